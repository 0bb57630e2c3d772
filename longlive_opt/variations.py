"""The `variations` of a result: the preset measured again with one key changed at a time. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .results import is_na, lookup, number

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
