"""What lies in a campaign's folder, with the verdicts that all of it allows."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from longlive_opt import decision
from longlive_opt.errors import UserError
from longlive_opt.figures import TARGET_MS
from longlive_opt.inputs import project_path
from longlive_opt.results import is_na, lookup, number, read_campaign

log = logging.getLogger(__name__)

Result = Mapping[str, Any]

BASELINE = "baseline"
SUMMARY = "summary"  # folder of the campaign's figures
FIGURES = {"SS Mean": "latency.ss_ms_per_frame.mean", "SS P99": "latency.ss_ms_per_frame.p99",
           "SS Max": "latency.ss_ms_per_frame.max", "PS Mean": "latency.ps_ms.mean", "FPS": "fps",
           "Memory": "memory_gb.peak_allocated"}
NOISE = {"ss_mean": "SS mean", "ss_p50": "SS p50", "ss_max": "SS max", "ps_mean": "PS mean", "fps": "FPS",
         "peak_allocated": "memory"}


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result: its folder's label, why, and the parameters that it was given.
    `outcome` is "failed", or "not available" where the machine lacks what the preset needs.
    """

    label: str
    reason: str
    parameters: Mapping[str, Any]
    outcome: str = "failed"

    @property
    def preset(self) -> str:
        """`baseline` for the label baseline.repeat2."""
        return re.sub(r"\.repeat\d+$", "", self.label)


@dataclass(frozen=True)
class Campaign:
    """What lies in a campaign's folder: results, failed runs, and (place, reason) of what is not usable."""

    folder: Path
    results: list[dict[str, Any]]
    failures: list[Failure]
    problems: list[tuple[str, str]]


def load(campaign_dir: str | Path) -> Campaign:
    """Read a campaign's folder. A bad result is listed as a problem and hides no other.

    Raises:
        UserError: there is no such folder.
    """
    pd.set_option("display.max_colwidth", None)  # reasons are read, not counted
    folder = project_path(campaign_dir)
    results, problems = read_campaign(folder)
    failed = [path for path in sorted(folder.glob("*/failed.json")) if path.parent.name != SUMMARY]
    # Messages hold the whole path; a log that is published must not.
    told = [(path.relative_to(folder).as_posix(), reason.removeprefix(f"{path}: ").replace(f"{folder}/", ""))
            for path, reason in problems if path.with_name("failed.json") not in failed]
    return Campaign(folder, decided(results), [_read_failure(path) for path in failed], told)


def _read_failure(path: Path) -> Failure:
    label = path.parent.name.removesuffix(".failed")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None
    if not isinstance(report, dict):
        return Failure(label, "failed.json is not readable", {})
    parameters = report.get("parameters")
    return Failure(str(report.get("label", label)), str(report.get("meaning", "no reason recorded")),
                   parameters if isinstance(parameters, dict) else {}, str(report.get("status", "failed")))


def decided(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results, each with the verdict that the whole campaign allows.

    While a preset runs, the A/A repeat that tells the noise may still lie ahead. So a decision that records
    its `gate` is made anew with the baseline and the noise that are there now; others stay as they are.
    """
    baseline, noise = baseline_of(results), noise_of(results)
    return [{**result, "decision": {**decision.decide(result, baseline, noise, gate), "gate": gate}}
            if (gate := lookup(result, "decision.gate")) else dict(result) for result in results]


def baseline_of(results: Iterable[Result]) -> Result | None:
    """The first run of the baseline."""
    return next((result for result in results if result["preset"] == BASELINE), None)


def noise_of(results: Sequence[Result]) -> dict[str, Any] | None:
    """A/A noise of the campaign; None if nothing was run twice, or not on one kind of machine."""
    try:
        return decision.campaign_noise(results)
    except UserError as error:
        log.warning("%s", error)
        return None


def change_of(result: Result, baseline: Result | None, label: str) -> float | None:
    """Percent against the baseline; None where either is n/a or the two may not be compared."""
    if (pair := decision.compared(result, baseline)) is None:
        return None
    value, reference = (number(run, FIGURES[label]) for run in pair)
    return None if value is None or not reference else 100 * (value / reference - 1)


def within_target(result: Result) -> bool:
    """Whether no steady-state block took longer than the target."""
    worst = number(result, FIGURES["SS Max"])
    return worst is not None and worst <= TARGET_MS


def is_judged(result: Result) -> bool:
    """Whether the result says how well the video followed its prompts."""
    return bool(result.get("world")) and not is_na(result["world"])
