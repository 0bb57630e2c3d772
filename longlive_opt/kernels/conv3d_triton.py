"""RMS norm and SiLU between the convolutions of the VAE's decoder, in Triton, for `conv3d`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
"""Per program and third of the channels."""


@triton.jit
def _norm_third(x, factor, gamma, unit, out_type: tl.constexpr):
    y = x * factor[:, None] * gamma[None, :]
    y = y / (1.0 + tl.exp2(y * -1.4426950408889634))
    if out_type == tl.float8e4nv:
        y *= unit  # the conversion saturates
    return y.to(out_type)


@triton.jit(do_not_specialize=["pixels", "first_kept", "unit"])
def norm_silu_kernel(x_ptr, gamma_ptr, past_ptr, out_ptr, new_past_ptr, pixels, first_kept, scale,
                     unit, C: tl.constexpr, ROWS: tl.constexpr, ONE_FRAME: tl.constexpr):
    """Program: ROWS pixels of C channels, in thirds, because these are powers of two. From pixel `first_kept`
    on, the result is also stored in the new history. With a single frame, `first_kept` is -pixels, and the
    old history's second frame becomes the first of the new one.
    """
    THIRD: tl.constexpr = C // 3
    kind: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, THIRD)
    inside = (rows < pixels)[:, None]
    offsets = rows[:, None] * C + channels[None, :]
    a = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + THIRD + offsets, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(x_ptr + 2 * THIRD + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = scale / tl.maximum(tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(c * c, 1)), 1e-12)
    a = _norm_third(a, factor, tl.load(gamma_ptr + channels).to(tl.float32), unit, kind)
    b = _norm_third(b, factor, tl.load(gamma_ptr + THIRD + channels).to(tl.float32), unit, kind)
    c = _norm_third(c, factor, tl.load(gamma_ptr + 2 * THIRD + channels).to(tl.float32), unit, kind)
    tl.store(out_ptr + offsets, a, mask=inside)
    tl.store(out_ptr + THIRD + offsets, b, mask=inside)
    tl.store(out_ptr + 2 * THIRD + offsets, c, mask=inside)
    if tl.program_id(0) * ROWS + ROWS > first_kept:
        kept = rows - first_kept
        keeps = inside & (kept >= 0)[:, None]
        new_past = new_past_ptr + kept[:, None] * C + channels[None, :]
        tl.store(new_past, a, mask=keeps)
        tl.store(new_past + THIRD, b, mask=keeps)
        tl.store(new_past + 2 * THIRD, c, mask=keeps)
    if ONE_FRAME:
        old = past_ptr + pixels.to(tl.int64) * C + offsets
        for third in tl.static_range(3):
            tl.store(new_past_ptr + third * THIRD + offsets, tl.load(old + third * THIRD, mask=inside),
                     mask=inside)


def norm_silu(x: Tensor, gamma: Tensor, past: Tensor, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """Launch the kernel on x [B, C, T, H, W], channels last -> (like x in past's dtype, like past). In e4m3,
    results are `unit` times as large.
    """
    if not x.permute(0, 2, 3, 4, 1).is_contiguous() or not past.permute(0, 2, 3, 4, 1).is_contiguous():
        raise ValueError("x and past must be channels last: the kernel takes no strides")
    out, new_past = torch.empty_like(x, dtype=past.dtype), torch.empty_like(past)
    batch, channels, frames, height, width = x.shape
    pixels = frames * height * width
    rows = ELEMENTS // (channels // 3)
    for b in range(batch):
        norm_silu_kernel[(triton.cdiv(pixels, rows),)](
            x[b], gamma, past[b], out[b], new_past[b], pixels, pixels - 2 * height * width, channels**0.5,
            unit, C=channels, ROWS=rows, ONE_FRAME=frames == 1, num_warps=4)
    return out, new_past
