"""8-bit formats of the KV (key-value) cache: contents, order, and the arithmetic of quantisation.

Letters: B batch, T cache slots (tokens), N heads, D head dim. A mode names the formats of K and of V:

| mode      | K, k_scale                        | V, v_scale                               | of bf16 |
|-----------|-----------------------------------|------------------------------------------|---------|
| int8_bf16 | int8 [B,T,N,D], per token [B,N,T] | bf16 [B,T,N,D], none                     | 3/4     |
| int8_int8 | int8 [B,T,N,D], per token [B,N,T] | int8 [B,T,N,D], per token [B,N,T]        | 1/2     |
| int8_fp8  | int8 [B,T,N,D], per token [B,N,T] | e4m3 [B,N,D,T'] permuted, per head [B,N] | 1/2     |
| fp8_fp8   | e4m3 [B,T,N,D], per head [B,N]    | e4m3 [B,N,D,T'] permuted, per head [B,N] | 1/2     |

One scale per token adds 4 bytes per head, or 3 % of int8 at D = 128. Scales are float32. Every format is
written slot by slot; each value is quantised once, when written.

*Why V is transposed in fp8.* Hopper's 8-bit matrix product needs both operands contiguous along the summed
dimension; for P V these are the slots. T' is T rounded up to 16 bytes, the granularity of the copy engine.

*Why its slots are permuted.* After the first matrix product, a thread holds columns 2q, 2q+1, 8+2q, 9+2q of
each 16 of P; the second needs columns 4q..4q+3. Attention does not depend on the order of keys. Storing V in
the order in which P lies in registers therefore avoids the exchange between threads (`slot_column`).

*Why fp8 has one fixed scale per head.* e4m3 is a floating-point format with 15 binades between its smallest
normal number and its largest. A scale per token would add no precision and cost one multiplication per score.
A scale of 1 covers 0.016 to 448; larger finite values saturate, and `count_codes` counts them. int8 needs its
scale per token.

*Non-finite values stay visible.* e4m3 has a code for NaN, and infinities become NaN too. int8 has none, so
the row's scale becomes NaN or infinite, and results that use it are visibly broken instead of subtly wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INT8_MAX = 127.0
FP8_MAX = 448.0
FP8 = torch.float8_e4m3fn
TINY = 1e-12
V_GROUP = 16
MODES = {
    "int8_bf16": ("int8", "bf16"),
    "int8_int8": ("int8", "int8"),
    "int8_fp8": ("int8", "fp8"),
    "fp8_fp8": ("fp8", "fp8"),
}


@dataclass(frozen=True)
class QuantizedKV:
    """One layer's 8-bit cache; the module docstring gives the layouts. `v_scale` is None when V is bf16."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory, scales included."""
        return sum(t.nbytes for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None)


def allocate_kv(mode: str, batch: int, tokens: int, heads: int, head_dim: int, device: torch.device | str,
                dtype: torch.dtype = torch.bfloat16) -> QuantizedKV:
    """Allocate an empty cache of `tokens` slots, zeroed because a kernel may read unused slots (weight 0).

    `dtype` is V's dtype in int8_bf16. Scales start at 1. Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; use one of {', '.join(MODES)}")
    k_kind, v_kind = MODES[mode]
    rows = (batch, tokens, heads, head_dim)
    per_token, per_head = (batch, heads, tokens), (batch, heads)
    k = torch.zeros(rows, dtype=torch.int8 if k_kind == "int8" else FP8, device=device)
    k_scale = torch.ones(per_token if k_kind == "int8" else per_head, device=device)
    if v_kind == "fp8":
        padded = -(-tokens // V_GROUP) * V_GROUP
        v = torch.zeros((batch, heads, head_dim, padded), dtype=FP8, device=device)
        return QuantizedKV(k, v, k_scale, torch.ones(per_head, device=device))
    v = torch.zeros(rows, dtype=torch.int8 if v_kind == "int8" else dtype, device=device)
    return QuantizedKV(k, v, k_scale, torch.ones(per_token, device=device) if v_kind == "int8" else None)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (int8 [..., D], float32 scale [...]), scale = absmax / 127, round half to even.

    If a row contains NaN or infinity, so does its scale. The kernels rely on this order of operations: one
    reciprocal per row, then multiplications in float32.
    """
    x = x.float()
    absmax = x.abs().amax(-1).clamp_min(TINY)
    q = torch.round(x * (absmax.reciprocal() * INT8_MAX)[..., None])
    return q.nan_to_num(0.0).to(torch.int8), absmax * (1 / INT8_MAX)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (e4m3 [..., D], float32 scale [...]), scale = absmax / 448."""
    x = x.float()
    absmax = x.abs().amax(-1).clamp_min(TINY)
    return saturate_fp8(x * (absmax.reciprocal() * FP8_MAX)[..., None]), absmax * (1 / FP8_MAX)


def saturate_fp8(x: Tensor) -> Tensor:
    """float32 -> e4m3, clamped to +-448, because a plain cast of a larger value gives NaN on some devices.
    NaN and infinities become NaN.
    """
    return torch.where(x.isfinite(), x.clamp(-FP8_MAX, FP8_MAX), math.nan).to(FP8)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """q [..., D] and its scale [...] -> float32 [..., D]."""
    return q.float() * scale[..., None]


def token_slots(slots: Tensor, frame_tokens: int) -> Tensor:
    """First slot of each latent frame, int [F] -> slot of each token, int64 [F*frame_tokens]; -1: none."""
    table = slots.long()[:, None] + torch.arange(frame_tokens, device=slots.device)
    return torch.where(slots[:, None] < 0, -1, table).flatten()


def slot_column(slots: Tensor) -> Tensor:
    """Slot -> column of the transposed fp8 V: bits (h,q1,q0,e) of its position in 16 become (q1,q0,h,e)."""
    low = slots % V_GROUP
    return slots - low + low % 8 // 2 * 4 + low // 8 * 2 + low % 2


def gather_v(v: Tensor, num_keys: int) -> Tensor:
    """Undo the transposed layout: v [B,N,D,T'] -> [B,num_keys,N,D], same dtype, slots in natural order."""
    stored = v.view(torch.uint8).unflatten(-1, (-1, 4, 2, 2))
    natural = stored.transpose(-2, -3).flatten(-4)[..., :num_keys]
    return natural.permute(0, 3, 1, 2).contiguous().view(v.dtype)


def dequantize_kv(cache: QuantizedKV, num_keys: int) -> tuple[Tensor, Tensor]:
    """The first `num_keys` slots of a cache, in natural order -> k, v float32 [B,num_keys,N,D]."""
    v = gather_v(cache.v, num_keys) if cache.v.dtype == FP8 else cache.v[:, :num_keys]
    return _plain_rows(cache.k[:, :num_keys], cache.k_scale), _plain_rows(v, cache.v_scale)


def count_codes(values: Tensor) -> Tensor:
    """Count the e4m3 values [B,T,N,D] of each head that are +-448, below the smallest normal number (zeros
    too), or NaN -> int64 [3,N].
    """
    magnitude = values.view(torch.uint8) & 0x7F
    kinds = (magnitude == 0x7E, magnitude < 0x08, magnitude == 0x7F)
    return torch.stack([kind.sum((0, 1, 3)) for kind in kinds])


def write_keys(cache: QuantizedKV, k: Tensor) -> None:
    """Write k [B,L,N,D] to the first L slots, in place, in the cache's format; shapes are static."""
    _write_rows(cache.k, cache.k_scale, k, torch.arange(k.shape[1], device=k.device))


def write_kv(cache: QuantizedKV, k: Tensor, v: Tensor, slots: Tensor, frame_tokens: int) -> None:
    """Write k, v [B,L,N,D] to their slots, in place, in the cache's formats, as the fused kernels do.

    slots: int [F], first slot of each latent frame of the call, negative = do not store; L = F *
    frame_tokens. Per-head scales are read, per-token scales are written; formats without scales are stored
    plain.
    """
    index = token_slots(slots, frame_tokens)
    kept, index = index >= 0, index[index >= 0]
    _write_rows(cache.k, cache.k_scale, k[:, kept], index)
    if cache.v.dtype == FP8:
        columns = _by_head(v[:, kept], cache.v_scale).permute(0, 2, 3, 1).contiguous()
        cache.v.view(torch.uint8).index_copy_(3, slot_column(index), columns.view(torch.uint8))
    else:
        _write_rows(cache.v, cache.v_scale, v[:, kept], index)


def _by_head(x: Tensor, scale: Tensor) -> Tensor:
    """Divide x [B,L,N,D] by a scale per head [B,N] and convert it to e4m3."""
    return saturate_fp8(x.float() * scale.reciprocal()[:, None, :, None])


def _plain_rows(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Rows [B,T,N,D] and their scale (per token [B,N,T'], T' >= T, per head [B,N] or none) -> float32."""
    if scale is None:
        return rows.float()
    return dequantize(rows, scale[..., :rows.shape[1]].mT if scale.dim() == 3 else scale[:, None])


def _write_rows(rows: Tensor, scale: Tensor | None, x: Tensor, index: Tensor) -> None:
    """Write x [B,L,N,D] to rows [B,T,N,D] at `index`, in the format of `rows`."""
    if rows.dtype == torch.int8:
        x, token_scale = quantize_int8(x)
        scale.index_copy_(2, index, token_scale.transpose(1, 2))
        rows.index_copy_(1, index, x)
    elif rows.dtype == FP8:
        rows.view(torch.uint8).index_copy_(1, index, _by_head(x, scale).view(torch.uint8))
    else:
        rows.index_copy_(1, index, x.to(rows.dtype))
