"""Attention over an 8-bit cache scheduled by hand for Hopper, in Gluon (`gluon_api` lists the Tritons).

Same arithmetic as `attention8_triton`, other schedule. A program has 128 queries: two consumer warpgroups of
64 rows each, and one producer warp that fetches tiles of K and V for both, so the L2 cache is read half as
often as with 64 queries a program. Within a consumer the next scores and the last tile's P V run in the
tensor core while it computes the exponentials:

    issue S_i = Q K_i | issue O += P_{i-1} V_{i-1} | wait for S_i | softmax of S_i | wait for O | rescale O

What the generated code taught (ptxas 12.8): P is carried to the next iteration in float32 (as e4m3 it would
be unpacked and packed byte by byte); the wait for the next K stands between softmax and the wait for O,
because ptxas hoists a bare wait above the exponentials and nothing overlaps; q lies in shared memory and the
scales of K arrive there with K, or registers spill.

Verified on an H100: equal to the emulation within the tolerances of `tests/test_kernels.py`. 4680 queries on
18720 keys, 12 heads of 128, take 0.675 ms in fp8_fp8, 0.899 in int8_fp8 and 0.919 in int8_bf16, where plain
Triton takes 0.895 and 1.09 for the first two, and cuDNN's bf16 attention 1.01.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from longlive_opt.kernels.emulation import P_SHIFT
from longlive_opt.kernels.gluon_api import (
    TensorDescriptor,
    barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from longlive_opt.kernels.quantize import FP8

CONSUMER_ROWS = 64
ROUND = gl.constexpr(12582912.0)


@gluon.jit
def _softmax(s, k_scale, q_scale, running, total, cols, num_keys, K_INT8: gl.constexpr, SHIFT: gl.constexpr,
             MASK: gl.constexpr):
    """Scores -> (P in float32, new maximum, new sum, factor for what was accumulated before)."""
    s = s.to(gl.float32)
    if K_INT8:
        scale = k_scale.reshape([s.shape[1]]).load(gl.SliceLayout(0, s.type.layout))
        s = s * scale[None, :]
    if MASK:
        s = gl.where((cols < num_keys)[None, :], s, float("-inf"))
    maximum = gl.maximum(running, gl.max(s, 1) * q_scale - SHIFT)
    alpha = gl.exp2(running - maximum)
    p = gl.exp2(s * q_scale[:, None] - maximum[:, None])
    return p, maximum, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _operand(p, layout: gl.constexpr, V_FP8: gl.constexpr):
    """P as the register operand of the second product; both conversions are without data movement."""
    ROWS: gl.constexpr = p.shape[0]
    KEYS: gl.constexpr = p.shape[1]
    if V_FP8:
        p = gl.permute(gl.reshape(p, [ROWS, KEYS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
        return gl.convert_layout(gl.reshape(p, [ROWS, KEYS]).to(gl.float8e4nv), layout, assert_trivial=True)
    else:
        return gl.convert_layout(p.to(gl.bfloat16), layout, assert_trivial=True)


@gluon.jit
def _values(v_smem, slot, V_FP8: gl.constexpr):
    """The tile of V in `slot` as [keys, D]."""
    if V_FP8:
        return v_smem.index(slot).permute((1, 0))
    else:
        return v_smem.index(slot)


@gluon.jit
def _consume(INDEX: gl.constexpr, q_ptr, out_ptr, k_scale_ptr, v_scale_ptr, queries, num_keys, heads,
             qk_scale, q_smem, k_smem, v_smem, scale_smem, k_ready, v_ready, k_empty, v_empty,
             ROWS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
             K_INT8: gl.constexpr, V_FP8: gl.constexpr, SHIFT: gl.constexpr):
    """One warpgroup: ROWS queries of one head against all keys."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if V_FP8 else 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, outputs, 4 if V_FP8 else 2)
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    batch_head = gl.program_id(1)
    batch = batch_head // heads
    head = batch_head % heads
    rows = (gl.program_id(0) * 2 + INDEX) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, memory))
    channels = gl.arange(0, D, gl.SliceLayout(0, memory))
    offsets = ((batch * queries + rows) * heads + head)[:, None] * D + channels[None, :]
    q = gl.load(q_ptr + offsets, mask=(rows < queries)[:, None], other=0.0).to(gl.float32)
    absmax = gl.maximum(gl.max(gl.abs(q), 1), 1e-12)
    q_shared = q_smem.index(INDEX)
    if K_INT8:
        q_shared.store(((q * (1.0 / absmax * 127.0)[:, None] + ROUND) - ROUND).to(gl.int8))
        q_scale = absmax * (1.0 / 127.0) * qk_scale
        empty = gl.full([ROWS, KEYS], 0, gl.int32, scores)
    else:
        q_shared.store((q * (1.0 / absmax * 448.0)[:, None]).to(gl.float8e4nv))
        q_scale = absmax * (1.0 / 448.0) * qk_scale * gl.load(k_scale_ptr + batch_head)
        empty = gl.full([ROWS, KEYS], 0.0, gl.float32, scores)
    fence_async_shared()
    barrier()
    q_scale = gl.convert_layout(q_scale, gl.SliceLayout(1, scores))
    running = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, scores))
    acc = gl.full([ROWS, D], 0.0, gl.float32, outputs)
    cols = gl.arange(0, KEYS, gl.SliceLayout(0, scores))
    last = gl.cdiv(num_keys, KEYS) - 1

    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q_shared, k_smem.index(0).permute((1, 0)), empty, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    p, running, total, alpha = _softmax(s, scale_smem.index(0), q_scale, running, total, cols, num_keys,
                                        K_INT8, SHIFT, True)
    mbarrier.arrive(k_empty.index(0), count=1)
    mbarrier.wait(k_ready.index(1), 0, pred=last > 0)
    for i in range(1, last):
        slot = i % STAGES
        before = (i - 1) % STAGES
        s = warpgroup_mma(q_shared, k_smem.index(slot).permute((1, 0)), empty, use_acc=False, is_async=True)
        weights = _operand(p, operand, V_FP8)
        mbarrier.wait(v_ready.index(before), (i - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, _values(v_smem, before, V_FP8), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p, running, total, alpha = _softmax(s, scale_smem.index(slot), q_scale, running, total, cols,
                                            num_keys, K_INT8, SHIFT, False)
        mbarrier.arrive(k_empty.index(slot), count=1)
        mbarrier.wait(k_ready.index((i + 1) % STAGES), (i + 1) // STAGES & 1)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, outputs), assert_trivial=True)[:, None]
    if last > 0:
        slot = last % STAGES
        before = (last - 1) % STAGES
        s = warpgroup_mma(q_shared, k_smem.index(slot).permute((1, 0)), empty, use_acc=False, is_async=True)
        weights = _operand(p, operand, V_FP8)
        mbarrier.wait(v_ready.index(before), (last - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, _values(v_smem, before, V_FP8), acc, is_async=True)
        s, acc = warpgroup_mma_wait(0, deps=[s, acc])
        p, running, total, alpha = _softmax(s, scale_smem.index(slot), q_scale, running, total,
                                            cols + last * KEYS, num_keys, K_INT8, SHIFT, True)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, outputs), assert_trivial=True)[:, None]
    weights = _operand(p, operand, V_FP8)
    mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
    acc = warpgroup_mma(weights, _values(v_smem, last % STAGES, V_FP8), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if V_FP8:
        total = total / gl.load(v_scale_ptr + batch_head)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, outputs), assert_trivial=True)[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), memory)
    gl.store(out_ptr + offsets, out, mask=(rows < queries)[:, None])


@gluon.jit
def _produce(k_desc, v_desc, scale_desc, slots, num_keys, heads, k_smem, v_smem, scale_smem, k_ready, v_ready,
             k_empty, v_empty, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
             K_INT8: gl.constexpr, V_FP8: gl.constexpr):
    """One warp: K (and its scales) and V, tile after tile, into slots that both consumers have left."""
    batch_head = gl.program_id(1)
    row = batch_head // heads * slots
    column = batch_head % heads * D
    for i in range(gl.cdiv(num_keys, KEYS)):
        slot = i % STAGES
        start = i * KEYS
        free = i // STAGES & 1 ^ 1
        mbarrier.wait(k_empty.index(slot), free)
        if K_INT8:
            mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes + scale_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(scale_desc, [batch_head, start], k_ready.index(slot),
                                            scale_smem.index(slot))
        else:
            mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [row + start, column], k_ready.index(slot),
                                        k_smem.index(slot))
        mbarrier.wait(v_empty.index(slot), free)
        mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
        if V_FP8:
            tma.async_copy_global_to_shared(v_desc, [batch_head * D, start], v_ready.index(slot),
                                            v_smem.index(slot))
        else:
            tma.async_copy_global_to_shared(v_desc, [row + start, column], v_ready.index(slot),
                                            v_smem.index(slot))


@gluon.jit(do_not_specialize=["queries", "num_keys"])
def attention_kernel(q_ptr, out_ptr, k_desc, v_desc, scale_desc, k_scale_ptr, v_scale_ptr, queries, slots,
                     num_keys, heads, qk_scale, ROWS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr,
                     STAGES: gl.constexpr, K_INT8: gl.constexpr, V_FP8: gl.constexpr, SHIFT: gl.constexpr):
    """Grid: (blocks of 2 * ROWS queries, batch and head). `ready` completes with its tile, `empty` with the
    second consumer's arrival.
    """
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], k_desc.dtype)
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [2, ROWS, D], q_layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, KEYS], scale_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    # The tuples are written out: one bound to a name would lose its compile-time constants.
    gl.warp_specialize(
        [(_consume, (0, q_ptr, out_ptr, k_scale_ptr, v_scale_ptr, queries, num_keys, heads, qk_scale, q_smem,
                     k_smem, v_smem, scale_smem, k_ready, v_ready, k_empty, v_empty, ROWS, KEYS, D, STAGES,
                     K_INT8, V_FP8, SHIFT)),
         (_consume, (1, q_ptr, out_ptr, k_scale_ptr, v_scale_ptr, queries, num_keys, heads, qk_scale, q_smem,
                     k_smem, v_smem, scale_smem, k_ready, v_ready, k_empty, v_empty, ROWS, KEYS, D, STAGES,
                     K_INT8, V_FP8, SHIFT)),
         (_produce, (k_desc, v_desc, scale_desc, slots, num_keys, heads, k_smem, v_smem, scale_smem, k_ready,
                     v_ready, k_empty, v_empty, KEYS, D, STAGES, K_INT8, V_FP8))],
        [4, 1], [240, 24])


def launch(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor | None, num_keys: int,
           block_n: int, num_stages: int) -> Tensor:
    """Run the kernel on arguments that `attention8` has checked -> new tensor like q. V: bf16 or e4m3.

    Raises ValueError for int8 V, whose conversion would stand in the way of the overlap.
    """
    if v.dtype not in (torch.bfloat16, FP8):
        raise ValueError(f"v is {v.dtype}; the Gluon kernel takes bf16 or {FP8}: use the Triton kernel")
    batch, queries, heads, dim = q.shape
    slots = k.shape[1]
    k_int8, v_fp8 = k.dtype == torch.int8, v.dtype == FP8
    out = torch.empty_like(q)
    if v_fp8:
        v_desc = _descriptor(v.view(batch * heads * dim, v.shape[3]), [dim, block_n])
    else:
        v_desc = _descriptor(v.view(batch * slots, heads * dim), [block_n, dim])
    scales = k_scale.view(batch * heads, slots) if k_int8 else q.new_empty(1, block_n, dtype=torch.float32)
    attention_kernel[(triton.cdiv(queries, 2 * CONSUMER_ROWS), batch * heads)](
        q, out, _descriptor(k.view(batch * slots, heads * dim), [block_n, dim]), v_desc,
        _descriptor(scales, [1, block_n]), k_scale, k_scale if v_scale is None else v_scale, queries, slots,
        num_keys, heads, dim**-0.5 * math.log2(math.e), ROWS=CONSUMER_ROWS, KEYS=block_n, D=dim,
        STAGES=num_stages, K_INT8=k_int8, V_FP8=v_fp8,
        SHIFT=P_SHIFT["fp8" if v_fp8 else "bf16"], num_warps=4, maxnreg=168)
    return out


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Copy-engine descriptor of a matrix, its tiles laid out as the matrix product reads them."""
    kinds = {torch.int8: gl.int8, FP8: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
    layout = gl.NVMMASharedLayout.get_default_for(block, kinds[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)
