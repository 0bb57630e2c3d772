"""Read a campaign's folder and decide its runs from all results together."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import BASELINE, several_suffix
from ..errors import UserError
from ..files import project_path, read_json
from ..measurement import decision
from ..measurement.catalogue import Metric, metric_of
from ..measurement.result import is_na, is_plain_mapping, lookup, read_campaign, run_label
from ..models.specs import TINY_VAES
from .charts import target_of

log = logging.getLogger(__name__)

Result = Mapping[str, Any]

LADDER = (BASELINE, "cuda_graphs", "static_kv", "async_vae", "quality", "balanced", "speed")
"""The presets of the log's template, in order. Other presets follow."""
SUMMARY = "summary"  # folder of the campaign's figures


OUTCOMES = ("failed", "not available")


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

    def __repr__(self) -> str:
        runs = ", ".join(run_label(run["preset"], run["run"]) for run in self.results) or "no finished run"
        more = [f"{len(self.failures)} failed"] * bool(self.failures)
        more += [f"{len(self.problems)} not usable"] * bool(self.problems)
        return f"Campaign({'; '.join([f'{self.folder.name}: {runs}', *more])})"

    def _repr_html_(self) -> str:
        """The results table, and a line per run that has no result."""
        from .tables import numbers_table  # which reads campaigns

        lines = [f"{failure.label}: {failure.outcome}, {failure.reason}" for failure in self.failures]
        lines += [f"{place}: {reason}" for place, reason in self.problems]
        rest = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        return (f"<b>{html.escape(f'Campaign {self.folder.name}')}</b>"
                f"{numbers_table(self.results).to_html(index=False, border=0)}{rest}")


def has_other_decoder(result: Result) -> bool:
    """Whether the frames are not the Wan VAE's within rounding (`ExperimentConfig.other_decoder`)."""
    return (lookup(result, "parameters.vae") in TINY_VAES
            or lookup(result, "parameters.use_quantized_vae") is True)


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
    usable, strange = _usable(results)
    return Campaign(folder, decided(usable), [read_failure(path) for path in failed], [*shown, *strange])


def _usable(results: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Split results into those of which every page can be made, and (place, reason) of the others.

    The schema cannot say everything, so the pages are made once for all results and, if that fails, for each
    result by itself and next to the baseline.
    """
    from .trial import try_pages  # makes the pages, and they read campaigns

    if not try_pages(results):
        return list(results), []
    usable: list[dict[str, Any]] = []
    strange = []
    for result in results:
        baseline = [run for run in usable if run["preset"] == BASELINE][:1]
        if reason := try_pages([result]) or try_pages([*baseline, result]):
            label = run_label(result["preset"], result["run"])
            strange.append((f"{label}/result.json", f"{reason}; run the preset again"))
        else:
            usable.append(result)
    return usable, strange


def read_failure(path: Path) -> Failure:
    """What a run without a result left in its failed.json."""
    label = path.parent.name.removesuffix(".failed")
    try:
        report = read_json(path, "run the preset again", mend=True)
    except UserError:
        report = None
    if not isinstance(report, dict):
        return Failure(label, "failed.json is not readable", {})
    parameters, outcome = report.get("parameters"), report.get("status")
    return Failure(label, str(report.get("meaning", "no reason recorded")),
                   parameters if is_plain_mapping(parameters) else {},
                   outcome if outcome in OUTCOMES else OUTCOMES[0])


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
