"""The details of a log entry: what each optimization did, and the conditions of the measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...measurement import decision, metrics, worst_block
from ...measurement.catalogue import Metric, metric_of, shown_for, shown_in
from ...measurement.result import is_na, lookup, number, numbers
from ...streaming.timeline import Event
from ..campaign import Result
from ..tables import ablations_table
from . import gpu
from .entry import (
    Run,
    frame_metrics,
    is_large,
    matched_runs,
    null_notes,
    of_truth,
    psnr_within_blocks,
    ratio_text,
)
from .markdown import digits, escape, sentence, share_text


def run_notes(run: Run, base: Run | None) -> list[str]:
    """What each optimization did, and the conditions of the measurement."""
    result = run.result
    if run.failure:
        return [f"{run.outcome.capitalize()}: {sentence(run.failure)}"]
    notes = []
    if base and not base.failure:
        notes += [*_lengths((run, base), matched_runs(run, base)), *_apart(result, base.result)]
    notes += [_optimization(report) for report in result["optimizations"]]
    notes += filter(None, [_sample(result), _switches(result), gpu.drift(result),
                           worst_block.explain(result), interruptions(result)])
    notes.append(sentence(lookup(result, "latency.clock_disagreement.sentence")))
    setup = {name: number(result, f"setup_s.{name}") for name in result["setup_s"]}
    seconds = ", ".join(f"{escape(name)} {digits(value)} s" for name, value in setup.items() if value)
    notes += [f"Set-up: {seconds or 'nothing recorded'}.", _playback(result)]
    notes += [*_gpu_clocks(result), *gpu.load(result)]
    if lookup(result, "environment.co_scheduled"):
        notes.append(decision.CROWDED)
    notes += [f"Quality check: {sentence(flag)}" for flag in lookup(result, "quality.flags") or []]
    if lookup(result, "quality.free_running"):
        free = {metric.label: number(result, metric.path.replace("quality.", "quality.free_running.", 1))
                for metric in frame_metrics()}
        words = ", ".join(f"{name} {digits(value)}" for name, value in free.items() if value is not None)
        same = lookup(result, "quality.free_running.identical") is True and not of_truth(result)
        notes.append(f"Free-running: {'identical frames' if same else words or 'n/a'}.")
    if lookup(result, "quality.reference"):
        notes.append(_quality(result))
    notes += null_notes(result)
    notes += _adherence(result)
    notes += _variations(result)
    return notes + [sentence(note) for note in result.get("notes") or []]


def _quality(result: Result) -> str:
    """The error ratios, and the number of blocks or frames behind them."""
    quality, within = result["quality"], psnr_within_blocks(result)
    if of_truth(result):
        switch = lookup(quality, "prompt_schedule.switch_block")
        where = "without a prompt switch" if switch is None else \
            f"with a prompt switch at block {escape(switch)}"
        blocks = lookup(quality, "prompt_schedule.blocks")
        return (f"{ratio_text(result)}. Measured over {escape(blocks)} blocks {where}, against "
                f"{escape(quality['reference'])}.{decoder_text(quality)}")
    text = (f"One-block protocol: {quality.get('frames_compared')} of {quality.get('frames_total')} frames "
            f"against those of {escape(quality['reference'])}.")
    if within is not None:
        text += f" PSNR goes from {within[0]:.1f} dB in a block's first frame to {within[1]:.1f} in its last."
    return text


def decoder_text(quality: Mapping[str, Any]) -> str:
    """A sentence about a decoder that is not the truth's; empty if there is none."""
    decoder = quality.get("decoder")
    if not decoder or is_na(decoder):
        return ""
    psnr = number(decoder, "psnr_db.mean")
    shown = "n/a" if psnr is None else f"{psnr:.1f} dB"
    return (f" The decoder differs: frames of {escape(decoder['name'])} are compared with those of the Wan "
            f"VAE. On the same latents their PSNR is {shown}; the error ratio is that of the latents.")


def missing_notes(run: Run) -> list[str]:
    """The reasons for missing metrics."""
    return [f"{label} is n/a: {sentence(reason)}" for label, reason in run.missing.items()]


def _adherence(result: Result) -> list[str]:
    """The prompt adherence of the video, or why it is n/a. Nothing for the large model without a value."""
    found = result.get("adherence")
    if not found or is_na(found) and is_large(result):
        return []
    if is_na(found):
        return [f"Moving Shapes: n/a, {escape(found['reason'])}; {escape(found['how_to_fix'].rstrip('.'))}."]
    never = f" ({found['never']} of {found['switches']} switches never came)" if found["never"] else ""
    text = (f"Moving Shapes: prompt adherence {share_text(found['adherence_before'])} before a prompt switch "
            f"and {share_text(found['adherence_after'])} from the second block after it on, switch delay in "
            f"blocks {share_text(found['delay_blocks'], 1)}{never}, object permanence "
            f"{share_text(found['permanence'])}; {found['label']}")
    lines = [sentence(text)]
    drift = found.get("drift")
    if drift and not is_na(drift):
        lines.append(f"Drift over {drift['seconds']:.0f} s of one prompt: adherence {drift['first']:.3f} in "
                    f"the first third, {drift['last']:.3f} in the last.")
    lines += [f"{name}: {escape(', '.join(found[key]))}."
             for name, key in (("Wrong", "wrong"), ("Not evaluated", "not_evaluated")) if found[key]]
    return [" ".join(lines)]


def _variations(result: Result) -> list[str]:
    """One note with a line per ablation of the preset."""
    if not result.get("ablations"):
        return []
    lines = ["Ablations: the preset with one key changed, measured with the same two streams."]
    metrics = shown_for("ablation", result, *result["ablations"])
    for name, row in ablations_table(result).iterrows():
        cells = (f"{metric.label} {_cell(row[metric.heading], metric)}" for metric in metrics)
        lines.append(f"  - {escape(name)}: {'; '.join(cells)}")
    return ["\n".join(lines)]


def _cell(value: Any, metric: Metric) -> str:
    if is_na(value):
        return f"n/a ({escape(value['reason'])})"
    return value if isinstance(value, str) else f"{digits(value)} {metric.unit}".rstrip()


def _lengths(runs: Sequence[Run], parts: Sequence[Run]) -> list[str]:
    """A note if the tables compare only a part of a run, with the values of the whole run."""
    lines = []
    for whole, part in zip(runs, parts):
        if part.result is not whole.result:
            sizes, all_sizes = part.result["sizes"], whole.result["sizes"]
            lines.append(f"The tables compare the first {sizes['blocks_measured']} steady-state blocks and "
                         f"{sizes['switches']} prompt switches of both runs. All "
                         f"{all_sizes['blocks_measured']} blocks of {whole.name}: SS mean "
                         f"{whole.value('ss_mean')} ms, SS max {whole.value('ss_max')} ms.")
    return lines


def _apart(result: Result, baseline: Result) -> list[str]:
    """A note if the run and its baseline come from different commits."""
    codes = [escape(str(lookup(r, "environment.git_commit") or "unknown")[:12]) for r in (result, baseline)]
    if codes[0] == codes[1]:
        return []
    days = [escape(r["created_utc"]) for r in (result, baseline)]
    return [f"Run and baseline were not measured together: commit {codes[0]} of {days[0]} against "
            f"{codes[1]} of {days[1]}."]


def _gpu_clocks(result: Result) -> list[str]:
    found = [lookup(result, f"environment.clocks_{when}") for when in ("before", "after")]
    if not all(clocks and clocks.get("sm_mhz") for clocks in found):
        return []
    before, after = (f"{clocks['sm_mhz']:.0f} MHz at {clocks['power_w'] or 0:.0f} W" for clocks in found)
    held = ", ".join(found[1].get("throttle_reasons") or [])
    return [f"GPU clock: {before} before the streams, {after} after"
            f"{f', throttled by {escape(held)}' if held else ''}."]


def _optimization(optimization: Mapping[str, Any]) -> str:
    """What an optimization did, in words."""
    report = dict(optimization.get("report") or {})
    done = report.pop("done", "nothing reported")
    facts = [_fact(key, value) for key, value in report.items()
             if value != {} and not (isinstance(value, str) and value in done)]
    state = "" if optimization.get("applied") else ", NOT applied"
    exactness = f" ({escape(optimization['exactness'])})" if optimization.get("exactness") else ""
    name = escape(optimization.get("name"))
    return f"Optimization {name}{exactness}{state}: {sentence('; '.join([done, *facts]))}"


def _fact(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{key}: {', '.join(_fact(*item) for item in value.items())}"
    if isinstance(value, bool):
        return f"{key} {'on' if value else 'off'}"
    if key.endswith("bytes"):
        return f"{key} {digits(value / 1e9)}e9"
    return f"{key} {digits(value) if isinstance(value, float) else value}"


def noise_sentence(noise: Mapping[str, Any]) -> str:
    """The run-to-run noise of each metric, and the number of blocks and switches behind it."""
    shares = {metric.label: number(noise, metric.key) for metric in shown_in("noise")}
    words = [f"{name} {share:.1%}" for name, share in shares.items() if share is not None]
    times = "twice" if noise["runs"] == 2 else f"{noise['runs']} times"
    over = f"over {noise['blocks']} blocks and {noise['switches']} prompt switches"
    worst = numbers(noise, "values.ss_max")
    if worst:
        words.append(f"the SS max of each {digits(min(worst))} to {digits(max(worst))} ms")
    return f"Noise (A/A, {escape(noise['preset'])} run {times}, {over}): {', '.join(words)}."


def _sample(result: Result) -> str:
    sizes = result["sizes"]
    quick = " (a quick run: a first impression)" if sizes["quick"] else ""
    text = (f"Sample: {sizes['blocks_measured']} steady-state blocks after {sizes['warmup_blocks']} of "
            f"warm-up, {sizes['switches']} prompt switches{quick}.")
    if result.get("frames_on") != "host":
        text += " A block ends with its frames complete on the device, not in host memory."
    built = {kind: count for kind, count in (result.get("built_while_measured") or {}).items() if count}
    if built:
        counts = ", ".join(f"{count} {escape(kind)}" for kind, count in built.items())
        text += f" Built inside the measured streams: {counts}."
    if not sizes["switches"] or "switch_events" not in result:
        return text
    all_blocks = metrics.with_switches(map(Event.from_row, result["switch_events"]),
                                       first_measured_block=sizes["warmup_blocks"],
                                       frames_per_block=sizes["frames_per_block"])
    fps = metric_of("fps_with_switches").value(result) or 1e3 / all_blocks["mean"]
    return (f"{text} With a switch at every second block: {fps:.1f} FPS, mean "
            f"{digits(all_blocks['mean'])} ms, max {digits(all_blocks['max'])} ms per frame.")


def _switches(result: Result) -> str:
    """Switch latency by prompt-cache outcome, for requests at a block's edge and at a random moment. Empty
    without a prompt cache.
    """
    by_prompt = lookup(result, "latency.ps_by_prompt") or {}
    anywhere = lookup(result, "latency.ps_random_by_prompt") or {}
    parts = []
    for outcome, times in sorted(by_prompt.items()):
        means = [digits(found["mean"]) for found in (times, anywhere.get(outcome)) if found]
        parts.append(f"{escape(outcome)} {' and '.join(means)} ms (n={escape(times['n'])})")
    return f"PS mean and PS mean at a random moment by prompt cache: {', '.join(parts)}." if parts else ""


def interruptions(result: Result) -> str:
    """External interruptions of the streams. Empty for results that do not record them."""
    found = result.get("interruptions")
    if found is None:
        return ""
    counts = {name.replace("_", " "): str(count) for name, count in found.items() if name != "garbage_ms_max"}
    if found["garbage_collections"]:
        counts["garbage collections"] += f" (the longest {found['garbage_ms_max']:.1f} ms)"
    return f"Interruptions: {', '.join(f'{name} {count}' for name, count in counts.items())}."


def _playback(result: Result) -> str:
    words = []
    for path, name in (("playback", "steady state"),
                       ("playback.switch_stream", "with a switch at every second block")):
        buffer_ms = number(result, f"{path}.startup_buffer_ms")
        if buffer_ms is not None:
            slow = lookup(result, f"{path}.sustained") is False
            words.append(f"{name}, " + ("too slow" if slow else f"start-up buffer {buffer_ms:.0f} ms"))
    own = number(result, "model.sizes.fps")
    made_for = f" (the model is made for {own:g})" if own else ""
    return f"Playback at {number(result, 'playback.fps') or 0:g} FPS{made_for}: {'; '.join(words) or 'n/a'}."
