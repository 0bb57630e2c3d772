"""RMS norm and SiLU between the convolutions of the VAE's decoder, in Triton, for `conv3d`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 8192
"""Of x per program."""


@triton.jit(do_not_specialize=["pixels", "first_kept"])
def norm_silu_kernel(x_ptr, gamma_ptr, past_ptr, out_ptr, new_past_ptr, pixels, first_kept, scale,
                     C: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, ONE_FRAME: tl.constexpr):
    """Program: ROWS pixels of C channels. From pixel `first_kept` on the result goes to the history, too; of
    one frame, `first_kept` is -pixels and the history's second frame becomes its first.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, CHANNELS)
    inside = (rows < pixels)[:, None] & (channels < C)[None, :]
    offsets = rows[:, None] * C + channels[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1))
    gamma = tl.load(gamma_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    y = x * (scale / tl.maximum(length, 1e-12))[:, None] * gamma[None, :]
    y = (y / (1.0 + tl.exp(-y))).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, y, mask=inside)
    if tl.program_id(0) * ROWS + ROWS > first_kept:
        kept = rows - first_kept
        tl.store(new_past_ptr + kept[:, None] * C + channels[None, :], y,
                 mask=inside & (kept >= 0)[:, None])
    if ONE_FRAME:
        size = pixels.to(tl.int64) * C
        tl.store(new_past_ptr + offsets, tl.load(past_ptr + size + offsets, mask=inside), mask=inside)


def norm_silu(x: Tensor, gamma: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel on x [B, C, T, H, W], channels last -> (like x, like past)."""
    if not x.permute(0, 2, 3, 4, 1).is_contiguous() or not past.permute(0, 2, 3, 4, 1).is_contiguous():
        raise ValueError("x and past must be channels last: the kernel takes no strides")
    out, new_past = torch.empty_like(x), torch.empty_like(past)
    batch, channels, frames, height, width = x.shape
    pixels = frames * height * width
    padded = triton.next_power_of_2(channels)
    rows = max(ELEMENTS // padded, 1)
    for b in range(batch):
        norm_silu_kernel[(triton.cdiv(pixels, rows),)](
            x[b], gamma, past[b], out[b], new_past[b], pixels, pixels - 2 * height * width, channels**0.5,
            C=channels, CHANNELS=padded, ROWS=rows, ONE_FRAME=frames == 1, num_warps=8)
    return out, new_past
