"""A campaign's results as tables, for readers and as CSV."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from longlive_opt import decision, figures
from longlive_opt.results import atomic_path, lookup, na, number, numbers

from .campaign import (
    FIGURES,
    NOISE,
    Campaign,
    Result,
    baseline_of,
    change_of,
    is_judged,
    noise_of,
    verdict_of,
    within_target,
)
from .text import percent, share_text

_WORLD = {"world_before": "world.adherence_before", "world_after": "world.adherence_after",
          "world_delay_blocks": "world.delay_blocks", "world_never": "world.never",
          "world_permanence": "world.permanence", "world_drift": "world.drift.change"}


def summary_table(results: Sequence[Result]) -> pd.DataFrame:
    """One row per result, numbers only (NaN for n/a); the change is against the first run of the baseline. A
    stream that is not `sustained` has no start-up buffer: it would only tell how long the stream was.

    The columns `world_...` are there if a video of the small world was judged in some run.
    """
    paths = {"ss_mean_ms": FIGURES["SS Mean"], "ss_p50_ms": "latency.ss_ms_per_frame.p50",
             "ss_p95_ms": "latency.ss_ms_per_frame.p95", "ss_p99_ms": FIGURES["SS P99"],
             "ss_max_ms": FIGURES["SS Max"], "ps_mean_ms": FIGURES["PS Mean"],
             "ps_max_ms": "latency.ps_ms.max", "ps_random_mean_ms": "latency.ps_random_ms.mean",
             "ps_random_p95_ms": "latency.ps_random_ms.p95", "fps": "fps",
             "fps_with_switches": "fps_with_switches", "joules_per_frame": "energy.joules_per_frame",
             "mean_power_w": "energy.mean_power_w", "peak_gb": FIGURES["Memory"],
             "kv_cache_gb": "memory_gb.kv_cache", "startup_buffer_ms": "playback.startup_buffer_ms",
             "psnr_db": "quality.psnr_db.mean", "ssim": "quality.ssim.mean", "lpips": "quality.lpips.mean",
             "clip_delta": "quality.clip_delta.mean", "error_ratio": "quality.worst_ratio",
             "st_lpips": "quality.st_lpips.mean", "blocks": "sizes.blocks_measured",
             "switches": "sizes.switches"} | (_WORLD if any(map(is_judged, results)) else {})
    baseline, rows = baseline_of(results), []
    for result in results:
        row = {"preset": result["preset"], "run": result.get("run", 1)}
        row |= {name: number(result, path) for name, path in paths.items()}
        sustained = lookup(result, "playback.sustained")
        if sustained is False:
            row["startup_buffer_ms"] = None
        rows.append(row | {
            "change_ss_mean_pct": change_of(result, baseline, "SS Mean"),
            "target_ms": figures.target_of(result), "within_target": within_target(result),
            "sustained": sustained,
            "identical": lookup(result, "quality.identical"),
            "keep": lookup(result, "decision.keep"), "verdict": verdict_of(result),
            "not_comparable": "" if baseline is None or result is baseline
                              else decision.fidelity_reason(result, baseline),
            "quick": lookup(result, "sizes.quick"),
            "weights": lookup(result, "weights.kind"), "gpu": lookup(result, "environment.gpu"),
            "created_utc": result.get("created_utc")})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["preset", "run", *paths])


def numbers_table(results: Sequence[Result]) -> pd.DataFrame:
    """The main columns of `summary_table` for readers: a row per run, and words where there is no number."""
    baseline, rows = baseline_of(results), []
    for result in results:
        rows.append({
            "preset": result["preset"], "run": result.get("run", 1),
            "SS mean, ms": _rounded(result, FIGURES["SS Mean"], 2),
            "change": percent(change_of(result, baseline, "SS Mean")),
            "SS max, ms": _rounded(result, FIGURES["SS Max"], 2),
            "PS mean, ms": _rounded(result, FIGURES["PS Mean"], 0),
            "FPS": _rounded(result, FIGURES["FPS"], 1),
            "start-up buffer": figures.buffer_words(result),
            "memory, GB": _rounded(result, FIGURES["Memory"], 2),
            "J per frame": _rounded(result, "energy.joules_per_frame", 1),
            "error ratio": _ratio_cell(result, baseline),
            "PSNR, dB": _fidelity_cell(result, baseline),
            "verdict": verdict_of(result),
            "blocks": _rounded(result, "sizes.blocks_measured", 0)})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["preset", "run"])


def _rounded(result: Result, path: str, digits: int) -> str:
    value = number(result, path)
    return "n/a" if value is None else f"{value:.{digits}f}"


def _ratio_cell(result: Result, baseline: Result | None) -> str:
    """The error ratio, or why there is no need of one."""
    if result is baseline:
        return "reference"
    if lookup(result, "quality.identical") is True:
        return "identical"
    return _rounded(result, "quality.worst_ratio", 2)


def _fidelity_cell(result: Result, baseline: Result | None) -> str:
    """PSNR to the truth; for results from before protocol 2 that to the baseline, or why there is no need of
    it.
    """
    cell = _ratio_cell(result, baseline)
    old = lookup(result, "quality.protocol") != 2
    return cell if old and cell in ("reference", "identical") else _rounded(result, "quality.psnr_db.mean", 1)


def to_csv(results: Sequence[Result], path: str | Path) -> Path:
    """Write `summary_table` as CSV, atomically; return the path."""
    with atomic_path(path) as temporary:
        summary_table(results).to_csv(temporary, index=False)
    return Path(path)


def runs_table(campaign: Campaign) -> pd.DataFrame:
    """Everything that lies in the campaign's folder, and what became of it."""
    rows = []
    for result in campaign.results:
        repeat = "" if result.get("run", 1) == 1 else f", run {result['run']}"
        rows.append({"run": f"{result['preset']}{repeat}", "status": "ok",
                     "detail": lookup(result, "sizes.note"), "weights": lookup(result, "weights.kind"),
                     "device": lookup(result, "environment.gpu") or "CPU"})
    rows += [{"run": f.label, "status": f.outcome, "detail": f.reason} for f in campaign.failures]
    rows += [{"run": place, "status": "not usable", "detail": reason} for place, reason in campaign.problems]
    return pd.DataFrame(rows, columns=["run", "status", "detail", "weights", "device"]).fillna("")


def noise_table(results: Sequence[Result]) -> pd.DataFrame:
    """A/A noise in percent, a row for each preset that was run more than once, and the range of SS max."""
    rows = []
    for preset, noise in noise_of(results).items():
        shares = {name: number(noise, key) for key, name in NOISE.items()}
        worst = numbers(noise, "values.ss_max")
        rows.append({"preset": preset, "runs": noise["runs"]}
                    | {name: None if share is None else round(100 * share, 2)
                       for name, share in shares.items()}
                    | {"SS max, ms": f"{min(worst):.2f} to {max(worst):.2f}" if worst else "n/a"})
    return pd.DataFrame(rows, columns=["preset", "runs", *NOISE.values(), "SS max, ms"])


def world_table(results: Sequence[Result]) -> pd.DataFrame | None:
    """How well each run's video followed its prompts in the small world: shares, delays in blocks, what was
    wrong. A run whose video was not judged says why; None if none was judged.
    """
    if not any(map(is_judged, results)):
        return None
    absent = na("not judged", "run the preset again")
    rows = []
    for result in results:
        world = result.get("world") or absent
        never = f", {world['never']} of {world['switches']} never" if world.get("never") else ""
        cells = {"adherence before": share_text(world.get("adherence_before", world)),
                 "adherence after": share_text(world.get("adherence_after", world)),
                 "switch delay, blocks": share_text(world.get("delay_blocks", world), 1) + never,
                 "permanence": share_text(world.get("permanence", world)),
                 "wrong": ", ".join(world.get("wrong", ())),
                 "not judged": ", ".join(world.get("not_judged", ()))}
        rows.append({"preset": result["preset"], "run": result.get("run", 1)} | cells)
    return pd.DataFrame(rows)
