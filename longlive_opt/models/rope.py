"""Rotary position embedding over (time, row, column), as in Wan 2.1 (RoPE: Su et al., arXiv:2104.09864).

A head of D components has c = D/2 complex pairs (2j, 2j+1). They split into a time, a row and a column group
of c - 2*(c//3), c//3 and c//3 pairs (22, 21, 21 for D = 128). Each group restarts at frequency 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .specs import ROPE_POSITIONS

THETA = 10000.0


def rope_angles(head_dim: int, frames: Tensor, rows: int, columns: int) -> Tensor:
    """Angles in radians, float64 [len(frames) * rows * columns, head_dim / 2], of tokens ordered by frame,
    row and column at the time positions `frames` (one number per latent frame).
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    device = frames.device

    def axis(positions: Tensor, n: int) -> Tensor:
        exponents = torch.arange(n, dtype=torch.float64, device=device) * 2 / (2 * n)
        return torch.outer(positions.double(), THETA ** -exponents)

    time = axis(frames, pairs - 2 * spatial)[:, None, None].expand(-1, rows, columns, -1)
    row = axis(torch.arange(rows, device=device), spatial)[None, :, None].expand(len(frames), -1, columns, -1)
    column = axis(torch.arange(columns, device=device), spatial)[None, None].expand(len(frames), rows, -1, -1)
    return torch.cat([time, row, column], dim=-1).flatten(0, 2)


def check_positions(last_frame: int) -> None:
    """Check that `last_frame` has an absolute position; LongLive's tables end at latent frame 1023.

    Raises:
        UserError: naming the first frame that has no position.
    """
    if last_frame >= ROPE_POSITIONS:
        raise UserError(
            f"relative_rope: false ends at latent frame {ROPE_POSITIONS - 1}, but frame {last_frame} was "
            "requested; reset the session or set relative_rope: true, which has no limit."
        )


class Rotary:
    """Rotates q or k by one table of angles; uses float64 and complex numbers, as LongLive does."""

    def __init__(self, angles: Tensor):
        """Args: angles: float64 [tokens, D/2]."""
        self.factors = torch.polar(torch.ones_like(angles), angles)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [B, tokens, N, D] in float64; return the dtype of x."""
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.factors).flatten(-2).to(x.dtype)
