"""Two runs compared, and the verdict on one: may they be compared and over which blocks, how large is the
noise, is the preset kept? Pure functions of results; `metrics` says what the figures are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longlive_opt.config import ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.metrics import measurements
from longlive_opt.results import is_na, lookup, na
from longlive_opt.timeline import Event

CROWDED = "Something else ran on the machine meanwhile: not fit for comparison."
NOISE_FLOOR = 0.02  # one A/A pair can agree by luck: no gain below this counts
_FIGURES = {"ss_mean": "latency.ss_ms_per_frame.mean", "ss_p50": "latency.ss_ms_per_frame.p50",
            "ss_max": "latency.ss_ms_per_frame.max", "ps_mean": "latency.ps_ms.mean", "fps": "fps",
            "peak_allocated": "memory_gb.peak_allocated"}
_FAIR = ("environment.gpu", "environment.cpu", "environment.torch", "model.name", "weights.kind",
         "parameters.height", "parameters.width", "seed", "sizes.frames_per_block")
_OBJECTIVES = {"latency": ("ss_mean", "SS mean", "ms per frame"), "switch": ("ps_mean", "PS mean", "ms"),
               "memory": ("peak_allocated", "peak allocated memory", "GB")}
_LIMITS = {"min_psnr_db": ("psnr_db", 1), "min_ssim": ("ssim", 1), "min_ms_ssim": ("ms_ssim", 1),
           "max_lpips": ("lpips", -1), "min_clip_delta": ("clip_delta", 1)}


def unfair(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Empty if the two runs may be compared, else the first difference that forbids it."""
    for path in _FAIR:
        if lookup(a, path) != lookup(b, path):
            return f"{path} is {lookup(a, path)!r} against {lookup(b, path)!r}"
    return ""


def matched(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Two results over equally many steady-state blocks and prompt switches, the first of each: what the log
    compares (see `metrics.DEFINITIONS["comparison"]`). One that is short enough is returned as it is, and
    where one has no switches the other keeps its own. Switches without a stream of their own end with the
    blocks.
    """
    blocks, switches = (min(lookup(result, f"sizes.{key}") for result in (a, b))
                        for key in ("blocks_measured", "switches"))
    return _shortened(a, blocks, switches), _shortened(b, blocks, switches)


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


def aa_noise(result_a: Mapping[str, Any], result_b: Mapping[str, Any]) -> dict[str, Any]:
    """Run-to-run noise from one preset run twice: figure -> |a - b| / a of the `matched` runs, or n/a.

    Figures: ss_mean, ss_p50, ss_max, ps_mean, fps, peak_allocated; blocks and switches say how many were
    compared. One pair is a rough estimate: see `NOISE_FLOOR`.

    Raises:
        UserError: the two are not runs of one preset on one kind of machine.
    """
    difference = unfair(result_a, result_b)
    if result_a["preset"] != result_b["preset"]:
        difference = f"preset is {result_a['preset']!r} against {result_b['preset']!r}"
    if difference:
        raise UserError(f"A/A noise needs the same run twice, but {difference}: run one preset twice")
    result_a, result_b = matched(result_a, result_b)
    sizes = result_a["sizes"]
    noise: dict[str, Any] = {"preset": result_a["preset"], "blocks": sizes["blocks_measured"],
                             "switches": sizes["switches"]}
    for name, path in _FIGURES.items():
        a, b = lookup(result_a, path), lookup(result_b, path)
        if is_na(a) or is_na(b):
            noise[name] = a if is_na(a) else b
        else:
            noise[name] = abs(a - b) / a if a else 0.0
    return noise


def campaign_noise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`aa_noise` of the first preset in `results` that was run twice, None if there is none."""
    seen: dict[str, Mapping[str, Any]] = {}
    for result in results:
        if result["preset"] in seen:
            return aa_noise(seen[result["preset"]], result)
        seen[result["preset"]] = result
    return None


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

    Dropped is also what gains nothing, so that no change stays in for its own sake. Undecided: a run beside
    which something else ran, and a change within a noise of more than `NOISE_FLOOR`, for on such a machine it
    may be anything.

    `noise`: from `aa_noise`, None if nothing was run twice (then undecided). `gate`: `{"level": "exact"}`, or
    `{"level": "lossy", ...}` with at least one of min_psnr_db, min_ssim, min_ms_ssim, max_lpips,
    min_clip_delta, each a limit on the mean; optionally "objective": "latency" (the default), "switch" or
    "memory".
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

    if result["preset"] == "baseline":
        return {"keep": None, "rule": "reference", "rationale": "the others are compared with the baseline"}
    if baseline is None:
        return verdict(None, "undecided: the campaign has no baseline result")
    if difference := unfair(result, baseline):
        return verdict(None, f"undecided: not comparable with the baseline, {difference}")
    if crowded := [run["preset"] for run in (result, baseline) if lookup(run, "environment.co_scheduled")]:
        return verdict(None, f"undecided: something else ran on the machine beside {' and '.join(crowded)}; "
                             "repeat the campaign when nothing else runs on it")
    ours, reference = (lookup(run, _FIGURES[figure]) for run in matched(result, baseline))
    spread = noise[figure] if noise else na("no A/A noise", "run one preset twice in the campaign")
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
