"""Render any frames of `Tracks` of Moving Shapes on any device. Each picture depends only on its own row.

Shapes are anti-aliased signed distances (https://iquilezles.org/articles/distfunctions2d). A shape of n
corners is folded into one of its 2n equal sectors, in which its outline is a single line. A blend of two
distances turns one shape into another.
"""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .motion import RADII, SIZE, Tracks, simulate
from .scene import GROUNDS, LETTERS, MAX_OBJECTS, PATTERNS, SHAPES

__all__ = ["SIZE", "Tracks", "render", "simulate", "to_uint8"]

CORNERS = {"square": 4, "circle": 1, "triangle": 3, "star": 5}
STAR_INNER = 0.52  # radius of a star's inner corners, as a share of the outer
LETTER_PIXELS = {"square": 4.6, "circle": 4.4, "triangle": 3.2, "star": 3.4}  # one pixel of a 5x7 letter

INK = (22, 22, 30)
GROUND_RGB = {"grey": ((92, 96, 102), (124, 128, 134)), "navy": ((30, 38, 92), (52, 64, 132)),
              "brown": ((100, 68, 46), (136, 98, 70)), "teal": ((14, 86, 88), (34, 120, 118))}

_FONT = {"A": "01110 10001 10001 11111 10001 10001 10001", "C": "01110 10001 10000 10000 10000 10001 01110",
         "T": "11111 00100 00100 00100 00100 00100 00100", "X": "10001 10001 01010 00100 01010 10001 10001"}
_TEXELS = 8  # texture pixels per font pixel


def render(tracks: Tracks, frames: slice | Sequence[int] | Tensor, device: str | torch.device = "cpu",
           size: int = SIZE, draw: Callable[..., Tensor] | None = None) -> Tensor:
    """Pictures of the given frames of all videos: float32 [B, T, 3, size, size] in 0..1 on `device`.

    `frames` is the same for all videos, or a tensor [B, T] with each video's own. `draw` is a compiled
    `draw_object`. It is always called with the same flags and tables, so that it is compiled only once.
    """
    if isinstance(frames, slice):
        frames = torch.arange(tracks.frames)[frames]
    index = torch.as_tensor(frames).cpu()
    chosen = tracks[:, index] if index.ndim == 1 else tracks[torch.arange(len(index))[:, None], index]
    videos, length = chosen.alpha.shape[:2]
    flat = Tracks(**{f.name: getattr(chosen, f.name).flatten(0, 1) for f in fields(chosen)})
    chunk = 4 if torch.device(device).type == "cpu" else 2048
    parts = [_draw(flat[first:first + chunk], torch.device(device), size, draw)
             for first in range(0, videos * length, chunk)]
    return torch.cat(parts).unflatten(0, (videos, length))


def to_uint8(pictures: Tensor) -> Tensor:
    """Round float values in 0..1 to uint8."""
    return (pictures * 255).round().clamp(0, 255).to(torch.uint8)


def _draw(tracks: Tracks, device: torch.device, size: int, draw: Callable[..., Tensor] | None) -> Tensor:
    """Pictures [F, 3, size, size] of tracks whose two leading axes are flattened."""
    there = [draw is not None or bool(tracks.alpha[:, i].any()) for i in range(MAX_OBJECTS)]
    turning = draw is not None or bool((tracks.shape[..., 0] != tracks.shape[..., 1]).any())
    lettered = draw is not None or bool(tracks.letter_alpha.any())
    moved = {f.name: getattr(tracks, f.name).to(device, non_blocking=True) for f in fields(tracks)}
    t = Tracks(**moved)
    bank = _grounds(device, size)
    picture = bank[t.ground[:, 0]]
    if bool((tracks.ground[:, 0] != tracks.ground[:, 1]).any()):
        picture = torch.lerp(picture, bank[t.ground[:, 1]], t.ground_mix[:, None, None, None])
    tables = (_outlines(device), *_letters(device), _axis(device, size), _ink_colour(device))
    for i in filter(there.__getitem__, range(MAX_OBJECTS)):
        values = (v[:, i] for v in (t.position, t.angle, t.scale, t.alpha, t.rgb, t.shape, t.shape_mix,
                                    t.letter, t.letter_alpha))
        picture = (draw or draw_object)(picture, *values, *tables, turning, lettered)
    return picture


def draw_object(picture: Tensor, position: Tensor, angle: Tensor, scale: Tensor, alpha: Tensor, rgb: Tensor,
                shape: Tensor, shape_mix: Tensor, letter: Tensor, letter_alpha: Tensor, outlines: Tensor,
                texture: Tensor, letter_pixels: Tensor, axis: Tensor, ink_colour: Tensor, turning: bool,
                lettered: bool) -> Tensor:
    """Draw one object and its shade over pictures [F, 3, size, size]. Its values are those of `Tracks`.

    The tables are those of this module. Without `turning` no shape changes. Without `lettered` no object has
    a letter.
    """
    pixel = SIZE / picture.shape[-1]
    x = axis[None, None, :] - position[:, 0, None, None]
    y = axis[None, :, None] - position[:, 1, None, None]
    cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))
    x, y = x * cos + y * sin, y * cos - x * sin
    scale, alpha, mix, ink_alpha = (v[:, None, None] for v in (scale, alpha, shape_mix, letter_alpha))
    far, around = torch.sqrt(x * x + y * y), torch.atan2(x, -y)
    distance = _distance(far, around, outlines[shape[:, 1]], scale)
    if turning:
        distance = torch.lerp(_distance(far, around, outlines[shape[:, 0]], scale), distance, mix)
    shade = (1 - distance.clamp(min=0) / 5).clamp(min=0).square()
    picture = picture * (1 - 0.3 * alpha * shade)[:, None]
    rim = 0.72 + 0.28 * (0.5 - (distance + 2.0) / pixel).clamp(0, 1)
    body = rgb[:, :, None, None] * rim[:, None]
    if lettered:
        ink = _ink(x, y, letter, letter_pixels[shape[:, 1]], scale, texture)
        body = torch.lerp(body, ink_colour[:, None, None], (ink * ink_alpha)[:, None])
    cover = (0.5 - distance / pixel).clamp(0, 1) * alpha
    return torch.lerp(picture, body, cover[:, None])


def _distance(far: Tensor, around: Tensor, outline: Tensor, scale: Tensor | float) -> Tensor:
    """Signed distance in pixels [F, H, W] to the outline [F, 6] of each frame, from polar coordinates."""
    sector, offset, fold, nx, ny, radius = (v[:, None, None] for v in outline.unbind(-1))
    corner = torch.remainder(around + offset + sector / 2, sector) - sector / 2
    corner = corner.abs() * fold
    return far * (torch.cos(corner) * nx + torch.sin(corner) * ny) - radius * nx * scale


def silhouette(shape: str, scale: float, angle: float) -> Tensor:
    """The pixels that a shape covers as 0 or 1, float [n, n], with n odd and the shape centred."""
    half = math.ceil(RADII[shape] * scale) + 1
    axis = torch.arange(-half, half + 1.0)
    x, y = axis[None, :].expand(2 * half + 1, -1), axis[:, None].expand(-1, 2 * half + 1)
    around = torch.atan2(x, -y) - angle
    outline = _outlines(torch.device("cpu"))[[SHAPES.index(shape)]]
    distance = _distance(torch.hypot(x, y)[None], around[None], outline, scale)
    return (distance[0] < 0).float()


@cache
def _outlines(device: torch.device) -> Tensor:
    """[shape, 6]: sector, its offset, 1 (0 for the circle, without corners), edge normal x, y, radius."""
    rows = []
    for name in SHAPES:
        corners, radius = CORNERS[name], RADII[name]
        if name == "circle":
            rows.append((2 * math.pi, 0.0, 0.0, 1.0, 0.0, radius))
            continue
        inner = STAR_INNER if name == "star" else math.cos(math.pi / corners)
        ex, ey = inner * math.cos(math.pi / corners) - 1, inner * math.sin(math.pi / corners)
        length = math.hypot(ex, ey)
        offset = math.pi / corners if name == "square" else 0.0
        rows.append((2 * math.pi / corners, offset, 1.0, ey / length, -ex / length, radius))
    return torch.tensor(rows, device=device)


def _ink(x: Tensor, y: Tensor, letter: Tensor, pixels: Tensor, scale: Tensor, texture: Tensor) -> Tensor:
    """Coverage [F, H, W] of the letter at each pixel, in the object's own coordinates."""
    rows, columns = texture.shape[1:]
    texel = _TEXELS / (pixels[:, None, None] * scale)
    column = (x * texel + columns / 2).long().clamp(0, columns - 1)
    row = (y * texel + rows / 2).long().clamp(0, rows - 1)
    return texture.flatten()[(letter[:, None, None] * rows + row) * columns + column]


@cache
def _axis(device: torch.device, size: int) -> Tensor:
    """The centre of each pixel of a row or column."""
    return (torch.arange(size, device=device) + 0.5) * (SIZE / size)


@cache
def _ink_colour(device: torch.device) -> Tensor:
    return torch.tensor(INK, device=device) / 255


@cache
def _letters(device: torch.device) -> tuple[Tensor, Tensor]:
    """Letters [letter, row, column], bold and with an empty margin; the size of a font pixel per shape."""
    bits = torch.tensor([[[int(c) for c in row] for row in _FONT[name].split()] for name in LETTERS]).float()
    texels = F.pad(bits, (1, 1, 1, 1)).repeat_interleave(_TEXELS, 1).repeat_interleave(_TEXELS, 2)
    soft = F.avg_pool2d(F.avg_pool2d(texels[:, None], 7, stride=1, padding=3), 5, stride=1, padding=2)[:, 0]
    pixels = torch.tensor([LETTER_PIXELS[name] for name in SHAPES], device=device)
    return (2.5 * soft - 0.5).clamp(0, 1).to(device), pixels


@cache
def _grounds(device: torch.device, size: int) -> Tensor:
    """All grounds [12, 3, size, size]: 8-pixel squares, diagonal stripes, dots. All repeat after 16 pixels.

    With a period of 8, the stride of the VAE, all latents of a ground would be equal. A decoder of
    nearest-neighbour upsampling and convolutions cannot distinguish places within equal latents.
    """
    axis = (torch.arange(size) + 0.5) * SIZE / size
    x, y = axis[None, :].expand(size, -1), axis[:, None].expand(-1, size)
    checked = ((x // 8 + y // 8) % 2).float()
    striped = (((x + y - 1) % 16 - 8).abs() - 3.5).clamp(0, 1)
    dotted = (4.0 - torch.hypot(x % 16 - 4, y % 16 - 4)).clamp(0, 1)
    masks = {"checked": checked, "striped": striped, "dotted": dotted}
    grounds = []
    for name in GROUNDS:
        low, high = (torch.tensor(rgb)[:, None, None] / 255 for rgb in GROUND_RGB[name])
        grounds += [low + (high - low) * masks[pattern] for pattern in PATTERNS]
    return torch.stack(grounds).to(device)
