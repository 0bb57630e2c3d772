"""`fused.qk_norm_rope_write` in two halves, around an exchange between ranks.

The norms need all heads of a token, and the cache has only this rank's: so `qk_norm_pack` normalises the
tokens of this rank and writes to all ranks, and `rope_write` rotates and stores all tokens of this rank's
heads. `scatter_tokens` returns what attention makes of them, and `arrive` lets ranks wait for each other.
Triton on CUDA, plain PyTorch elsewhere. Rounding is that of the whole operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fused import check_write, rms_norm_reference, rope_reference
from .quantize import QuantizedKV, write_kv


def qk_norm_pack(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, parts: Sequence[Tensor],
                 head_groups: int, eps: float = 1e-6) -> None:
    """RMS norm of q and k, packed by heads.

    Args:
        qkv: q, k and v of this rank's tokens, concatenated: [B,L,3C], contiguous.
        q_weight, k_weight: [C].
        parts: where to write, one [B,L,3C/head_groups] per rank, contiguous: q, k and v of its heads, which
            are group `rank % head_groups`. They may be on other GPUs that this one can write to.

    Raises:
        ValueError: shapes do not fit.
    """
    batch, tokens, width = qkv.shape
    if width % (3 * head_groups) or len(parts) % head_groups or not qkv.is_contiguous():
        raise ValueError(f"qkv {tuple(qkv.shape)} must be contiguous, 3 * {head_groups} equal parts wide, "
                         f"for a multiple of {head_groups} ranks, not {len(parts)}")
    wanted = (batch, tokens, width // head_groups)
    if any(part.shape != wanted or not part.is_contiguous() for part in parts):
        raise ValueError(f"parts {[tuple(part.shape) for part in parts]} must be contiguous, {wanted} each")
    if qkv.is_cuda:
        from . import fused_exchange_triton

        fused_exchange_triton.qk_norm_pack(qkv, q_weight, k_weight, parts, head_groups, eps)
        return
    q, k, v = qkv.chunk(3, -1)
    roles = (rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps), v)
    packed = [torch.cat(own, -1) for own in zip(*(role.chunk(head_groups, -1) for role in roles))]
    for rank, part in enumerate(parts):
        part.copy_(packed[rank % head_groups])


def scatter_tokens(x: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy each part of the tokens to its place.

    Args:
        x: [B,L,M,D], contiguous.
        parts: where to write, one [B,L/ranks,M,D] per rank, as in memory for more heads. They may be on other
            GPUs that this one can write to.

    Raises:
        ValueError: shapes or strides do not fit.
    """
    batch, tokens, heads, dim = x.shape
    wanted = (batch, tokens // len(parts), heads, dim)
    for part in parts:
        row = part.stride(1)
        if part.shape != wanted or part.stride() != (row * wanted[1], row, dim, 1):
            raise ValueError(f"part {tuple(part.shape)} with strides {part.stride()} must be {wanted} and "
                             "have its tokens in order")
    if not x.is_contiguous() or tokens % len(parts):
        raise ValueError(f"x {tuple(x.shape)} must be contiguous, with {len(parts)} equal parts of tokens")
    if x.is_cuda:
        from . import fused_exchange_triton

        fused_exchange_triton.scatter_tokens(x, parts)
        return
    for part, rows in zip(parts, x.chunk(len(parts), 1), strict=True):
        part.copy_(rows)


def arrive(flags: Sequence[Tensor], own: Tensor, epoch: Tensor, rank: int) -> None:
    """Let the current stream wait until all ranks have arrived as often as this one; on CUDA only.

    Args:
        flags: of all ranks, int64 [ranks] each, with how often each rank has arrived; zeros at first.
        own: the flags of this rank.
        epoch: int64 [1], how often this rank has arrived; 0 at first. Changed in place.
    """
    from . import fused_exchange_triton

    fused_exchange_triton.arrive(flags, own, epoch, rank)


def rope_write(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
               k_scale: Tensor | None, v_scale: Tensor | None, frame_tokens: int) -> Tensor:
    """Rotate q and k, which are normalised, and write k and v to their cache slots.

    qkv [B,L,3C] with C = N*D of this rank's N heads, contiguous; the other arguments are those of
    `fused.qk_norm_rope_write`. Returns rotated q [B,L,N,D]. Raises ValueError when shapes do not fit.
    """
    heads, dim = k_cache.shape[2:]
    check_write(qkv, cos, sin, slots, k_cache, v_cache, frame_tokens)
    if qkv.is_cuda:
        from . import fused_exchange_triton

        return fused_exchange_triton.rope_write(qkv, cos, sin, slots, k_cache, v_cache, k_scale, v_scale,
                                                frame_tokens)
    q, k, v = qkv.unflatten(-1, (3, heads, dim)).unbind(2)
    write_kv(QuantizedKV(k_cache, v_cache, k_scale, v_scale), rope_reference(k, cos, sin), v, slots,
             frame_tokens)
    return rope_reference(q, cos, sin)
