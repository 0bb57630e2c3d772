"""The log's sections on all runs: the summary table, the recommendation, and observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...measurement import catalogue
from ...measurement.catalogue import metric_of
from ...measurement.decision import OBJECTIVES
from ...measurement.result import lookup
from ..campaign import (
    BASELINE,
    Failure,
    Result,
    change_of,
    gpus_of,
    has_other_decoder,
    verdict_of,
    within_target,
)
from ..charts import target_of, targets_of
from ..noise_record import over_campaigns
from .entry import (
    SUMMARY_NAMES,
    Run,
    fidelity_of,
    is_kept,
    is_large,
    model_name,
    objective_of,
    quality_short,
    worst_ms,
)
from .markdown import BLANK, bullets, escape, first_cell, percent, sentence, table_row
from .notes import noise_sentence

_PURPOSES = {"memory": "memory", "switch": "the wait at a prompt switch"}


def fill_summary(section: str, runs: Mapping[str, Run]) -> str:
    """The section with the table of all presets, the recommended preset, and when to take another."""
    presets, lines = {name: preset for preset, name in SUMMARY_NAMES.items()}, []
    for line in section.split("\n"):
        label = first_cell(line)
        run = runs.get(presets.get(label, ""))
        lines.append(_summary_row(line, run) if run else line)
        if label == "Speed":
            others = [run for preset, run in runs.items() if preset not in SUMMARY_NAMES]
            lines += [_summary_row(line.replace(" Speed ", f" {run.name} "), run) for run in others]
    text = "\n".join(lines)
    if set(runs) <= {BASELINE}:
        return text
    best, rationale = recommend(runs)
    text = text.replace(f"**Preset**: {BLANK}", f"**Preset**: {best.name if best else 'none'}")
    text = text.replace("**Rationale**:\n-\n-\n-", f"**Rationale**:\n{bullets(rationale)}")
    for preset in ("quality", "speed"):
        if preset in runs:
            blank = f"- {SUMMARY_NAMES[preset]}: {BLANK}"
            instead = _beaten_by(runs[preset], runs) or best or runs.get(BASELINE)
            text = text.replace(blank, blank.replace(BLANK, _when(runs[preset], instead)))
    others = [run for run in _kept(runs) if run.preset not in ("quality", "speed") and run != best
              and not _beaten_by(run, runs)]
    if best and others:
        text = f"{text.rstrip()}\n{bullets(f'{run.name}: {_when(run, best)}' for run in others)}\n"
    return text


def _summary_row(line: str, run: Run) -> str:
    if within_target(run.result):
        line = line.replace("[ ]", "[x]")
    return table_row(line, [*map(run.cell, ("ss_max", "fps", "peak_allocated")), quality_short(run)])


def headline(runs: Mapping[str, Run]) -> str:
    """The result in one line for the top of the log; empty without a recommended preset or a baseline."""
    best, _ = recommend(runs)
    if best is None or best.preset == BASELINE or BASELINE not in runs or runs[BASELINE].failure:
        return ""
    base = runs[BASELINE]
    return (f"**Result**: {best.name} is recommended, with SS max {best.value('ss_max')} ms per frame and "
            f"{best.value('fps')} FPS. The baseline has {base.value('ss_max')} ms and "
            f"{base.value('fps')} FPS.")


def recommend(runs: Mapping[str, Run]) -> tuple[Run | None, list[str]]:
    """The recommended run or None, and the reasons. Studies, dropped and undecided presets do not qualify,
    nor do runs on several GPUs, since not everybody has them, nor those with a tiny VAE or a VAE in 8 bit,
    since their gate does not see the frames.
    """
    measured = [run for run in runs.values() if not run.failure and gpus_of(run.result) == 1]
    blocks = min((run.result["sizes"]["blocks_measured"] for run in measured), default=0)
    measured.sort(key=lambda run: worst_ms(run, blocks))
    best = next((run for run in measured if within_target(run.result) and is_kept(run)
                 and not has_other_decoder(run.result)), None)
    faster = measured[:measured.index(best)] if best else measured[:3]
    small = sorted({model_name(run.result) for run in measured if not is_large(run.result)})
    reasons = [f"These are runs of the model {', '.join(small)}. They recommend nothing for LongLive-1.3B."] \
        if small else []
    if best:
        base = runs[BASELINE].result if BASELINE in runs else None
        change = percent(change_of(best.result, base, metric_of("ss_mean")))
        reasons += [f"{best.name}: SS max {best.value('ss_max')} ms, FPS {best.value('fps')}, SS mean "
                    f"{best.value('ss_mean')} ms ({change} against the baseline).",
                    f"Quality: {'it is the reference' if best.preset == BASELINE else quality_short(best)}."]
        is_exact = best.preset == BASELINE or lookup(best.result, "quality.identical") is True
        if lookup(best.result, "weights.kind") == "random" and not is_exact:
            reasons.append("The gates were passed with random weights. Run the preset with the official "
                           "weights before relying on its fidelity.")
    else:
        reasons.append("No measured preset meets the rule below.")
    rule = (f"Rule: the lowest SS max over the first {blocks} blocks of each, among the presets that stay "
            f"within {_targets(measured)} ms per video frame in all blocks and whose decision is Keep. The "
            "baseline needs no decision; a study or a preset with a tiny VAE or a VAE in 8 bit is never "
            "recommended.")
    return best, [*reasons, *(f"Not {run.name}, SS max {run.value('ss_max')} ms: {_why_not(run)}"
                              for run in faster), rule]


def _why_not(run: Run) -> str:
    if is_kept(run) and has_other_decoder(run.result):
        return "its gate is that of the latents, and another decoder makes its frames: judge them by eye."
    if is_kept(run):
        return f"it misses the {target_of(run.result):g} ms target."
    return sentence(run.result["decision"]["rationale"])


def _targets(runs: Sequence[Run]) -> str:
    return " or ".join(f"{target:g}" for target in targets_of(run.result for run in runs)) or "the target's"


def _kept(runs: Mapping[str, Run]) -> list[Run]:
    return [run for run in runs.values() if not run.failure and run.preset != BASELINE and is_kept(run)
            and gpus_of(run.result) == 1]


def _beaten_by(run: Run, runs: Mapping[str, Run]) -> Run | None:
    """The fastest kept preset that dominates `run`: at least as fast and as faithful, and better in one.

    None for a preset whose objective is not latency.
    """
    if run.failure or objective_of(run) != "latency":
        return None

    def costs(of: Run) -> tuple[float, float]:
        return metric_of("ss_max").value(of.result), -fidelity_of(of)

    ours = costs(run)
    better = [other for other in _kept(runs) if costs(other) != ours and not has_other_decoder(other.result)
              and all(theirs <= own for theirs, own in zip(costs(other), ours))]
    return min(better, key=costs, default=None)


def _when(run: Run, other: Run | None) -> str:
    """When to take `run` instead of `other`, which is the recommended preset or the baseline."""
    if run.failure:
        return f"n/a ({run.outcome})"
    if run is other:
        return "this is the recommended preset"
    state = {True: "", False: ", dropped"}.get(lookup(run.result, "decision.keep"), ", undecided")
    facts = f"SS max {run.value('ss_max')} ms, {quality_short(run)}{state}"
    if not is_kept(run):
        return f"not recommended ({facts})"
    if other is None or other.failure:
        return f"nothing to compare it with ({facts})"
    if objective_of(run) != "latency":
        metric = metric_of(OBJECTIVES[objective_of(run)])
        better = (metric.value(run.result) or 0) < (metric.value(other.result) or 0)
        facts = f"{metric.label} {run.value(metric.key)} {metric.unit}, {facts}"
        purpose = f"where {_PURPOSES[objective_of(run)]} counts most"
    elif other.preset == BASELINE:
        better, purpose = True, "where the mean counts more than the worst case"
    else:
        is_faster = metric_of("ss_max").value(run.result) < metric_of("ss_max").value(other.result)
        better = is_faster or fidelity_of(run) > fidelity_of(other)
        purpose = ("where latency counts more than fidelity" if is_faster
                   else "where fidelity counts more than latency")
    none = f"dominated by {other.name}, no faster in the worst case and no closer to the baseline"
    return f"{purpose if better else none} ({facts})"


def observations(results: Sequence[Result], runs: Mapping[str, Run],
                 noise: Mapping[str, Mapping[str, Any]], record: Sequence[Mapping[str, Any]] = ()
                 ) -> list[str]:
    """Observations on the whole campaign: noise (also of recorded campaigns), clocks, quick runs, and
    differences between the runs.
    """
    if not results:
        return []
    lines = [noise_sentence(found) for found in noise.values()] or [
        "Noise (A/A): unknown, because no preset was run twice. Small changes mean nothing."]
    lines += over_campaigns(record, results)
    for path, words in (("latency.clock_disagreement.flag", "Clocks: host and CUDA clock disagree in"),
                        ("environment.co_scheduled", "Not fit for comparison, because something else ran "
                                                     "on the machine:"),
                        ("sizes.quick", "Quick runs, for a first impression only:")):
        presets = [run.preset for run in runs.values() if lookup(run.result, path)]
        if presets:
            lines.append(f"{words} {escape(', '.join(presets))}.")
    read = [run for run in runs.values() if lookup(run.result, "latency.clock_disagreement.available")]
    if read and not any(lookup(run.result, "latency.clock_disagreement.flag") for run in read):
        lines.append("Clocks: host and CUDA clock agree wherever both were read.")
    held = [f"{run.preset} ({mhz:.0f} MHz)" for run in runs.values() if (mhz := _held_clock(run.result))]
    if held:
        lines.append(f"The GPU throttled its clock (lower of two readings, before and after the streams) in "
                     f"{escape(', '.join(held))}.")
    for path in ("environment.git_commit", "environment.torch", "environment.gpu"):
        found = sorted({str(lookup(result, path))[:24] for result in results})
        if len(found) > 1:
            lines.append(f"The runs differ in {path}: {escape(', '.join(found))}.")
    return lines


def _held_clock(result: Result) -> float | None:
    """The lower reading of the GPU's clock in MHz. None if neither reading was throttled."""
    read = [lookup(result, f"environment.clocks_{when}") or {} for when in ("before", "after")]
    held = any(clocks.get("throttle_reasons") for clocks in read)
    return min((clocks["sm_mhz"] for clocks in read if clocks.get("sm_mhz")), default=None) if held else None


def rules(runs: Mapping[str, Run]) -> list[str]:
    """Each decision rule once, with the presets that it decided."""
    found: dict[str, list[str]] = {}
    for run in runs.values():
        if not run.failure and verdict_of(run.result) in ("keep", "drop", "undecided"):
            found.setdefault(run.result["decision"]["rule"], []).append(run.preset)
    return [f"Decision rule of {escape(', '.join(presets))}: {sentence(rule)}"
            for rule, presets in found.items()]


def caveats(runs: Mapping[str, Run]) -> list[str]:
    """What fidelity does and does not mean, once per kind of fidelity."""
    labels = dict.fromkeys(lookup(run.result, "quality.label") for run in runs.values() if not run.failure)
    return [f"Quality is {escape(label)}: how close latents and frames are to the baseline's, not how good "
            "the frames look." for label in labels if label]


def troubles(failures: Sequence[Failure], problems: Sequence[tuple[str, str]]) -> list[str]:
    """The runs without a result, and the reasons."""
    return [
        *(
            f"{failure.outcome.capitalize()}: {escape(failure.label)}: {sentence(failure.reason)}"
            for failure in failures
        ),
        *(f"Not usable: {escape(place)}: {sentence(reason)}" for place, reason in problems),
    ]


def closing(results: Sequence[Result], source: str) -> str:
    """The sentence on how the log is made."""
    command = f" by `python -m longlive_opt.report {source}`" if source else ""
    return f"This file is generated{command} from {len(results)} results. Do not edit it."


def definitions(results: Sequence[Result]) -> str:
    """The definitions of the metrics of these results and of the template. Empty without results."""
    recorded = [metric for metric in catalogue.METRICS
                if metric.template or any(metric.value(result) is not None for result in results)]
    lines = [f"**{escape(name)}**: {escape(text)}" for name, text in catalogue.glossary(recorded).items()]
    return f"<details><summary>Definitions</summary>\n\n{bullets(lines)}\n\n</details>\n" if results else ""
