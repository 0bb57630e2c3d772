"""The tables of the README, each between two markers: results, generated from a campaign, and robustness,
generated from outputs/robustness.json.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError
from ..files import atomic_path, project_path, read_json
from ..measurement.catalogue import Metric, metric_of
from .campaign import BASELINE, Campaign, Result
from .verdicts import read_decisions

PRESETS = (BASELINE, "balanced", "speed", "realtime")
"""The presets in the README. The log shows all of them."""
KEYS = ("ss_mean", "ss_max", "fps", "ps_mean", "peak_allocated", "error_ratio")
_MARKS = re.compile(r"(<!-- results: [^\n]*-->\n).*?(<!-- end of results -->\n)", re.DOTALL)


ROBUSTNESS_FILE = "outputs/robustness.json"
_ROBUSTNESS_MARKS = re.compile(r"(<!-- robustness: [^\n]*-->\n).*?(<!-- end of robustness -->\n)", re.DOTALL)
# Check -> the figures that the table shows, and their words.
_FIGURES = {
    "soak": (("memory_growth_mb", "MB more memory after block 500"),
             ("blocks_that_differ_the_second_time", "blocks differ")),
    "switches": (("applied", "applied"), ("at_another_block", "at another block"),
                 ("blocks_that_differ_when_replayed", "blocks differ when replayed")),
    "kill": (("finished_results_lost", "lost"), ("finished_results_changed", "changed"),
             ("half_written", "half-written"), ("temporary_files_left", "temporary files left")),
    "two": (("refused_with_one_sentence", "refused with one sentence"),),
    "disk": (("runs_that_failed_in_words", "failed with one error"),
             ("earlier_result_damaged", "earlier results damaged")),
    "fuzz": (("read", "read"), ("refused", "refused in words"), ("readers", "readers")),
    "hostile": (("texts", "texts"), ("refused_at_the_door", "refused")),
    "pickles": (("files_with_code_refused", "refused"),),
}


def robustness_table(path: Path) -> str:
    """A Markdown table with one row per check of scripts/robustness.py.

    Raises:
        UserError: the record cannot be read.
    """
    checks = read_json(path, "run scripts/robustness.py").get("checks", {})
    rows = [["check", "n", "outcome", "measured"], ["---"] * 4]
    for name, check in checks.items():
        figures = ", ".join(f"{check['figure'][key]} {words}" for key, words in _FIGURES.get(name, ())
                            if key in check["figure"])
        outcome = "held" if check["passed"] else "**failed**"
        rows.append([check["claim"], f"{check['n']:,}", outcome, figures])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


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


def page_with_robustness(text: str, record: Path) -> str:
    """The page `text` with the table of the checks between its markers, if it has them."""
    return _ROBUSTNESS_MARKS.sub(lambda marks: marks[1] + robustness_table(record) + marks[2], text)


def write_readme(path: Path, campaign: Campaign) -> None:
    """Put the campaign's table into the page, atomically.

    Raises:
        UserError: see `page_with_results`; or the page cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read ({error.strerror}); name the page.") from error
    text, record = page_with_results(text, campaign), project_path(ROBUSTNESS_FILE)
    with atomic_path(path) as temporary:
        temporary.write_text(page_with_robustness(text, record) if record.exists() else text,
                             encoding="utf-8")
