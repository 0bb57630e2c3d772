"""Read a campaign's folder and decide its runs from all results together."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import BASELINE, several_suffix
from ..files import project_path
from ..measurement import decision
from ..measurement.catalogue import Metric, metric_of
from ..measurement.result import is_na, lookup, read_campaign
from .charts import target_of

log = logging.getLogger(__name__)

Result = Mapping[str, Any]

LADDER = (BASELINE, "cuda_graphs", "static_kv", "async_vae", "quality", "balanced", "speed")
"""The presets of the log's template, in order. Other presets follow."""
SUMMARY = "summary"  # folder of the campaign's figures


@dataclass(frozen=True)
class Failure:
    """A run without a result: the label of its folder, the reason, and its parameters.

    `outcome` is "failed", or "not available" if the machine lacks what the preset needs.
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
    """A campaign's folder: its results, its failed runs, and (place, reason) of each unusable file."""

    folder: Path
    results: list[dict[str, Any]]
    failures: list[Failure]
    problems: list[tuple[str, str]]


def gpus_of(result: Result) -> int:
    """Number of GPUs (on a CPU: processes) that made, or should have made, the run's stream."""
    return int(lookup(result, "ranks.count") or lookup(result, "parameters.gpus") or 1)


def one_gpu_preset(result: Result) -> str:
    """The preset of a run on several GPUs that is the same on one."""
    return str(result["preset"]).removesuffix(several_suffix(gpus_of(result)))


def load(campaign_dir: str | Path) -> Campaign:
    """Read a campaign's folder. A bad result becomes a problem in the list and hides no other result.

    Raises:
        UserError: the folder does not exist.
    """
    pd.set_option("display.max_colwidth", None)  # show reasons in full
    folder = project_path(campaign_dir)
    results, problems = read_campaign(folder)
    failed = [path for path in sorted(folder.glob("*/failed.json")) if path.parent.name != SUMMARY]
    # Messages contain the absolute path, which a published log must not show.
    shown = [(path.relative_to(folder).as_posix(), reason.removeprefix(f"{path}: ").replace(f"{folder}/", ""))
            for path, reason in problems if path.with_name("failed.json") not in failed]
    return Campaign(folder, decided(results), [_read_failure(path) for path in failed], shown)


def _read_failure(path: Path) -> Failure:
    label = path.parent.name.removesuffix(".failed")
    try:
        report = _writable(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        report = None
    if not isinstance(report, dict):
        return Failure(label, "failed.json is not readable", {})
    parameters = report.get("parameters")
    return Failure(str(report.get("label", label)), str(report.get("meaning", "no reason recorded")),
                   parameters if isinstance(parameters, dict) else {}, str(report.get("status", "failed")))


def _writable(value: Any) -> Any:
    """`value` with lone surrogates escaped, since a failure message may contain them and a log cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_writable(key): _writable(item) for key, item in value.items()}
    return [_writable(item) for item in value] if isinstance(value, list) else value


def decided(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Give each result its verdict from the whole campaign.

    A run that must not be compared with the baseline loses its fidelity metrics. A decision that records its
    `gate` is made again with the current baseline and noise, because the repetitions that measure the noise
    may come after the preset's own run. Other decisions stay as they are.
    """
    baseline, noise = baseline_of(results), noise_of(results)
    return [_decided(result, baseline, noise) for result in results]


def _decided(result: Result, baseline: Result | None, noise: Mapping[str, Mapping[str, Any]]
             ) -> dict[str, Any]:
    if baseline is not None and result is not baseline and (
            difference := decision.fidelity_reason(result, baseline)) and lookup(result, "quality.reference"):
        result = {**result, "quality": decision.without_fidelity(result["quality"], difference)}
    gate = lookup(result, "decision.gate")
    if result["run"] > 1 and result["preset"] != BASELINE:
        repeats = f"a repetition of {result['preset']}: it shows the noise and gets no verdict"
        return {**result, "decision": {"keep": None, "rule": "repetition", "rationale": repeats,
                                       "gate": gate}}
    if not gate and not decision.is_study(result):
        return dict(result)
    spread = decision.noise_of_preset(result["preset"], noise)
    found = decision.decide(result, baseline, spread, gate or {"exactness": "bitwise"})
    return {**result, "decision": {**found, "gate": gate}}


def verdict_of(result: Result) -> str:
    """keep, drop or undecided; reference, repetition or study for a run that gets no verdict."""
    found = result["decision"]
    if result["preset"] == BASELINE:
        return "reference" if result["run"] == 1 else "repetition"
    if found["rule"] in ("repetition", "study"):
        return found["rule"]
    return {True: "keep", False: "drop"}.get(found["keep"], "undecided")


def baseline_of(results: Iterable[Result]) -> Result | None:
    """The first run of the baseline."""
    return next((result for result in results if result["preset"] == BASELINE), None)


def by_ladder(results: Iterable[Result]) -> list[Result]:
    """The results in the order of the log, with the runs of each preset together."""
    return sorted(results, key=lambda run: (LADDER.index(run["preset"]) if run["preset"] in LADDER
                                            else len(LADDER), run["preset"], run.get("run", 1)))


def noise_of(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """A/A noise of the campaign by preset. Empty if no preset was run twice on one kind of machine."""
    return decision.campaign_noise(results)


def change_of(result: Result, baseline: Result | None, metric: Metric) -> float | None:
    """Change against the baseline in percent. None if either value is n/a or the two are not comparable."""
    if (pair := decision.compared(result, baseline)) is None:
        return None
    value, reference = map(metric.value, pair)
    return None if value is None or not reference else 100 * (value / reference - 1)


def within_target(result: Result) -> bool:
    """Whether every steady-state block met the target of the run."""
    worst = metric_of("ss_max").value(result)
    return worst is not None and worst <= target_of(result)


def is_judged(result: Result) -> bool:
    """Whether the result holds the prompt adherence of its video."""
    return bool(result.get("adherence")) and not is_na(result["adherence"])
