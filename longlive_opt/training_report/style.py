"""What the charts and tables share."""

from __future__ import annotations

from typing import Any

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
