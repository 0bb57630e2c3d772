"""The decoder's last convolution, from 96 channels to RGB, in Gluon for Hopper.

With three outputs per pixel, loading the input for each of the 27 taps takes longer than the arithmetic. So
the rows of the matrix product are the colours of 4 frames x 4 image rows, 48 of 64. One load of the input
serves all outputs that need it: 6.75 loads per output pixel instead of 27. Outputs that do not need it have
zero weights.

Three consumer warpgroups each have their own pixels, 4 x 64 of them on every fourth image row, and share the
weights. The TMA unit sees the image as [T, H / 4, 4, W, C] and writes zeros for pixels outside.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from .conv3d import HEAD_FRAMES, HEAD_ROWS, HeadPlan
from .gluon_api import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .gluon_columns import halves

STAGES = 4
BOX_HEIGHT, BOX_WIDTH = 4, 64


@gluon.jit
def _place(box, groups, boxes_across):
    """Index of a box -> its first frame, group of 4 image rows, and column."""
    spot = box // groups
    return box % groups * 4, spot // boxes_across * 4, spot % boxes_across * 64


@gluon.jit
def _store(sums, out_ptr, bias, frames, height, width, frame, row, column):
    """Round and store sums [64, 64]: rows are (frame, image row, colour), columns are pixels of one row."""
    layout: gl.constexpr = sums.type.layout
    m = gl.arange(0, 64, gl.SliceLayout(1, layout))
    x = column + gl.arange(0, 64, gl.SliceLayout(0, layout))
    t = frame + m // 12
    y = row * 4 + m // 3 % 4
    inside = (m < 48) & (t < frames) & (y < height)
    offsets = ((t * 3 + m % 3) * height + y) * width
    gl.store(out_ptr + offsets[:, None] + x[None, :], (sums + bias[:, None]).to(gl.bfloat16),
             mask=inside[:, None] & (x < width)[None, :])


@gluon.jit
def _consume(INDEX: gl.constexpr, out_ptr, bias_ptr, tiles, steps, frames, height, width, groups,
             boxes_across, w_smem, x_smem, ready, empty, STAGES: gl.constexpr):
    """One warpgroup: one box of every tile of this program."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    piece: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    at = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.full([64, 256], 0.0, gl.float32, layout)
        for k in range(steps):
            slot = (at + k) % STAGES
            mbarrier.wait(ready.index(slot), (at + k) // STAGES & 1)
            acc = warpgroup_mma(w_smem.index(slot), x_smem.index(slot * 3 + INDEX).permute((1, 0)), acc,
                                is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((at + k + STAGES - 1) % STAGES), count=1, pred=k > 0)
        acc = warpgroup_mma_wait(0, deps=[acc])
        at += steps
        mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), count=1)
        bias = gl.load(bias_ptr + gl.arange(0, 64, gl.SliceLayout(1, piece)) % 3)
        frame, row, column = _place(tile * 3 + INDEX, groups, boxes_across)
        left, right = halves(acc)
        a, b = halves(left)
        _store(gl.convert_layout(a, piece, assert_trivial=True), out_ptr, bias, frames, height, width, frame,
               row, column)
        _store(gl.convert_layout(b, piece, assert_trivial=True), out_ptr, bias, frames, height, width, frame,
               row + 1, column)
        a, b = halves(right)
        _store(gl.convert_layout(a, piece, assert_trivial=True), out_ptr, bias, frames, height, width, frame,
               row + 2, column)
        _store(gl.convert_layout(b, piece, assert_trivial=True), out_ptr, bias, frames, height, width, frame,
               row + 3, column)


@gluon.jit
def _produce(x_desc, past_desc, w_desc, steps_ptr, tiles, steps, groups, boxes_across, w_smem, x_boxes, ready,
             empty, STAGES: gl.constexpr):
    """One warp: load weights and three boxes step by step."""
    at = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        step = gl.load(steps_ptr)
        for k in range(steps):
            following = gl.load(steps_ptr + gl.minimum(k + 1, steps - 1))
            channel = (step & 0xFF) * 32
            aside = (step >> 8 & 3) - 1
            inner = step >> 10 & 3
            below = (step >> 12 & 3) - 1
            later = (step >> 14 & 7) - 2
            slot = (at + k) % STAGES
            mbarrier.wait(empty.index(slot), (at + k) // STAGES & 1 ^ 1)
            mbarrier.expect(ready.index(slot), 3 * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(w_desc, [0, k * 32], ready.index(slot), w_smem.index(slot))
            for i in gl.static_range(3):
                frame, row, column = _place(tile * 3 + i, groups, boxes_across)
                frame += later
                tma.async_copy_global_to_shared(
                    past_desc, [frame + 2, row + below, inner, column + aside, channel], ready.index(slot),
                    x_boxes.index(slot * 3 + i), pred=frame < 0)
                tma.async_copy_global_to_shared(
                    x_desc, [frame, row + below, inner, column + aside, channel], ready.index(slot),
                    x_boxes.index(slot * 3 + i), pred=frame >= 0)
            step = following
        at += steps


@gluon.jit(do_not_specialize=["tiles", "frames", "groups", "boxes_across"])
def head_kernel(x_desc, past_desc, w_desc, out_ptr, bias_ptr, steps_ptr, tiles, steps, frames, height, width,
                groups, boxes_across, STAGES: gl.constexpr):
    """`ready` completes when its stage is loaded, `empty` when the third consumer arrives."""
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    x_boxes = gl.allocate_shared_memory(gl.bfloat16, [3 * STAGES] + x_desc.block_shape, x_desc.layout)
    w_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + w_desc.block_shape, w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_smem = x_boxes._reinterpret(gl.bfloat16, [3 * STAGES, 256, 32], flat)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=3)
    fence_async_shared()
    # The tuples are written out: one bound to a name would lose its compile-time constants.
    gl.warp_specialize(
        [(_consume, (0, out_ptr, bias_ptr, tiles, steps, frames, height, width, groups, boxes_across, w_smem,
                     x_smem, ready, empty, STAGES)),
         (_consume, (1, out_ptr, bias_ptr, tiles, steps, frames, height, width, groups, boxes_across, w_smem,
                     x_smem, ready, empty, STAGES)),
         (_consume, (2, out_ptr, bias_ptr, tiles, steps, frames, height, width, groups, boxes_across, w_smem,
                     x_smem, ready, empty, STAGES)),
         (_produce, (x_desc, past_desc, w_desc, steps_ptr, tiles, steps, groups, boxes_across, w_smem,
                     x_boxes, ready, empty, STAGES))],
        [4, 4, 1], [160, 160, 24])


def launch(plan: HeadPlan, x: Tensor, past: Tensor, out: Tensor) -> None:
    """Convolve x [T, H, W, C], after past [2, H, W, C], into out [T, 3, H, W]; H is a multiple of 4."""
    frames, height, width, _ = x.shape
    groups, across = triton.cdiv(frames, HEAD_FRAMES), triton.cdiv(width, BOX_WIDTH)
    tiles = triton.cdiv(groups * across * triton.cdiv(height // HEAD_ROWS, BOX_HEIGHT), 3)
    programs = min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)
    weight = TensorDescriptor.from_tensor(plan.weight, [64, 32], _layout(2))
    head_kernel[(programs,)](
        _boxes(x), _boxes(past), weight, out, plan.bias, plan.steps, tiles, plan.steps.shape[0], frames,
        height, width, groups, across, STAGES=STAGES, num_warps=4, maxnreg=128)


@functools.cache
def _layout(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=rank)


def _boxes(x: Tensor) -> TensorDescriptor:
    """TMA descriptor of [T, H, W, C] in boxes of every fourth row."""
    return TensorDescriptor.from_tensor(x.unflatten(1, (-1, HEAD_ROWS)), [1, BOX_HEIGHT, 1, BOX_WIDTH, 32],
                                        _layout(5))
