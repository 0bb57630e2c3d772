"""Detect the objects in single frames of Moving Shapes by colour and geometry. Nothing here is learned.

A pixel belongs to the nearest colour of the palette. Rays from the middle of a colour's silhouette give its
radius in every direction. The Fourier harmonics of the radius distinguish triangle (3), square (4), star (5)
and circle (none) at any rotation. The ink inside the silhouette is compared in the same polar coordinates
with each letter at all rotations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from .motion import RADII, RGB, SCALES, SIZE
from .render import CORNERS, GROUND_RGB, INK, LETTER_PIXELS, STAR_INNER, _grounds, _letters
from .scene import COLOURS, GROUNDS, LETTERS, PATTERNS, SHAPES

LEAST_AREA = 40  # smallest number of pixels of one colour that counts as an object
LARGE_SCALE = 0.73  # between a small object at its largest pulse and a large one at its smallest

_RAYS = 72
_REACH = 40  # pixels along a ray; more than any object's radius
_LETTER_RADII = np.linspace(0.35, 3.85, 12)  # in font pixels
_LEAST_INK, _LEAST_MATCH = 0.09, 0.5


@dataclass(frozen=True)
class Detection:
    """One object in one frame: middle and visible area in pixels, scale 1 = large, angle in radians.

    `whole`: neither cut by the edge of the picture nor touched by another object. Shape, scale, angle and
    letter are only read for whole objects and are None otherwise. An object without a letter has None too.
    """

    colour: str
    x: float
    y: float
    area: int
    whole: bool
    shape: str | None = None
    scale: float | None = None
    angle: float | None = None
    letter: str | None = None


@dataclass(frozen=True)
class Track:
    """One colour over T frames. Arrays are [T, ...], with NaN where the object is absent or unread."""

    colour: str
    area: np.ndarray  # visible pixels, 0 where the object is absent
    middle: np.ndarray  # [T, 2] x, y of the visible part
    touches: np.ndarray  # [T, colour] whether that colour's object touches it
    at_edge: np.ndarray  # [T] whether the edge of the picture cuts it
    waves: np.ndarray  # [T, 8] complex harmonics of the outline, divided by its mean radius
    strays: np.ndarray  # [T] area of the same colour elsewhere
    ink: Tensor  # [T, H, W] share of ink over the colour
    silhouette: Tensor  # [T, H, W] bool

    @property
    def there(self) -> np.ndarray:
        return self.area > 0


def read_objects(frame: Tensor | np.ndarray) -> list[Detection]:
    """All objects of one frame, uint8 [3, 128, 128], largest first.

    Raises:
        UserError: the frame has another shape or dtype.
    """
    tracks, _ = read_tracks(torch.as_tensor(frame)[None])
    seen = []
    for track in tracks.values():
        whole = not (track.at_edge[0] or track.touches[0].any())
        x, y = map(float, track.middle[0])
        read = {}
        if whole:
            shape, scale = outline(track, [0])
            letter, angle = read_letter(track, [0], shape)
            read = {"shape": shape, "scale": float(scale[0]), "letter": letter,
                    "angle": float(angle[0]) if letter else shape_angle(track, shape)[0]}
        seen.append(Detection(track.colour, x, y, int(track.area[0]), whole, **read))
    return sorted(seen, key=lambda thing: -thing.area)


def check_frames(frames: Tensor | np.ndarray, least: int = 1) -> Tensor:
    """`frames` as a uint8 tensor [T, 3, 128, 128] of at least `least` frames.

    Raises:
        UserError: naming the shape and dtype found.
    """
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8 or frames.shape[1:] != (3, SIZE, SIZE) or len(frames) < least:
        raise UserError(f"frames: {list(frames.shape)} {frames.dtype}; give uint8 [T, 3, {SIZE}, {SIZE}] "
                        f"with T >= {least}.")
    return frames.cpu()


def read_tracks(frames: Tensor) -> tuple[dict[str, Track], Tensor]:
    """The tracks of all colours found in `frames`, and a mask [T, H, W] where only ground is visible."""
    frames = check_frames(frames)
    pixels = frames.float()
    labels = _labels(pixels)
    votes = F.one_hot(labels, len(COLOURS) + 1)[..., :-1].permute(0, 3, 1, 2).float()
    masks = F.avg_pool2d(votes, 3, stride=1, padding=1, count_include_pad=False) > 0.5
    masks, strays = _main_blobs(masks)
    found = [c for c in range(len(COLOURS)) if bool(masks[:, c].any())]
    wide = {c: dilate(masks[:, c], 2) for c in found}
    tracks = {}
    for c in found:
        others = torch.stack([masks[:, o] for o in found if o != c]).any(0) if found[1:] else None
        filled = masks[:, c] | _enclosed(masks[:, c])
        if others is not None:
            filled &= ~others
        tracks[COLOURS[c]] = _track(c, filled, wide, found, strays[:, c], pixels)
    ground = ~dilate(labels != len(COLOURS), 6)
    return tracks, ground


def _labels(pixels: Tensor) -> Tensor:
    """Index in COLOURS of each pixel [T, H, W], or len(COLOURS) for ground and ink."""
    palette, meaning = _palette()
    flat = pixels.permute(0, 2, 3, 1).reshape(-1, 3)
    distance = palette.square().sum(1) - 2 * flat @ palette.T
    return meaning[distance.argmin(1)].view(len(pixels), *pixels.shape[2:])


@cache
def _palette() -> tuple[Tensor, Tensor]:
    rows, meaning = [], []
    for index, name in enumerate(COLOURS):
        for shade in (1.0, 0.86, 0.72):
            rows.append([shade * value for value in RGB[name]])
            meaning.append(index)
    for tones in GROUND_RGB.values():
        for tone in (*tones, [(a + b) / 2 for a, b in zip(*tones)]):
            for shade in (1.0, 0.75):
                rows.append([shade * value for value in tone])
                meaning.append(len(COLOURS))
    rows.append(INK)
    meaning.append(len(COLOURS))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(meaning)


def _main_blobs(masks: Tensor) -> tuple[Tensor, np.ndarray]:
    """Cut each mask [T, C, H, W] to 40 pixels around its main blob. Also returns the area outside."""
    density = F.avg_pool2d(masks.float(), 16, stride=4)
    best, width = density.flatten(2).argmax(-1), density.shape[-1]
    middle = torch.stack([best % width, best // width], dim=-1) * 4.0 + 8
    axis = torch.arange(SIZE) + 0.5
    near = masks
    for _ in range(2):
        near = masks & (((axis[None, :] - middle[..., 0, None, None]).square()
                         + (axis[:, None] - middle[..., 1, None, None]).square()) < 40 ** 2)
        weight = near.flatten(2).sum(-1).clamp(min=1)
        middle = torch.stack([(near.sum(side) * axis).sum(-1) / weight for side in (-2, -1)], -1)
    near = near & (near.flatten(2).sum(-1) >= LEAST_AREA)[..., None, None]
    return near, (masks & ~near).flatten(2).sum(-1).numpy()


def _enclosed(mask: Tensor) -> Tensor:
    """Pixels with the mask on all four sides, which fills a letter but not the notches of a star.

    A mask that the edge of the picture cuts is taken to continue behind the edge.
    """
    def between(value: Tensor, axis: int) -> Tensor:
        return torch.cummax(value, axis).values & torch.cummax(value.flip(axis), axis).values.flip(axis)

    value = F.pad(mask.byte(), (1, 1, 1, 1))
    for side, along in ((value[:, :, 0], mask[:, :, 0]), (value[:, :, -1], mask[:, :, -1]),
                        (value[:, 0], mask[:, 0]), (value[:, -1], mask[:, -1])):
        side[:, 1:-1] = between(along.byte(), 1)
    return (between(value, 1) & between(value, 2))[:, 1:-1, 1:-1].bool()


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """Masks [T, H, W] grown by `pixels` to each side, with a square."""
    return F.max_pool2d(mask.float()[:, None], 2 * pixels + 1, stride=1, padding=pixels)[:, 0] > 0


def _track(colour: int, mask: Tensor, wide: dict[int, Tensor], found: list[int], strays: np.ndarray,
           pixels: Tensor) -> Track:
    frames = len(mask)
    area = mask.flatten(1).sum(1)
    there = area > 0
    edge = torch.cat([mask[:, :2].flatten(1), mask[:, -2:].flatten(1), mask[:, :, :2].flatten(1),
                      mask[:, :, -2:].flatten(1)], 1).any(1)
    touches = torch.zeros(frames, len(COLOURS), dtype=torch.bool)
    axis = torch.arange(SIZE)
    for other in found:
        if other != colour:
            touches[:, other] = (mask & wide[other]).flatten(1).any(1)
    weight = area.clamp(min=1)
    middle = torch.stack([(mask.sum(1) * (axis + 0.5)).sum(1) / weight,
                          (mask.sum(2) * (axis + 0.5)).sum(1) / weight], 1)
    middle[~there] = math.nan
    body = torch.tensor(RGB[COLOURS[colour]], dtype=torch.float32)
    towards = torch.tensor(INK, dtype=torch.float32) - body
    ink = torch.einsum("tchw,c->thw", pixels - body[:, None, None], towards / towards.square().sum())
    radius = _along_rays(mask.float(), middle.nan_to_num(), torch.arange(_REACH) + 0.5,
                         torch.ones(frames)).sum(1)
    waves = torch.fft.rfft(radius / radius.mean(1, keepdim=True).clamp(min=1))[:, :8] / _RAYS
    return Track(COLOURS[colour], area.numpy(), middle.numpy(), touches.numpy(),
                 edge.numpy(), waves.numpy(), strays, ink.clamp(0, 1), mask)


def _along_rays(picture: Tensor, middle: Tensor, radii: Tensor, scale: Tensor) -> Tensor:
    """Samples [T, radius, ray] of pictures [T, H, W] around `middle` [T, 2]. Ray 0 points up; the others
    follow clockwise.
    """
    turn = torch.arange(_RAYS) * (2 * math.pi / _RAYS)
    way = torch.stack([torch.sin(turn), -torch.cos(turn)], -1)
    points = middle[:, None, None] + (radii * scale[:, None])[:, :, None, None] * way
    grid = points * (2 / SIZE) - 1
    return F.grid_sample(picture[:, None], grid, align_corners=False)[:, 0]


def outline(track: Track, frames: Sequence[int]) -> tuple[str, np.ndarray]:
    """The shape nearest to the outlines of these frames, and the scale in each frame."""
    strength = np.median(np.abs(track.waves[frames]), axis=0)[3:6]
    ideal = _ideal_waves()
    shape = min(SHAPES, key=lambda name: np.square(strength - ideal[name]).sum())
    return shape, np.sqrt(track.area[frames] / large_area(shape))


@cache
def _ideal_waves() -> dict[str, np.ndarray]:
    """Strengths of harmonics 3, 4 and 5 of each shape's outline."""
    turn = np.arange(720) * (math.pi / 360)
    ideal = {}
    for shape in SHAPES:
        corners = CORNERS[shape]
        if shape == "circle":
            ideal[shape] = np.zeros(3)
            continue
        fold = np.abs((turn + math.pi / corners) % (2 * math.pi / corners) - math.pi / corners)
        inner = STAR_INNER if shape == "star" else math.cos(math.pi / corners)
        ex, ey = inner * math.cos(math.pi / corners) - 1, inner * math.sin(math.pi / corners)
        radius = ey / (ey * np.cos(fold) - ex * np.sin(fold))
        ideal[shape] = np.abs(np.fft.rfft(radius / radius.mean())[3:6]) / len(turn)
    return ideal


def large_area(shape: str) -> float:
    """Pixels of a large object, including its rim."""
    radius, corners = RADII[shape], CORNERS[shape]
    if shape == "circle":
        return math.pi * radius ** 2
    inner = STAR_INNER if shape == "star" else math.cos(math.pi / corners)
    return corners * inner * math.sin(math.pi / corners) * radius ** 2


def shape_angle(track: Track, shape: str) -> np.ndarray:
    """Rotation [T] in radians, clockwise, modulo the symmetry of the shape. NaN for a circle."""
    corners = CORNERS[shape]
    if shape == "circle":
        return np.full(len(track.area), math.nan)
    offset = math.pi / corners if shape == "square" else 0.0
    return -np.angle(track.waves[:, corners]) / corners - offset


def read_letter(track: Track, frames: Sequence[int], shape: str, place: np.ndarray | None = None,
                scale: float | None = None) -> tuple[str | None, np.ndarray]:
    """The letter on an object of this shape in these frames, or None, and its rotation in each frame.

    For an object that is not whole, `place` [len(frames), 2] and `scale` give the position of the letter.
    """
    inked = _letter_rays(track, frames, shape, place, scale)
    nothing = None, np.full(len(inked), math.nan)
    weights = torch.as_tensor(_LETTER_RADII, dtype=torch.float32)[:, None]
    coverage = ((inked * weights).sum((1, 2)) / (weights.sum() * _RAYS)).median()
    if coverage < _LEAST_INK:
        return nothing
    score = _match(inked[:, None], _letter_templates()[None], weights)
    best = score.amax(-1).mean(0)
    index = int(best.argmax())
    if best[index] < _LEAST_MATCH:
        return nothing
    return LETTERS[index], score[:, index].argmax(-1).numpy() * (2 * math.pi / _RAYS)


def letter_turn(track: Track, earlier: Sequence[int], later: Sequence[int], shape: str) -> np.ndarray:
    """The rotation of a letter between pairs of frames, clockwise, at most 0.7 radians."""
    weights = torch.as_tensor(_LETTER_RADII, dtype=torch.float32)[:, None]
    score = _match(_letter_rays(track, later, shape), _letter_rays(track, earlier, shape), weights)
    return (score.roll(8, -1)[..., :17].argmax(-1).numpy() - 8) * (2 * math.pi / _RAYS)


def _letter_rays(track: Track, frames: Sequence[int], shape: str, place: np.ndarray | None = None,
                 scale: float | None = None) -> Tensor:
    """Ink [len(frames), radius, ray] around the middle of the object, at radii in font pixels."""
    middle = track.middle[frames] if place is None else place
    size = np.sqrt(track.area[frames] / large_area(shape)) if scale is None else np.full(len(middle), scale)
    return _along_rays(track.ink[frames], torch.from_numpy(middle).float(),
                       torch.as_tensor(_LETTER_RADII, dtype=torch.float32),
                       torch.from_numpy(size).float() * LETTER_PIXELS[shape])


def letter_reach(shape: str) -> float:
    """Radius in pixels around the middle of a large object that contains its whole letter."""
    return float(_LETTER_RADII[-1]) * LETTER_PIXELS[shape]


@cache
def _letter_templates() -> Tensor:
    """[letter, radius, ray] of upright letters."""
    texture, _ = _letters(torch.device("cpu"))
    rows, columns = texture.shape[1:]
    big = F.pad(texture, [(SIZE - columns) // 2, (SIZE - columns + 1) // 2,
                          (SIZE - rows) // 2, (SIZE - rows + 1) // 2])
    count = len(big)
    return _along_rays(big, torch.full((count, 2), SIZE / 2), torch.as_tensor(_LETTER_RADII).float(),
                       torch.full((count,), 8.0))


def _match(inked: Tensor, template: Tensor, weights: Tensor) -> Tensor:
    """Correlation [..., ray] of two polar maps [..., radius, ray] for each rotation of the first."""
    def normal(value: Tensor) -> Tensor:
        centred = value - (value * weights).sum((-2, -1), keepdim=True) / (weights.sum() * _RAYS)
        return centred / (centred.square() * weights).sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-6)

    spectrum = torch.fft.rfft(normal(inked) * weights) * torch.fft.rfft(normal(template)).conj()
    return torch.fft.irfft(spectrum.sum(-2), n=_RAYS)


def read_ground(frames: Tensor, ground: Tensor) -> tuple[str, str | None]:
    """Colour and pattern of the ground where `ground` [T, H, W] is true. The pattern is None if none matches.
    """
    pixels = frames.float() / 255
    weight = ground.float().sum(0)
    mean = (pixels * ground[:, None]).sum(0) / weight.clamp(min=1)
    sure = weight > 0
    bank = _grounds(torch.device("cpu"), SIZE).view(len(GROUNDS), len(PATTERNS), 3, SIZE, SIZE)
    if not sure.any():
        return GROUNDS[0], None
    colour = mean[:, sure].mean(-1)
    distance = (bank[:, :, :, sure].mean(-1).mean(1) - colour).square().sum(-1)
    light = mean.mean(0)[sure]
    light = light - light.mean()
    scores = []
    for pattern in range(len(PATTERNS)):
        wanted = bank[0, pattern].mean(0)[sure]
        wanted = wanted - wanted.mean()
        scores.append(float((light * wanted).sum() / (light.norm() * wanted.norm()).clamp(min=1e-6)))
    best = int(np.argmax(scores))
    return GROUNDS[int(distance.argmin())], PATTERNS[best] if scores[best] > 0.3 else None


def is_large(scale: float) -> bool:
    """Whether this is a large object. A pulse does not change the answer."""
    return scale > LARGE_SCALE * max(SCALES.values())
