"""What the log notes on one run: hypothesis and outcome, what the rooms did, what qualifies the figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...measurement import decision, metrics, worst_block
from ...measurement.catalogue import Metric, metric_of, shown_in
from ...measurement.result import block_ms, is_na, lookup, number, numbers
from ...streaming.timeline import Event
from ..campaign import Result, change_of, within_target
from ..charts import target_of
from ..tables import variations_table
from . import gpu
from .entry import (
    Run,
    frame_metrics,
    is_large,
    matched_runs,
    model_name,
    null_notes,
    of_truth,
    psnr_within_blocks,
    ratio_text,
)
from .markdown import digits, escape, percent, sentence, share_text

OTHERS = ("ps_mean", "peak_allocated")  # of an outcome, after SS mean and SS max


def run_notes(run: Run, base: Run | None, noise: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Hypothesis and outcome, what the rooms did, and everything that qualifies the figures. `noise`: by
    preset.
    """
    result = run.result
    other = "" if is_large(result) else \
        f" (of LongLive-1.3B on an H100; this is the model {model_name(result)})"
    notes = [f"Hypothesis{other}: {sentence(result['hypothesis'])}"] if result.get("hypothesis") else []
    if run.failure:
        return [*notes, f"{run.outcome.capitalize()}: {sentence(run.failure)}"]
    if base and not base.failure:
        parts = matched_runs(run, base)
        notes += [_outcome(run, *parts), *_lengths((run, base), parts), *_apart(run.result, base.result)]
    notes += [_room(room) for room in result["rooms"]]
    notes.append(f"Clocks: {sentence(lookup(result, 'latency.clock_disagreement.sentence'))}")
    if run.preset in noise:
        notes.append(noise_sentence(noise[run.preset]))
    notes += filter(None, [_sample(result), _switches(result), gpu.drift(result),
                           worst_block.sentence(result), interruptions(result)])
    setup = {name: number(result, f"setup_s.{name}") for name in result["setup_s"]}
    seconds = ", ".join(f"{escape(name)} {digits(value)} s" for name, value in setup.items() if value)
    notes.append(f"Set-up, not part of any latency: {seconds or 'nothing recorded'}.")
    notes.append(_playback(result))
    notes += [*_gpu_clocks(result), *gpu.load(result)]
    if lookup(result, "environment.co_scheduled"):
        notes.append(decision.CROWDED)
    notes += [f"Quality check: {sentence(flag)}" for flag in lookup(result, "quality.flags") or []]
    if lookup(result, "quality.free_running"):
        free = {metric.label: number(result, metric.path.replace("quality.", "quality.free_running.", 1))
                for metric in frame_metrics()}
        words = ", ".join(f"{name} {digits(value)}" for name, value in free.items() if value is not None)
        same = lookup(result, "quality.free_running.identical") is True and not of_truth(result)
        notes.append("Free-running, where differences add up from block to block: "
                     f"{'identical frames' if same else words or 'n/a'}.")
    if lookup(result, "quality.reference"):
        notes.append(_quality(result))
    notes += null_notes(result)
    notes += _world(result)
    notes += _variations(result)
    notes += [sentence(note) for note in result.get("notes") or []]
    return notes


def _quality(result: Result) -> str:
    """What the quality figures are, and over how many frames."""
    quality, within = result["quality"], psnr_within_blocks(result)
    if of_truth(result):
        switch = lookup(quality, "script.switch_block")
        where = "without a prompt switch" if switch is None else f"with a prompt switch at block {switch}"
        st_lpips = metric_of("st_lpips").value(result)
        return (f"{ratio_text(result)}. Against {escape(quality['reference'])} over "
                f"{lookup(quality, 'script.blocks')} blocks {where}; {escape(quality.get('label'))}, not how "
                f"good the frames look{'' if st_lpips is None else f'; ST-LPIPS {digits(st_lpips)}'}.")
    text = (f"Quality is {escape(quality.get('label'))}: how far the frames are from those of "
            f"{escape(quality['reference'])}, not how good they look; one-block protocol, "
            f"{quality.get('frames_compared')} of {quality.get('frames_total')} frames.")
    if within is not None:
        text += f" PSNR goes from {within[0]:.1f} dB in a block's first frame to {within[1]:.1f} in its last."
    return text


def missing_notes(run: Run) -> list[str]:
    """Why some of the figures that were asked for are not there."""
    return [f"{label} is n/a: {sentence(reason)}" for label, reason in run.missing.items()]


def _world(result: Result) -> list[str]:
    """Whether the video showed its prompts, where that was asked: a note, or why it cannot be told. Of the
    large model it never can.
    """
    world = result.get("world")
    if not world or is_na(world) and is_large(result):
        return []
    if is_na(world):
        return [f"Small world: n/a, {escape(world['reason'])}; {escape(world['how_to_fix'].rstrip('.'))}."]
    never = f" ({world['never']} of {world['switches']} switches never came)" if world["never"] else ""
    text = (f"Small world: prompt adherence {share_text(world['adherence_before'])} before a prompt switch "
            f"and {share_text(world['adherence_after'])} from the second block after it on, switch delay in "
            f"blocks {share_text(world['delay_blocks'], 1)}{never}, object permanence "
            f"{share_text(world['permanence'])}; {world['label']}")
    told = [sentence(text)]
    drift = world.get("drift")
    if drift and not is_na(drift):
        told.append(f"Drift over {drift['seconds']:.0f} s of one prompt: adherence {drift['first']:.3f} in "
                    f"the first third, {drift['last']:.3f} in the last.")
    told += [f"{name}: {escape(', '.join(world[key]))}."
             for name, key in (("Wrong", "wrong"), ("Not judged", "not_judged")) if world[key]]
    return [" ".join(told)]


def _variations(result: Result) -> list[str]:
    """One note for each variation of the preset, after one that says what they are."""
    if not result.get("variations"):
        return []
    lines = ["Variations, each the preset with one key changed, measured by the same two streams:"]
    for name, row in variations_table(result).iterrows():
        cells = (f"{metric.label} {_cell(row[metric.heading], metric)}" for metric in shown_in("ablation"))
        lines.append(f"  - {escape(name)}: {'; '.join(cells)}")
    return ["\n".join(lines)]


def _cell(value: Any, metric: Metric) -> str:
    if is_na(value):
        return f"n/a ({escape(value['reason'])})"
    return value if isinstance(value, str) else f"{digits(value)} {metric.unit}".rstrip()


def _lengths(runs: Sequence[Run], parts: Sequence[Run]) -> list[str]:
    """That the table shows a part of the longer run only, and what all of it gives."""
    lines = []
    for whole, part in zip(runs, parts):
        if part.result is not whole.result:
            sizes, all_sizes = part.result["sizes"], whole.result["sizes"]
            lines.append(f"Compared over the first {sizes['blocks_measured']} steady-state blocks and "
                         f"{sizes['switches']} prompt switches of both; all that was measured of "
                         f"{whole.name}: {all_sizes['blocks_measured']} blocks, SS mean "
                         f"{whole.figure('ss_mean')} ms, SS max {whole.figure('ss_max')} ms.")
    return lines


def _apart(result: Result, baseline: Result) -> list[str]:
    """That the two were not measured in one go."""
    codes = [str(lookup(r, "environment.git_commit") or "unknown")[:12] for r in (result, baseline)]
    if codes[0] == codes[1]:
        return []
    days = [escape(r["created_utc"]) for r in (result, baseline)]
    return [f"Not measured in one go with the baseline: commit {codes[0]}, {days[0]}; the baseline's is "
            f"{codes[1]}, {days[1]}."]


def _outcome(whole: Run, run: Run, base: Run) -> str:
    """What the hypothesis is to be compared with: `run` and `base` over the blocks that are compared. The
    target is for the `whole` run.
    """
    verb = "meets" if within_target(whole.result) else "misses"
    text = f"Outcome: SS mean {run.figure('ss_mean')} ms per video frame against {base.figure('ss_mean')}"
    if difference := decision.unfair(run.result, base.result):
        return f"{text}, not comparable: {escape(difference)}."
    target = f" {verb} the {target_of(whole.result):g} ms target" if is_large(run.result) else ""
    others = "; ".join(f"{metric.label} {run.figure(metric.key)} {metric.unit} ({change})"
                       for metric in map(metric_of, OTHERS)
                       if (change := percent(change_of(run.result, base.result, metric))) != "n/a")
    return (f"{text} ({percent(change_of(run.result, base.result, metric_of('ss_mean')))}); SS max "
            f"{whole.figure('ss_max')} ms{target}; {others}{'; ' if others else ''}{_per_block(run, base)}.")


def _per_block(run: Run, base: Run) -> str:
    """How far the block interval moved, and through which stages."""
    runs = [base.result, run.result]
    before, after = map(block_ms, runs)
    rest, moved = after - before, []
    for name in run.result["latency"]["stages_ms"]:
        was, now = (number(r, f"latency.stages_ms.{name}.mean") for r in runs)
        if was is not None and now is not None:
            rest -= now - was
            moved.append(f"{escape(name)} {now - was:+.1f} ms")
    parts = ", ".join([*moved, f"overlap of stages and time outside them {rest:+.1f} ms"])
    return f"per block {after - before:+.1f} ms: {parts}"


def _gpu_clocks(result: Result) -> list[str]:
    found = [lookup(result, f"environment.clocks_{when}") for when in ("before", "after")]
    if not all(clocks and clocks.get("sm_mhz") for clocks in found):
        return []
    before, after = (f"{clocks['sm_mhz']:.0f} MHz at {clocks['power_w'] or 0:.0f} W" for clocks in found)
    held = ", ".join(found[1].get("throttle_reasons") or [])
    return [f"GPU clock: {before} before the streams, {after} after"
            f"{f', held back by {escape(held)}' if held else ''}."]


def _room(room: Mapping[str, Any]) -> str:
    report = dict(room.get("report") or {})
    done = report.pop("done", "nothing reported")
    facts = [_fact(key, value) for key, value in report.items()
             if value != {} and not (isinstance(value, str) and value in done)]
    state = "" if room.get("applied") else ", NOT applied"
    level = f" ({escape(room['level'])})" if room.get("level") else ""
    return f"Optimization {escape(room.get('name'))}{level}{state}: {sentence('; '.join([done, *facts]))}"


def _fact(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{key}: {', '.join(_fact(*item) for item in value.items())}"
    if isinstance(value, bool):
        return f"{key} {'on' if value else 'off'}"
    if key.endswith("bytes"):
        return f"{key} {digits(value / 1e9)}e9"
    return f"{key} {digits(value) if isinstance(value, float) else value}"


def noise_sentence(noise: Mapping[str, Any]) -> str:
    """The run-to-run noise of each figure, and over how much it was taken."""
    shares = {metric.label: number(noise, metric.key) for metric in shown_in("noise")}
    words = [f"{name} {share:.1%}" for name, share in shares.items() if share is not None]
    times = "twice" if noise["runs"] == 2 else f"{noise['runs']} times"
    over = f"over {noise['blocks']} blocks and {noise['switches']} prompt switches"
    worst = numbers(noise, "values.ss_max")
    if worst:
        words.append(f"the SS max of each {digits(min(worst))} to {digits(max(worst))} ms")
    return (f"Noise (A/A, {escape(noise['preset'])} run {times}, {over}): {', '.join(words)}; a share is "
            "(largest - smallest) / mean of the runs.")


def _sample(result: Result) -> str:
    sizes = result["sizes"]
    quick = " (a quick run, too short for more than a first impression)" if sizes["quick"] else ""
    text = (f"Sample: {sizes['blocks_measured']} steady-state blocks after {sizes['warmup_blocks']} of "
            f"warm-up, {sizes['switches']} prompt switches{quick}.")
    if result.get("frames_on") != "host":
        text += " A block ends with its frames complete on the device, not yet in host memory."
    built = {kind: count for kind, count in (result.get("built_while_measured") or {}).items() if count}
    if built:
        text += " Not rehearsed, built inside the measured streams: " + ", ".join(
            f"{count} {escape(kind)}" for kind, count in built.items()) + "."
    if not sizes["switches"] or "switch_events" not in result:
        return text
    all_blocks = metrics.with_switches(map(Event.from_row, result["switch_events"]),
                                       first_measured_block=sizes["warmup_blocks"],
                                       frames_per_block=sizes["frames_per_block"])
    fps = metric_of("fps_with_switches").value(result) or 1e3 / all_blocks["mean"]
    return (f"{text} In the stream in which every second block is a switch: {fps:.1f} FPS, mean "
            f"{digits(all_blocks['mean'])} ms, max {digits(all_blocks['max'])} ms per video frame.")


def _switches(result: Result) -> str:
    """How long a switch takes: requested at a block's edge and at a random moment, by prompt cache; empty
    without switches.
    """
    edge = metric_of("ps_mean").value(result)
    if edge is None:
        return ""
    text = f"PS: mean {digits(edge)} ms for a request at a block's edge"
    anywhere, p95 = (metric_of(f"ps_random_{key}").value(result) for key in ("mean", "p95"))
    if anywhere is not None and p95 is not None:
        text += (f"; {digits(anywhere)} ms (p95 {digits(p95)}) at a random moment, derived: it waits for the "
                 "block under way")
    by_prompt = lookup(result, "latency.ps_by_prompt") or {}
    if not by_prompt:
        return f"{text}."
    anywhere_by_prompt = lookup(result, "latency.ps_random_by_prompt") or {}
    parts = []
    for outcome, times in sorted(by_prompt.items()):
        later = anywhere_by_prompt.get(outcome)
        means = [digits(found["mean"]) for found in (times, later) if found]
        parts.append(f"{escape(outcome)} {' and '.join(means)} ms (n={times['n']})")
    return f"{text}. By prompt cache: {', '.join(parts)}."


def interruptions(result: Result) -> str:
    """What held the streams up from outside of them; empty for results that do not tell."""
    found = result.get("interruptions")
    if found is None:
        return ""
    counts = {name.replace("_", " "): str(count) for name, count in found.items() if name != "garbage_ms_max"}
    if found["garbage_collections"]:
        counts["garbage collections"] += f" (the longest {found['garbage_ms_max']:.1f} ms)"
    return f"Interruptions of both streams: {', '.join(f'{name} {count}' for name, count in counts.items())}."


def _playback(result: Result) -> str:
    words = []
    for path, name in (("playback", "steady state"),
                       ("playback.switch_stream", "with a prompt switch every second block")):
        buffer_ms = number(result, f"{path}.startup_buffer_ms")
        if buffer_ms is not None:
            slow = lookup(result, f"{path}.sustained") is False
            words.append(f"{name}, " + ("too slow" if slow else f"start-up buffer {buffer_ms:.0f} ms"))
    own = number(result, "model.sizes.fps")
    made_for = f" (the model's videos are made for {own:g})" if own else ""
    return f"Playback at {number(result, 'playback.fps') or 0:g} FPS{made_for}: {'; '.join(words) or 'n/a'}."
