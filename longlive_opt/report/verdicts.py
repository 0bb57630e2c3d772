"""The last word of each run's HTML report, once the whole campaign is there."""

import html

from longlive_opt.reading import VERDICT, verdict
from longlive_opt.results import atomic_path, run_label

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
        label = run_label(result["preset"], result["run"])
        path = campaign.folder / label / "report.html"
        if result["preset"] == BASELINE or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        words = html.escape(verdict(result, final=True))
        settled = VERDICT.sub(lambda found: f"{found[1]}{words}{found[3]}", text)
        if settled != text:
            with atomic_path(path) as temporary:
                temporary.write_text(settled, encoding="utf-8")
            changed.append(label)
    return changed
