"""The log's table of steps: what a change was expected to do, what it did, and why.

outputs/steps.yaml has one entry per step. It names two recorded runs and the metric that tells them apart;
every number of the result is computed from these runs. A step that made nothing faster stays.

    CUDA graphs alone:
      date: "2026-11-22"             # when the prediction was written; without one, when it was measured
      before: h100/baseline          # campaign/run in outputs/; of a study: h100_extras/ablation[key=value]
      after: h100/cuda_graphs
      metric: stage_denoise          # a key of measurement/catalogue.py
      prediction: launch gaps cost about 10 ms    # leave out where none was written down
      predicted_change: -10          # in the metric's unit; or predicted_value, or predicted_percent
      why: ...                       # one or two sentences
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, short
from ...files import load_yaml
from ...measurement import decision, metrics
from ...measurement.catalogue import METRICS, Metric
from ...measurement.result import is_finite, is_na, lookup, number, numbers, read_campaign, run_label
from ...streaming.timeline import Event
from ..campaign import Campaign, Result, read_failure
from ..campaign_diff import CONFIDENCE, SAMPLES, interval
from .markdown import escape, percent

STEPS_FILE = "outputs/steps.yaml"
HEADING = "## Steps"
NO_PREDICTION = "none written down"
_NEEDED = ("date", "before", "after", "metric", "why")
_PREDICTED = ("predicted_value", "predicted_change", "predicted_percent")
_FIELDS = (*_NEEDED, "prediction", *_PREDICTED)
_RUN = re.compile(r"([\w-][\w.-]*)/([\w-][\w.-]*)(?:\[(\w+)=(.+)\])?")
_STAGES = "latency.stages_ms."
# What a study's variant has in common with the run that it varies.
_SHARED = ("preset", "run", "environment", "model", "weights", "seed", "prompt_schedule")


@dataclass(frozen=True)
class Reference:
    """A recorded run, or with `key` the part of a study in which that key had the value `text`."""

    campaign: str
    run: str
    key: str = ""
    text: str = ""

    def __str__(self) -> str:
        return f"{self.campaign}/{self.run}" + (f"[{self.key}={self.text}]" if self.key else "")


@dataclass(frozen=True)
class Step:
    """One change. `predicted` is a number, or the two ends of a range; `kind` is one of `_PREDICTED`, and
    empty without a number.
    """

    name: str
    date: str
    before: Reference
    after: Reference
    metric: Metric
    why: str
    prediction: str = ""
    kind: str = ""
    predicted: tuple[float, ...] = ()

    def expected_change(self, before: float) -> list[float]:
        """The predicted change in the metric's unit: one number, the two ends of a range, or none."""
        if self.kind == "predicted_value":
            return [value - before for value in self.predicted]
        return [value * before / 100 if self.kind == "predicted_percent" else value
                for value in self.predicted]


@dataclass(frozen=True)
class Outcome:
    """What a step did: both values, the shares of the predicted change that were reached, and the verdict. If
    the runs cannot be compared, the verdict is n/a and the rest is empty.
    """

    step: Step
    verdict: str
    reason: str = ""
    before: float | None = None
    after: float | None = None
    shares: tuple[float, ...] = ()

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    def result_text(self) -> str:
        """`denoise 406.6 to 396.1 ms per block, -10.5 (-2.6%)`, or why there is none."""
        if self.change is None:
            return f"n/a: {self.reason}"
        metric = self.step.metric
        values = f"{metric.text(self.before)} to {metric.text(self.after)} {metric.unit}".rstrip()
        relative = percent(100 * self.change / self.before)
        return f"{metric.label} {values}, {metric.text(self.change, '+')} ({relative})"

    def prediction_text(self) -> str:
        """The prediction in words, then its number."""
        step, metric = self.step, self.step.metric
        if not step.prediction:
            return NO_PREDICTION
        if not step.kind:
            return f"{step.prediction} (no number)"
        sign = "" if step.kind == "predicted_value" else "+"
        unit = "%" if step.kind == "predicted_percent" else metric.unit
        number = " to ".join(f"{value + 0.0:{sign}g}" for value in step.predicted)
        return f"{step.prediction} ({metric.label} {number} {unit}".rstrip() + ")"

    def share_text(self) -> str:
        """How much of the predicted change was reached; n/a without a number, or if no change was predicted.
        """
        return " to ".join(f"{share:.0%}" for share in self.shares) or "n/a"

    def verdict_text(self) -> str:
        return self.verdict if self.change is None or not self.reason else f"{self.verdict}: {self.reason}"


def read_steps(path: Path) -> list[Step]:
    """The steps of a file, in its order; none if it does not exist.

    Raises:
        UserError: the file is no YAML, or an entry is wrong; names entry, field, value and remedy.
    """
    if not path.exists():
        return []
    return [_step(f"{path.name}, {name}", name, entry) for name, entry in load_yaml(path).items()]


def _step(where: str, name: str, entry: Any) -> Step:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: {short(name)} is no name of a step; write a few words.")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {short(entry)} is no entry; write the fields {', '.join(_NEEDED)} below "
                        "the name.")
    for key in entry:
        if key not in _FIELDS:
            raise UserError(f"{where}: the field {short(key)} is unknown; use {', '.join(_FIELDS)}.")
    for key in _NEEDED:
        if key not in entry:
            raise UserError(f"{where}: the field {key} is missing; write {', '.join(_NEEDED)}.")
    texts = {key: _text(where, key, value) for key, value in entry.items() if key not in _PREDICTED}
    kinds = [key for key in _PREDICTED if key in entry]
    if len(kinds) > 1:
        raise UserError(f"{where}: {kinds[0]} and {kinds[1]} both state the prediction; keep one.")
    if kinds and "prediction" not in entry:
        raise UserError(f"{where}: {kinds[0]} {short(entry[kinds[0]])} has no prediction; write down in "
                        "prediction what was expected, or leave the number out.")
    numbered = [(kind, _numbers(where, kind, entry[kind])) for kind in kinds]
    return Step(name, _date(where, texts["date"]), _reference(where, "before", texts["before"]),
                _reference(where, "after", texts["after"]), _metric(where, texts["metric"]), texts["why"],
                texts.get("prediction", ""), *(numbered[0] if numbered else ()))


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} {short(value)} is no text; write words"
                        f"{', in quotes, as YYYY-MM-DD' if key == 'date' else ''}.")
    return " ".join(value.split())


def _date(where: str, text: str) -> str:
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):  # Python also reads weeks
            raise ValueError
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise UserError(f"{where}: date {short(text)} is no day; write it as YYYY-MM-DD, in "
                        "quotes.") from None


def _reference(where: str, key: str, text: str) -> Reference:
    found = _RUN.fullmatch(text)
    if not found:
        raise UserError(f"{where}: {key} {short(text)} is no recorded run; write campaign/run, for example "
                        "h100/baseline, and for a part of a study h100_extras/ablation[key=value].")
    return Reference(*(part or "" for part in found.groups()))


def _metric(where: str, key: str) -> Metric:
    known = {metric.key: metric for metric in METRICS if metric.better}
    if key not in known:
        raise UserError(f"{where}: metric {short(key)} is unknown or has no better end; use a key of "
                        "measurement/catalogue.py, for example ss_mean, ps_mean or stage_decode.")
    return known[key]


def _numbers(where: str, key: str, value: Any) -> tuple[float, ...]:
    ends = value if isinstance(value, list) else [value]
    if not all(map(is_finite, ends)) or len(ends) not in (1, 2) or isinstance(value, list) and (
            len(ends) != 2 or ends[0] == ends[1]):
        raise UserError(f"{where}: {key} {short(value)} is neither a number nor the two ends of a range; "
                        "write -10, or [-30, -10].")
    return tuple(map(float, ends))


@dataclass
class Records:
    """The runs in a folder of campaigns. A campaign is read once."""

    folder: Path
    _campaigns: dict[str, tuple[list[Result], Mapping[str, str]]] = field(default_factory=dict)
    _noise: dict[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def find(self, reference: Reference) -> Result | str:
        """The result of a run, or the reason why there is none."""
        results, problems = self._campaign(reference.campaign)
        found = next((result for result in results
                      if run_label(result["preset"], result["run"]) == reference.run), None)
        if found is not None:
            return self._part(found, reference) if reference.key else found
        if reference.run in problems:
            return problems[reference.run]
        failed = self.folder / reference.campaign / reference.run / "failed.json"
        if failed.exists():
            failure = read_failure(failed)
            verb = "has failed" if failure.outcome == "failed" else "was not available"
            return f"{reference} {verb}: {_first_sentence(failure.reason)}"
        return f"{reference.campaign}/{reference.run} has no result in outputs"

    def noise(self, reference: Reference, metric: Metric) -> float:
        """A/A noise of the metric in the run's campaign (`decision.noise_of_preset`); 0 if it is unknown."""
        if reference.campaign not in self._noise:
            self._noise[reference.campaign] = decision.campaign_noise(self._campaign(reference.campaign)[0])
        preset = re.sub(r"\.repeat\d+$", "", reference.run)
        spreads = decision.noise_of_preset(preset, self._noise[reference.campaign]) or {}
        return number(spreads, metric.key) or 0.0

    def _campaign(self, name: str) -> tuple[list[Result], Mapping[str, str]]:
        if name not in self._campaigns:
            folder = self.folder / name
            results, problems = read_campaign(folder) if folder.is_dir() else ([], [])
            self._campaigns[name] = results, {path.parent.name: reason.replace(f"{self.folder}/", "")
                                              for path, reason in problems}
        return self._campaigns[name]

    @staticmethod
    def _part(study: Result, reference: Reference) -> Result | str:
        """The part of a study in which one key had another value, as a result of its own."""
        for part in study.get("ablations") or []:
            changed = part.get("changed") or {}
            words = {key: value if isinstance(value, str) else json.dumps(value)
                     for key, value in changed.items()}
            if words == {reference.key: reference.text}:
                if failure := part.get("failure"):
                    return f"{reference} has failed: {_first_sentence(str(lookup(failure, 'reason')))}"
                shared = {key: study[key] for key in _SHARED if key in study}
                return {**shared, **part, "parameters": {**study["parameters"], **changed}}
        return f"{reference.campaign}/{reference.run} has no part with {reference.key}={reference.text}"


def _first_sentence(reason: str) -> str:
    first = re.split(r"\.\s", reason)[0].rstrip(".")
    return first if len(first) <= 120 else f"{first[:117]}..."


def evaluate(step: Step, records: Records) -> Outcome:
    """Compare the two runs of a step.

    They must be comparable by the rule of every comparison here (`decision.unfair`), and they are cut to
    equally many blocks and switches. A change counts if it exceeds 2 % and the A/A noise of the runs'
    campaigns and, where the runs keep samples of the metric, if the interval of confidence of
    `longlive compare` leaves out 0. Disturbed runs get no verdict.
    """
    pair = [records.find(reference) for reference in (step.before, step.after)]
    for run in pair:
        if isinstance(run, str):
            return Outcome(step, "n/a", run)
    if reason := decision.unfair(pair[1], pair[0]):
        return Outcome(step, "n/a", f"not comparable, {reason}")
    sizes = [[lookup(run, f"sizes.{key}") for key in ("blocks_measured", "switches")] for run in pair]
    if sizes[0] != sizes[1]:
        if any("events" not in run for run in pair):
            return Outcome(step, "n/a", "the two have different numbers of blocks or switches, and the part "
                                        "of a study keeps no events to count equally many")
        pair = list(decision.matched(*pair))
    before, after = (step.metric.value(run) for run in pair)
    for run, value in zip(pair, (before, after)):
        if value is None:
            absent = lookup(run, step.metric.path)
            reason = absent["reason"] if is_na(absent) else "it is not recorded"
            return Outcome(step, "n/a", f"{step.metric.label} of {run['preset']}: {reason}")
    if not before:
        return Outcome(step, "n/a", f"{step.metric.label} is 0 before the step")
    shares = [(after - before) / change for change in step.expected_change(before) if change]
    verdict, reason = _verdict(step, pair, after / before - 1, records)
    return Outcome(step, verdict, reason, before, after, tuple(sorted(shares)))


def _verdict(step: Step, pair: Sequence[Result], change: float, records: Records) -> tuple[str, str]:
    if disturbed := [run["preset"] for run in pair if lookup(run, "environment.co_scheduled")]:
        return "undecided", f"something else ran on the machine during {' and '.join(disturbed)}"
    threshold = max(decision.NOISE_FLOOR, *(records.noise(reference, step.metric)
                                            for reference in (step.before, step.after)))
    samples = [_samples(run, step.metric) for run in pair]
    low, high = interval(*([one] for one in samples)) if all(map(len, samples)) else (change, change)
    if abs(change) <= threshold or low <= 0 <= high:
        return "noise", ""
    improved = (change < 0) == (step.metric.better == "lower")
    timed = step.metric.unit.startswith("ms") or step.metric.key.startswith("fps")
    return (("faster" if improved else "slower") if timed else ("better" if improved else "worse")), ""


def _samples(run: Result, metric: Metric) -> np.ndarray:
    """The samples whose mean the metric is; none where a result does not keep them."""
    path, _ = SAMPLES.get(metric.heading, ("", False))
    if not path and metric.path.startswith(_STAGES) and "events" in run:
        totals, _ = metrics.stage_totals(map(Event.from_row, run["events"]))
        of_block = totals.get(metric.path.removeprefix(_STAGES).partition(".")[0], {})
        return np.asarray([of_block.get(block, 0.0) for block in numbers(run, "latency.ss_blocks")])
    return np.asarray(numbers(run, path))


def require_steps(campaign_folder: Path) -> None:
    """Refuse a steps.yaml that the log could not read, before a campaign is measured.

    Raises:
        UserError: the file is wrong.
    """
    read_steps(campaign_folder.with_name(Path(STEPS_FILE).name))


def outcomes(campaign: Campaign, whole: bool) -> list[Outcome]:
    """The steps of outputs/steps.yaml next to the campaign's folder: those with a run of this campaign, or
    with `whole` all.

    Raises:
        UserError: the file is wrong.
    """
    folder = campaign.folder.resolve()
    steps, records = read_steps(folder.with_name(Path(STEPS_FILE).name)), Records(folder.parent)
    return [evaluate(step, records) for step in steps
            if whole or folder.name in (step.before.campaign, step.after.campaign)]


VERDICTS = ("faster", "better", "slower", "worse", "noise", "undecided", "n/a")
COLUMNS = ("Step", "Runs", "Prediction", "Result", "Of the prediction", "Verdict", "Why")


def rows(found: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """A row per step under `COLUMNS`, as plain text."""
    return [(f"{one.step.name}, {one.step.date}", f"{one.step.before} to {one.step.after}",
             one.prediction_text(), one.result_text(), one.share_text(), one.verdict_text(), one.step.why)
            for one in found]


def steps_section(found: Sequence[Outcome]) -> str:
    """The section of the log; empty without steps."""
    if not found:
        return ""
    counts = Counter(one.verdict for one in found)
    counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    table = [COLUMNS, ("---",) * len(COLUMNS), *(tuple(map(escape, row)) for row in rows(found))]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    rule = (f"Each row is one change ({STEPS_FILE}), kept when it loses too. Numbers are computed from the "
            "runs in outputs/, over equally many blocks and switches; those of different machines do not add "
            "up. Two runs are compared only if prompts, switches, seed, sizes, weights and machine are the "
            f"same. A change counts if it exceeds {decision.NOISE_FLOOR:.0%} and the A/A noise of both "
            f"campaigns and, where the runs keep samples, if its {CONFIDENCE:.0%} interval leaves out 0. The "
            "date is that of the prediction; *of the prediction* is the measured change, divided by the "
            "predicted one.")
    return f"\n{HEADING}\n\n{len(found)} steps: {counted}.\n\n{lines}\n\n{rule}\n"

