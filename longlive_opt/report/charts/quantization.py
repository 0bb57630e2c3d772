"""The chart of the 8-bit formats study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .chart import DARK, FONT, GREY, Chart, described, new_axes, not_drawn
from .labels import name_points

_COLOURS = {"bf16": "#4d4d4d", "int8_bf16": "#3d9ad1", "int8_fp8": "#d98b00", "fp8_fp8": "#b4508f"}
_MARKS = {None: "o", "int8": "s", "fp8": "^"}
_CACHES = {"bf16": "K, V bf16", "int8_bf16": "K int8, V bf16", "int8_fp8": "K int8, V e4m3",
           "fp8_fp8": "K, V e4m3"}
_FORMS = {None: "as they are", "int8": "int8", "fp8": "e4m3"}


def error_against_time(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Error ratio against denoising time of each combination. Down and to the left is better. The chart names
    the combinations that no other one beats in both.
    """
    title = "Exactness against speed of 8-bit formats"
    if not rows:
        return not_drawn(title, "no combination was measured")
    figure, ax = new_axes(title, 5.2)
    points = [(row["ms_per_frame"], row["ratio"]) for row in rows]
    for row, (x, y) in zip(rows, points, strict=True):
        partly = row["form"] is not None and len(row["layers"]) < 4
        colour = _COLOURS[row["cache"]]
        ax.scatter([x], [y], s=30 if partly else 64, marker=_MARKS[row["form"]], zorder=3,
                   facecolors="white" if partly else colour, edgecolors=colour)
    front = [(row, point) for row, point in zip(rows, points, strict=True)
             if not any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points)]
    front.sort(key=lambda pair: pair[1])
    ax.step([x for _, (x, _) in front], [y for _, (_, y) in front], where="post", color=GREY, lw=1.0,
            zorder=1)
    ax.axhline(1.0, color=DARK, lw=0.8, ls=":")
    ax.set_yscale("log")
    low, high = min(1.0, *(y for _, y in points)), max(y for _, y in points)
    ticks = [tick for tick in (0.5, 0.7, 1, 1.2, 1.6, 2, 3, 4, 6, 10, 15, 20)
             if 0.9 * low < tick < 1.2 * high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(0.85 * low, 1.3 * high)
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    ax.set_xlim(left - 0.2 * (right - left) - 0.1, right + 0.5 * (right - left) + 0.1)  # room for the legend
    ax.set(xlabel="denoising, ms per video frame   (left is faster)",
           ylabel="error / the reference's own   (1: as exact)")
    for name, colour in _COLOURS.items():
        ax.scatter([], [], color=colour, marker="o", label=_CACHES[name])
    for form, mark in _MARKS.items():
        ax.scatter([], [], color=GREY, marker=mark, label=f"linear layers {_FORMS[form]}")
    ax.scatter([], [], facecolors="white", edgecolors=GREY, label="some of them")
    ax.legend(fontsize=FONT - 1, loc="upper right", frameon=False)
    name_points(ax, [((x, y), f"{_CACHES[row['cache']]}; {row['linears']}", _COLOURS[row["cache"]])
                     for row, (x, y) in front])
    return described(figure, "ratio of errors against denoising time", (
        f"{_CACHES[row['cache']]}, linear layers {row['linears']}: {x:.2f} ms, ratio {y:.2f}"
        for row, (x, y) in zip(rows, points, strict=True)))
