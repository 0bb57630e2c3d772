"""Triton kernels behind `fp8`: the norm of `fused_triton` in its quantising form, and GELU with quantisation.

A row of the feed-forward's width would waste half of its lanes if it were padded to a power of two (8960 to
16384), so GELU takes it in two parts: as many channels as a power of two holds, and the padded rest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longlive_opt.kernels.fp8 import empty_rows
from longlive_opt.kernels.fused_triton import norm_into

# -2 sqrt(2 / pi) log2(e), and that times GELU's 0.044715.
GELU_LINEAR = tl.constexpr(-2.302208198144325)
GELU_CUBIC = tl.constexpr(-0.1029432395800235)


@triton.jit
def _gelu(x, dtype: tl.constexpr):
    """GELU in its tanh form, x sigmoid(2 u), rounded to dtype and widened again."""
    return (x / (1.0 + tl.exp2(x * (GELU_LINEAR + GELU_CUBIC * (x * x))))).to(dtype).to(tl.float32)


@triton.jit
def gelu_kernel(x_ptr, out_ptr, row_scale_ptr, channels, BLOCK: tl.constexpr, REST: tl.constexpr):
    """One row: GELU, then e4m3 by the row's own scale. BLOCK <= channels < 2 BLOCK; the rest, if there is
    any, is masked in REST lanes.
    """
    row = tl.program_id(0)
    dtype = x_ptr.dtype.element_ty
    cols = row * channels + tl.arange(0, BLOCK)
    h = _gelu(tl.load(x_ptr + cols).to(tl.float32), dtype)
    absmax = tl.max(tl.abs(h), 0)
    if REST:
        more = BLOCK + tl.arange(0, REST)
        mask = more < channels
        h_more = _gelu(tl.load(x_ptr + row * channels + more, mask=mask, other=0.0).to(tl.float32), dtype)
        absmax = tl.maximum(absmax, tl.max(tl.abs(h_more), 0))
    absmax = tl.maximum(absmax, 1e-12)
    tl.store(row_scale_ptr + row, absmax * (1.0 / 448.0))
    inverse = tl.div_rn(1.0, absmax) * 448.0
    tl.store(out_ptr + cols, (h * inverse).to(tl.float8e4nv))
    if REST:
        tl.store(out_ptr + row * channels + more, (h_more * inverse).to(tl.float8e4nv), mask=mask)


def norm(x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, frame_tokens: int,
         modulate: bool, eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """`fused_triton.norm` -> (new residual stream or None without y, normed in e4m3, scales of rows)."""
    values, row_scale = empty_rows(x)
    x_out = norm_into(values, row_scale, x, y, gate, scale, shift, frame_tokens, modulate, eps)
    return x_out, values, row_scale


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `gelu_kernel` over the last dimension of a contiguous x -> (e4m3, scales of rows)."""
    values, row_scale = empty_rows(x)
    channels = x.shape[-1]
    block = 1 << channels.bit_length() - 1
    rest = triton.next_power_of_2(channels - block) if channels > block else 0
    gelu_kernel[(row_scale.numel(),)](x, values, row_scale, channels, BLOCK=block, REST=rest, num_warps=8,
                                      enable_fp_fusion=True)
    return values, row_scale
