"""The results table of the README, generated from a campaign and placed between two markers."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError
from ..files import atomic_path
from ..measurement.catalogue import Metric, metric_of
from .campaign import BASELINE, Campaign, Result
from .verdicts import read_decisions

PRESETS = (BASELINE, "balanced", "speed", "realtime")
"""The presets in the README. The log shows all of them."""
KEYS = ("ss_mean", "ss_max", "fps", "ps_mean", "peak_allocated", "error_ratio")
_MARKS = re.compile(r"(<!-- results: [^\n]*-->\n).*?(<!-- end of results -->\n)", re.DOTALL)


def results_table(campaign: Campaign) -> str:
    """A Markdown table with one row per preset of `PRESETS`. The recommended preset is bold. SS max shows its
    range if the preset was run several times.
    """
    metrics = [metric_of(key) for key in KEYS]
    gpus = [run["environment"]["gpu"] for run in campaign.results if run["environment"]["gpu"]]
    head = [f"on one {gpus[0] if gpus else 'CPU'}",
            *(metric.heading for metric in metrics)]
    best = read_decisions(campaign.folder)["recommended"]["preset"]
    rows = [head, ["---"] * len(head)]
    for preset in PRESETS:
        runs = [run for run in campaign.results if run["preset"] == preset]
        if runs:
            first = min(runs, key=lambda run: run["run"])
            name = f"**{first['title']}**" if preset == best else first["title"]
            rows.append([name, *(_cell(metric, first, runs) for metric in metrics)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(metric: Metric, first: Result, runs: list[Result]) -> str:
    if metric.key != "ss_max" or len(runs) == 1:
        return metric.shown(first)
    values = [metric.value(run) for run in runs]
    return f"{metric.text(min(values))} to {metric.text(max(values))} ({len(runs)} runs)"


def page_with_results(text: str, campaign: Campaign) -> str:
    """The page `text` with the campaign's table between its markers.

    Raises:
        UserError: the page does not have exactly one pair of markers.
    """
    if len(_MARKS.findall(text)) != 1:
        raise UserError("README: it needs one line '<!-- results: ... -->' and, after it, one "
                        "'<!-- end of results -->'; put them where the table belongs.")
    return _MARKS.sub(lambda marks: marks[1] + results_table(campaign) + marks[2], text)


def write_readme(path: Path, campaign: Campaign) -> None:
    """Put the campaign's table into the page, atomically.

    Raises:
        UserError: see `page_with_results`; or the page cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read ({error.strerror}); name the page.") from error
    with atomic_path(path) as temporary:
        temporary.write_text(page_with_results(text, campaign), encoding="utf-8")
