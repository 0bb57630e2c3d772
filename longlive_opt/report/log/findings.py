"""The first three lines of a log entry: Expected, Measured, Why."""

from __future__ import annotations

from ...measurement import decision
from ...measurement.catalogue import Metric, shown_for
from ...measurement.result import block_ms, lookup, number
from ..campaign import verdict_of, within_target
from ..charts import target_of
from .entry import Run, is_large, matched_runs, model_name
from .markdown import escape, sentence

FOLDED = "<details><summary>Measurement details</summary>"


def findings(run: Run, base: Run | None, against: str = "") -> list[str]:
    """Three lines: Expected, Measured, Why.

    Args:
        base: the campaign's baseline. None for the baseline itself, or if there is none.
        against: a sentence on what the preset makes worse by more than the noise, or empty.
    """
    hypothesis = run.result.get("hypothesis")
    other = "" if is_large(run.result) else \
        f"(for LongLive-1.3B on an H100; this run used the model {model_name(run.result)}) "
    expected = f"{other}{sentence(hypothesis)}" if hypothesis else "nothing was stated."
    if run.failure:
        return [f"**Expected**: {expected}", "**Measured**: nothing.",
                f"**Why**: {run.outcome.capitalize()}: {sentence(run.failure)}"]
    return [f"**Expected**: {expected}", f"**Measured**: {_measured(run, base)}",
            f"**Why**: {_why(run, base, against)}"]


def _measured(whole: Run, base: Run | None) -> str:
    """The metrics of the conclusion card with their changes. The target applies to the whole run."""
    run, other = matched_runs(whole, base)
    parts = [_part(run, other, metric) for metric in shown_for("card", run.result)
             if metric.is_recorded(run.result)]
    if is_large(whole.result):
        verb = "meets" if within_target(whole.result) else "misses"
        parts.append(f"the slowest block ({whole.value('ss_max')} ms per frame) {verb} the "
                     f"{target_of(whole.result):g} ms target")
    if lookup(run.result, "quality.identical") is True:
        parts.append("latents and frames are bit-identical to the baseline's")
    if other is not None and not other.failure and (difference := decision.unfair(run.result, other.result)):
        parts.append(f"not comparable with the baseline, {escape(difference)}")
    return f"{'; '.join(parts)}."


def _part(run: Run, base: Run | None, metric: Metric) -> str:
    text = run.value(metric.key) if metric.template else metric.shown(run.result)
    text = text if text.startswith("n/a") or not metric.unit else f"{text} {metric.unit}"
    known = base is not None and not base.failure and not decision.unfair(run.result, base.result)
    change = metric.change(metric.value(run.result), metric.value(base.result)) if known else ""
    return f"{metric.label} {text}{f' ({change})' if change else ''}"


def _why(whole: Run, base: Run | None, against: str) -> str:
    """The verdict with its reason, and the change of each stage per block."""
    verdict = verdict_of(whole.result)
    reason = sentence(whole.result["decision"]["rationale"])
    if verdict == "reference":
        return f"this run is the reference; {_stages(whole)}."
    words = reason if reason.lower().startswith(verdict) else f"{verdict.capitalize()}: {reason}"
    run, other = matched_runs(whole, base)
    if other is None or other.failure or decision.unfair(run.result, other.result):
        return f"{words}{against}"
    return f"{words}{against} {_per_block(run, other)}."


def _stages(run: Run) -> str:
    """The duration of a block and of each of its stages."""
    parts = ", ".join(f"{escape(name)} {number(run.result, f'latency.stages_ms.{name}.mean') or 0:.1f} ms"
                      for name in run.result["latency"]["stages_ms"])
    return f"a block takes {block_ms(run.result):.1f} ms ({parts})"


def _per_block(run: Run, base: Run) -> str:
    """The change of the block interval, and the contribution of each stage."""
    runs = [base.result, run.result]
    before, after = map(block_ms, runs)
    rest, moved = after - before, []
    for name in run.result["latency"]["stages_ms"]:
        was, now = (number(r, f"latency.stages_ms.{name}.mean") for r in runs)
        if was is not None and now is not None:
            rest -= now - was
            moved.append(f"{escape(name)} {now - was:+.1f} ms")
    parts = ", ".join([*moved, f"overlap of stages and time outside them {rest:+.1f} ms"])
    return f"Per block {after - before:+.1f} ms: {parts}"


def folded(text: str) -> str:
    """`text` in a folded section of the log."""
    return f"{FOLDED}\n\n{text.strip()}\n\n</details>\n"
