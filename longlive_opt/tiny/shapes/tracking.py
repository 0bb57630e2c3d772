"""Track an object of Moving Shapes over a span of frames and recognise its motion.

The place of a whole object is the middle of its silhouette. For an object that is partly hidden by the edge
or by another object, the place is the shift at which a picture of its shape disagrees least with the visible
pixels. A Fourier transform computes all shifts at once. Pixels behind other objects and beyond the edge do
not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .detection import Track, dilate, is_large, letter_reach, letter_turn, outline, read_letter, shape_angle
from .motion import SIZE
from .render import CORNERS, silhouette
from .scene import SHAPES

WINDOW_FRAMES = 24
LEAST_FRAMES = 12

_FIELD = 256  # the picture with space for objects beyond its edges
_MARGIN = (_FIELD - SIZE) // 2
_LAG = 3  # frames between which displacement and rotation are measured
_MOVES = 0.7  # least speed of a travelling object, pixels per frame
_SPINS = 0.035  # least speed of a spinning object, radians per frame
_PULSES = 0.06  # least range of a pulsing object's scale in a window, divided by its mean
_LEAST_VISIBLE = 0.2  # visible share of an object below which its place is unreliable
_POOR_FIT = 0.06  # share of the visible area that may disagree
_CLEAR_LEAD = 0.04  # share of the visible area by which the best shape must beat the next
_LEAST_PLACES = 7
_DOUBT = 0.25  # pixels of misfit by which a bend must beat a straight line
_TURNS = np.concatenate([np.arange(-0.15, -0.045, 0.01), np.arange(0.05, 0.155, 0.01)])


@dataclass(frozen=True)
class Trajectory:
    """One object over a span: the frames in which it is whole, its shape, its scale and its places.

    `shape` and `scale` are None if no frame shows enough. `place` is [T, 2], with NaN where it is unknown.
    `open`: frames in which nothing hides the position of its letter.
    """

    whole: np.ndarray
    open: np.ndarray
    shape: str | None
    scale: float | None
    place: np.ndarray


def follow(track: Track, front: list[Track], likely: tuple[str, float]) -> Trajectory:
    """Track one object that only `front` may hide. `likely` gives shape and scale if they cannot be read."""
    hidden = torch.zeros_like(track.silhouette)
    for other in front:
        hidden |= other.silhouette
    hidden = dilate(hidden, 2)
    touched = (dilate(track.silhouette, 1) & hidden).flatten(1).any(1).numpy()
    whole = track.there & ~track.at_edge & ~touched
    weight = (~hidden).float() - 2 * (track.silhouette & ~hidden).float()
    frames = np.flatnonzero(whole)
    place = np.where(whole[:, None], track.middle, math.nan)
    parts = np.flatnonzero(track.there & ~whole)
    if len(frames):
        shape, scales = outline(track, frames)
        scale: float | None = float(np.mean(scales))
        turn = float(shape_angle(track, shape)[frames[len(frames) // 2]])
    else:
        shape, scale, turn = _recognise(track, weight, parts)
    if len(parts):
        drawn = (shape or likely[0], scale or likely[1], 0.0 if math.isnan(turn) else turn)
        place[parts] = _place_parts(weight[parts], track.area[parts], *drawn)
    shows = whole.copy()
    if shape is not None and scale is not None and len(parts):
        reach = letter_reach(shape) * scale
        inside = (np.abs(place[parts] - SIZE / 2) < SIZE / 2 - reach).all(1)
        axis = np.arange(SIZE) + 0.5
        x, y = (place[parts, side, None, None] for side in (0, 1))
        near = np.hypot(axis - x, axis[:, None] - y) < reach
        shows[parts] = inside & ~(hidden[parts].numpy() & near).any((1, 2))
    return Trajectory(whole, shows, shape, scale, place)


def _place_parts(weight: Tensor, visible: np.ndarray, shape: str, scale: float, turn: float) -> np.ndarray:
    """Places of a known, partly hidden object. Tries other sizes and rotations where it fits badly."""
    drawn = silhouette(shape, scale, turn)
    misfit, place = (one[:, 0] for one in _fit(weight, drawn[None]))
    poor = np.flatnonzero(misfit.numpy() + visible > _POOR_FIT * visible)
    if len(poor):
        symmetry = 2 * math.pi / CORNERS[shape]
        others = [(scale * factor, turn) for factor in (0.68, 0.8, 0.9, 1.1, 1.25, 1.47)]
        others += [(scale, turn + symmetry * step / 6) for step in range(1, 6) if shape != "circle"]
        drawings = [drawn, *(silhouette(shape, *other) for other in others)]
        misfit, places = _fit(weight[poor], _stack(drawings))
        best = misfit.numpy().argmin(1), misfit.numpy().min(1)
        place[poor] = places[np.arange(len(poor)), best[0]]
        place[poor[best[1] + visible[poor] > 2 * _POOR_FIT * visible[poor]]] = math.nan
    place[visible < _LEAST_VISIBLE * float(drawn.sum())] = math.nan
    return place


def _recognise(track: Track, weight: Tensor, parts: np.ndarray) -> tuple[str | None, float | None, float]:
    """Shape, scale and angle of an object that is never whole, from the three frames that show most of it.

    Shape and scale are None if another shape fits nearly as well. Scale alone is None if the other size does.
    """
    best = parts[np.argsort(-track.area[parts])][:3]
    tried = [(shape, scale, 2 * math.pi / CORNERS[shape] * step / 8)
             for shape, scale in product(SHAPES, (0.47, 0.55, 0.64, 0.85, 1.0, 1.17))
             for step in range(1 if shape == "circle" else 8)]
    drawn = _stack([silhouette(*one) for one in tried])
    misfit, _ = _fit(weight[best], drawn)
    visible = torch.as_tensor(track.area[best], dtype=torch.float32)[:, None]
    score = (misfit / visible + 1).mean(0).numpy()
    first = int(score.argmin())
    shape, scale, turn = tried[first]
    if visible.max() < _LEAST_VISIBLE * drawn[first].sum():
        return None, None, 0.0
    limit = score[first] + _CLEAR_LEAD
    if any(value < limit for value, one in zip(score, tried) if one[0] != shape):
        return None, None, 0.0
    if any(value < limit for value, one in zip(score, tried) if is_large(one[1]) != is_large(scale)):
        return shape, None, turn
    return shape, scale, turn


def _stack(drawn: list[Tensor]) -> Tensor:
    """Squares of odd sides as one batch, each centred."""
    side = max(len(one) for one in drawn)
    return torch.stack([F.pad(one, [(side - len(one)) // 2] * 4) for one in drawn])


def _fit(weight: Tensor, drawn: Tensor) -> tuple[Tensor, np.ndarray]:
    """Least misfit [n, templates] of drawn shapes [templates, H, W] to frames; its place [n, templates, 2].

    `weight` [n, H, W] is -1 on the object, 1 where something else is visible, and 0 where nothing is known.
    Its sum over a drawn shape, plus the object's area, counts the pixels that disagree.
    """
    field = torch.zeros(len(weight), _FIELD, _FIELD)
    field[:, _MARGIN:_MARGIN + SIZE, _MARGIN:_MARGIN + SIZE] = weight
    shape = torch.zeros(len(drawn), _FIELD, _FIELD)
    half = drawn.shape[-1] // 2
    shape[:, :2 * half + 1, :2 * half + 1] = drawn
    shape = shape.roll((-half, -half), (1, 2))
    spectra, wanted = torch.fft.rfft2(field), torch.fft.rfft2(shape).conj()
    least, places = [], []
    for spectrum in spectra:
        score = torch.fft.irfft2(spectrum * wanted, s=(_FIELD, _FIELD)).flatten(1)
        lowest = score.min(1)
        least.append(lowest.values)
        row, column = lowest.indices // _FIELD, lowest.indices % _FIELD
        score = score.view(-1, _FIELD, _FIELD)
        every = torch.arange(len(drawn))
        near = [[score[every, (row + dy) % _FIELD, (column + dx) % _FIELD] for dx, dy in steps]
                for steps in (((-1, 0), (0, 0), (1, 0)), ((0, -1), (0, 0), (0, 1)))]
        shift = [((a - c) / (2 * (a - 2 * b + c)).clamp(min=1e-3)).clamp(-0.5, 0.5) for a, b, c in near]
        places.append(torch.stack([column + shift[0], row + shift[1]], -1) - _MARGIN + 0.5)
    return torch.stack(least), torch.stack(places).numpy()


def motion_of(track: Track, trajectory: Trajectory, window: slice) -> str | None:
    """The one of MOTIONS that fits a window best, or None if too little is visible."""
    inside = np.zeros(len(trajectory.whole), bool)
    inside[window] = True
    seen = np.flatnonzero(inside & ~np.isnan(trajectory.place).any(1))
    if len(seen) < _LEAST_PLACES:
        return None
    jumps = np.flatnonzero(np.abs(np.diff(trajectory.place[seen], axis=0)).max(1) > SIZE / 2) + 1
    seen = max(np.split(seen, jumps), key=len)
    if len(seen) < _LEAST_PLACES:
        return None
    place = trajectory.place[seen]
    speed = np.hypot(*(place[_LAG:] - place[:-_LAG]).T) / (seen[_LAG:] - seen[:-_LAG])
    if np.median(speed) > _MOVES:
        return travel(seen, place)
    return _in_place(track, trajectory, np.flatnonzero(trajectory.whole & inside))


def travel(frames: np.ndarray, place: np.ndarray) -> str:
    """The motion (left, right, up, down, bounces, orbits) whose path is nearest to places [n, 2] at `frames`.
    """
    time = (frames - frames[0]).astype(float)

    def misfit(columns: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray]:
        found = np.linalg.lstsq(columns, values, rcond=None)[0]
        return float(np.mean(np.abs(columns @ found - values) ** 2)), found

    constant = np.ones((len(time), 1), complex)
    scores = {}
    flips = []
    for axis, names in enumerate((("left", "right"), ("up", "down"))):
        straight, found = misfit(np.stack([constant[:, 0].real, time], 1), place[:, axis])
        rest = np.var(place[:, 1 - axis])
        scores[names[int(found[1] > 0)]] = math.sqrt(straight + rest)
        flips.append(min((misfit(np.stack([constant[:, 0].real, np.abs(time - turn)], 1), place[:, axis])
                          for turn in time), key=lambda one: one[0]))
    slopes = sorted(abs(found[1]) for _, found in flips)
    if slopes[0] > 0.4 * slopes[1]:
        scores["bounces"] = math.sqrt(flips[0][0] + flips[1][0]) + _DOUBT
    complex_place = place[:, 0] + 1j * place[:, 1]
    circles = [misfit(np.concatenate([constant, np.exp(1j * turn * time)[:, None]], 1), complex_place)
               for turn in _TURNS]
    around, found = min(circles, key=lambda one: one[0])
    if 10 < abs(found[1]) < 45:
        scores["orbits"] = math.sqrt(around) + _DOUBT
    return min(scores, key=scores.__getitem__)


def _in_place(track: Track, trajectory: Trajectory, frames: np.ndarray) -> str | None:
    """spins, pulses or still, from the frames in which the object is whole."""
    shape = trajectory.shape
    pairs = np.intersect1d(frames, frames - _LAG)
    if shape is None or len(pairs) < 3:
        return None
    scale = np.sqrt(track.area[frames])
    if shape == "circle":
        lettered = read_letter(track, pairs, shape)[0] is not None
        turns = letter_turn(track, pairs, pairs + _LAG, shape) if lettered else np.zeros(1)
    else:
        angle, symmetry = shape_angle(track, shape), 2 * math.pi / CORNERS[shape]
        turns = (angle[pairs + _LAG] - angle[pairs] + symmetry / 2) % symmetry - symmetry / 2
    if abs(np.median(turns)) / _LAG > _SPINS:
        return "spins"
    trim = len(scale) // 20
    if np.ptp(np.sort(scale)[trim:len(scale) - trim]) / scale.mean() > _PULSES:
        return "pulses"
    return "still" if len(frames) >= LEAST_FRAMES - 2 else None
