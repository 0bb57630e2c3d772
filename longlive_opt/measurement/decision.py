"""Compares two runs and decides on one: are they comparable, over which blocks, how large is the noise, and
is the preset kept? These are pure functions of results; `catalogue` describes the metrics.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config import BASELINE, STUDIES, ExperimentConfig
from ..errors import UserError, short
from ..models.specs import MODELS
from ..prompts import PromptSchedule, spread_evenly
from ..streaming.timeline import Event
from .catalogue import metric_of, shown_in
from .metrics import measurements
from .result import is_finite, is_na, lookup, na

log = logging.getLogger(__name__)

CROWDED = "Something else ran on the machine in the meantime: not fit for comparison."
NOISE_FLOOR = 0.02  # a few runs can agree by luck: no gain below this counts
UNREPEATED_NOISE = 0.25
"""Assumed where nothing was run twice: ten times the largest of outputs/noise.json, which has GPUs only."""
# Preset keys that metrics depend on and that no optimization may change. Older results have the default.
_SAME_KEYS = ("seed", "model_dtype", "block_frames", "denoising_steps", "timestep_shift", "context_noise",
              "local_attn_size", "sink_size", "global_sink", "relative_rope")
# Fidelity also depends on these: both videos must have the same length.
_SAME_VIDEO = ("video_latent_frames", "fidelity_blocks")
_DEFAULTS = ExperimentConfig().to_dict()
PLANNED = "planned"  # status of a run that has not started
OBJECTIVES = {"latency": "ss_mean", "switch": "ps_mean", "memory": "peak_allocated"}
"""What a preset should improve -> the key of the metric that measures it."""
_EXACTNESS = ("bitwise", "rounding", "lossy")  # from strict to loose
MAX_ERROR_RATIO = 1.1
"""The gate of a preset without its own: as exact as the baseline's own rounding, with a margin for chance.
"""
_LIMIT = "max_error_ratio"
_OLD_LIMITS = ("min_psnr_db", "min_ssim", "min_ms_ssim", "max_lpips", "min_clip_delta")


def unfair(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return an empty string if the two runs are comparable, else the first difference that forbids it.

    This compares everything that metrics depend on and that no optimization may change: GPU (or CPU, for CPU
    runs), torch, model, weights with the SHA-256 of every file, prompts and switch frames as used, seed,
    picture size, dtype, block size, sampling, window, sink and rotation. If one run is only `planned`, facts
    missing from either run are skipped.
    """
    for name, ours, theirs in _facts(a, b):
        if ours != theirs:
            return _difference(name, ours, theirs)
    return ""


def fidelity_reason(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """Return an empty string if the two runs' frames are comparable, else why not: length, or `unfair`.

    `result` may be a planned run.
    """
    for key in _SAME_VIDEO:  # first, because prompts are spread over the length
        ours, theirs = _key(result, key), _key(baseline, key)
        if ours != theirs:
            return _difference(key, ours, theirs)
    return unfair(result, baseline)


def planned(config: ExperimentConfig, schedule: PromptSchedule, sha256: Mapping[str, str] | None = None
            ) -> dict[str, Any]:
    """Return the known facts of a run before it starts: the part of its result that `fidelity_reason` reads.

    Args:
        sha256: of the weights' files by part; None if they were not read.
    """
    model = config.model_config()
    weights = {"kind": "random" if config.weights == "random" else "files"}
    return {"status": PLANNED, "preset": config.name, "seed": config.seed,
            "parameters": config.to_dict(), "prompt_schedule": schedule.to_dict(),
            "model": {"name": model.name, "sizes": {"height": model.height, "width": model.width}},
            "weights": weights if sha256 is None else weights | {"sha256": dict(sha256)}}


def _facts(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """(name, value of `a`, value of `b`) of everything in which the two must agree."""
    partial = PLANNED in (a.get("status"), b.get("status"))
    paths = ["environment.gpu", "environment.torch", "model.name", "weights.kind", "seed",
             "sizes.frames_per_block"]
    if lookup(a, "environment.gpu") is None:
        paths.insert(1, "environment.cpu")
    for path in paths:
        section = path.partition(".")[0]
        if not partial or section in a and section in b:
            yield path, lookup(a, path), lookup(b, path)
    ours, theirs = (lookup(run, "weights.sha256") for run in (a, b))
    if ours is not None and theirs is not None:
        for part in sorted({*ours, *theirs}):
            yield f"weights.sha256 of {part}", ours.get(part), theirs.get(part)
    for side in ("height", "width"):
        yield side, _side(a, side), _side(b, side)
    for key in _SAME_KEYS:
        yield key, _key(a, key), _key(b, key)
    if lookup(a, "weights.kind") != "random":
        yield "lora_alpha", _key(a, "lora_alpha"), _key(b, "lora_alpha")
    # Last, because the prompts' spread depends on the values compared before.
    schedules = [schedule_of_result(run) for run in (a, b)]
    yield "prompts", *(prompts for prompts, _ in schedules)
    yield "switch frames", *(frames for _, frames in schedules)
    if _key(a, "prompts_file") is None and _key(b, "prompts_file") is None:
        yield "prompts", _key(a, "prompts"), _key(b, "prompts")  # also those that a short video omits


def _key(result: Mapping[str, Any], key: str) -> Any:
    """Read a preset's key; a result without it comes from code that behaved like the default."""
    value = (result.get("parameters") or {}).get(key, _DEFAULTS[key])
    return list(value) if isinstance(value, tuple) else value


def _side(result: Mapping[str, Any], side: str) -> Any:
    own = MODELS.get(_key(result, "model"))
    return lookup(result, f"model.sizes.{side}") or _key(result, side) or getattr(own, side, None)


def schedule_of_result(result: Mapping[str, Any]) -> tuple[list[str] | None, list[int] | None]:
    """Return a run's prompts and the latent frames at which each later prompt took over.

    They are in `prompt_schedule`. In an older result they follow from its parameters, unless it read them
    from a file; then both are None.
    """
    schedule = result.get("prompt_schedule")
    if schedule:
        return list(schedule["prompts"]), list(schedule["switch_frames"])
    if _key(result, "prompts_file") is not None:
        return None, None
    prompts, given = list(_key(result, "prompts")), _key(result, "switch_frame_indices")
    if given is not None:
        return prompts, list(given)
    frames = _key(result, "block_frames")
    schedule = spread_evenly(prompts, _key(result, "video_latent_frames") // frames, frames)
    return list(schedule.prompts), list(schedule.switch_frames)


def _difference(name: str, ours: Any, theirs: Any) -> str:
    """Describe a difference; for two lists of one length, only the first differing item."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        at = next(i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
        name, ours, theirs = f"{name}[{at}]", ours[at], theirs[at]
    return f"{name} is {short(ours)} against {short(theirs)}"


def without_fidelity(quality: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """Return a `quality` section in which every metric is n/a for `reason`: the frames were not, or must not
    be, compared with the baseline's.
    """
    absent = na(f"not comparable with the baseline, {reason}", "run both with the same settings")
    kept: dict[str, Any] = {}
    for name, value in quality.items():
        if name in ("reference", "identical"):
            kept[name] = None
        elif name in ("frames_compared", "frames_total"):
            kept[name] = 0
        elif name in ("label", "flags"):
            kept[name] = value
        elif isinstance(value, (Mapping, float)) and name != "free_running":
            kept[name] = absent
    return kept


def is_study(result: Mapping[str, Any]) -> bool:
    """Whether the run analyses presets instead of being a candidate: it is measured but never recommended."""
    return result["preset"] in STUDIES or bool(result.get("ablations"))


def matched(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Cut two results to equally many steady-state blocks and prompt switches, the first of each, for the
    log's comparison (see "Comparison" in `catalogue.TERMS`). A result that is short enough is returned
    unchanged. If one has no switches, the other keeps its own. Switches without their own stream end with the
    blocks.
    """
    first, second = _all_matched((a, b))
    return first, second


def _all_matched(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if any(lookup(run, "sizes.blocks_measured") is None for run in runs):
        return list(runs)  # a failed run has no sizes
    blocks, switches = (min(lookup(run, f"sizes.{key}") for run in runs)
                        for key in ("blocks_measured", "switches"))
    return [_shortened(run, blocks, switches) for run in runs]


def compared(result: Mapping[str, Any], other: Mapping[str, Any] | None
             ) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return both results, `matched`; None if there is no other result or the two are not comparable."""
    return None if other is None or unfair(result, other) else matched(result, other)


def _shortened(result: Mapping[str, Any], blocks: int, switches: int) -> Mapping[str, Any]:
    sizes, latency = result["sizes"], result["latency"]
    switches = switches or sizes["switches"]
    if (sizes["blocks_measured"], sizes["switches"]) == (blocks, switches):
        return result
    apart = switches and "switch_events" in result
    return {**result, **measurements(
        _first(result["events"], latency["ss_blocks"], blocks),
        first_measured_block=sizes["warmup_blocks"],
        frames_per_block=sizes["frames_per_block"],
        switch_events=_first(result["switch_events"], latency["ps_blocks"], switches) if apart else None,
        playback_fps=result["playback"]["fps"],
        target_ms=latency["ss_over_target"]["target_ms"])}


def _first(rows: Iterable[list[Any]], counted: Sequence[int], count: int) -> list[Event]:
    """Return the events before the block that is counted after the first `count` ones."""
    end = next(iter(counted[count:]), math.inf)
    events = map(Event.from_row, rows)
    return [event for event in events if event.block is None or event.block < end]


def aa_noise(*runs: Mapping[str, Any]) -> dict[str, Any]:
    """Run-to-run noise of one preset from two or more runs in separate processes: metric -> spread, or n/a.

    The spread is (max - min) / mean over the runs, each `matched` to the shortest. It assumes no distribution
    and can only grow with the number of runs. A few runs give a rough estimate; see `NOISE_FLOOR`.

    Returns:
        preset, runs, blocks and switches (the compared number of each), the spread of each metric that the
        catalogue shows in "noise", and in `values` what each run measured.

    Raises:
        UserError: there are fewer than two runs, or they differ in preset or conditions.
    """
    if len(runs) < 2:
        raise UserError(f"A/A noise needs one preset at least twice, found {len(runs)} run; repeat it")
    first, *others = runs
    for other in others:
        difference = unfair(first, other)
        if first["preset"] != other["preset"]:
            difference = f"preset is {first['preset']!r} against {other['preset']!r}"
        if difference:
            raise UserError(f"A/A noise needs the same run twice, but {difference}: run one preset twice")
    same = _all_matched(runs)
    sizes = same[0]["sizes"]
    noise: dict[str, Any] = {"preset": first["preset"], "runs": len(runs), "blocks": sizes["blocks_measured"],
                             "switches": sizes["switches"], "values": {}}
    for metric in shown_in("noise"):
        values = [lookup(run, metric.path) for run in same]
        absent = next(filter(is_na, values), None)
        noise[metric.key] = absent or (max(values) - min(values)) / ((math.fsum(values) / len(values)) or 1.0)
        noise["values"][metric.key] = absent or values
    return noise


def campaign_noise(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """preset -> `aa_noise` of every preset in `results` with more than one run. A preset whose runs are not
    comparable is left out with a warning.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        runs.setdefault(result["preset"], []).append(result)
    noise = {}
    for preset, repeated in runs.items():
        if len(repeated) > 1:
            try:
                noise[preset] = aa_noise(*repeated)
            except UserError as error:
                log.warning("%s", error)
    return noise


def noise_of_preset(preset: str, noise: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The noise that a comparison of `preset` with the baseline must exceed, per metric: the larger of the
    preset's and the baseline's if both were repeated, else the known one; None if neither is known.
    """
    known = [noise[name] for name in dict.fromkeys((preset, BASELINE)) if name in noise]
    if not known:
        return None
    larger = dict(known[0])
    for name in (metric.key for metric in shown_in("noise")):
        spreads = [run[name] for run in known if not is_na(run[name])]
        larger[name] = max(spreads) if spreads else known[0][name]
    return larger


def gate_of(config: ExperimentConfig, optimizations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the quality gate for `decide`: the loosest exactness of the optimizations, and the largest
    allowed ratio of a run's error to the baseline's own.
    """
    exactness = max((optimization["exactness"] for optimization in optimizations), key=_EXACTNESS.index,
                    default="bitwise")
    limit = MAX_ERROR_RATIO if config.max_error_ratio is None else config.max_error_ratio
    return {"exactness": exactness, "objective": config.objective, _LIMIT: limit}


def mildest_null(baseline: Mapping[str, Any] | None) -> tuple[float, str] | None:
    """The smallest error ratio of the null rows of a campaign's baseline, and that row's title; None without
    null rows. A gate at or above this ratio would pass that stream.
    """
    rows = lookup(baseline or {}, "quality.nulls") or []
    known = [(row["worst_ratio"], row["title"]) for row in rows if is_finite(row.get("worst_ratio"))]
    return min(known, default=None)


def decide(result: Mapping[str, Any], baseline: Mapping[str, Any] | None, noise: Mapping[str, Any] | None,
           gate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `decision` section: keep is True or False by a stated rule, None if it does not apply.

    A run that fails its gate is dropped at any speed. A run without a gain is dropped too, so no change stays
    for its own sake. Undecided runs are those not comparable with the baseline (`fidelity_reason`), those
    during which something else ran on the machine, and those whose change is within a noise of more than
    `NOISE_FLOOR`, because on such a machine any change may be noise. A study gets no verdict.

    `noise`: from `noise_of_preset`; None if nothing was run twice, and then a change of up to
    `UNREPEATED_NOISE` is undecided. `gate`: from
    `gate_of`, {"exactness": "bitwise", "rounding" or "lossy", "max_error_ratio": number, optionally
    "objective": "latency" (the default), "switch" or "memory"}. Gates of results from before protocol 2 are
    readable; runs that pass them are undecided unless the frames are identical.
    """
    objective, exactness, limit = _read_gate(gate)
    metric = metric_of(OBJECTIVES[objective])
    words, unit = metric.label, metric.unit
    near = ("as near as a gate of an older kind requires" if limit is None else
            f"at most {limit:g} times as far from the baseline in float32 as the baseline's own")
    same = "the same bits as the baseline, or " if exactness == "bitwise" else ""
    quality = f"the latents are {same}{near}"
    least = f"at least {NOISE_FLOOR:.0%}" if noise else f"{UNREPEATED_NOISE:.0%}, since nothing was run twice"
    rule = (f"keep if {words} improves on the baseline by more than the A/A noise "
            f"({least}) and {quality}; undecided if the change is within a larger noise")

    def verdict(keep: bool | None, rationale: str) -> dict[str, Any]:
        return {"keep": keep, "rule": rule, "rationale": rationale}

    if result["preset"] == BASELINE:
        return {"keep": None, "rule": "reference", "rationale": "the others are compared with the baseline"}
    if is_study(result):
        return {"keep": None, "rule": "study",
                "rationale": "no verdict: this run studies other presets and is not a candidate itself"}
    if baseline is None:
        return verdict(None, "undecided: the campaign has no baseline result")
    if difference := fidelity_reason(result, baseline):
        return verdict(None, f"undecided: not comparable with the baseline, {difference}")
    passed, why = _passes(result["quality"], limit, baseline)
    if passed is False:
        return verdict(False, why)
    if crowded := [run["preset"] for run in (result, baseline) if lookup(run, "environment.co_scheduled")]:
        return verdict(None, f"undecided: something else ran on the machine during {' and '.join(crowded)}; "
                             "repeat the campaign when nothing else runs on it")
    ours, reference = (lookup(run, metric.path) for run in matched(result, baseline))
    spread = noise[metric.key] if noise else UNREPEATED_NOISE
    for value in (ours, reference, spread):
        if is_na(value):
            return verdict(None, f"undecided: {value['reason']}; {value['how_to_fix']}")
    gain, threshold = (reference - ours) / reference, max(spread, NOISE_FLOOR)
    compared = (f"{words} {ours:.4g} {unit} against {reference:.4g}: {'gain' if gain >= 0 else 'loss'} "
                f"{abs(gain):.1%}, threshold {threshold:.1%}")
    if abs(gain) <= spread and not noise:
        return verdict(None, f"undecided: {compared}, and there is no A/A noise; run the baseline twice in "
                             "the campaign")
    if abs(gain) <= spread and spread > NOISE_FLOOR:
        return verdict(None, f"undecided: {compared}, within the noise of this machine; repeat the campaign "
                             "when nothing else runs on it")
    if gain <= threshold:
        return verdict(False, f"{compared}: no gain above the threshold")
    return verdict(passed, f"{compared}; {why}")


def _read_gate(gate: Mapping[str, Any]) -> tuple[str, str, float | None]:
    """(objective, exactness, limit of the error ratio); no limit in a gate of an older kind."""
    objective, exactness, limit = gate.get("objective", "latency"), gate.get("exactness"), gate.get(_LIMIT)
    if unknown := sorted(set(gate) - {"objective", "exactness", _LIMIT, *_OLD_LIMITS}):
        raise UserError(f"quality gate: {unknown[0]!r} is unknown; use objective, exactness, {_LIMIT}.")
    if objective not in OBJECTIVES:
        raise UserError(f"quality gate: objective {objective!r} is unknown; choose one of "
                        f"{', '.join(OBJECTIVES)}.")
    if exactness not in _EXACTNESS:
        raise UserError(f"quality gate: exactness {exactness!r} is unknown; choose one of "
                        f"{', '.join(_EXACTNESS)}.")
    if limit is not None and not (is_finite(limit) and limit > 0):
        raise UserError(f"quality gate: {_LIMIT} {limit!r} must be a number greater than 0.")
    if limit is None and exactness != "bitwise" and not set(gate) & set(_OLD_LIMITS):
        raise UserError(f"quality gate: exactness {exactness!r} without a limit; write {_LIMIT}.")
    return objective, exactness, limit


def _passes(quality: Mapping[str, Any], limit: float | None,
            baseline: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Whether the gate is passed (None if unknown), and why."""
    if quality.get("flags"):
        return False, f"quality check failed: {quality['flags'][0]}"
    if quality.get("identical"):
        return True, "the latents and frames are the baseline's, bit for bit"
    ratio = quality.get("worst_ratio", na("the result is older than this gate", "run the preset again"))
    if quality.get("identical") is None or is_na(ratio):
        reason = ratio if "worst_ratio" in quality else next(filter(is_na, (quality.get("psnr_db"),)), ratio)
        return None, f"undecided: no error ratio, {reason['reason']}; {reason['how_to_fix']}"
    if limit is None:
        return None, "undecided: the gate is of an older kind; run the preset again"
    null = mildest_null(baseline)
    if null is None:
        return None, ("undecided: the baseline has no null rows to show what the gate is worth; run the "
                      "baseline again")
    if limit >= null[0]:
        return None, (f"undecided: the gate, {limit:g}, would pass a stream with {null[1]} (error ratio "
                      f"{null[0]:.3g}); set a lower {_LIMIT}")
    found = f"error ratio {ratio:.3g}, limit {limit:g}, mildest null row {null[0]:.3g} ({null[1]})"
    if decoder := quality.get("decoder"):
        found += f"; of the latents only, since {decoder['name']} makes other frames of them"
    if ratio > limit:
        return False, f"the quality gate is missed: {found}"
    parts = [("teacher-forced", quality)]
    if quality.get("free_running_counts", True):
        parts.append(("free-running", quality["free_running"]))
    for words, part in parts:
        worst = lookup(part, "error_ratio.worst")
        if worst is not None and worst > null[0]:
            return False, (f"the quality gate is missed in block {part['error_ratio']['worst_block']} "
                           f"({words}): {worst:.3g} times the baseline's error there; {found}")
    return True, f"the quality gate is passed: {found}"
