"""A figure that a notebook shows by itself, and what every chart begins and ends with: axes, notes, words."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .palette import DARK, GREY

FONT = 9  # points
_KEPT_COLOURS = 64
_DPI = 110
_WIDTH = 9  # inches


class Chart(Figure):
    """A Figure that a notebook shows by itself: no pyplot, hence no global state.

    `alt` says in words what there is to see; without it the titles stand for it.
    """

    alt = ""

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.save(buffer)
        return buffer.getvalue(), {"alt": self.alt or "; ".join(ax.get_title(loc="left") for ax in self.axes)}

    def save(self, target: Path | BinaryIO) -> None:
        """Write as PNG. Without pictures in it, a palette will do: a third of the size for lines and text."""
        if any(ax.images for ax in self.axes):
            self.savefig(target, format="png")
            return
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        _few_colours(Image.open(buffer).convert("RGB")).save(target, "PNG", optimize=True)


def _few_colours(picture: Image.Image) -> Image.Image:
    """The picture in 256 colours: the most frequent ones as they are, the others by greatest coverage. By
    frequency alone a thin line would get the colour of a thicker one.
    """
    codes = np.asarray(picture, dtype=np.int64) @ (1 << 16, 1 << 8, 1)
    found, places, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    others = picture.quantize(256 - _KEPT_COLOURS, Image.Quantize.MAXCOVERAGE).getpalette()
    frequent = colours[np.argsort(-counts, kind="stable")[:_KEPT_COLOURS]]
    palette = np.concatenate([frequent, np.reshape(others, (-1, 3))])[:256]
    nearest = ((colours[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1).astype(np.uint8)
    few = Image.fromarray(nearest[places].reshape(codes.shape), "P")
    few.putpalette(palette.astype(np.uint8).tobytes())
    return few


def new_axes(title: str, height: float) -> tuple[Chart, Axes]:
    figure, axes = new_lanes(title, height, 1)
    return figure, axes[0]


def new_lanes(title: str, height: float, count: int) -> tuple[Chart, list[Axes]]:
    """A chart of axes below one another that share their x axis; the title stands above the first."""
    figure = Chart(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    axes = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    axes[0].set_title(title, loc="left", fontsize=FONT + 2)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e6e6", lw=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=FONT)
    return figure, axes


def not_drawn(title: str, reason: Any) -> Chart:
    figure, ax = new_axes(title, 1.4)
    ax.set_axis_off()
    ax.text(0.0, 0.6, f"Not drawn: {plain(reason)}.", transform=ax.transAxes, color=GREY)
    return told(figure, f"Not drawn: {plain(reason)}")


def told(chart: Chart, shown: str, readings: Iterable[str] = ()) -> Chart:
    """The chart with its alternative text: the title, what is shown, and what can be read there."""
    values = "; ".join(readings)
    title = chart.axes[0].get_title(loc="left")
    words = f"{title}{'' if title.endswith('?') else '.'} {shown}{': ' if values else ''}{values}."
    chart.alt = words.replace(r"\$", "$")
    return chart


def note(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Text at `offset` points from `at`."""
    ax.annotate(text, at, offset, textcoords="offset points",
                **{"fontsize": FONT, "color": DARK, "annotation_clip": False} | style)


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Rows from top to bottom, named on the left."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.75)
    ax.grid(visible=False, axis="y")


def plain(text: Any, length: int = 100) -> str:
    """One line of bounded length without mathtext: a dollar sign in a name must not stop a report."""
    text = " ".join(str(text).split())
    return (text if len(text) <= length else text[:length - 1] + "…").replace("$", r"\$")


def in_ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 10 else f"{round(milliseconds, 1) + 0.0:.1f}"
