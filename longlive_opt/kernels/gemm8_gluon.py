"""The int8 matrix product scheduled by hand for Hopper, in Gluon: out = act(a b^T * scales + bias).

One persistent program per multiprocessor iterates over output tiles. One producer warp fetches 128 channels
of a and b at a time, as many stages ahead as there are. Two or three consumer warpgroups, each with its own
rows, feed the tensor core and never wait for one another. After finishing its sums, a consumer scales, rounds
and stores them a few columns at a time through shared memory. Meanwhile the producer and the other consumers
continue with the next tile.

Tiles are as large as the registers allow, because a program with 128 x 256 outputs reads 48 KB per 128
channels from the L2 cache, near Hopper's limit. There are as many stages as shared memory holds, because data
loaded during an epilogue is used after it. The generated code (ptxas 12.8, Triton 3.6 and 3.8) keeps all sums
in registers and the matrix products asynchronous; `tests/test_gemm8.py` compiles it and checks this.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

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
from .gluon_columns import halves

STEP = 128
"""Channels per stage: one row of them is one 128-byte line of shared memory."""
# sqrt(2 / pi), and its product with GELU's 0.044715.
GELU_LINEAR = gl.constexpr(0.7978845608028654)
GELU_CUBIC = gl.constexpr(0.035677408136300125)


@gluon.jit
def _gelu(x):
    """GELU in its tanh form; the hardware's tanh has an error of 2^-11, an eighth of a bfloat16 step."""
    u = x * (GELU_LINEAR + GELU_CUBIC * (x * x))
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=gl.float32, is_pure=True,
                                     pack=1)
    half = 0.5 * x
    return half + half * tanh


@gluon.jit
def _tile(index, row_tiles, column_tiles, GROUP: gl.constexpr):
    """Tile number -> (row of tiles, column of tiles): GROUP rows down, then the next column."""
    per_group = GROUP * column_tiles
    first = index // per_group * GROUP
    rows = gl.minimum(row_tiles - first, GROUP)
    inside = index % per_group
    return first + inside % rows, inside // rows


@gluon.jit
def _vectors(column_scale_ptr, bias_ptr, column, columns, PIECE: gl.constexpr):
    """Load scale and bias of PIECE columns early, since they come from the L2 cache."""
    piece: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32])
    cols = column + gl.arange(0, PIECE, gl.SliceLayout(0, piece))
    scale = gl.load(column_scale_ptr + cols, mask=cols < columns, other=0.0)
    bias = gl.load(bias_ptr + cols, mask=cols < columns, other=0.0)
    return scale, bias


@gluon.jit
def _store(sums, row_scale, column_scale, bias, out_desc, buffer, row, column, PIECE: gl.constexpr,
           GELU: gl.constexpr):
    """Scale, round and store sums [ROWS, PIECE] through a buffer that the previous piece does not use."""
    piece: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32])
    out = gl.convert_layout(sums, piece, assert_trivial=True).to(gl.float32)
    out = out * row_scale[:, None] * column_scale[None, :] + bias.to(gl.float32)[None, :]
    if GELU:
        out = _gelu(out)
    tma.store_wait(1)
    barrier()
    buffer.store(out.to(out_desc.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(out_desc, [row, column], buffer)


@gluon.jit
def _consume(INDEX: gl.constexpr, out_desc, row_scale_ptr, column_scale_ptr, bias_ptr, rows, columns,
             channels, row_tiles, column_tiles, a_smem, b_smem, out_smem, ready, empty,
             CONSUMERS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr,
             PIECE: gl.constexpr,
             STAGES: gl.constexpr, GROUP: gl.constexpr, GELU: gl.constexpr):
    """One warpgroup: process ROWS rows of every tile of this program."""
    # Triton's widest int8 matrix product has 128 columns.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    piece: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32])
    steps = gl.cdiv(channels, STEP)
    even = out_smem.index(2 * INDEX)
    odd = out_smem.index(2 * INDEX + 1)
    at = 0
    for index in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        tile_row, tile_column = _tile(index, row_tiles, column_tiles, GROUP)
        row = (tile_row * CONSUMERS + INDEX) * ROWS
        column = tile_column * COLUMNS
        own_rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, piece))
        row_scale = gl.load(row_scale_ptr + own_rows, mask=own_rows < rows, other=0.0)
        scale, bias = _vectors(column_scale_ptr, bias_ptr, column, columns, PIECE)
        sums = gl.full([ROWS, COLUMNS], 0, gl.int32, layout)
        for k in range(steps):
            slot = (at + k) % STAGES
            mbarrier.wait(ready.index(slot), (at + k) // STAGES & 1)
            sums = warpgroup_mma(a_smem.index(slot * CONSUMERS + INDEX), b_smem.index(slot).permute((1, 0)),
                                 sums, use_acc=k > 0, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])
            mbarrier.arrive(empty.index((at + k + STAGES - 1) % STAGES), count=1, pred=k > 0)
        sums = warpgroup_mma_wait(0, deps=[sums])
        at += steps
        mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), count=1)
        left, right = halves(sums)
        if CONSUMERS == 3:  # too few registers to load the next piece's vectors early
            gl.static_assert(COLUMNS == 4 * PIECE)
            a, b = halves(left)
            scale, bias = _vectors(column_scale_ptr, bias_ptr, column, columns, PIECE)
            _store(a, row_scale, scale, bias, out_desc, even, row, column, PIECE, GELU)
            scale, bias = _vectors(column_scale_ptr, bias_ptr, column + PIECE, columns, PIECE)
            _store(b, row_scale, scale, bias, out_desc, odd, row, column + PIECE, PIECE, GELU)
            a, b = halves(right)
            scale, bias = _vectors(column_scale_ptr, bias_ptr, column + 2 * PIECE, columns, PIECE)
            _store(a, row_scale, scale, bias, out_desc, even, row, column + 2 * PIECE, PIECE, GELU)
            scale, bias = _vectors(column_scale_ptr, bias_ptr, column + 3 * PIECE, columns, PIECE)
            _store(b, row_scale, scale, bias, out_desc, odd, row, column + 3 * PIECE, PIECE, GELU)
        elif COLUMNS == 4 * PIECE:
            a, b = halves(left)
            next_scale, next_bias = _vectors(column_scale_ptr, bias_ptr, column + PIECE, columns, PIECE)
            _store(a, row_scale, scale, bias, out_desc, even, row, column, PIECE, GELU)
            scale, bias = _vectors(column_scale_ptr, bias_ptr, column + 2 * PIECE, columns, PIECE)
            _store(b, row_scale, next_scale, next_bias, out_desc, odd, row, column + PIECE, PIECE, GELU)
            a, b = halves(right)
            next_scale, next_bias = _vectors(column_scale_ptr, bias_ptr, column + 3 * PIECE, columns, PIECE)
            _store(a, row_scale, scale, bias, out_desc, even, row, column + 2 * PIECE, PIECE, GELU)
            _store(b, row_scale, next_scale, next_bias, out_desc, odd, row, column + 3 * PIECE, PIECE, GELU)
        else:
            gl.static_assert(COLUMNS == 2 * PIECE)
            next_scale, next_bias = _vectors(column_scale_ptr, bias_ptr, column + PIECE, columns, PIECE)
            _store(left, row_scale, scale, bias, out_desc, even, row, column, PIECE, GELU)
            _store(right, row_scale, next_scale, next_bias, out_desc, odd, row, column + PIECE, PIECE, GELU)
    tma.store_wait(0)


@gluon.jit
def _produce(a_desc, b_desc, channels, row_tiles, column_tiles, a_smem, b_smem, ready, empty,
             CONSUMERS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr,
             STAGES: gl.constexpr, GROUP: gl.constexpr):
    """One warp: load 128 channels at a time, of every tile, into slots that all consumers have released."""
    steps = gl.cdiv(channels, STEP)
    at = 0
    for index in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        tile_row, tile_column = _tile(index, row_tiles, column_tiles, GROUP)
        for k in range(steps):
            slot = (at + k) % STAGES
            mbarrier.wait(empty.index(slot), (at + k) // STAGES & 1 ^ 1)
            mbarrier.expect(ready.index(slot),
                            CONSUMERS * a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            for i in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(a_desc, [(tile_row * CONSUMERS + i) * ROWS, k * STEP],
                                                ready.index(slot), a_smem.index(slot * CONSUMERS + i))
            tma.async_copy_global_to_shared(b_desc, [tile_column * COLUMNS, k * STEP], ready.index(slot),
                                            b_smem.index(slot))
        at += steps


@gluon.jit(do_not_specialize=["rows"])
def linear_kernel(a_desc, b_desc, out_desc, row_scale_ptr, column_scale_ptr, bias_ptr, rows, columns,
                  channels, CONSUMERS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
                  STEP: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
                  GELU: gl.constexpr):
    """`ready` completes when its stage arrives, `empty` when the last consumer arrives."""
    a_smem = gl.allocate_shared_memory(gl.int8, [STAGES * CONSUMERS, ROWS, STEP], a_desc.layout)
    b_smem = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, STEP], b_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2 * CONSUMERS, ROWS, PIECE], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    row_tiles = gl.cdiv(rows, CONSUMERS * ROWS)
    column_tiles = gl.cdiv(columns, COLUMNS)
    # The tuples are written out: bound to a name, they would lose their compile-time constants.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(_consume, (0, out_desc, row_scale_ptr, column_scale_ptr, bias_ptr, rows, columns, channels,
                         row_tiles, column_tiles, a_smem, b_smem, out_smem, ready, empty, CONSUMERS, ROWS,
                         COLUMNS, STEP, PIECE, STAGES, GROUP, GELU)),
             (_consume, (1, out_desc, row_scale_ptr, column_scale_ptr, bias_ptr, rows, columns, channels,
                         row_tiles, column_tiles, a_smem, b_smem, out_smem, ready, empty, CONSUMERS, ROWS,
                         COLUMNS, STEP, PIECE, STAGES, GROUP, GELU)),
             (_produce, (a_desc, b_desc, channels, row_tiles, column_tiles, a_smem, b_smem, ready, empty,
                         CONSUMERS, ROWS, COLUMNS, STEP, STAGES, GROUP))],
            [4, 1], [240, 24])
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [(_consume, (0, out_desc, row_scale_ptr, column_scale_ptr, bias_ptr, rows, columns, channels,
                         row_tiles, column_tiles, a_smem, b_smem, out_smem, ready, empty, CONSUMERS, ROWS,
                         COLUMNS, STEP, PIECE, STAGES, GROUP, GELU)),
             (_consume, (1, out_desc, row_scale_ptr, column_scale_ptr, bias_ptr, rows, columns, channels,
                         row_tiles, column_tiles, a_smem, b_smem, out_smem, ready, empty, CONSUMERS, ROWS,
                         COLUMNS, STEP, PIECE, STAGES, GROUP, GELU)),
             (_consume, (2, out_desc, row_scale_ptr, column_scale_ptr, bias_ptr, rows, columns, channels,
                         row_tiles, column_tiles, a_smem, b_smem, out_smem, ready, empty, CONSUMERS, ROWS,
                         COLUMNS, STEP, PIECE, STAGES, GROUP, GELU)),
             (_produce, (a_desc, b_desc, channels, row_tiles, column_tiles, a_smem, b_smem, ready, empty,
                         CONSUMERS, ROWS, COLUMNS, STEP, STAGES, GROUP))],
            [4, 4, 1], [160, 160, 24])


def plan(block_m: int) -> tuple[int, int, int, int]:
    """Consumers, rows per consumer, columns stored at once (8 KB), and average registers per thread."""
    consumers, rows = {128: (2, 64), 192: (3, 64), 256: (2, 128)}[block_m]
    return consumers, rows, 64 * 64 // rows, 168 if consumers == 2 else 128


def launch(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, gelu: bool,
           block_m: int, block_n: int, stages: int, group: int) -> Tensor:
    """values [M,C] times weight [N,C] -> [M,N]; `linear8` has checked the arguments. block_m is 128, 192 or
    256: two consumers of 64 or 128 rows, or three of 64.
    """
    (rows, channels), columns = values.shape, weight.shape[0]
    consumers, own_rows, piece, registers = plan(block_m)
    out = torch.empty(rows, columns, dtype=bias.dtype, device=values.device)
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
    programs = min(tiles, torch.cuda.get_device_properties(values.device).multi_processor_count)
    linear_kernel[(programs,)](
        _descriptor(values, [own_rows, STEP]), _descriptor(weight, [block_n, STEP]),
        _descriptor(out, [own_rows, piece]), row_scale, weight_scale, bias, rows, columns, channels,
        CONSUMERS=consumers, ROWS=own_rows, COLUMNS=block_n, STEP=STEP, PIECE=piece, STAGES=stages,
        GROUP=group, GELU=gelu, num_warps=4, maxnreg=registers)
    return out


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Copy-engine descriptor of a matrix, with tiles laid out as the matrix product reads them."""
    kinds = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16}
    layout = gl.NVMMASharedLayout.get_default_for(block, kinds[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)
