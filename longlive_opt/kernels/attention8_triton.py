"""Triton kernel behind `attention8`: reads 8-bit keys and values as stored, with online softmax in float32.

Design decisions, from the machine code for sm_90a (Triton 3.6):

* V is permuted as in `quantize`, so P becomes the second matrix product's operand without leaving its
  registers. Otherwise exchanges between threads take a fifth of the loop's instructions, and ptxas waits
  after every wgmma (its note C7515).
* Only the last tile masks keys beyond `num_keys`; it is peeled off the loop.
* q is quantised here, once per program. Its scale, 1/sqrt(D) and log2(e) form one factor per row, applied
  after the row's maximum.
* K and V use TMA (tensor memory accelerator) descriptors, whose loads run `num_stages` tiles ahead.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention8_reference import P_SHIFT
from .quantize import FP8

# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to the nearest integer, ties to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _scores(q, k_desc, row, column, K_INT8: tl.constexpr):
    """Product of the quantised queries with one tile of keys, float32 (exact for int8)."""
    k = k_desc.load([row, column])
    if K_INT8:
        return tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32)
    else:
        return tl.dot(q, k.T)


@triton.jit
def _values(v_desc, row, column, channel, start, V_KIND: tl.constexpr):
    """One tile of values as [keys, D], ready for P: bf16, float16 (from int8) or e4m3."""
    if V_KIND == "fp8":
        return v_desc.load([channel, start]).T
    elif V_KIND == "int8":
        # 0x6400 is 1024 in float16 with a last bit of 1, so or-ing a byte into it adds the byte.
        v = v_desc.load([row + start, column]).to(tl.uint8, bitcast=True)
        return ((v ^ 128).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        return v_desc.load([row + start, column])


@triton.jit
def _softmax(s, q_scale, running, total, k_scale, v_scale, cols, num_keys, K_INT8: tl.constexpr,
             V_KIND: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Scores of a tile -> (P, new maximum, new sum, factor for the earlier sums).

    For e4m3 V, P is permuted and rounded unscaled. For int8 V, P includes V's token scales.
    """
    if K_INT8:
        if MASK:
            s = s * tl.load(k_scale + cols, mask=cols < num_keys, other=0.0)[None, :]
        else:
            s = s * tl.load(k_scale + cols)[None, :]
    if MASK:
        s = tl.where((cols < num_keys)[None, :], s, float("-inf"))
    maximum = tl.maximum(running, tl.max(s, 1) * q_scale - SHIFT)
    alpha = tl.exp2(running - maximum)
    p = tl.exp2(s * q_scale[:, None] - maximum[:, None])
    total = total * alpha + tl.sum(p, 1)
    if V_KIND == "fp8":
        ROWS: tl.constexpr = s.shape[0]
        KEYS: tl.constexpr = s.shape[1]
        p = tl.permute(tl.reshape(p, [ROWS, KEYS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
        p = tl.reshape(p, [ROWS, KEYS]).to(tl.float8e4nv)
    elif V_KIND == "int8":
        if MASK:
            p = p * tl.load(v_scale + cols, mask=cols < num_keys, other=0.0)[None, :]
        else:
            p = p * tl.load(v_scale + cols)[None, :]
        p = p.to(tl.float16)
    return p, maximum, total, alpha


@triton.jit
def _attend(acc, p, v, alpha, V_FP8: tl.constexpr):
    """acc * alpha + p v. An e4m3 product starts from zero and is added in float32."""
    p = p.to(v.dtype)
    if V_FP8:
        return acc * alpha[:, None] + tl.dot(p, v)
    else:
        return tl.dot(p, v, acc * alpha[:, None])


@triton.jit(do_not_specialize=["queries", "num_keys"])
def attention8_kernel(q_ptr, out_ptr, k_desc, v_desc, k_scale_ptr, v_scale_ptr, queries, slots, num_keys,
                      heads, qk_scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      K_INT8: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr):
    """One program: BLOCK_M queries of one head against all keys. Programs of a head are adjacent, so its
    cache stays in L2.
    """
    batch_head = tl.program_id(1)
    batch = batch_head // heads
    head = batch_head % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < queries)[:, None]
    offsets = ((batch * queries + rows) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    absmax = tl.maximum(tl.max(tl.abs(q), 1), 1e-12)
    if K_INT8:
        q = ((q * (tl.div_rn(1.0, absmax) * 127.0)[:, None] + ROUND) - ROUND).to(tl.int8)
        q_scale = absmax * (1.0 / 127.0) * qk_scale
    else:
        q = (q * (tl.div_rn(1.0, absmax) * 448.0)[:, None]).to(tl.float8e4nv)
        q_scale = absmax * (1.0 / 448.0) * qk_scale * tl.load(k_scale_ptr + batch_head)
    k_scale = k_scale_ptr + batch_head * slots
    v_scale = v_scale_ptr + batch_head * slots

    running = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    row = batch * slots
    column = head * D
    tile = tl.arange(0, BLOCK_N)
    last = (tl.cdiv(num_keys, BLOCK_N) - 1) * BLOCK_N
    for start in tl.range(0, last, BLOCK_N):
        s = _scores(q, k_desc, row + start, column, K_INT8)
        p, running, total, alpha = _softmax(s, q_scale, running, total, k_scale, v_scale, start + tile,
                                            num_keys, K_INT8, V_KIND, SHIFT, False)
        v = _values(v_desc, row, column, batch_head * D, start, V_KIND)
        acc = _attend(acc, p, v, alpha, V_KIND == "fp8")
    s = _scores(q, k_desc, row + last, column, K_INT8)
    p, running, total, alpha = _softmax(s, q_scale, running, total, k_scale, v_scale, last + tile, num_keys,
                                        K_INT8, V_KIND, SHIFT, True)
    v = _values(v_desc, row, column, batch_head * D, last, V_KIND)
    acc = _attend(acc, p, v, alpha, V_KIND == "fp8")
    if V_KIND == "fp8":
        total = total / tl.load(v_scale_ptr + batch_head)
    tl.store(out_ptr + offsets, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def launch(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor | None, num_keys: int,
           block_m: int, block_n: int, num_warps: int, num_stages: int, max_registers: int) -> Tensor:
    """Run the kernel on arguments that `attention8` has checked; returns a new tensor like q."""
    batch, queries, heads, dim = q.shape
    slots = k.shape[1]
    v_kind = "fp8" if v.dtype == FP8 else "int8" if v.dtype == torch.int8 else "bf16"
    if v_kind == "fp8":
        v_desc = TensorDescriptor.from_tensor(v.view(batch * heads * dim, v.shape[3]), [dim, block_n])
    else:
        v_desc = TensorDescriptor.from_tensor(v.view(batch * slots, heads * dim), [block_n, dim])
    k_desc = TensorDescriptor.from_tensor(k.view(batch * slots, heads * dim), [block_n, dim])
    out = torch.empty_like(q)
    attention8_kernel[(triton.cdiv(queries, block_m), batch * heads)](
        q, out, k_desc, v_desc, k_scale, k_scale if v_scale is None else v_scale, queries, slots, num_keys,
        heads, dim**-0.5 * math.log2(math.e), D=dim, BLOCK_M=block_m, BLOCK_N=block_n,
        K_INT8=k.dtype == torch.int8, V_KIND=v_kind, SHIFT=P_SHIFT[v_kind],
        num_warps=num_warps, num_stages=num_stages, maxnreg=max_registers or None)
    return out
