"""The arithmetic of the 8-bit attention kernels in plain PyTorch: same quantisation points, same tiles.

Tests use it as the kernels' reference, and CPUs run it instead of them. It does not emulate fused
multiply-adds, the hardware's exp2 (2 ulp) or the short accumulators of Hopper's fp8 matrix product.

Relative error (root mean square, RMS) against float32 attention on random normal data, D = 128, 6000 keys:
int8_bf16 0.9 %, int8_int8 1.1 %, int8_fp8 3.8 %, fp8_fp8 5.3 %. An H100 measured 1.0, 3.9 and 5.4 % for all
but int8_int8. Storage alone, with exact q and P, causes 0.7, 0.9, 2.8 and 3.9 %. With more keys, error and
signal average out alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .quantize import FP8, QuantizedKV, dequantize_kv, gather_v, quantize_fp8, quantize_int8

# P has units of 2^-P_SHIFT: the largest value of a row becomes 256 in e4m3, whose maximum is 448.
P_SHIFT = {"fp8": 8, "int8": 6, "bf16": 0}


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float32 softmax(q k^T / sqrt(D)) v for q [B,L,N,D], k, v [B,T,N,D] -> float32 [B,L,N,D]."""
    scores = torch.einsum("blnd,btnd->bnlt", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return torch.einsum("bnlt,btnd->blnd", scores.softmax(-1), v.float())


def attention8_emulated(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor | None,
                        num_keys: int, block_n: int = 128) -> Tensor:
    """Compute what the kernel does, in tiles of `block_n` keys -> [B,L,N,D] in q's dtype.

    q is quantised per token and head to K's format. Scores are in base 2; the running maximum, P and the sums
    are float32. P is rounded to match V: bf16 (V bf16), fp16 with V's token scale included (V int8), or e4m3
    (V fp8).
    """
    k_int8, v_fp8 = k.dtype == torch.int8, v.dtype == FP8
    v_kind = "fp8" if v_fp8 else "int8" if v.dtype == torch.int8 else "bf16"
    values = (gather_v(v, num_keys) if v_fp8 else v[:, :num_keys]).float().transpose(1, 2)
    keys = k[:, :num_keys].float().permute(0, 2, 3, 1)
    q8, q_scale = quantize_int8(q) if k_int8 else quantize_fp8(q)
    q8, q_scale = q8.float().transpose(1, 2), q_scale.transpose(1, 2)[..., None]
    q_scale = q_scale * (q.shape[-1] ** -0.5 * math.log2(math.e))
    if not k_int8:
        q_scale = q_scale * k_scale[..., None, None]
    shift = P_SHIFT[v_kind]
    running = torch.full_like(q_scale, -math.inf)
    total = torch.zeros_like(q_scale)
    out = torch.zeros_like(q8)
    for start in range(0, num_keys, block_n):
        cols = slice(start, min(start + block_n, num_keys))
        scores = q8 @ keys[..., cols]
        if k_int8:
            scores = scores * k_scale[..., None, cols]
        maximum = torch.maximum(running, scores.amax(-1, keepdim=True) * q_scale - shift)
        alpha = torch.exp2(running - maximum)
        p = torch.exp2(scores * q_scale - maximum)
        total = total * alpha + p.sum(-1, keepdim=True)
        out = out * alpha + _round_p(p, v.dtype, v_scale, cols).float() @ values[..., cols, :]
        running = maximum
    if v_kind == "fp8":
        total = total / v_scale[..., None, None]
    return (out / total).transpose(1, 2).to(q.dtype).contiguous()


def attention8_dequantized(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor | None,
                           num_keys: int) -> Tensor:
    """float32 attention over the dequantised cache with q unchanged: the error of storage alone."""
    return attention_reference(q, *dequantize_kv(QuantizedKV(k, v, k_scale, v_scale), num_keys))


def _round_p(p: Tensor, v_dtype: torch.dtype, v_scale: Tensor | None, cols: slice) -> Tensor:
    """Round P as the second matrix product takes it: to V's dtype; for int8 V, times its scales to fp16."""
    if v_dtype == torch.int8:
        return (p * v_scale[..., None, cols]).to(torch.float16)
    return p.to(v_dtype)
