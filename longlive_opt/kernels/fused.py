"""Element-wise fusions of the DiT block as PyTorch operators: Triton on CUDA, plain PyTorch elsewhere.

Each operator reads and writes every tensor once. Rounding follows eager PyTorch in the tensors' dtype (SPEC
2.5): LayerNorm in float32 and rounded once, then 1 + scale, product and sum each rounded; RMS norm rounded
before its weight; RoPE in float32. On CUDA, the order of sums in a norm differs from eager PyTorch, so
results occasionally differ in the last bit.

Per-frame vectors (gate, scale, shift) are [B,F,C] and may be views with any strides over B and F, such as a
slice of the modulation table [B,F,6,C]. Token l belongs to latent frame l // frame_tokens.

A device tensor gives the cache slots (`slots`, int32 [F]: first slot of each latent frame of the call;
negative = do not store), so one captured CUDA graph works for every ring position. Slots must be within the
cache: kernels do not check.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .quantize import QuantizedKV, write_kv


@torch.library.custom_op("longlive::layernorm_modulate", mutates_args=())
def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int,
                       eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, for x [B,L,C], shift and scale [B,F,C] -> [B,L,C]. Not affine."""
    for vector in (shift, scale):
        check_frames(x, vector, frame_tokens)
    if x.is_cuda:
        from . import fused_triton

        return fused_triton.norm(x, None, None, scale, shift, frame_tokens, True, eps)[1]
    return layernorm_modulate_reference(x, shift, scale, frame_tokens, eps)


@torch.library.custom_op("longlive::gate_residual_layernorm_modulate", mutates_args=())
def gate_residual_layernorm_modulate(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
                                     frame_tokens: int, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """r = x + gate * y (gate None: x + y) and LayerNorm(r) * (1 + scale) + shift -> (r, modulated)."""
    for vector in (gate, shift, scale):
        check_frames(x, vector, frame_tokens)
    if x.is_cuda:
        from . import fused_triton

        return fused_triton.norm(x, y.contiguous(), gate, scale, shift, frame_tokens, True, eps)
    residual = gate_residual_reference(x, y, gate, frame_tokens)
    return residual, layernorm_modulate_reference(residual, shift, scale, frame_tokens, eps)


@torch.library.custom_op("longlive::gate_residual_layernorm_affine", mutates_args=())
def gate_residual_layernorm_affine(x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor,
                                   frame_tokens: int, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """r = x + gate * y (gate None: x + y) and LayerNorm(r) * weight + bias, both [C] -> (r, normed)."""
    check_frames(x, gate, frame_tokens)
    if x.is_cuda:
        from . import fused_triton

        return fused_triton.norm(x, y.contiguous(), gate, weight, bias, frame_tokens, False, eps)
    residual = gate_residual_reference(x, y, gate, frame_tokens)
    return residual, F.layer_norm(residual, x.shape[-1:], weight, bias, eps)


@torch.library.custom_op("longlive::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last dimension of x, weight [C]: the norm of cross-attention's queries."""
    if x.is_cuda:
        from . import fused_triton

        return fused_triton.rms_norm(x.contiguous(), weight, eps)
    return rms_norm_reference(x, weight, eps)


def prompt_rows(key: Tensor) -> Tensor:
    """Number of rows of keys [B,T,N,D] before those that equal the last row, int32 [B]: a prompt's own rows,
    where the others come from its zero padding.
    """
    differs = (key != key[:, -1:]).flatten(2).any(2)
    places = torch.arange(1, key.shape[1] + 1, device=key.device, dtype=torch.int32)
    return (differs * places).amax(1)


@torch.library.custom_op("longlive::cross_attention", mutates_args=())
def cross_attention(q: Tensor, key: Tensor, value: Tensor, own_rows: Tensor) -> Tensor:
    """Attend with q [B,L,N,D] to a prompt's keys and values [B,T,N,D], whose rows from `own_rows` [B] on are
    equal -> [B,L,N,D]. So one of them is enough, with its score raised by the logarithm of their number.
    Raises ValueError when shapes do not fit.
    """
    batch, _, heads, dim = q.shape
    rows = (batch, key.shape[1], heads, dim)
    if tuple(key.shape) != rows or tuple(value.shape) != rows or tuple(own_rows.shape) != (batch,):
        raise ValueError(f"q {tuple(q.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, own_rows "
                         f"{tuple(own_rows.shape)}; they need the same batch, heads and channels")
    if q.is_cuda:
        from . import fused_triton

        return fused_triton.cross_attention(q.contiguous(), key.contiguous(), value.contiguous(), own_rows)
    return cross_attention_reference(q, key, value, own_rows)


def check_write(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
                frame_tokens: int) -> None:
    """Raise ValueError unless the arguments of `qk_norm_rope_write` fit each other."""
    _, tokens, width = qkv.shape
    heads, dim = k_cache.shape[2:]
    tables = (tokens, dim // 2)
    if width != 3 * heads * dim or tuple(cos.shape) != tables or tuple(sin.shape) != tables:
        raise ValueError(f"qkv {tuple(qkv.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; {heads} "
                         f"heads of {dim} need qkv [B,L,{3 * heads * dim}] and tables {tables}")
    if slots.shape[0] * frame_tokens != tokens:
        raise ValueError(f"qkv has {tokens} tokens, slots {slots.shape[0]} frames of {frame_tokens}")
    if not (qkv.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("qkv, k_cache and v_cache must be contiguous: the kernel does not support strides")


@torch.library.custom_op("longlive::qk_norm_rope_write",
                         mutates_args=("k_cache", "v_cache", "k_scale", "v_scale"))
def qk_norm_rope_write(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
                       slots: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None,
                       v_scale: Tensor | None, frame_tokens: int, eps: float = 1e-6) -> Tensor:
    """Do everything between the QKV linear layer and attention; write k and v directly to their cache slots.

    qkv [B,L,3C] is the concatenation of q, k and v. The RMS norms have weights [C] over C = N*D. cos and sin
    are float32 [L,D/2]; pair j is channels 2j, 2j+1 of a head. The caches are [B,T,N,D] in qkv's dtype with
    scales None, or the tensors of a `QuantizedKV`. In the latter case, k (rounded to qkv's dtype) and v are
    quantised: per-token scales are written, per-head scales are read. Returns q [B,L,N,D], normalised and
    rotated. Raises ValueError when shapes do not fit.
    """
    heads, dim = k_cache.shape[2:]
    check_write(qkv, cos, sin, slots, k_cache, v_cache, frame_tokens)
    if qkv.is_cuda:
        from . import fused_triton

        return fused_triton.qk_norm_rope_write(qkv, q_weight, k_weight, cos, sin, slots, k_cache, v_cache,
                                               k_scale, v_scale, frame_tokens, eps)
    q, k, v = (part.unflatten(-1, (heads, dim)) for part in qkv.chunk(3, -1))
    q = rope_reference(rms_norm_reference(q.flatten(2), q_weight, eps).view_as(q), cos, sin)
    k = rope_reference(rms_norm_reference(k.flatten(2), k_weight, eps).view_as(k), cos, sin)
    write_kv(QuantizedKV(k_cache, v_cache, k_scale, v_scale), k, v, slots, frame_tokens)
    return q


def qk_norm_rope_write8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
                        slots: Tensor, cache: QuantizedKV, frame_tokens: int, eps: float = 1e-6) -> Tensor:
    """`qk_norm_rope_write` into an 8-bit cache."""
    return qk_norm_rope_write(qkv, q_weight, k_weight, cos, sin, slots, cache.k, cache.v, cache.k_scale,
                              cache.v_scale, frame_tokens, eps)


def store_kv(k: Tensor, v: Tensor, slots: Tensor, cache: QuantizedKV, frame_tokens: int) -> None:
    """Write k (normalised, rotated) and v, both [B,L,N,D], to their slots of an 8-bit cache.

    This is the last step of `qk_norm_rope_write8`, for use where a compiler fuses norm and rotation. Raises
    ValueError when shapes do not fit.
    """
    torch.ops.longlive.store_kv(k, v, slots, cache.k, cache.v, cache.k_scale, cache.v_scale, frame_tokens)


@torch.library.custom_op("longlive::store_kv", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale"))
def _store_kv(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor,
              v_scale: Tensor | None, frame_tokens: int) -> None:
    expected = (k_cache.shape[0], slots.shape[0] * frame_tokens, *k_cache.shape[2:])
    if tuple(k.shape) != expected or tuple(v.shape) != expected:
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)}; {slots.shape[0]} frames of {frame_tokens} "
                         f"tokens need {expected}")
    if k.is_cuda:
        from . import fused_triton

        fused_triton.store_kv(k.contiguous(), v.contiguous(), slots, k_cache, v_cache, k_scale, v_scale,
                              frame_tokens)
        return
    write_kv(QuantizedKV(k_cache, v_cache, k_scale, v_scale), k, v, slots, frame_tokens)


def layernorm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int,
                                 eps: float = 1e-6) -> Tensor:
    """Eager form of `layernorm_modulate`."""
    h = F.layer_norm(x, x.shape[-1:], eps=eps)
    return h * (1 + _spread(scale, frame_tokens)) + _spread(shift, frame_tokens)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor | None, frame_tokens: int) -> Tensor:
    """x + gate * y with one gate per frame; None means 1."""
    return x + (y if gate is None else _spread(gate, frame_tokens) * y)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Eager form of `rms_norm`: rounded to x's dtype before the weight."""
    full = x.float()
    return (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def cross_attention_reference(q: Tensor, key: Tensor, value: Tensor, own_rows: Tensor) -> Tensor:
    """Plain form of `cross_attention`."""
    number = key.shape[1]
    places, own = torch.arange(number, device=q.device), own_rows[:, None]
    bias = torch.zeros(len(q), number, device=q.device)
    bias = torch.where(places == own, (number - own).clamp_min(1).log(), bias)
    bias = bias.masked_fill(places > own, -torch.inf).to(q.dtype)[:, None, None]
    q, key, value = (x.transpose(1, 2) for x in (q, key, value))
    return F.scaled_dot_product_attention(q, key, value, attn_mask=bias).transpose(1, 2)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved channel pairs of x [B,L,N,D] by the tables [L,D/2], in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def _spread(per_frame: Tensor, frame_tokens: int) -> Tensor:
    """[B,F,C] -> [B,L,C]: repeat each frame's vector for its tokens."""
    return per_frame.repeat_interleave(frame_tokens, 1)


def check_frames(x: Tensor, per_frame: Tensor | None, frame_tokens: int) -> None:
    """Refuse an x or a per-frame vector that the kernels would misread."""
    batch, tokens, channels = x.shape
    if not x.is_contiguous() or tokens % frame_tokens:
        raise ValueError(f"x {tuple(x.shape)} must be contiguous, a whole number of frames of {frame_tokens}")
    expected = (batch, tokens // frame_tokens, channels)
    if per_frame is not None and (tuple(per_frame.shape) != expected or per_frame.stride(2) != 1):
        raise ValueError(f"per-frame vector {tuple(per_frame.shape)} must be {expected}, channels adjacent")


def _one_like_x(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(x)


def _two_like_x(x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


layernorm_modulate.register_fake(_one_like_x)
rms_norm.register_fake(_one_like_x)
cross_attention.register_fake(_one_like_x)
gate_residual_layernorm_modulate.register_fake(_two_like_x)
gate_residual_layernorm_affine.register_fake(_two_like_x)


@_store_kv.register_fake
def _store_kv_fake(*args: object) -> None:
    return None


@qk_norm_rope_write.register_fake
def _qk_norm_rope_write_fake(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
                             slots: Tensor, k_cache: Tensor, *args: object, **kwargs: object) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], *k_cache.shape[2:])
