"""Chart of what changed between two campaigns: one row per preset and metric, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .chart import DARK, GREY, Chart, described, name_rows, new_axes, not_drawn, note, plain

COLOURS = {"faster": "#0072b2", "slower": "#d55e00", "noise": GREY, "undecided": GREY}


class Interval(Protocol):
    """A relative change with its interval of confidence, or None where there is no comparison."""

    preset: str
    metric: str
    change: float | None
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str: ...


def change_intervals(changes: Sequence[Interval], floor: float, confidence: float) -> Chart:
    """Changes in percent with their intervals; within `floor` (a share) lies noise whatever its interval."""
    title = "What changed? Below zero is faster"
    drawn = [one for one in changes if one.change is not None]
    if not drawn:
        return not_drawn(title, "no preset of the two campaigns can be compared")
    figure, ax = new_axes(title, 1.3 + 0.4 * len(drawn))
    ax.axvspan(-100 * floor, 100 * floor, color="#eeeeee", zorder=0)
    ax.axvline(0, color=GREY, lw=1)
    for row, one in enumerate(drawn):
        colour = COLOURS[one.verdict]
        ax.plot([100 * one.low, 100 * one.high], [row, row], color=colour, lw=2.5, solid_capstyle="butt")
        ax.plot(100 * one.change, row, "o", color=colour, ms=6)
        note(ax, f"{one.change:+.1%} {one.verdict}", (100 * one.change, row), (0, 5), ha="center",
             color=DARK if colour == GREY else colour)
    name_rows(ax, [plain(f"{one.preset}, {one.metric.partition(',')[0]}", 34) for one in drawn])
    ends = [100 * end for one in drawn for end in (one.low, one.high)] + [-100 * floor, 100 * floor]
    room = max(ends) - min(ends)
    ax.set(xlim=(min(ends) - 0.08 * room, max(ends) + 0.08 * room),
           xlabel=f"change in percent, line: {confidence:.0%} interval, grey: below {floor:.0%}")
    return described(figure, f"Change with its {confidence:.0%} interval", (
        f"{one.preset}, {one.metric}: {one.change:+.1%} ({one.low:+.1%} to {one.high:+.1%}), {one.verdict}"
        for one in drawn))
