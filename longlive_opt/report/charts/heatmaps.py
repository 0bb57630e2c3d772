"""Charts of the inside of a preset: errors by layer, slots of the cache, attention by latent frame."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from .chart import (
    DARK,
    FONT,
    GREY,
    RED,
    STAGE_COLOURS,
    Chart,
    colour_of,
    described,
    name_rows,
    new_axes,
    new_lanes,
    not_drawn,
    note,
    plain,
)
from .labels import name_lines

ROLES = {"sink": STAGE_COLOURS["recache"], "past": STAGE_COLOURS["denoise"],
         "present": STAGE_COLOURS["decode"], "empty": "#e6e6e6"}
"""What a slot of the cache holds -> its colour."""
_LEAST = 1e-8


def error_by_layer(preset: str, timesteps: Sequence[float], errors: Sequence[Sequence[float]],
                   reference: Sequence[Sequence[float]] | None = None) -> Chart:
    """Relative error of each layer's output, one line per denoising step; dashed, the reference's own error
    in the preset's dtype.

    Args:
        errors, reference: [step][layer].
    """
    title = f"Error of every layer against the reference in float32: {plain(preset, 22)}"
    if not errors or not max(map(max, errors)) > 0:
        return not_drawn(title, "every layer's output is that of the reference, bit for bit")
    figure, ax = new_axes(title, 4.8)
    names, steps = [], len(errors)
    for values, colour, dashed in ((errors, colour_of(preset), False), (reference or (), GREY, True)):
        for step, line in enumerate(values):
            shade = _lighter(colour, 0.6 * step / max(1, steps - 1))
            shown = [(layer, math.log10(100 * max(error, _LEAST))) for layer, error in enumerate(line, 1)]
            ax.plot(*zip(*shown, strict=True), color=shade, marker=".", lw=1.0 if dashed else 1.6,
                    ls="--" if dashed else "-")
            if not dashed or step in (0, steps - 1):
                name = f"{'reference, ' if dashed else ''}step {step + 1} (t={timesteps[step]:.0f})"
                names.append((*shown[-1], name, shade))
    ax.yaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
    ax.set(ylabel="relative error of the layer's output, %", xlabel="layer   (dashed: reference)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_lines(ax, names)
    return described(figure, "Relative error in per cent after the last layer", (
        [f"step {step} {100 * line[-1]:.2g}" for step, line in enumerate(errors, 1)]
        + [f"reference, step {step} {100 * line[-1]:.2g}" for step, line in enumerate(reference or (), 1)]))


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    return tuple(1 - (1 - part) * (1 - share) for part in to_rgb(colour))


def slots_by_block(cache: str, sink: int, rows: Sequence[Sequence[tuple[str, int | None, str]]],
                   switches: Sequence[int] = ()) -> Chart:
    """The slots of a cache (columns, in the order of the memory) after every block (rows).

    Args:
        rows: per block and slot (role, latent frame or None, mark); a mark is "recached", "old prompt" or "".
        switches: the blocks at which a prompt took over.
    """
    title = f"What lies in which slot: {plain(cache, 40)}"
    if not rows:
        return not_drawn(title, "no block was streamed")
    figure, ax = new_axes(title, 1.9 + 0.34 * len(rows))
    for block, row in enumerate(rows):
        for slot, (role, frame, mark) in enumerate(row):
            dark = role in ("sink", "empty")
            ax.add_patch(Rectangle((slot - 0.46, block - 0.44), 0.92, 0.88, facecolor=ROLES[role],
                                   hatch="////" if mark == "recached" else None, edgecolor="white", lw=0.4))
            if mark == "old prompt":
                ax.add_patch(Rectangle((slot - 0.44, block - 0.41), 0.88, 0.82, fill=False, edgecolor=RED,
                                       lw=1.4, ls=":"))
            if frame is not None:
                ax.text(slot, block, str(frame), ha="center", va="center", fontsize=FONT,
                        color=DARK if dark else "white",
                        bbox={"facecolor": ROLES[role], "edgecolor": "none", "pad": 1.5})
    for block in switches:
        ax.axhline(block - 0.5, color=RED, lw=1.2)
        note(ax, "prompt switch", (len(rows[0]) - 0.5, block - 0.5), (3, 0), va="center", color=RED,
             fontsize=FONT - 1)
    if 0 < sink < len(rows[0]):
        ax.axvline(sink - 0.5, color=DARK, lw=1.0)
    name_rows(ax, [f"after block {block}" for block in range(len(rows))])
    ax.grid(visible=False)
    ax.set_xticks(range(len(rows[0])))
    ax.set(xlim=(-0.6, len(rows[0]) - 0.4), ylim=(len(rows) - 0.4, -0.6),
           xlabel="slot of the memory   (in it: its latent frame; line: end of the sink)")
    marks = {mark for row in rows for _, _, mark in row}
    handles = [Patch(color=colour, label=role) for role, colour in ROLES.items()]
    handles += [Patch(facecolor=GREY, edgecolor="white", hatch="////", label="recached at this switch")] \
        if "recached" in marks else []
    handles += [Patch(fill=False, edgecolor=RED, ls=":", label="under an older prompt")] \
        if "old prompt" in marks else []
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
                  fontsize=FONT)
    return described(figure, "Latent frames in the slots", (
        f"after block {block} " + " ".join("-" if frame is None else str(frame) for _, frame, _ in row)
        for block, row in enumerate(rows)))


def attention_by_frame(preset: str, block: int, frames: Sequence[int | None], roles: Sequence[str],
                       mass: Sequence[Sequence[float]]) -> Chart:
    """Attention mass of each latent frame: the mean over layers (bars), and every layer (below).

    Args:
        frames, roles: of each column; None for an empty slot.
        mass: [layer][column], each row with the sum 1.
    """
    title = f"Attention mass by latent frame: {plain(preset, 22)}, block {block}"
    figure, (above, below) = new_lanes(title, 3.6 + 0.13 * len(mass), 2)
    table = np.asarray(mass, dtype=float)
    mean = table.mean(axis=0)
    above.bar(range(len(frames)), 100 * mean, width=0.8, color=[ROLES[role] for role in roles])
    for column, value in enumerate(mean):
        note(above, f"{100 * value:.1f}", (column, 100 * value), (0, 2), ha="center", fontsize=FONT - 1)
    above.axhline(100 / len(frames), color=GREY, lw=0.9, ls="--")
    above.set(ylabel="mean of all layers, %", ylim=(0, 118 * mean.max()))
    picture = below.imshow(100 * table, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    below.grid(visible=False)
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    below.yaxis.set_major_formatter(lambda value, _: f"{value + 1:.0f}")
    below.set(ylabel="layer", xlabel="latent frame   (dashed: as much as every other frame)")
    below.set_xticks(range(len(frames)), ["empty" if frame is None else f"{role}\n{frame}"
                                          for frame, role in zip(frames, roles, strict=True)])
    figure.colorbar(picture, ax=below, label="%", pad=0.01)
    shares = {role: sum(value for value, own in zip(mean, roles, strict=True) if own == role)
              for role in dict.fromkeys(roles)}
    return described(figure, "Mean mass of all layers in per cent", (
        f"{role} {100 * share:.1f}" for role, share in shares.items()))
