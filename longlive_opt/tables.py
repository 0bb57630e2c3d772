"""The tables that an experiment's notebook shows, one for each step of a run. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .config import ExperimentConfig
from .results import is_na


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
    """The figures that a reader looks for first, of the sections that `measurement` makes."""
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
