"""The last word of each run's HTML report, once the whole campaign is there."""

import html
from collections.abc import Mapping
from typing import Any

from longlive_opt.reading import VERDICT, verdict
from longlive_opt.results import atomic_path

from .campaign import BASELINE, Campaign


def settle_reports(campaign: Campaign) -> list[str]:
    """Write the verdict of the whole campaign into the reports of its runs, and return the labels of those
    that had another. While a preset runs, the repetition that tells the noise may still lie ahead: a report
    that is handed round must not stay undecided for that.

    Raises:
        UserError: a report cannot be written.
    """
    changed = []
    for result in campaign.results:
        path = campaign.folder / _label(result) / "report.html"
        if result["preset"] == BASELINE or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        words = html.escape(verdict(result, final=True))
        settled = VERDICT.sub(lambda found: f"{found[1]}{words}{found[3]}", text)
        if settled != text:
            with atomic_path(path) as temporary:
                temporary.write_text(settled, encoding="utf-8")
            changed.append(_label(result))
    return changed


def _label(result: Mapping[str, Any]) -> str:
    """The folder of a run within its campaign."""
    return result["preset"] if result["run"] == 1 else f"{result['preset']}.repeat{result['run']}"
