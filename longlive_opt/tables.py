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


def quality_table(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The figures of `quality.log_numbers`, a row for each protocol."""
    return pd.DataFrame({name: {key: plain(value) for key, value in row.items()}
                         for name, row in rows.items()}).T


def plain(value: Any) -> Any:
    """A figure for a table: rounded, or 'n/a: reason'."""
    if is_na(value):
        return f"n/a: {value['reason']}"
    return round(value, 3) if isinstance(value, float) else value
