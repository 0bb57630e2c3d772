"""Place the names of lines and points so that they cover neither one another nor the lines."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .chart import FONT, note

_HALO = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85}


def name_lines(ax: Axes, names: Sequence[tuple[float, float, str, str]]) -> None:
    """Put names at the right edge, from (where the line ends, value, text, colour), moved apart so that none
    overlap. A dotted line connects a name with a line that ends earlier.
    """
    (low, high), right = ax.get_ylim(), ax.get_xlim()[1]
    ax.set_xlim(right=right)
    height = 0.78 * ax.figure.get_figheight() / ax.get_subplotspec().get_gridspec().nrows
    gap = 1.45 * FONT / 72 / height  # a line of text, in heights of the axes
    items = sorted(((value - low) / (high - low), end, text, colour) for end, value, text, colour in names)
    for (height, end, text, colour), moved in zip(items, spread([item[0] for item in items], gap),
                                                  strict=True):
        if end < right:
            ax.hlines(low + height * (high - low), end, right, color=colour, lw=0.8, ls=":", alpha=0.7)
        # Start at the name's left side, since a steep leader from its centre would cross its neighbours.
        ax.annotate(text, (1.0, height), (1.04, moved), xycoords="axes fraction", textcoords="axes fraction",
                    va="center", color=colour, fontsize=FONT, annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 0,
                                "relpos": (0, 0.5)})


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights at least `gap` apart. Heights that are too close form a group around their mean."""
    groups: list[list[float]] = []

    def bottom(group: list[float]) -> float:
        return sum(group) / len(group) - (len(group) - 1) * gap / 2

    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + len(groups[-2]) * gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [bottom(group) + index * gap for group in groups for index in range(len(group))]


def name_points(ax: Axes, names: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Put names, from (point, text, colour), next to their points where they cover least of other names,
    points and lines.
    """
    ax.figure.draw_without_rendering()  # the layout must be final before data coordinates become pixels
    scale = ax.figure.dpi / 72
    lines = np.concatenate([np.zeros((0, 2)), *map(along, ax.get_lines())]) / scale
    (left, bottom), (right, top) = ax.get_window_extent().get_points() / scale
    anchors = [tuple(ax.transData.transform(point) / scale) for point, _, _ in names]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    offsets = [(dx, side * 14 * row) for row in range(8) for side in (1, -1) for dx in (8, -8)]
    for (x, y), (at, text, colour) in zip(anchors, names, strict=True):
        width, height = 0.6 * FONT * len(text), 1.3 * FONT
        best = None
        for rank, (dx, dy) in enumerate(offsets):
            begin = x + dx - (width if dx < 0 else 0)
            box = (begin, y + dy - height / 2, begin + width, y + dy + height / 2)
            outside = box[0] < left or box[1] < bottom or box[2] > right or box[3] > top
            struck = np.all((lines > box[:2]) & (lines < box[2:]), axis=1).sum()
            cost = 1000 * (outside + sum(_overlap(box, other) for other in taken)) + 10 * struck + rank
            if best is None or cost < best[0]:
                best = cost, box, dx, dy
        _, box, dx, dy = best
        taken.append(box)
        note(ax, text, at, (dx, dy), va="center", ha="left" if dx > 0 else "right", color=colour, bbox=_HALO,
             arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (dx < 0, 0.5)}
             if dy else None)


def along(line: Line2D) -> np.ndarray:
    """Points every two pixels along a drawn line."""
    corners = line.get_transform().transform(line.get_xydata())
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(corners, axis=0).T))])
    at = np.arange(0.0, lengths[-1], 2.0)
    return np.stack([np.interp(at, lengths, corners[:, axis]) for axis in (0, 1)], axis=1)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
