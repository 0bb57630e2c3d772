"""Triton kernels behind `fused`: one program per token, with intermediates rounded as in eager PyTorch.

The kernels are memory bound, so they are launched without fused multiply-add: as in eager code, a product is
rounded before it is added. A program handles a row of C channels in up to four equal parts whose size is a
power of two, such as 3 x 512; another C is padded to a power of two and the padding is masked.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import FP8, V_GROUP

ROUND = tl.constexpr(12582912.0)
V_TOKENS = 64
CROSS_ROWS, CROSS_COLUMNS, CROSS_WARPS = 64, 32, 4
"""Tokens per program of cross-attention, prompt rows per step, and warps: the fastest for short prompts."""
LOG2_E = math.log2(math.e)
NORM_WARPS = 2
WRITE_WARPS = 2
KINDS = {torch.int8: "int8", FP8: "fp8"}


def parts_of(size: int) -> tuple[int, int]:
    """(number, size) of the parts of a row of `size`: at most four of a power of two, or one padded part."""
    part = size & -size
    return (size // part, part) if size <= 4 * part else (1, triton.next_power_of_2(size))


@triton.jit
def magnitude(x):
    """float32 x -> integers that are ordered as the magnitudes, with NaN as the largest; tl.max drops NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def from_magnitude(bits):
    """The float32 of a magnitude, at least 1e-12."""
    return tl.maximum(bits, 0x2B8CBCCC).to(tl.float32, bitcast=True)  # the bits of 1e-12


@triton.jit
def largest(x, axis: tl.constexpr):
    """Largest magnitude of float32 x along an axis, at least 1e-12; NaN if x contains NaN."""
    return from_magnitude(tl.max(magnitude(x), axis))


@triton.jit
def rounded_row(x, absmax, FORMAT: tl.constexpr):
    """Divide x by `scale_of` and round to int8 (ties to even) or e4m3. absmax: x's shape without the row."""
    inverse = tl.div_rn(1.0, absmax) * (127.0 if FORMAT == "int8" else 448.0)
    if FORMAT == "int8":
        return ((x * inverse + ROUND) - ROUND).to(tl.int8)
    else:
        return (x * inverse).to(tl.float8e4nv)


@triton.jit
def scale_of(absmax, FORMAT: tl.constexpr):
    """The scale that converts the output of `rounded_row` back."""
    return absmax * ((1.0 / 127.0) if FORMAT == "int8" else (1.0 / 448.0))


@triton.jit
def _saturated(x):
    """float32 -> e4m3, clamped to +-448; non-finite values become NaN."""
    clamped = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return tl.where(tl.abs(x) < float("inf"), clamped, float("nan")).to(tl.float8e4nv)


@triton.jit
def _vector(pointer, batch, frame, batch_stride, frame_stride, cols, mask):
    """One per-frame vector [C] of a [B,F,C] tensor, float32."""
    vector = pointer + batch * batch_stride + frame * frame_stride
    return tl.load(vector + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_kernel(x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, x_out_ptr, out_ptr, row_scale_ptr, tokens,
                channels, frame_tokens, gate_batch, gate_frame, scale_batch, scale_frame, shift_batch,
                shift_frame, eps, RESIDUAL: tl.constexpr, GATE: tl.constexpr, MODULATE: tl.constexpr,
                FORMAT: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """x + gate * y, LayerNorm, then per-frame modulation, or an affine step with weight and bias in its
    place. The output is rounded to x's dtype. Unless FORMAT is "plain", it is then rounded to 8 bit by the
    row's own scale, which is stored.
    """
    row = tl.program_id(0)
    batch = row // tokens
    frame = row % tokens // frame_tokens
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros([PART], tl.float32)
    values = ()
    for i in tl.static_range(PARTS):
        cols = i * PART + tl.arange(0, PART)
        mask = cols < channels
        x = tl.load(x_ptr + row * channels + cols, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            y = tl.load(y_ptr + row * channels + cols, mask=mask, other=0.0).to(tl.float32)
            if GATE:
                gate = _vector(gate_ptr, batch, frame, gate_batch, gate_frame, cols, mask)
                y = (gate * y).to(dtype).to(tl.float32)
            rounded = (x + y).to(dtype)
            tl.store(x_out_ptr + row * channels + cols, rounded, mask=mask)
            x = rounded.to(tl.float32)
        total += x
        values = values + (x,)
    mean = tl.sum(total, 0) / channels
    squares = tl.zeros([PART], tl.float32)
    for i in tl.static_range(PARTS):
        centred = tl.where(i * PART + tl.arange(0, PART) < channels, values[i] - mean, 0.0)
        squares += centred * centred
    inverse = tl.rsqrt(tl.sum(squares, 0) / channels + eps)
    most = tl.zeros([PART], tl.int32)
    normed = ()
    for i in tl.static_range(PARTS):
        cols = i * PART + tl.arange(0, PART)
        mask = cols < channels
        h = tl.where(mask, values[i] - mean, 0.0) * inverse
        scale = _vector(scale_ptr, batch, frame, scale_batch, scale_frame, cols, mask)
        shift = _vector(shift_ptr, batch, frame, shift_batch, shift_frame, cols, mask)
        if MODULATE:
            h = (h.to(dtype).to(tl.float32) * (1.0 + scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        else:
            h = h * scale
        out = (h + shift).to(dtype)
        if FORMAT == "plain":
            tl.store(out_ptr + row * channels + cols, out, mask=mask)
        else:
            wide = out.to(tl.float32)
            most = tl.maximum(most, magnitude(wide))
            normed = normed + (wide,)
    if FORMAT != "plain":
        absmax = from_magnitude(tl.max(most, 0))
        tl.store(row_scale_ptr + row, scale_of(absmax, FORMAT))
        for i in tl.static_range(PARTS):
            cols = i * PART + tl.arange(0, PART)
            tl.store(out_ptr + row * channels + cols, rounded_row(normed[i], absmax, FORMAT),
                     mask=cols < channels)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, channels, eps, BLOCK: tl.constexpr):
    """RMS norm of one row over all channels, rounded before the weight."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < channels
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * channels + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / channels + eps)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * channels + cols, (normed * weight).to(dtype), mask=mask)


@triton.jit
def _spots(heads, D: tl.constexpr):
    """Offsets [HEADS, D] of the channels of `heads` in a token."""
    return heads[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def rotated(x, cos_ptr, sin_ptr, token, HEADS: tl.constexpr, D: tl.constexpr):
    """Rotate the channel pairs of float32 x [HEADS, D] to the position of `token`."""
    even, odd = tl.split(tl.reshape(x, [HEADS, D // 2, 2]))
    pairs = token * (D // 2) + tl.arange(0, D // 2)[None, :]
    cos = tl.load(cos_ptr + pairs)
    sin = tl.load(sin_ptr + pairs)
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [HEADS, D])


@triton.jit
def _store_row(pointer, scale_ptr, x, batch, slot, slots, heads, N: tl.constexpr, D: tl.constexpr,
               KIND: tl.constexpr):
    """Write a token x [heads, D] to its cache row: int8 with new scales, e4m3 with existing ones, or plain.

    A negative slot stores nothing.
    """
    kept = heads < tl.where(slot < 0, 0, N)
    target = pointer + (batch * slots + slot) * N * D + _spots(heads, D)
    if KIND == "int8":
        x = x.to(tl.float32)
        absmax = largest(x, 1)
        x = rounded_row(x, absmax[:, None], KIND)
        tl.store(scale_ptr + (batch * N + heads) * slots + slot, scale_of(absmax, KIND), mask=kept)
    elif KIND == "fp8":
        scale = tl.load(scale_ptr + batch * N + heads, mask=kept, other=1.0)
        x = x.to(tl.float32) * tl.div_rn(1.0, scale)[:, None]
        x = _saturated(x)
    tl.store(target, x, mask=kept[:, None])


@triton.jit
def qk_norm_rope_write_kernel(qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr, q_ptr, k_ptr,
                              v_ptr, k_scale_ptr, v_scale_ptr, tokens, slots, frame_tokens, eps,
                              N: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
                              K_KIND: tl.constexpr, V_KIND: tl.constexpr):
    """Program (token, role). Role 0 normalises and rotates q; 1 does so for k and stores it; 2 stores v. A
    part has HEADS heads.
    """
    row = tl.program_id(0)
    role = tl.program_id(1)
    batch = row // tokens
    token = row % tokens
    frame = token // frame_tokens
    first = tl.load(slots_ptr + frame)
    slot = tl.where(first < 0, -1, first + token % frame_tokens)
    source = qkv_ptr + (row * 3 + role) * N * D
    if role == 2:
        for i in tl.static_range(PARTS):
            heads = i * HEADS + tl.arange(0, HEADS)
            x = tl.load(source + _spots(heads, D), mask=(heads < N)[:, None], other=0.0)
            _store_row(v_ptr, v_scale_ptr, x, batch, slot, slots, heads, N, D, V_KIND)
    else:
        dtype = qkv_ptr.dtype.element_ty
        weights = tl.where(role == 0, q_weight_ptr, k_weight_ptr)
        squares = tl.zeros([HEADS, D], tl.float32)
        values = ()
        for i in tl.static_range(PARTS):
            heads = i * HEADS + tl.arange(0, HEADS)
            x = tl.load(source + _spots(heads, D), mask=(heads < N)[:, None], other=0.0).to(tl.float32)
            squares += x * x
            values = values + (x,)
        inverse = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / (N * D) + eps)
        for i in tl.static_range(PARTS):
            heads = i * HEADS + tl.arange(0, HEADS)
            mask = (heads < N)[:, None]
            weight = tl.load(weights + _spots(heads, D), mask=mask, other=0.0).to(tl.float32)
            x = (values[i] * inverse).to(dtype).to(tl.float32)
            x = rotated((x * weight).to(dtype).to(tl.float32), cos_ptr, sin_ptr, token, HEADS, D).to(dtype)
            if role == 0:
                tl.store(q_ptr + row * N * D + _spots(heads, D), x, mask=mask)
            else:
                _store_row(k_ptr, k_scale_ptr, x, batch, slot, slots, heads, N, D, K_KIND)


@triton.jit
def cross_attention_kernel(q_ptr, k_ptr, v_ptr, own_rows_ptr, out_ptr, tokens, keys, scale, N: tl.constexpr,
                           D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (ROWS tokens, batch and head): attend with q [B,L,N,D] to the prompt's own rows and to one row
    of padding, which counts as often as there are such rows.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) // N
    head = tl.program_id(1) % N
    own = tl.load(own_rows_ptr + batch)
    used = tl.minimum(own + 1, keys)
    extra = tl.log2(tl.maximum(keys - own, 1).to(tl.float32))
    channels = tl.arange(0, D)
    cells = ((batch * tokens + rows)[:, None] * N + head) * D + channels[None, :]
    q = tl.load(q_ptr + cells, mask=(rows < tokens)[:, None], other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, D], tl.float32)
    for first in range(0, used, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (columns < used)[:, None]
        places = ((batch * keys + columns)[:, None] * N + head) * D + channels[None, :]
        k = tl.load(k_ptr + places, mask=inside, other=0.0)
        v = tl.load(v_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores += tl.where(columns == own, extra, 0.0)[None, :]
        scores = tl.where((columns < used)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        factor = tl.exp2(most - higher)
        total = total * factor + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * factor[:, None], input_precision="ieee")
        most = higher
    out = sums / total[:, None]
    tl.store(out_ptr + cells, out.to(out_ptr.dtype.element_ty), mask=(rows < tokens)[:, None])


@triton.jit
def write_rows_kernel(x_ptr, slots_ptr, out_ptr, scale_ptr, tokens, slots, frame_tokens, N: tl.constexpr,
                      D: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr):
    """One program per token: write x [B,L,N,D] to its cache row."""
    row = tl.program_id(0)
    token = row % tokens
    first = tl.load(slots_ptr + token // frame_tokens)
    slot = tl.where(first < 0, -1, first + token % frame_tokens)
    heads = tl.arange(0, HEADS)
    offsets = (row * N + heads)[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + offsets, mask=(heads < N)[:, None], other=0.0)
    _store_row(out_ptr, scale_ptr, x, row // tokens, slot, slots, heads, N, D, KIND)


@triton.jit
def write_v_transposed_kernel(x_ptr, slots_ptr, v_ptr, v_scale_ptr, tokens, token_stride, capacity,
                              frame_tokens, blocks, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Program (batch and head, block of columns of a frame): V as e4m3 [B,N,D,T'], slots permuted.

    It iterates over the cache's columns and loads each column's token, so stores are contiguous.
    """
    batch_head = tl.program_id(0)
    frame = tl.program_id(1) // blocks
    block = tl.program_id(1) % blocks
    batch = batch_head // N
    head = batch_head % N
    first = tl.load(slots_ptr + frame)
    end = first + tl.where(first < 0, 0, frame_tokens)
    start = first // 16 * 16 + block * BLOCK
    scale = tl.div_rn(1.0, tl.load(v_scale_ptr + batch_head))
    source = x_ptr + (batch * tokens + frame * frame_tokens - first) * token_stride + head * D
    target = v_ptr + batch_head * D * capacity
    channels = tl.arange(0, D)
    # Four neighbouring columns are one 32-bit number, and their slots are 0, 1, 8 and 9 from its first.
    words = tl.arange(0, BLOCK // 4)
    group = start + words // 4 * 16
    whole = tl.max_constancy((group >= first) & (group + 16 <= end), 4)
    rows = source + (group + words % 4 * 2)[:, None] * token_stride + channels[None, :]
    mask = whole[:, None]
    packed = _code(tl.load(rows, mask=mask, other=0.0), scale)
    packed |= _code(tl.load(rows + token_stride, mask=mask, other=0.0), scale) << 8
    packed |= _code(tl.load(rows + 8 * token_stride, mask=mask, other=0.0), scale) << 16
    packed |= _code(tl.load(rows + 9 * token_stride, mask=mask, other=0.0), scale) << 24
    at = target.to(tl.pointer_type(tl.int32)) + channels[:, None] * tl.multiple_of(capacity // 4, 4)
    at += tl.multiple_of(start // 4, 4) + words[None, :]
    tl.store(at, tl.trans(packed), mask=whole[None, :])
    # A frame may begin and end inside a group.
    last = end // 16 * 16
    if (block == 0) & (start < first):
        _write_group(source, target, start, first, end, token_stride, capacity, scale, D)
    if (last >= tl.maximum(start, first)) & (last < start + BLOCK) & (last < end):
        _write_group(source, target, last, first, end, token_stride, capacity, scale, D)


@triton.jit
def _write_group(source, target, start, first, end, token_stride, capacity, scale, D: tl.constexpr):
    """Write those of the 16 columns from `start` whose slots are in first ... end - 1."""
    low = tl.arange(0, 16)
    slot = start + low % 4 // 2 * 8 + low // 4 * 2 + low % 2
    inside = (slot >= first) & (slot < end)
    channels = tl.arange(0, D)
    x = tl.load(source + slot[:, None] * token_stride + channels[None, :], mask=inside[:, None], other=0.0)
    stored = tl.trans(_saturated(x.to(tl.float32) * scale))
    tl.store(target + channels[:, None] * capacity + start + low[None, :], stored, mask=inside[None, :])


@triton.jit
def _code(x, factor):
    """x times a factor as the bits of e4m3, in an int32."""
    return _saturated(x.to(tl.float32) * factor).to(tl.uint8, bitcast=True).to(tl.int32)


def norm(x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, frame_tokens: int,
         modulate: bool, eps: float) -> tuple[Tensor | None, Tensor]:
    """Launch `norm_kernel` -> (new residual stream or None without y, normed).

    scale and shift are [B,F,C] if `modulate`; otherwise they are weight and bias [C].
    """
    out = torch.empty_like(x)
    return norm_into(out, None, x, y, gate, scale, shift, frame_tokens, modulate, eps), out


def norm_into(out: Tensor, row_scale: Tensor | None, x: Tensor, y: Tensor | None, gate: Tensor | None,
              scale: Tensor, shift: Tensor, frame_tokens: int, modulate: bool, eps: float) -> Tensor | None:
    """Launch `norm_kernel` and write the normed rows to `out`, which is int8 or e4m3 if `row_scale` [B,L,1]
    is given and written too. Return the new residual stream, None without y.
    """
    batch, tokens, channels = x.shape
    x_out = None if y is None else torch.empty_like(x)
    parts, part = parts_of(channels)
    strides = []
    for t in (gate, scale, shift):
        strides += t.stride()[:2] if t is not None and t.dim() == 3 else (0, 0)
    norm_kernel[(batch * tokens,)](
        x, x if y is None else y, x if gate is None else gate, scale, shift, out if x_out is None else x_out,
        out, out if row_scale is None else row_scale, tokens, channels, frame_tokens, *strides, eps,
        RESIDUAL=y is not None, GATE=gate is not None, MODULATE=modulate,
        FORMAT=KINDS.get(out.dtype, "plain"), PARTS=parts, PART=part, num_warps=NORM_WARPS,
        enable_fp_fusion=False)
    return x_out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Launch `rms_norm_kernel` over the last dimension of a contiguous x."""
    out = torch.empty_like(x)
    channels = x.shape[-1]
    block = triton.next_power_of_2(channels)
    rms_norm_kernel[(x.numel() // channels,)](x, weight, out, channels, eps, BLOCK=block, num_warps=4,
                                              enable_fp_fusion=False)
    return out


def qk_norm_rope_write(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
                       slots: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
                       frame_tokens: int, eps: float) -> Tensor:
    """Launch the write kernels; change k, v and their per-token scales in place. Return q [B,L,N,D]."""
    batch, tokens, _ = qkv.shape
    _, capacity, heads, dim = k.shape
    transposed = v.dtype == FP8
    q = torch.empty(batch, tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    parts, part = parts_of(heads)
    qk_norm_rope_write_kernel[(batch * tokens, 2 if transposed else 3)](
        qkv, q_weight, k_weight, cos, sin, slots, q, k, v, q if k_scale is None else k_scale,
        q if v_scale is None else v_scale, tokens, capacity, frame_tokens, eps, N=heads, D=dim,
        PARTS=parts, HEADS=part, K_KIND=KINDS.get(k.dtype, "plain"),
        V_KIND="plain" if transposed else KINDS.get(v.dtype, "plain"), num_warps=WRITE_WARPS,
        enable_fp_fusion=False)
    if transposed:
        _store_transposed(qkv[:, :, 2 * heads * dim:], slots, v, v_scale, frame_tokens)
    return q


def cross_attention(q: Tensor, k: Tensor, v: Tensor, own_rows: Tensor) -> Tensor:
    """Launch `cross_attention_kernel` on contiguous q [B,L,N,D], k and v [B,T,N,D]."""
    batch, tokens, heads, dim = q.shape
    out = torch.empty_like(q)
    cross_attention_kernel[(triton.cdiv(tokens, CROSS_ROWS), batch * heads)](
        q, k, v, own_rows, out, tokens, k.shape[1], LOG2_E / math.sqrt(dim), N=heads, D=dim, ROWS=CROSS_ROWS,
        COLUMNS=CROSS_COLUMNS, num_warps=CROSS_WARPS)
    return out


def store_kv(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor,
             v_scale: Tensor | None, frame_tokens: int) -> None:
    """Launch the kernels that write k and v [B,L,N,D], both contiguous, into an 8-bit cache."""
    _store_rows(k, slots, k_cache, k_scale, frame_tokens)
    if v_cache.dtype == FP8:
        _store_transposed(v.flatten(2), slots, v_cache, v_scale, frame_tokens)
    else:
        _store_rows(v, slots, v_cache, v_scale, frame_tokens)


def _store_rows(x: Tensor, slots: Tensor, rows: Tensor, scale: Tensor | None, frame_tokens: int) -> None:
    batch, tokens, heads, dim = x.shape
    write_rows_kernel[(batch * tokens,)](
        x, slots, rows, x if scale is None else scale, tokens, rows.shape[1], frame_tokens, N=heads, D=dim,
        HEADS=triton.next_power_of_2(heads), KIND=KINDS.get(rows.dtype, "plain"), num_warps=4,
        enable_fp_fusion=False)


def _store_transposed(x: Tensor, slots: Tensor, v: Tensor, v_scale: Tensor, frame_tokens: int) -> None:
    """x [B,L,N*D]: channels are adjacent, tokens may be any distance apart, batches are L tokens apart."""
    batch, tokens, _ = x.shape
    heads, dim, capacity = v.shape[1:]
    blocks = triton.cdiv(frame_tokens + V_GROUP, V_TOKENS)
    write_v_transposed_kernel[(batch * heads, slots.shape[0] * blocks)](
        x, slots, v, v_scale, tokens, x.stride(1), capacity, frame_tokens, blocks, N=heads, D=dim,
        BLOCK=V_TOKENS, num_warps=8, enable_fp_fusion=False)
