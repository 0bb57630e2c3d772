"""`fused.qk_norm_rope_write` in two halves, around an exchange between ranks.

The norms need all heads of a token, and the cache has only this rank's: so `qk_norm_pack` normalises the
tokens of this rank and writes the messages to all ranks, and `rope_write` rotates and stores all tokens of
this rank's heads. Triton on CUDA, plain PyTorch elsewhere. Rounding is that of the whole operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import check_write, rms_norm_reference, rope_reference
from .quantize import QuantizedKV, write_kv


def qk_norm_pack(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, ranks: int, eps: float = 1e-6) -> Tensor:
    """RMS norm of q and k, packed by heads.

    Args:
        qkv: q, k and v of this rank's tokens, concatenated: [B,L,3C], contiguous.
        q_weight, k_weight: [C].
        ranks: number of parts; they divide the heads.

    Returns:
        [ranks,B,L,3C/ranks]: for each rank, q, k and v of its heads.
    """
    if qkv.shape[-1] % (3 * ranks) or not qkv.is_contiguous():
        raise ValueError(f"qkv {tuple(qkv.shape)} must be contiguous, 3 * {ranks} equal parts wide")
    if qkv.is_cuda:
        from . import fused_exchange_triton

        return fused_exchange_triton.qk_norm_pack(qkv, q_weight, k_weight, ranks, eps)
    q, k, v = qkv.chunk(3, -1)
    parts = (rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps), v)
    packed = torch.stack([part.unflatten(-1, (ranks, -1)) for part in parts], dim=3)
    return packed.flatten(3).movedim(2, 0).contiguous()


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
