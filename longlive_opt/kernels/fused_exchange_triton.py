"""Triton kernels behind `fused_exchange`: the halves of `fused_triton.qk_norm_rope_write_kernel`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_triton import (
    KINDS,
    WRITE_WARPS,
    _spots,
    _store_row,
    _store_transposed,
    parts_of,
    rotated,
)
from .quantize import FP8


@triton.jit
def qk_norm_pack_kernel(qkv_ptr, q_weight_ptr, k_weight_ptr, parts, channels, eps, PART: tl.constexpr,
                        GROUPS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token of any batch, role). Roles 0 and 1 normalise q and k, 2 copies v. Channel c of a role
    goes to the parts of group c // PART, [tokens, 3, PART] each.
    """
    row = tl.program_id(0)
    role = tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    mask = cols < channels
    x = tl.load(qkv_ptr + (row * 3 + role) * channels + cols, mask=mask, other=0.0)
    dtype = x.dtype
    if role != 2:
        weights = tl.where(role == 0, q_weight_ptr, k_weight_ptr)
        weight = tl.load(weights + cols, mask=mask, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / channels + eps)).to(dtype).to(tl.float32)
        x = (normed * weight).to(dtype)
    for part in tl.static_range(RANKS):
        target = parts[part] + (row * 3 + role) * PART + cols - part % GROUPS * PART
        tl.store(target, x, mask=mask & (cols // PART == part % GROUPS))


@triton.jit
def scatter_tokens_kernel(x_ptr, parts, tokens, stride, width, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token of any batch). A part has `tokens` per batch, `stride` apart."""
    row = tl.program_id(0)
    batch = row // (tokens * RANKS)
    token = row % (tokens * RANKS)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    x = tl.load(x_ptr + row * width + cols, mask=mask)
    offset = (batch * tokens + token % tokens) * stride
    for part in tl.static_range(RANKS):
        if token // tokens == part:
            tl.store(parts[part] + offset + cols, x, mask=mask)


@triton.jit
def arrive_kernel(flags, own_ptr, epoch_ptr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """One program."""
    epoch = tl.load(epoch_ptr) + 1
    tl.store(epoch_ptr, epoch)
    for rank in tl.static_range(RANKS):
        tl.atomic_xchg(flags[rank] + RANK, epoch, sem="release", scope="sys")
    for rank in tl.static_range(RANKS):
        seen = tl.atomic_add(own_ptr + rank, 0, sem="acquire", scope="sys")
        while seen < epoch:
            seen = tl.atomic_add(own_ptr + rank, 0, sem="acquire", scope="sys")


@triton.jit
def rope_write_kernel(qkv_ptr, cos_ptr, sin_ptr, slots_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
                      tokens, slots, frame_tokens, N: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
                      HEADS: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr):
    """Program (token, role). Role 0 rotates q; 1 rotates k and stores it; 2 stores v. A part has HEADS heads.
    """
    row = tl.program_id(0)
    role = tl.program_id(1)
    batch = row // tokens
    token = row % tokens
    first = tl.load(slots_ptr + token // frame_tokens)
    slot = tl.where(first < 0, -1, first + token % frame_tokens)
    for i in tl.static_range(PARTS):
        heads = i * HEADS + tl.arange(0, HEADS)
        mask = (heads < N)[:, None]
        x = tl.load(qkv_ptr + (row * 3 + role) * N * D + _spots(heads, D), mask=mask, other=0.0)
        if role == 2:
            _store_row(v_ptr, v_scale_ptr, x, batch, slot, slots, heads, N, D, V_KIND)
        else:
            turned = rotated(x.to(tl.float32), cos_ptr, sin_ptr, token, HEADS, D).to(x.dtype)
            if role == 0:
                tl.store(q_ptr + row * N * D + _spots(heads, D), turned, mask=mask)
            else:
                _store_row(k_ptr, k_scale_ptr, turned, batch, slot, slots, heads, N, D, K_KIND)


def qk_norm_pack(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, parts: Sequence[Tensor],
                 head_groups: int, eps: float) -> None:
    """Launch `qk_norm_pack_kernel` on a contiguous qkv [B,L,3C]; fill parts [B,L,3C/head_groups]."""
    batch, tokens, width = qkv.shape
    channels = width // 3
    qk_norm_pack_kernel[(batch * tokens, 3)](
        qkv, q_weight, k_weight, tuple(parts), channels, eps, PART=channels // head_groups,
        GROUPS=head_groups, RANKS=len(parts), BLOCK=triton.next_power_of_2(channels), num_warps=4,
        enable_fp_fusion=False)


def scatter_tokens(x: Tensor, parts: Sequence[Tensor]) -> None:
    """Launch `scatter_tokens_kernel` on a contiguous x [B,L,M,D]; fill parts [B,L/ranks,M,D]."""
    batch, tokens, heads, dim = x.shape
    scatter_tokens_kernel[(batch * tokens,)](
        x, tuple(parts), tokens // len(parts), parts[0].stride(1), heads * dim, RANKS=len(parts),
        BLOCK=triton.next_power_of_2(heads * dim), num_warps=2)


def arrive(flags: Sequence[Tensor], own: Tensor, epoch: Tensor, rank: int) -> None:
    """Launch `arrive_kernel`."""
    arrive_kernel[(1,)](tuple(flags), own, epoch, RANK=rank, RANKS=len(flags), num_warps=1)


def rope_write(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k: Tensor, v: Tensor,
               k_scale: Tensor | None, v_scale: Tensor | None, frame_tokens: int) -> Tensor:
    """Launch the write kernels; change k, v and their per-token scales in place. Return q [B,L,N,D]."""
    batch, tokens, _ = qkv.shape
    _, capacity, heads, dim = k.shape
    transposed = v.dtype == FP8
    q = torch.empty(batch, tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    parts, part = parts_of(heads)
    rope_write_kernel[(batch * tokens, 2 if transposed else 3)](
        qkv, cos, sin, slots, q, k, v, q if k_scale is None else k_scale, q if v_scale is None else v_scale,
        tokens, capacity, frame_tokens, N=heads, D=dim, PARTS=parts, HEADS=part,
        K_KIND=KINDS.get(k.dtype, "plain"), V_KIND="plain" if transposed else KINDS.get(v.dtype, "plain"),
        num_warps=WRITE_WARPS, enable_fp_fusion=False)
    if transposed:
        _store_transposed(qkv[:, :, 2 * heads * dim:], slots, v, v_scale, frame_tokens)
    return q
