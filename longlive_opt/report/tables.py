"""Results as tables: those of an experiment's notebook, one for each step of a run; its ablations; and those
of a campaign, for readers and as CSV. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import ExperimentConfig
from ..files import atomic_path
from ..measurement import decision
from ..measurement.result import is_na, lookup, na, number, numbers
from . import charts
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
from .log.markdown import percent, share_text

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
            "target_ms": charts.target_of(result), "within_target": within_target(result),
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
            "start-up buffer": charts.buffer_words(result),
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


def parameters_table(config: ExperimentConfig) -> pd.DataFrame:
    """The parameters that are not the baseline's on the laptop."""
    default, own = ExperimentConfig().to_dict(), config.to_dict()
    rows = {key: {"value": own[key], "default": default[key]} for key in own if own[key] != default[key]}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "default"])


def rooms_table(rooms: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each optimization did."""
    rows = [(room["name"], room["level"], room["report"]["done"]) for room in rooms]
    return pd.DataFrame(rows, columns=["optimization", "level", "what it did"])


def headline_table(measured: Mapping[str, Any]) -> pd.DataFrame:
    """The figures that a reader looks for first, of the sections that `measurement.protocol` makes."""
    latency, memory = measured["latency"], measured["memory_gb"]
    steady, switch = latency["ss_ms_per_frame"], latency["ps_ms"]
    rows = {f"SS {key}, ms per frame": steady[key] for key in ("mean", "p50", "p95", "p99", "max")}
    over = latency["ss_over_target"]
    rows[f"SS blocks over {over['target_ms']:g} ms per frame, %"] = 100 * over["share"]
    rows |= {f"PS {key}, ms": switch[key] for key in ("mean", "max")}
    rows |= {f"PS {key} at a random moment, ms": latency["ps_random_ms"][key] for key in ("mean", "p95")}
    rows |= {"first frame, ms": latency["first_frame_ms"], "FPS": measured["fps"],
             "FPS with prompt switches": measured["fps_with_switches"],
             "peak memory, GB": memory["peak_allocated"], "KV cache, GB": memory["kv_cache"]}
    return pd.DataFrame({"value": {name: plain(value) for name, value in rows.items()}})


def fidelity_table(quality: Mapping[str, Any], facts: Mapping[str, Any] | None) -> pd.DataFrame:
    """Errors against the truth: this run, the campaign's baseline and its null rows, each free-running and,
    where that says something, teacher-forced. Cells are numbers, n/a with the reason, or nothing.

    Args:
        quality: the section of the run.
        facts: those of the campaign's truth, None if it has none.
    """
    free = quality.get("free_running") or {}
    rows = {"this run, free-running": _fidelity_row(free or quality),
            "this run, teacher-forced": _fidelity_row(quality)}
    if facts is not None:
        for name, title in (("free_running", "free-running"), ("forced", "teacher-forced")):
            error = facts["baseline"][name]
            rows[f"baseline, {title}"] = _fidelity_row({"latent_error": error})
        for null in facts["nulls"]:
            running = null.get("free_running") or null
            rows[f"null: {null['title']}, free-running"] = {
                name: cell for name, cell in _fidelity_row(running).items()
                if running is null or not str(cell).startswith("n/a")}  # the run's own row says why
            if "free_running" in null and not is_na(null["latent_error"]):
                rows[f"null: {null['title']}, teacher-forced"] = _fidelity_row(null)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return pd.DataFrame([[row.get(name, "") for name in columns] for row in rows.values()],
                        index=list(rows), columns=columns, dtype=object)


def _fidelity_row(section: Mapping[str, Any]) -> dict[str, Any]:
    error, ratio = section.get("latent_error"), section.get("error_ratio")
    row: dict[str, Any] = {}
    for key, words in (("all", ""), ("last", ", last block"), ("worst", ", worst block")):
        for values, name, scale in ((error, "latent error, %", 100), (ratio, "error ratio", 1)):
            if values is not None:
                row[name + words] = plain(values if is_na(values) else scale * values[key])
    for key, name in (("psnr_db", "PSNR, dB"), ("ssim", "SSIM"), ("ms_ssim", "MS-SSIM"), ("lpips", "LPIPS"),
                      ("st_lpips", "ST-LPIPS"), ("clip_delta", "CLIP delta")):
        values = section.get(key)
        if values is None:
            continue
        row[name] = plain(values if is_na(values) else "equal" if values["mean"] is None else values["mean"])
        worst = "max" if "lpips" in key else "min"
        if not is_na(values) and worst in values:
            row[f"{name}, worst frame"] = "equal" if values[worst] is None else plain(values[worst])
    return row


def plain(value: Any) -> Any:
    """A figure for a table: rounded, or 'n/a: reason'."""
    if is_na(value):
        return f"n/a: {value['reason']}"
    return round(value, 3) if isinstance(value, float) else value


COLUMNS = {"SS mean, ms": "latency.ss_ms_per_frame.mean", "SS max, ms": "latency.ss_ms_per_frame.max",
           "denoise, ms": "latency.stages_ms.denoise.mean", "decode, ms": "latency.stages_ms.decode.mean",
           "PS mean, ms": "latency.ps_ms.mean", "FPS": "fps", "peak, GB": "memory_gb.peak_allocated",
           "KV cache, GB": "memory_gb.kv_cache", "PSNR, dB": "quality.psnr_db.mean",
           "error ratio": "quality.error_ratio.all"}
AS_IS = "as is"


def variation_summary(measured: Mapping[str, Any], fidelity: Mapping[str, Any], setup_s: Mapping[str, Any]
                      ) -> dict[str, Any]:
    """What is kept of a variation: the measured figures without events and single samples, and its quality.
    """
    latency = measured["latency"]
    return {"latency": {key: latency[key] for key in ("ss_ms_per_frame", "ps_ms", "stages_ms")},
            "fps": measured["fps"], "memory_gb": measured["memory_gb"], "sizes": measured["sizes"],
            "quality": fidelity, "setup_s": setup_s}


def variations_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """One row for the preset as it is and one for each variation; a cell is a number, or n/a and why."""
    rows = {AS_IS: result} | {name_of(row): row for row in result.get("variations", [])}
    return pd.DataFrame.from_dict({name: {column: _cell(row, path) for column, path in COLUMNS.items()}
                                   for name, row in rows.items()}, orient="index", columns=list(COLUMNS))


def name_of(variation: Mapping[str, Any]) -> str:
    """`local_attn_size: 9`"""
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in variation["changed"].items())


def _cell(row: Mapping[str, Any], path: str) -> Any:
    if "failure" in row:
        return row["failure"]
    value = number(row, path)
    if value is not None:
        return value
    if path.startswith("quality") and lookup(row, "quality.identical"):
        return "identical"
    places = (lookup(row, path), lookup(row, path.rpartition(".")[0]),
              lookup(row, "quality.psnr_db") if path.startswith("quality") else None)
    absent = next(filter(is_na, places), None)
    return absent or {"value": None, "reason": "not recorded", "how_to_fix": "run it again"}
