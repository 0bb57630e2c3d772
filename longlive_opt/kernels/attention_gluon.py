"""Attention over the cache, scheduled by hand for Hopper in Gluon (`gluon_api` lists the Triton versions).

The arithmetic is that of `attention8_triton`; the schedule differs. A program has 128 queries: two consumer
warpgroups of 64 rows each, and one producer warp that fetches tiles of K and V for both. The L2 cache is thus
read half as often as with 64 queries per program. K and V are in 8 bit, or V or both are in bf16.

e4m3 V: Hopper's FP8 accumulators keep about 14 bits, so each added product truncates a little of what all
tokens of V have in common. Therefore P V of each tile of 128 keys starts from zero and is added to the total
in float32. The same instruction rescales the total by the previous tile's factor, so rescaling costs only
registers. They suffice because P V is issued before the next scores:

    pack P_{i-1} | issue R = P_{i-1} V_{i-1} | issue S_i = Q K_i
    wait for R | O = O a_{i-1} + R | wait for S_i | softmax of S_i

P is packed before S_i is written, and both share registers. (With S_i first, ptxas keeps 60 more registers
and spills.) One warpgroup's matrix products run while the other computes exponentials.

bf16 V: the accumulator is true float32, so the tensor core adds P V to O. This runs while the same warpgroup
computes the exponentials of S_i, which is issued first.

Lessons from the generated code (ptxas 12.8):

* P passes to the next iteration in float32; as e4m3 it would be unpacked and packed byte by byte.
* No matrix product may be pending across a loop's end, or ptxas serialises all of them (note C7514).
* Each thread adds up its own columns of P and meets the other three of its row once, at the end: no tile
  waits for shuffles of its sums. Maxima as a tree, scores issued a tile ahead, a fixed order of the two
  warpgroups, and every fourth or eighth exponential as a polynomial were slower or equal.
* A consumer warp waits for the tensor core in an eighth of its time (Nsight Compute, e4m3). Most of the rest
  are latencies of its own maxima, exponentials and conversions, which one other warp per scheduler does not
  hide. A third consumer warpgroup would have to do with 160 registers.
* Result addresses are computed after the loop from a program index that is opaque to the compiler; otherwise
  they occupy registers throughout.
* q is in shared memory, and the scales of K arrive there with K.

The last wave: 4680 queries and 12 heads make 444 programs on 132 multiprocessors, or 3.36 waves. Programs of
the last, partial wave are split along the keys (`split_last_wave`). A second kernel merges their parts by the
logarithms of their sums.

`scripts/bench_kernels.py` measures it on an H100 (4680 queries on 18720 keys, 12 heads of 128, V with a
component common to all tokens) and records the times in outputs/.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention8_reference import P_SHIFT
from .gluon_api import (
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
from .quantize import FP8

CONSUMER_ROWS = 64
PROGRAM_ROWS = 2 * CONSUMER_ROWS
MAX_PARTS = 8
MIN_KEY_TILES = 4
"""Fewest key tiles per part; starting and merging shorter parts costs more than balancing gains."""
PART_COST = 0.04
"""Cost of one more part per split program, as a share of a whole program's time."""
ROUND = gl.constexpr(12582912.0)


@gluon.jit
def _rows(factor, x):
    """One factor per row, in the layout that multiplies the accumulator x."""
    return gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _own_sum(p):
    """Sum of each thread's own columns of P, [rows, 4]: four threads share a row of the accumulator."""
    ROWS: gl.constexpr = p.shape[0]
    KEYS: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, KEYS // 8, 4, 2]), 3), 1)


@gluon.jit
def _softmax(s, k_scale, q_scale, running, total, limit, K_INT8: gl.constexpr, SHIFT: gl.constexpr,
             MASK: gl.constexpr):
    """Scores -> (P in float32, new maximum, new sums by thread, factor for the earlier sums)."""
    s = s.to(gl.float32)
    if K_INT8:
        s = s * k_scale.reshape([s.shape[1]]).load(gl.SliceLayout(0, s.type.layout))[None, :]
    if MASK:
        s = gl.where((gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout)) < limit)[None, :], s,
                     float("-inf"))
    maximum = gl.maximum(running, gl.max(s, 1) * q_scale - SHIFT)
    factor = gl.exp2(running - maximum)
    p = gl.exp2(s * q_scale[:, None] - maximum[:, None])
    own = gl.convert_layout(_own_sum(p), total.type.layout, assert_trivial=True)
    return p, maximum, total * _rows(factor, total) + own, factor


@gluon.jit
def _operand(p, layout: gl.constexpr, V_FP8: gl.constexpr):
    """P as the register operand of the second matrix product; neither conversion moves data."""
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
def _step(i, limit, p, acc, before, running, total, q_scale, no_scores, no_values, q_shared, k_smem, v_smem,
          scale_smem, k_ready, v_ready, k_empty, v_empty, operand: gl.constexpr, STAGES: gl.constexpr,
          K_INT8: gl.constexpr, V_FP8: gl.constexpr, SHIFT: gl.constexpr, LAST: gl.constexpr):
    """Compute the scores of tile i and P V of tile i - 1 -> (P of tile i, O, its factor, maximum, sum).

    `before` is the factor of tile i - 1; for e4m3 V, O does not include it yet.
    """
    slot = i % STAGES
    old = (i - 1) % STAGES
    keys = k_smem.index(slot).permute((1, 0))
    if V_FP8:
        weights = _operand(p, operand, V_FP8)
        mbarrier.wait(v_ready.index(old), (i - 1) // STAGES & 1)
        part = warpgroup_mma(weights, _values(v_smem, old, V_FP8), no_values, use_acc=False, is_async=True)
        s = warpgroup_mma(q_shared, keys, no_scores, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(1, deps=[part])
        mbarrier.arrive(v_empty.index(old), count=1)
        acc = acc * _rows(before, acc) + part
        if not LAST:
            mbarrier.wait(k_ready.index((i + 1) % STAGES), (i + 1) // STAGES & 1)
        s = warpgroup_mma_wait(0, deps=[s])
        p, running, total, factor = _softmax(s, scale_smem.index(slot), q_scale, running, total, limit,
                                             K_INT8, SHIFT, LAST)
        mbarrier.arrive(k_empty.index(slot), count=1)
    else:
        s = warpgroup_mma(q_shared, keys, no_scores, use_acc=False, is_async=True)
        weights = _operand(p, operand, V_FP8)
        mbarrier.wait(v_ready.index(old), (i - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, _values(v_smem, old, V_FP8), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p, running, total, factor = _softmax(s, scale_smem.index(slot), q_scale, running, total, limit,
                                             K_INT8, SHIFT, LAST)
        mbarrier.arrive(k_empty.index(slot), count=1)
        if not LAST:
            mbarrier.wait(k_ready.index((i + 1) % STAGES), (i + 1) // STAGES & 1)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(old), count=1)
        acc = acc * _rows(factor, acc)
    return p, acc, factor, running, total


@gluon.jit
def _work(program, tiles, whole, parts):
    """(block of rows and head, first key tile, number of key tiles, index of the part or -1)."""
    if program < whole:
        return program, 0, tiles, -1
    else:
        place = program - whole
        part = place % parts
        first = part * tiles // parts
        return whole + place // parts, first, (part + 1) * tiles // parts - first, place


@gluon.jit
def _opaque(x):
    """Hide x from the compiler: values derived from it are computed where used and occupy no registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _consume(INDEX: gl.constexpr, q_ptr, out_ptr, part_ptr, lse_ptr, k_scale_ptr, v_scale_ptr, queries,
             num_keys, heads, row_blocks, whole, parts, qk_scale, q_smem, k_smem, v_smem, scale_smem, k_ready,
             v_ready, k_empty, v_empty, ROWS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr,
             STAGES: gl.constexpr, K_INT8: gl.constexpr, K_FP8: gl.constexpr, V_FP8: gl.constexpr,
             SHIFT: gl.constexpr):
    """One warpgroup: ROWS queries of one head against the keys of its program."""
    step: gl.constexpr = 32 if K_INT8 or K_FP8 else 16
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, step])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if V_FP8 else 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, outputs, 4 if V_FP8 else 2)
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tiles = gl.cdiv(num_keys, KEYS)
    block, first, count, place = _work(gl.program_id(0), tiles, whole, parts)
    batch_head = block // row_blocks
    local = INDEX * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, memory))
    rows = block % row_blocks * (2 * ROWS) + local
    channels = gl.arange(0, D, gl.SliceLayout(0, memory))
    offsets = ((batch_head // heads * queries + rows) * heads + batch_head % heads)[:, None] * D \
        + channels[None, :]
    q = gl.load(q_ptr + offsets, mask=(rows < queries)[:, None], other=0.0)
    q_shared = q_smem.index(INDEX)
    no_scores = gl.full([ROWS, KEYS], 0, gl.int32 if K_INT8 else gl.float32, scores)
    if K_INT8 or K_FP8:
        LARGEST: gl.constexpr = 127.0 if K_INT8 else 448.0
        q = q.to(gl.float32)
        # Zero, or NaN if a row contains NaN or infinity, which a maximum or int8 would lose.
        spoilt = gl.sum(q * 0.0, 1)
        absmax = gl.maximum(gl.max(gl.abs(q), 1), 1e-12)
        q = q * (1.0 / absmax * LARGEST)[:, None]
        if K_INT8:
            q_shared.store(((q + ROUND) - ROUND).to(gl.int8))
            q_scale = absmax * (1.0 / LARGEST) * qk_scale + spoilt
        else:
            q_shared.store(q.to(gl.float8e4nv))
            q_scale = absmax * (1.0 / LARGEST) * qk_scale * gl.load(k_scale_ptr + batch_head) + spoilt
        fence_async_shared()
        barrier()
        q_scale = gl.convert_layout(q_scale, gl.SliceLayout(1, scores))
    else:
        q_shared.store(q)
        fence_async_shared()
        barrier()
        q_scale = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, scores)) * qk_scale
    running = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    # Four threads hold a row's sums until the end; [ROWS, 4] in the threads of the accumulator.
    shared: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [ROWS, 4])
    total = gl.full([ROWS, 4], 0.0, gl.float32, shared)
    acc = gl.full([ROWS, D], 0.0, gl.float32, outputs)
    no_values = gl.full([ROWS, D], 0.0, gl.float32, outputs)
    limit = num_keys - first * KEYS

    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q_shared, k_smem.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    p, running, total, before = _softmax(s, scale_smem.index(0), q_scale, running, total, limit, K_INT8,
                                         SHIFT, True)
    mbarrier.arrive(k_empty.index(0), count=1)
    mbarrier.wait(k_ready.index(1), 0, pred=count > 1)
    for i in range(1, count - 1):
        p, acc, before, running, total = _step(
            i, limit, p, acc, before, running, total, q_scale, no_scores, no_values, q_shared, k_smem, v_smem,
            scale_smem, k_ready, v_ready, k_empty, v_empty, operand, STAGES, K_INT8, V_FP8, SHIFT, False)
    last = count - 1
    if last > 0:
        p, acc, before, running, total = _step(
            last, limit - last * KEYS, p, acc, before, running, total, q_scale, no_scores, no_values,
            q_shared, k_smem, v_smem, scale_smem, k_ready, v_ready, k_empty, v_empty, operand, STAGES, K_INT8,
            V_FP8, SHIFT, True)
    weights = _operand(p, operand, V_FP8)
    mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, scores), assert_trivial=True)
    divisor = total
    if V_FP8:
        part = warpgroup_mma(weights, _values(v_smem, last % STAGES, V_FP8), no_values, use_acc=False,
                             is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        acc = acc * _rows(before, acc) + part
        divisor = total / gl.load(v_scale_ptr + batch_head)
    else:
        acc = warpgroup_mma(weights, _values(v_smem, last % STAGES, V_FP8), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    acc = acc / _rows(divisor, acc)
    block, first, count, place = _work(_opaque(gl.program_id(0)), tiles, whole, parts)
    batch_head = block // row_blocks
    local = INDEX * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, memory))
    rows = block % row_blocks * (2 * ROWS) + local
    channels = gl.arange(0, D, gl.SliceLayout(0, memory))
    if place < 0:
        offsets = ((batch_head // heads * queries + rows) * heads + batch_head % heads)[:, None] * D \
            + channels[None, :]
        out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), memory)
        gl.store(out_ptr + offsets, out, mask=(rows < queries)[:, None])
    else:
        offsets = (place * 2 * ROWS + local)[:, None] * D + channels[None, :]
        gl.store(part_ptr + offsets, gl.convert_layout(acc, memory))
        row = (place * 2 + INDEX) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
        gl.store(lse_ptr + row, running + gl.log2(total))


@gluon.jit
def _produce(k_desc, v_desc, scale_desc, slots, num_keys, heads, row_blocks, whole, parts, k_smem, v_smem,
             scale_smem, k_ready, v_ready, k_empty, v_empty, KEYS: gl.constexpr, D: gl.constexpr,
             STAGES: gl.constexpr, K_INT8: gl.constexpr, V_FP8: gl.constexpr):
    """One warp: load K (and its scales) and V tile by tile into slots that both consumers have released."""
    block, first, count, place = _work(gl.program_id(0), gl.cdiv(num_keys, KEYS), whole, parts)
    batch_head = block // row_blocks
    row = batch_head // heads * slots
    column = batch_head % heads * D
    for i in range(count):
        slot = i % STAGES
        start = (first + i) * KEYS
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


@gluon.jit(do_not_specialize=["queries", "num_keys", "whole", "parts"])
def attention_kernel(q_ptr, out_ptr, part_ptr, lse_ptr, k_desc, v_desc, scale_desc, k_scale_ptr, v_scale_ptr,
                     queries, slots, num_keys, heads, row_blocks, whole, parts, qk_scale, ROWS: gl.constexpr,
                     KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, K_INT8: gl.constexpr,
                     K_FP8: gl.constexpr, V_FP8: gl.constexpr, SHIFT: gl.constexpr):
    """Grid: `whole` blocks of 2 * ROWS queries of one head, then the blocks that are split along the keys,
    with `parts` programs each. `ready` completes when its tile arrives, `empty` when the second consumer
    arrives.
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
    # The tuples are written out: bound to a name, they would lose their compile-time constants.
    gl.warp_specialize(
        [(_consume, (0, q_ptr, out_ptr, part_ptr, lse_ptr, k_scale_ptr, v_scale_ptr, queries, num_keys, heads,
                     row_blocks, whole, parts, qk_scale, q_smem, k_smem, v_smem, scale_smem, k_ready, v_ready,
                     k_empty, v_empty, ROWS, KEYS, D, STAGES, K_INT8, K_FP8, V_FP8, SHIFT)),
         (_consume, (1, q_ptr, out_ptr, part_ptr, lse_ptr, k_scale_ptr, v_scale_ptr, queries, num_keys, heads,
                     row_blocks, whole, parts, qk_scale, q_smem, k_smem, v_smem, scale_smem, k_ready, v_ready,
                     k_empty, v_empty, ROWS, KEYS, D, STAGES, K_INT8, K_FP8, V_FP8, SHIFT)),
         (_produce, (k_desc, v_desc, scale_desc, slots, num_keys, heads, row_blocks, whole, parts, k_smem,
                     v_smem, scale_smem, k_ready, v_ready, k_empty, v_empty, KEYS, D, STAGES, K_INT8,
                     V_FP8))],
        [4, 1], [240, 24])


@triton.jit(do_not_specialize=["queries", "whole"])
def merge_kernel(part_ptr, lse_ptr, out_ptr, queries, heads, row_blocks, whole, PARTS: tl.constexpr,
                 SLOTS: tl.constexpr, PROGRAM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Grid: (split blocks, PROGRAM / ROWS). Compute the weighted mean of a block's parts, each divided by its
    own sum. The weights are these sums; `lse` has their logarithms to base 2. SLOTS: PARTS rounded up to a
    power of two.
    """
    block = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, SLOTS)
    lse = tl.load(lse_ptr + (block * PARTS + part[:, None]) * PROGRAM + rows[None, :],
                  mask=(part < PARTS)[:, None], other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0)[None, :])
    weights = weights / tl.sum(weights, 0)[None, :]
    channels = tl.arange(0, D)
    acc = tl.zeros([ROWS, D], tl.float32)
    for i in tl.static_range(PARTS):
        weight = tl.sum(tl.where((part == i)[:, None], weights, 0.0), 0)
        values = tl.load(part_ptr + ((block * PARTS + i) * PROGRAM + rows)[:, None] * D + channels[None, :])
        acc += weight[:, None] * values
    block += whole
    head = block // row_blocks
    rows += block % row_blocks * PROGRAM
    offsets = ((head // heads * queries + rows) * heads + head % heads)[:, None] * D + channels[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(rows < queries)[:, None])


@functools.cache
def split_last_wave(blocks: int, key_tiles: int, multiprocessors: int) -> tuple[int, int]:
    """(blocks with one program each, parts of every other block).

    Whole waves of one program per multiprocessor are not split. The rest is split to take the least time, in
    units of one program: rounds / parts, plus `PART_COST` per part.
    """
    rest = blocks % multiprocessors
    most = min(MAX_PARTS, key_tiles // MIN_KEY_TILES) if rest else 1

    def cost(parts: int) -> float:
        return math.ceil(rest * parts / multiprocessors) / parts + PART_COST * parts

    parts = min(range(1, max(most, 1) + 1), key=cost)
    return (blocks, 1) if parts == 1 else (blocks - rest, parts)


def launch(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, num_keys: int,
           block_n: int, num_stages: int) -> Tensor:
    """Run the kernel on arguments that `attention8` has checked -> new tensor like q.

    K: int8 or e4m3 with scales, or bf16 without. V: bf16 or e4m3. Raises ValueError for int8 V, whose
    conversion would prevent the overlap.
    """
    if v.dtype not in (torch.bfloat16, FP8):
        raise ValueError(f"v is {v.dtype}; the Gluon kernel takes bf16 or {FP8}: use the Triton kernel")
    batch, queries, heads, dim = q.shape
    slots = k.shape[1]
    k_int8, k_fp8, v_fp8 = k.dtype == torch.int8, k.dtype == FP8, v.dtype == FP8
    out = torch.empty_like(q)
    if v_fp8:
        v_desc = _descriptor(v.view(batch * heads * dim, v.shape[3]), [dim, block_n])
    else:
        v_desc = _descriptor(v.view(batch * slots, heads * dim), [block_n, dim])
    scales = k_scale.view(batch * heads, slots) if k_int8 else q.new_empty(1, block_n, dtype=torch.float32)
    row_blocks = triton.cdiv(queries, PROGRAM_ROWS)
    blocks = row_blocks * batch * heads
    whole, parts = split_last_wave(blocks, triton.cdiv(num_keys, block_n), _multiprocessors(q.device))
    split = blocks - whole
    partial = q.new_empty(max(split * parts, 1), PROGRAM_ROWS, dim, dtype=torch.float32)
    lse = q.new_empty(max(split * parts, 1), PROGRAM_ROWS, dtype=torch.float32)
    attention_kernel[(whole + split * parts,)](
        q, out, partial, lse, _descriptor(k.view(batch * slots, heads * dim), [block_n, dim]), v_desc,
        _descriptor(scales, [1, block_n]), lse if k_scale is None else k_scale,
        lse if v_scale is None else v_scale, queries, slots, num_keys, heads, row_blocks, whole, parts,
        dim**-0.5 * math.log2(math.e), ROWS=CONSUMER_ROWS, KEYS=block_n, D=dim, STAGES=num_stages,
        K_INT8=k_int8, K_FP8=k_fp8, V_FP8=v_fp8, SHIFT=P_SHIFT["fp8" if v_fp8 else "bf16"], num_warps=4,
        maxnreg=168)
    if split:
        merge_kernel[(split, 4)](partial, lse, out, queries, heads, row_blocks, whole, PARTS=parts,
                                 SLOTS=triton.next_power_of_2(parts), PROGRAM=PROGRAM_ROWS,
                                 ROWS=PROGRAM_ROWS // 4, D=dim)
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Copy-engine descriptor of a matrix, with tiles laid out as the matrix product reads them."""
    kinds = {torch.int8: gl.int8, FP8: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
    layout = gl.NVMMASharedLayout.get_default_for(block, kinds[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)
