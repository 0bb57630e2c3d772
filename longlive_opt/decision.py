"""Two runs compared, and the verdict on one: may they be compared and over which blocks, how large is the
noise, is the preset kept? Pure functions of results; `metrics` says what the figures are.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longlive_opt.config import BASELINE, STUDIES, ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.inputs import Script, spread_evenly
from longlive_opt.metrics import measurements
from longlive_opt.model_config import MODELS
from longlive_opt.results import is_na, lookup, na
from longlive_opt.timeline import Event

log = logging.getLogger(__name__)

CROWDED = "Something else ran on the machine meanwhile: not fit for comparison."
NOISE_FLOOR = 0.02  # a few runs can agree by luck: no gain below this counts
FIGURES = {"ss_mean": "latency.ss_ms_per_frame.mean", "ss_p50": "latency.ss_ms_per_frame.p50",
            "ss_max": "latency.ss_ms_per_frame.max", "ps_mean": "latency.ps_ms.mean", "fps": "fps",
            "peak_allocated": "memory_gb.peak_allocated"}
# What a figure depends on and no optimization may change: keys of a preset, whose defaults hold where a
# result is older than the key.
_SAME_KEYS = ("seed", "model_dtype", "block_frames", "denoising_steps", "timestep_shift", "context_noise",
              "local_attn_size", "sink_size", "global_sink", "relative_rope")
# What fidelity depends on besides: both videos have to be equally long.
_SAME_VIDEO = ("video_latent_frames", "fidelity_blocks")
_DEFAULTS = ExperimentConfig().to_dict()
PLANNED = "planned"  # status of what is known of a run before it
_OBJECTIVES = {"latency": ("ss_mean", "SS mean", "ms per frame"), "switch": ("ps_mean", "PS mean", "ms"),
               "memory": ("peak_allocated", "peak allocated memory", "GB")}
_LIMITS = {"min_psnr_db": ("psnr_db", 1), "min_ssim": ("ssim", 1), "min_ms_ssim": ("ms_ssim", 1),
           "max_lpips": ("lpips", -1), "min_clip_delta": ("clip_delta", 1)}


def unfair(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Empty if the two runs may be compared, else the first difference that forbids it.

    Compared is everything that a figure depends on and that no optimization may change: GPU (or CPU, for runs
    on one), torch, model, weights with the SHA-256 of every file, prompts and switch frames as they were
    used, seed, picture size, dtype, block size, sampling, window, sink and rotation. Where one is only
    `planned`, what one of the two does not say is not compared.
    """
    for name, ours, theirs in _facts(a, b):
        if ours != theirs:
            return _difference(name, ours, theirs)
    return ""


def fidelity_reason(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """Empty if the frames of the two may be compared, else why not: videos of unequal length, or `unfair`.

    `result` may be a planned run.
    """
    for key in _SAME_VIDEO:  # first, since prompts are spread over the length
        ours, theirs = _key(result, key), _key(baseline, key)
        if ours != theirs:
            return _difference(key, ours, theirs)
    return unfair(result, baseline)


def planned(config: ExperimentConfig, script: Script, sha256: Mapping[str, str] | None = None
            ) -> dict[str, Any]:
    """What is known of a run before it: the part of its result that `fidelity_reason` reads.

    Args:
        sha256: of the weights' files by part, None if they were not read.
    """
    model = config.model_config()
    weights = {"kind": "random" if config.weights == "random" else "files"}
    return {"status": PLANNED, "preset": config.name, "seed": config.seed,
            "parameters": config.to_dict(), "script": script.to_dict(),
            "model": {"name": model.name, "sizes": {"height": model.height, "width": model.width}},
            "weights": weights if sha256 is None else weights | {"sha256": dict(sha256)}}


def _facts(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """(name, value of `a`, value of `b`) of everything in which the two have to agree."""
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
    # Last: how they are spread depends on what was compared before.
    scripts = [script_of_result(run) for run in (a, b)]
    yield "prompts", *(prompts for prompts, _ in scripts)
    yield "switch frames", *(frames for _, frames in scripts)
    if _key(a, "prompts_file") is None and _key(b, "prompts_file") is None:
        yield "prompts", _key(a, "prompts"), _key(b, "prompts")  # also those that a short video leaves out


def _key(result: Mapping[str, Any], key: str) -> Any:
    """A preset's key: a result that does not state it is of code that did as the default does."""
    value = (result.get("parameters") or {}).get(key, _DEFAULTS[key])
    return list(value) if isinstance(value, tuple) else value


def _side(result: Mapping[str, Any], side: str) -> Any:
    own = MODELS.get(_key(result, "model"))
    return lookup(result, f"model.sizes.{side}") or _key(result, side) or getattr(own, side, None)


def script_of_result(result: Mapping[str, Any]) -> tuple[list[str] | None, list[int] | None]:
    """The prompts that a run used, and the latent frames at which each but the first took over.

    They stand under `script`; of an older result they follow from its parameters, unless it read them from a
    file: then both are None.
    """
    script = result.get("script")
    if script:
        return list(script["prompts"]), list(script["switch_frames"])
    if _key(result, "prompts_file") is not None:
        return None, None
    prompts, given = list(_key(result, "prompts")), _key(result, "switch_frame_indices")
    if given is not None:
        return prompts, list(given)
    frames = _key(result, "block_frames")
    script = spread_evenly(prompts, _key(result, "video_latent_frames") // frames, frames)
    return list(script.prompts), list(script.switch_frames)


def _difference(name: str, ours: Any, theirs: Any) -> str:
    """Of two lists of one length, only the first item that differs."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        at = next(i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
        name, ours, theirs = f"{name}[{at}]", ours[at], theirs[at]
    return f"{name} is {_short(ours)} against {_short(theirs)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def without_fidelity(quality: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """A `quality` section in which every metric is n/a for `reason`: the frames were not, or must not be,
    compared with the baseline's.
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
    """Whether the run takes presets apart and is none to take itself: it is measured, and never advised."""
    return result["preset"] in STUDIES or bool(result.get("variations"))


def matched(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Two results over equally many steady-state blocks and prompt switches, the first of each: what the log
    compares (see `metrics.DEFINITIONS["comparison"]`). One that is short enough is returned as it is, and
    where one has no switches the other keeps its own. Switches without a stream of their own end with the
    blocks.
    """
    first, second = _all_matched((a, b))
    return first, second


def _all_matched(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    blocks, switches = (min(lookup(run, f"sizes.{key}") for run in runs)
                        for key in ("blocks_measured", "switches"))
    return [_shortened(run, blocks, switches) for run in runs]


def compared(result: Mapping[str, Any], other: Mapping[str, Any] | None
             ) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The two, `matched`; None if there is no other, or the two may not be compared."""
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
    """Events before the block that is counted after the first `count` ones."""
    end = next(iter(counted[count:]), math.inf)
    events = map(Event.from_row, rows)
    return [event for event in events if event.block is None or event.block < end]


def aa_noise(*runs: Mapping[str, Any]) -> dict[str, Any]:
    """Run-to-run noise of one preset, from two or more runs in processes of their own: metric -> spread, or
    n/a.

    The spread is (max - min) / mean over the runs, each `matched` to the shortest: no distribution is
    assumed, and it can only grow with the number of runs. A few runs are a rough estimate: see `NOISE_FLOOR`.

    Returns:
        preset, runs, blocks and switches (how many of each were compared), the spread of ss_mean, ss_p50,
        ss_max, ps_mean, fps and peak_allocated, and under `values` what each run measured of them.

    Raises:
        UserError: fewer than two runs, or not of one preset under equal conditions.
    """
    if len(runs) < 2:
        raise UserError(f"A/A noise needs one preset twice or more, found {len(runs)} run; repeat it")
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
    for name, path in FIGURES.items():
        values = [lookup(run, path) for run in same]
        absent = next(filter(is_na, values), None)
        noise[name] = absent or (max(values) - min(values)) / ((math.fsum(values) / len(values)) or 1.0)
        noise["values"][name] = absent or values
    return noise


def campaign_noise(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """preset -> `aa_noise` of every preset in `results` that was run more than once; one whose runs are not
    alike is left out with a warning.
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
    """What a comparison of `preset` with the baseline has to exceed, metric by metric: the larger of its own
    noise and the baseline's, where both were repeated, else the one that is known; None if neither is.
    """
    known = [noise[name] for name in dict.fromkeys((preset, BASELINE)) if name in noise]
    if not known:
        return None
    larger = dict(known[0])
    for name in FIGURES:
        spreads = [run[name] for run in known if not is_na(run[name])]
        larger[name] = max(spreads) if spreads else known[0][name]
    return larger


def gate_of(config: ExperimentConfig, rooms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The quality gate of `decide`: bit-identical frames if every optimization is exact, else the preset's
    limits.
    """
    limits: dict[str, float] = {}
    if all(room["level"] == "exact" for room in rooms):
        return {"level": "exact", "objective": config.objective}
    return {"level": "lossy", "objective": config.objective, **(limits or {"min_psnr_db": 45.0})}


def decide(result: Mapping[str, Any], baseline: Mapping[str, Any] | None, noise: Mapping[str, Any] | None,
           gate: Mapping[str, Any]) -> dict[str, Any]:
    """The `decision` section: keep True or False by a stated rule, None where the rule cannot be applied.

    Dropped is also what gains nothing, so that no change stays in for its own sake. Undecided: a run that is
    not comparable with the baseline (`fidelity_reason`), one during which something else ran on the machine,
    and a change within a noise of more than `NOISE_FLOOR`, for on such a machine it may be anything. A study
    gets no verdict.

    `noise`: from `noise_of_preset`, None if nothing was run twice (then undecided). `gate`:
    `{"level": "exact"}`, or `{"level": "lossy", ...}` with at least one of min_psnr_db, min_ssim,
    min_ms_ssim, max_lpips, min_clip_delta, each a limit on the mean; optionally "objective": "latency" (the
    default), "switch" or "memory".
    """
    objective, level, limits = _read_gate(gate)
    figure, words, unit = _OBJECTIVES[objective]
    quality = ("the frames are bit-identical to the baseline's" if level == "exact"
               else "the mean over the frames passes " + ", ".join(f"{key} {limit:g}"
                                                                       for key, limit in limits.items()))
    rule = (f"keep if {words} improves on the baseline by more than the A/A noise "
            f"(at least {NOISE_FLOOR:.0%}) and {quality}; undecided if the change is within a larger noise")

    def verdict(keep: bool | None, rationale: str) -> dict[str, Any]:
        return {"keep": keep, "rule": rule, "rationale": rationale}

    if result["preset"] == BASELINE:
        return {"keep": None, "rule": "reference", "rationale": "the others are compared with the baseline"}
    if is_study(result):
        return {"keep": None, "rule": "study",
                "rationale": "no verdict: this is a study of other presets, and none to take itself"}
    if baseline is None:
        return verdict(None, "undecided: the campaign has no baseline result")
    if difference := fidelity_reason(result, baseline):
        return verdict(None, f"undecided: not comparable with the baseline, {difference}")
    if crowded := [run["preset"] for run in (result, baseline) if lookup(run, "environment.co_scheduled")]:
        return verdict(None, f"undecided: something else ran on the machine beside {' and '.join(crowded)}; "
                             "repeat the campaign when nothing else runs on it")
    ours, reference = (lookup(run, FIGURES[figure]) for run in matched(result, baseline))
    spread = noise[figure] if noise else na("no A/A noise", "run the baseline twice in the campaign")
    for value in (ours, reference, spread):
        if is_na(value):
            return verdict(None, f"undecided: {value['reason']}; {value['how_to_fix']}")
    gain, threshold = (reference - ours) / reference, max(spread, NOISE_FLOOR)
    compared = (f"{words} {ours:.4g} {unit} against {reference:.4g}: {'gain' if gain >= 0 else 'loss'} "
                f"{abs(gain):.1%}, threshold {threshold:.1%}")
    if abs(gain) <= spread and spread > NOISE_FLOOR:
        return verdict(None, f"undecided: {compared}, within the noise of this machine; repeat the campaign "
                             "when nothing else runs on it")
    if gain <= threshold:
        return verdict(False, f"{compared}: no gain above the threshold")
    passed, why = _passes(result["quality"], level, limits)
    return verdict(passed, f"{compared}; {why}")


def _read_gate(gate: Mapping[str, Any]) -> tuple[str, str, dict[str, float]]:
    objective, level = gate.get("objective", "latency"), gate.get("level")
    limits = {key: gate[key] for key in _LIMITS if gate.get(key) is not None}
    if unknown := sorted(set(gate) - {"objective", "level", *_LIMITS}):
        raise UserError(f"quality gate: {unknown[0]!r} is unknown; use objective, level, "
                        f"{', '.join(_LIMITS)}.")
    if objective not in _OBJECTIVES:
        raise UserError(f"quality gate: objective {objective!r} is unknown; choose one of "
                        f"{', '.join(_OBJECTIVES)}.")
    if level not in ("exact", "lossy") or (level == "lossy") != bool(limits):
        raise UserError(f"quality gate: level {level!r} with limits {sorted(limits)}; write 'exact' without "
                        f"limits, or 'lossy' with at least one of {', '.join(_LIMITS)}.")
    return objective, level, limits


def _passes(quality: Mapping[str, Any], level: str, limits: Mapping[str, float]) -> tuple[bool | None, str]:
    """(True, False, or None if it cannot be told; why)."""
    identical = quality.get("identical")
    if quality.get("flags"):
        return False, f"quality check failed: {quality['flags'][0]}"
    if identical is None:
        return None, "undecided: the frames were not compared with the baseline's"
    if identical:
        return True, "the frames are identical"
    if level == "exact":
        return False, "declared exact, but the frames differ from the baseline's"
    undecided = ""
    for key, limit in limits.items():
        name, sign = _LIMITS[key]
        metric = quality[name]
        if is_na(metric):
            undecided = undecided or f"undecided: {name} is n/a, {metric['reason']}; {metric['how_to_fix']}"
        # A null mean is a PSNR that is infinite: every compared frame was equal.
        elif metric["mean"] is not None and sign * metric["mean"] < sign * limit:
            return False, f"{name} {metric['mean']:.4g} misses {key} {limit:g}"
    return (None, undecided) if undecided else (True, "the quality gate is passed")
