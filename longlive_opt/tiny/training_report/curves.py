"""Tables and curves from a training log, and the style shared by all charts of this report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import pandas as pd

from ...report.charts import Chart
from .reader import ROW_KEYS, Row

_TITLES = {"vae": "VAE", "text": "text encoder alone", "teacher": "teacher", "student": "student"}
_SERIES = {"loss": "weighted sum", "l1": "pixels, L1", "edges": "differences in space, L1",
           "change": "differences in time, L1", "kl": "KL", "flow": "flow",
           "opening_flow": "flow of openings", "switch_flow": "flow after a switch", "opening": "openings",
           "reading": "attributes of the prompt, cross entropy", "true": "true past", "stream": "own past",
           "gradient": "norm of the gradient", "read_right": "share read correctly"}
_NO_LOSS = ("gradient", "read_right")
_LOG_FROM = 4.0  # least ratio of the largest to the smallest value for a logarithmic scale


def stage_table(rows: Sequence[Row]) -> pd.DataFrame:
    """One row per stage: steps, minutes of training, progress (the share of the planned time at the last line
    of the log; later steps do not count), and the first and last values of each curve.
    """
    table = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        steps, spent = own[-1]["step"], _minutes(own)
        table[_TITLES.get(stage, stage)] = {
            "steps": int(steps), "minutes": round(spent, 2),
            "ms per step": round(6e4 * spent / steps, 1), "progress": own[-1]["progress"],
            "from, to": "; ".join(_curves(own))}
    return pd.DataFrame.from_dict(table, orient="index")


def _curves(rows: Sequence[Row]) -> list[str]:
    """The first value and the mean of the last tenth, for each curve that lasts to the end of its stage."""
    last, curves = rows[-math.ceil(len(rows) / 10):], []
    for key in _series(rows):
        if all(key in row for row in last):
            first = next(row for row in rows if key in row)
            since = "" if first is rows[0] else f" (from step {first['step']:.0f})"
            end = sum(row[key] for row in last) / len(last)
            curves.append(f"{_SERIES.get(key, key)} {digits(first[key])} to {digits(end)}{since}")
    return curves


def _minutes(rows: Sequence[Row]) -> float:
    """Minutes of training up to the last row of a stage. After a resumption, a line averages fewer steps than
    separate it from the previous line. So the time follows from the progress, and the lines only give its
    scale.
    """
    scale = median((now["step"] - before["step"]) * now["ms_per_step"]
                   / max(now["progress"] - before["progress"], 1e-4)
                   for before, now in pairwise([{"step": 0, "progress": 0}, *rows]))
    return scale * rows[-1]["progress"] / 6e4


def loss_chart(rows: Sequence[Row]) -> Chart:
    """Curves of one stage over its steps: one panel with the losses and one per other metric. A panel with
    positive curves of a large range is logarithmic.
    """
    series = _series(rows)
    panels = [[key for key in series if key not in _NO_LOSS], *([key] for key in _NO_LOSS if key in series)]
    panels = [keys for keys in panels if keys]
    chart = Chart(figsize=(9, 2.9), dpi=110, layout="constrained")
    axes = chart.subplots(1, len(panels), squeeze=False,
                          width_ratios=[2, *[1] * (len(panels) - 1)])[0]
    title = _TITLES.get(rows[0]["stage"], rows[0]["stage"])
    for ax, keys in zip(axes, panels):
        for key, colour in zip(keys, COLOURS * len(keys)):
            points = [(row["step"], row[key]) for row in rows if key in row]
            ax.plot(*zip(*points), color=colour, lw=1.2, label=_SERIES.get(key, key),
                    marker="." if len(points) < 40 else None)
        values = [row[key] for row in rows for key in keys if key in row]
        if min(values) > 0 and max(values) > _LOG_FROM * min(values):
            ax.set_yscale("log")
        name = f"{title}: losses" if keys is panels[0] else _SERIES[keys[0]]
        dress(ax, name, "step")
    axes[0].legend(frameon=False, fontsize=8)
    chart.alt = f"{title}, curves over {rows[-1]['step']:.0f} steps: {'; '.join(_curves(rows))}."
    return chart


def _series(rows: Sequence[Row]) -> list[str]:
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ROW_KEYS]


COLOURS = ("#3b75af", "#d1491b", "#5aa469", "#9467bd", "#8a8a8a", "#e0a100")


def digits(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.0f}" if value == round(value) and abs(value) >= 2 or value == 0 else f"{value:.3g}"


def dress(ax: Any, title: str, label: str) -> None:
    ax.set_title(title, loc="left", fontsize=9)
    ax.set_xlabel(label, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
