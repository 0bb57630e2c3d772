"""A run in the log: its metrics as text, and its comparison with another run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

from ...measurement import decision
from ...measurement.catalogue import Metric, metric_of, shown_in
from ...measurement.result import is_finite, is_na, lookup, number, numbers
from ...models.specs import LONGLIVE
from ..campaign import BASELINE, Result, change_of
from .markdown import digits, escape, percent, sentence

SUMMARY_NAMES = {BASELINE: "Baseline", "quality": "Quality", "balanced": "Balanced", "speed": "Speed"}


@dataclass
class Run:
    """A preset's run in the log: its metrics as text, and the reasons for missing ones."""

    result: Result  # a failed run has only preset, title, hypothesis and parameters
    failure: str = ""
    outcome: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    repeats: tuple[Result, ...] = ()  # further runs of the same preset, each in its own process

    @property
    def preset(self) -> str:
        return str(self.result["preset"])

    @property
    def name(self) -> str:
        return SUMMARY_NAMES.get(self.preset) or escape(self.result.get("title") or self.preset)

    def value(self, key: str) -> str:
        """The metric with this key as text."""
        return self.text(metric_of(key))

    def cell(self, key: str) -> str:
        """A metric for a table. SS max of a repeated preset includes its range."""
        if key != "ss_max" or (among := self.range()) is None:
            return self.value(key)
        return f"{self.value(key)} ({among})"

    def range(self) -> str | None:
        """The range of SS max over this run and its repetitions. None without repetitions."""
        values = [metric_of("ss_max").value(run) for run in (self.result, *self.repeats)]
        if len(values) < 2 or None in values:
            return None
        return f"{digits(min(values))} to {digits(max(values))} over {len(values)} runs"

    def text(self, metric: Metric) -> str:
        """The metric as text, or n/a with a short reason. `missing` keeps the long one for the notes."""
        value, path = metric.value(self.result), metric.path
        if value is not None:
            return digits(value)
        if self.failure:
            return f"n/a ({self.outcome})"
        places = (lookup(self.result, at) for at in (path, path.rpartition(".")[0]))
        absent = next(filter(is_na, places), {"reason": "not recorded", "how_to_fix": "run the preset again"})
        self.missing[metric.template or metric.label] = f"{absent['reason']}; {absent.get('how_to_fix', '')}"
        clause = re.split("[;:(]", absent["reason"])[0].strip()
        return f"n/a ({escape(clause if len(clause) <= 80 else clause[:79] + '…')})"


def matched_runs(run: Run, base: Run | None) -> tuple[Run, Run | None]:
    """Both runs cut to equally many blocks and switches, or unchanged if they are not comparable."""
    if base is None or run.failure or base.failure or (
            pair := decision.compared(run.result, base.result)) is None:
        return run, base
    return replace(run, result=pair[0]), replace(base, result=pair[1])


def frame_metrics() -> list[Metric]:
    """The fidelity metrics in the log's template."""
    return [metric for metric in shown_in("fidelity") if metric.template]


def details_table(run: Run, base: Run | None) -> str:
    """The metrics outside the log's template, against the baseline's. A metric that the run does not record
    has no row. Empty for a failed run.
    """
    if run.failure:
        return ""
    other = None if base is None or base.failure else base.result
    rows = [["Metric", run.name] if other is None else ["Metric", "Baseline", run.name, "Change"]]
    rows.append(["---"] * len(rows[0]))
    for metric in shown_in("log"):
        if metric.is_recorded(run.result):
            cells = [escape(metric.heading), metric.shown(run.result)]
            if other is not None:
                cells.insert(1, metric.shown(other))
                cells.append(percent(change_of(run.result, other, metric)))
            rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def quality_text(run: Run, metric: Metric) -> str:
    """The text after "PSNR: ", "SSIM: " and "LPIPS: ": the mean, and the worst frame if it is recorded."""
    unit = f" {metric.unit}" if metric.unit else ""
    if metric.key == "psnr" and lookup(run.result, "quality.identical") is True and not of_truth(run.result):
        return "infinite, all compared frames are identical"
    text = run.text(metric)
    extreme = "max" if metric.better == "lower" else "min"
    worst = number(run.result, f"{metric.path.rpartition('.')[0]}.{extreme}")
    if text.startswith("n/a") or worst is None:
        return text if text.startswith("n/a") else text + unit
    return f"{text}{unit} (worst frame {digits(worst)}{unit})"


def quality_sentence(run: Run) -> str:
    """The sentence on quality in experiments 1 to 3."""
    if run.failure:
        return f"n/a ({run.outcome})"
    quality = run.result["quality"]
    if not quality.get("reference"):
        return f"Not compared: {sentence(lookup(quality, 'psnr_db.reason') or 'no reference')}"
    compared = f"{quality.get('frames_compared')} of {quality.get('frames_total')} frames compared"
    if of_truth(run.result):
        same = "Exact: latents and frames are bit-identical to the baseline's. " \
            if quality.get("identical") else ""
        return f"{same}{ratio_text(run.result)}; {', '.join(_frame_values(run))}, against " \
               f"{escape(quality['reference'])} ({compared})."
    if quality.get("identical") is True:
        return f"Exact: bit-identical to the baseline ({compared})."
    return f"{', '.join(_frame_values(run))}, against the baseline ({compared})."


def _frame_values(run: Run) -> list[str]:
    return [f"{metric.template} {quality_text(run, metric)}" for metric in frame_metrics()]


def of_truth(result: Result) -> bool:
    """Whether fidelity was measured by protocol 2, against the baseline in float32."""
    return lookup(result, "quality.protocol") == 2


def ratio_text(result: Result) -> str:
    """The error ratios over all blocks and of the worst block, free-running and teacher-forced."""
    parts = []
    for name, path in (("free-running", "quality.free_running"), ("teacher-forced", "quality")):
        ratio, error = lookup(result, f"{path}.error_ratio"), number(result, f"{path}.latent_error.all")
        if error is None:
            parts.append(f"{name} n/a")
        elif is_na(ratio):
            parts.append(f"{name} n/a (latent error {error:.2g})")
        else:
            parts.append(f"{name} {ratio['all']:.3g} (worst block {ratio['worst']:.3g}; latent error "
                         f"{100 * error:.3g} %)")
    return f"Error ratio {', '.join(parts)}"


def null_notes(result: Result) -> list[str]:
    """The error ratios of the null rows of a campaign's baseline, which give the scale of all others."""
    rows = lookup(result, "quality.nulls") or []
    lines = []
    for row in rows:
        if (ratio := number(row, "worst_ratio")) is None:
            lines.append(f"{row['title']} n/a")
            continue
        psnr, worst = (number(row, f"free_running.psnr_db.{key}") for key in ("mean", "min"))
        lines.append(f"{row['title']} {ratio:.3g} (PSNR {digits(psnr)} dB, worst frame {digits(worst)})")
    return [f"Error ratios of the null rows: {escape('; '.join(lines))}."] if lines else []


def psnr_within_blocks(result: Result) -> tuple[float, float] | None:
    """Mean PSNR of the first and of the last frame of all blocks after the first. None if some frames were
    not compared or are identical.
    """
    values, size = lookup(result, "quality.psnr_db.per_frame") or [], result["sizes"]["frames_per_block"]
    later = values[len(values) % size:]
    whole = lookup(result, "quality.frames_compared") == lookup(result, "quality.frames_total")
    if not whole or not later or not all(map(is_finite, values)):
        return None
    firsts, lasts = later[::size], later[size - 1::size]
    return math.fsum(firsts) / len(firsts), math.fsum(lasts) / len(lasts)


def worst_ms(run: Run, blocks: int) -> float:
    """SS max, in ms per video frame, over the first `blocks` steady-state blocks."""
    return max(numbers(run.result, "latency.ss_block_ms")[:blocks]) / run.result["sizes"]["frames_per_block"]


def quality_short(run: Run) -> str:
    """Fidelity in a few words."""
    if lookup(run.result, "quality.identical") is True:
        return "exact"
    text = run.value("psnr")
    ratio = metric_of("error_ratio").value(run.result)
    return text if text.startswith("n/a") else f"PSNR {text} dB" if ratio is None else \
        f"error ratio {ratio:.3g}, PSNR {text} dB"


def fidelity_of(run: Run) -> float:
    """A score in which higher is closer: minus the error ratio, which is 1 for a bit-identical run.

    Results older than protocol 2 score their PSNR to the baseline, infinite if identical. An unknown fidelity
    scores minus infinity.
    """
    if of_truth(run.result):
        same = run.preset == BASELINE or lookup(run.result, "quality.identical") is True
        ratio = 1.0 if same else metric_of("error_ratio").value(run.result)
        return float("-inf") if ratio is None else -ratio
    if run.preset == BASELINE or lookup(run.result, "quality.identical") is True:
        return float("inf")
    psnr = metric_of("psnr").value(run.result)
    return float("-inf") if psnr is None else psnr


def objective_of(run: Run) -> str:
    """The objective of its decision: latency, switch or memory."""
    return lookup(run.result, "decision.gate.objective") or "latency"


def is_kept(run: Run) -> bool:
    """Whether its decision is Keep. The baseline counts as kept, a study does not."""
    if run.preset == BASELINE:
        return True
    return lookup(run.result, "decision.keep") is True and not decision.is_study(run.result)


def is_large(result: Result) -> bool:
    """Whether the run used the model that the hypotheses and the target are about."""
    return model_name(result) == LONGLIVE


def model_name(result: Result) -> str:
    """The model's name, escaped. A failed run has it in its parameters."""
    return escape(lookup(result, "model.name") or lookup(result, "parameters.model") or "unknown")
