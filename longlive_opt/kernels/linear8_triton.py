"""Triton kernels that produce the operands of `linear8`: the norm of `fused_triton` with 8-bit output, and
rows rounded to 8 bit, after GELU where the matrix product does not apply it.

Padding a feed-forward row to a power of two (8960 to 16384) would waste half of its lanes. Such rows are
split in two: the largest power of two, and the padded rest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .fused_triton import largest, norm_into, rounded_row, scale_of
from .linear8 import empty_rows

# -2 sqrt(2 / pi) log2(e), and its product with GELU's 0.044715.
GELU_LINEAR = tl.constexpr(-2.302208198144325)
GELU_CUBIC = tl.constexpr(-0.1029432395800235)


@triton.jit
def tanh_gelu(x):
    """GELU in its tanh form, x sigmoid(2 u), of float32 x."""
    return x / (1.0 + tl.exp2(x * (GELU_LINEAR + GELU_CUBIC * (x * x))))


@triton.jit
def _load(pointer, mask, GELU: tl.constexpr):
    """Load a part of a row as float32; GELU's result is rounded to the dtype in memory first."""
    if mask is None:
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask=mask, other=0.0)
    if GELU:
        x = tanh_gelu(x.to(tl.float32)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def rows_kernel(x_ptr, out_ptr, row_scale_ptr, channels, BLOCK: tl.constexpr, REST: tl.constexpr,
                FORMAT: tl.constexpr, GELU: tl.constexpr):
    """One row: GELU if requested, then 8 bit by the row's own scale. BLOCK <= channels < 2 BLOCK; any rest is
    masked in REST lanes.
    """
    row = tl.program_id(0)
    cols = row * channels + tl.arange(0, BLOCK)
    h = _load(x_ptr + cols, None, GELU)
    absmax = largest(h, 0)
    if REST:
        more = BLOCK + tl.arange(0, REST)
        mask = more < channels
        h_more = _load(x_ptr + row * channels + more, mask, GELU)
        absmax = tl.maximum(absmax, largest(h_more, 0), propagate_nan=tl.PropagateNan.ALL)
    tl.store(row_scale_ptr + row, scale_of(absmax, FORMAT))
    tl.store(out_ptr + cols, rounded_row(h, absmax, FORMAT))
    if REST:
        tl.store(out_ptr + row * channels + more, rounded_row(h_more, absmax, FORMAT), mask=mask)


def norm(x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, frame_tokens: int,
         modulate: bool, eps: float, form: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """`fused_triton.norm` -> (new residual stream or None without y, normed in 8 bit, scales of rows)."""
    values, row_scale = empty_rows(x, form)
    x_out = norm_into(values, row_scale, x, y, gate, scale, shift, frame_tokens, modulate, eps)
    return x_out, values, row_scale


def quantize_rows(x: Tensor, form: str, gelu: bool) -> tuple[Tensor, Tensor]:
    """Launch `rows_kernel` over the last dimension of a contiguous x -> (8 bit, scales of rows)."""
    values, row_scale = empty_rows(x, form)
    channels = x.shape[-1]
    block = 1 << channels.bit_length() - 1
    rest = triton.next_power_of_2(channels - block) if channels > block else 0
    rows_kernel[(row_scale.numel(),)](x, values, row_scale, channels, BLOCK=block, REST=rest, FORMAT=form,
                                      GELU=gelu, num_warps=8, enable_fp_fusion=gelu)
    return values, row_scale
