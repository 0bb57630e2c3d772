"""Charts of a roofline: kernels against their floors, speed against intensity, distance to the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.patches import Patch

from ...measurement.result import numbers
from .chart import (
    DARK,
    FONT,
    GREY,
    RED,
    STAGE_COLOURS,
    Chart,
    Result,
    described,
    first_runs,
    in_ms,
    mean_of,
    name_of,
    name_rows,
    new_axes,
    not_drawn,
    note,
    plain,
    result_colour,
)

_COLOURS = {"linear layers": STAGE_COLOURS["denoise"], "attention": STAGE_COLOURS["recache"],
            "convolutions": STAGE_COLOURS["decode"], "VAE attention": "#009e73",
            "norms and the rest": STAGE_COLOURS["text_encode"], "copies": STAGE_COLOURS["copy_to_host"],
            "no kernel": STAGE_COLOURS["other"]}


class Row(Protocol):
    """What a chart needs of one kind of kernels (`measurement.roofline.KindRow`)."""

    kind: str
    ms: float
    floor_ms: float
    flops: float
    bytes: float


def kernels_against_floor(rows: Sequence[Row]) -> Chart:
    """Measured ms per block of each kind (bar) and its floor (black line)."""
    title = "Kernels of a steady block against their floors"
    if not rows:
        return not_drawn(title, "no kernel was recorded")
    figure, ax = new_axes(title, 1.6 + 0.5 * len(rows))
    right = max(max(row.ms, row.floor_ms) for row in rows)
    for place, row in enumerate(rows):
        ax.barh(place, row.ms, height=0.56, color=_COLOURS[row.kind])
        words = f"{in_ms(row.ms)} ms"
        if row.floor_ms:
            ax.plot([row.floor_ms] * 2, [place - 0.36, place + 0.36], color=DARK, lw=2)
            words += f", floor {in_ms(row.floor_ms)} ({row.ms / row.floor_ms:.2f} x)"
        note(ax, words, (max(row.ms, row.floor_ms), place), (6, 0), va="center")
    name_rows(ax, [row.kind for row in rows])
    ax.set(xlim=(0, 1.35 * right),
           xlabel="ms per block   (black: every operator alone, with its fastest kernel)")
    return described(figure, "ms per block, and the floor", (
        f"{row.kind} {in_ms(row.ms)}, floor {in_ms(row.floor_ms)}" for row in rows))


def speed_against_intensity(rows: Sequence[Row], points: Sequence[Mapping[str, Any]], copy_gb_per_s: float
                            ) -> Chart:
    """The roofline: TFLOP/s against FLOP per byte. Small dots are operators alone, large ones what each kind
    reached in the block; the line is what a copy's bandwidth allows.
    """
    title = "Roofline: speed against arithmetic intensity"
    shown = [row for row in rows if row.flops and row.ms]
    if not points or not shown:
        return not_drawn(title, "no operator was measured")
    figure, ax = new_axes(title, 4.8)
    for point in points:
        ax.scatter([point["intensity"]], [point["tflops"]], s=14, color=_COLOURS[point["kind"]], alpha=0.55)
    for row in shown:
        ax.scatter([row.flops / row.bytes], [row.flops / row.ms / 1e9], s=90, marker="D",
                   color=_COLOURS[row.kind], edgecolors="white", zorder=4)
    top = max(point["tflops"] for point in points)
    intensities = [point["intensity"] for point in points] + [row.flops / row.bytes for row in shown]
    low, high = 0.7 * min(intensities), 1.4 * max(intensities)
    knee = min(max(top * 1e3 / copy_gb_per_s, low), high)
    ax.plot([low, knee, high], [low * copy_gb_per_s / 1e3, min(top, knee * copy_gb_per_s / 1e3), top],
            color=DARK, lw=1.2)
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte that has to move",
           ylabel="TFLOP/s   (dots: operators alone, diamonds: in the block)")
    kinds = dict.fromkeys(row.kind for row in shown)
    figure.legend(handles=[Patch(color=_COLOURS[kind], label=kind) for kind in kinds],
                  loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=FONT)
    return described(figure, "Diamonds: what each kind reached in the block, TFLOP/s", (
        [f"{row.kind} {row.flops / row.ms / 1e9:.3g}" for row in shown]
        + [f"fastest operator alone {top:.3g}", f"copy {copy_gb_per_s:.0f} GB/s"]))


def distance_to_floor(results: Sequence[Result], preset: str, block_ms: float, floor_ms: float,
                      reason: str = "") -> Chart:
    """SS mean of a campaign's presets and of this run, with the floor as a line.

    Args:
        preset: of this run, whose formats the floor has.
        reason: why the campaign's runs cannot be compared with this floor; then only this run is drawn.
    """
    rows = [] if reason else [
        (name_of(result), mean_of(numbers(result, "latency.ss_block_ms")), result_colour(result))
        for result in first_runs(results)]
    rows = [row for row in rows if row[1]] + [(f"{preset}, this run", block_ms, DARK)]
    rows.sort(key=lambda row: -row[1])
    figure, ax = new_axes(f"Distance to the floor of {preset}", 1.7 + 0.42 * len(rows))
    for place, (_, ms, colour) in enumerate(rows):
        ax.barh(place, ms, height=0.56, color=colour)
        note(ax, f"{in_ms(ms)} ms, {ms / floor_ms:.2f} x", (ms, place), (6, 0), va="center")
    ax.axvline(floor_ms, color=RED, lw=1.4)
    note(ax, f"floor {in_ms(floor_ms)} ms", (floor_ms, -0.72), (4, 0), va="center", color=RED)
    name_rows(ax, [name for name, _, _ in rows])
    ax.set(xlim=(0, 1.25 * max(ms for _, ms, _ in rows)), xlabel="ms per steady-state block")
    if reason:
        figure.supxlabel(plain(f"Without the campaign: {reason}.", 140), color=GREY, fontsize=FONT - 1)
    return described(figure, f"Floor {in_ms(floor_ms)} ms per block", (
        f"{name} {in_ms(ms)} ms, {ms / floor_ms:.2f} times the floor" for name, ms, _ in rows))
