"""The convolutions of the VAE's decoder as implicit matrix products, scheduled by hand for Hopper in Gluon.

A program computes tiles of 192 outputs (rows) for 256 pixels (columns): three consumer warpgroups compute 64
rows each, and one producer warp loads for all of them. The rows are 192 channels of one frame, or 96 channels
of two consecutive frames, or of two neighbouring pixels of an upsampled image (`conv3d.Plan`). So the weights
are the left operand and the pixels the right one: Triton has no tile of 96 columns, and 64 + 32 columns would
need more shared-memory bandwidth than Hopper has.

The pixels are two boxes of 8 x 16 pixels of one frame each. A step multiplies 32 or 64 input channels of one
tap. The TMA unit loads both boxes, shifted by the tap, from memory [T, H, W, C] and writes zeros for pixels
outside the image. Frames before the first come from the history, a tensor of its own. So nothing is padded or
concatenated. A table computed on the host says what each step loads. A residual is a few more steps with the
identity matrix as weights, and a 1x1 shortcut the same with its own weights; both are added before the result
is rounded.

Two frames (or pixels) of 96 channels share some taps and not others. A consumer skips a step that none of its
rows needs. The middle consumer has rows of both and multiplies the unneeded half by zeros, so two frames cost
10 units of work instead of 9.

In 8 bit (`EIGHT`), a step multiplies 96 channels of e4m3. In shared memory they lie 128 bytes apart: the last
32 are outside the tensor, so the TMA unit fills them with zeros, and nothing multiplies them. A step of 64
channels of bf16 has the same bytes, so residual and shortcut use the same slots. They come last, because the
sums of 8-bit products are cut to some 14 bits (`max_num_imprecise_acc` stays at Triton's default for Hopper,
which adds no float32 sums between), and what is added in bf16 after them is not.

There is one persistent program per multiprocessor. While consumers store their results, the producer loads
the next tile's steps, as many as fit. Each consumer transposes its results to [pixels, channels] in shared
memory, and the TMA unit writes them and omits pixels outside the image.
"""

from __future__ import annotations

import functools
from typing import Sequence

import torch
import triton
from torch import Tensor

from .conv3d import BOX, STEP8, TAIL, Plan, tiles
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

CONSUMERS = 3
CONSUMER_ROWS = 64
BOX_HEIGHT, BOX_WIDTH = BOX
PIECE_ROWS = 32
ROW_BYTES = 128
"""Per pixel or weight's row and 8-bit step, in shared memory."""
STAGES = {STEP8: 3, 64: 3, 32: 6}
"""By channels per step; 168 KB of shared memory."""


@gluon.jit
def _place(box, frames, boxes_across, TIME: gl.constexpr):
    """Index of a box -> its first frame, row and column. Consecutive boxes are consecutive frames: they share
    input, which is then in the L2 cache.
    """
    spot = box // frames
    return box % frames * TIME, spot // boxes_across * 8, spot % boxes_across * 16


@gluon.jit
def _skip(first, last, at, ready, empty, STAGES: gl.constexpr):
    """Pass over steps first ... last - 1."""
    for k in range(first, last):
        slot = (at + k) % STAGES
        mbarrier.wait(ready.index(slot), (at + k) // STAGES & 1)
        mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit
def _multiply(acc, first, last, at, w_smem, x_smem, ready, empty, INDEX: gl.constexpr, EIGHT: gl.constexpr,
              STAGES: gl.constexpr):
    """acc + the products of steps first ... last - 1, at least one. EIGHT: 96 of 128 channels."""
    for k in range(first, last):
        slot = (at + k) % STAGES
        mbarrier.wait(ready.index(slot), (at + k) // STAGES & 1)
        weights = w_smem.index(slot * 3 + INDEX)
        pixels = x_smem.index(slot)
        if EIGHT:
            acc = warpgroup_mma(weights.slice(0, 64, 1), pixels.slice(0, 64, 1).permute((1, 0)), acc,
                                is_async=True)
            acc = warpgroup_mma(weights.slice(64, 32, 1), pixels.slice(64, 32, 1).permute((1, 0)), acc,
                                is_async=True)
            acc = warpgroup_mma_wait(2, deps=[acc])
        else:
            acc = warpgroup_mma(weights, pixels.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((at + k + STAGES - 1) % STAGES), count=1, pred=k > first)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((at + last + STAGES - 1) % STAGES), count=1)
    return acc


@gluon.jit
def _send(out_a, out_b, out_c, out_d, piece, buffer, frame, row, column, OUTPUTS: gl.constexpr):
    """Write 32 channels of 64 pixels to the output, frame and channel of `piece`."""
    channel = piece & 0xFFFF
    frame += piece >> 16 & 15
    which = piece >> 20
    if OUTPUTS == 1:
        tma.async_copy_shared_to_global(out_a, [frame, row, column, channel], buffer)
    else:
        if which == 0:
            tma.async_copy_shared_to_global(out_a, [frame, row, column, channel], buffer)
        elif which == 1:
            tma.async_copy_shared_to_global(out_b, [frame, row, column, channel], buffer)
        if OUTPUTS == 4:
            if which == 2:
                tma.async_copy_shared_to_global(out_c, [frame, row, column, channel], buffer)
            elif which == 3:
                tma.async_copy_shared_to_global(out_d, [frame, row, column, channel], buffer)


@gluon.jit
def _store(sums, out_a, out_b, out_c, out_d, low, high, turned, boxes, PLACE: gl.constexpr, frame, row,
           column, OUTPUTS: gl.constexpr):
    """Round and store 64 rows of 64 pixels through buffer PLACE, which differs from the previous one."""
    out = gl.permute(gl.reshape(sums.to(gl.bfloat16), [2, 32, 64]), (0, 2, 1))
    tma.store_wait(2)
    barrier()
    turned.index(PLACE).store(out)
    fence_async_shared()
    barrier()
    _send(out_a, out_b, out_c, out_d, low, boxes.index(2 * PLACE), frame, row, column, OUTPUTS)
    _send(out_a, out_b, out_c, out_d, high, boxes.index(2 * PLACE + 1), frame, row, column, OUTPUTS)


@gluon.jit
def _consume(INDEX: gl.constexpr, out_a, out_b, out_c, out_d, bias_ptr, pieces_ptr, blocks, pairs, frames,
             boxes_across, steps, dense, apart, w_smem, x_smem, w_tail, x_tail, turned, boxes, ready,
             empty, EIGHT: gl.constexpr, TIME: gl.constexpr, OWN: gl.constexpr, SHIFT: gl.constexpr,
             OUTPUTS: gl.constexpr, STAGES: gl.constexpr):
    """One warpgroup: 64 rows of every tile of this program."""
    plain: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32 if EIGHT else 16])
    at = 0
    for tile in range(gl.program_id(0), blocks * pairs, gl.num_programs(0)):
        block = tile % blocks
        pair = tile // blocks
        rows = (block * 3 + INDEX) * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        bias = gl.load(bias_ptr + rows)
        acc = gl.full([64, 256], 0.0, gl.float32, layout) + bias[:, None]
        first = 0
        last = dense
        if INDEX == 2:
            first = apart
        if INDEX == 0:
            last = dense - apart
        _skip(0, first, at, ready, empty, STAGES)
        acc = _multiply(acc, first, last, at, w_smem, x_smem, ready, empty, INDEX, EIGHT, STAGES)
        if EIGHT:
            acc = gl.convert_layout(acc, plain, assert_trivial=True)
        if OWN > 0:
            own = dense + INDEX * SHIFT
            _skip(last, own, at, ready, empty, STAGES)
            acc = _multiply(acc, own, own + OWN, at, w_tail, x_tail, ready, empty, INDEX, False, STAGES)
            _skip(own + OWN, steps, at, ready, empty, STAGES)
        else:
            _skip(last, steps, at, ready, empty, STAGES)
        if EIGHT:
            scales = ((blocks + block) * 3 + INDEX) * 64 + gl.arange(0, 64, gl.SliceLayout(1, plain))
            acc = acc * gl.load(bias_ptr + scales)[:, None]
        at += steps
        low = gl.load(pieces_ptr + (block * 3 + INDEX) * 2)
        high = gl.load(pieces_ptr + (block * 3 + INDEX) * 2 + 1)
        left, right = halves(acc)
        a, b = halves(left)
        frame, row, column = _place(pair * 2, frames, boxes_across, TIME)
        _store(a, out_a, out_b, out_c, out_d, low, high, turned, boxes, 2 * INDEX, frame, row, column,
               OUTPUTS)
        _store(b, out_a, out_b, out_c, out_d, low, high, turned, boxes, 2 * INDEX + 1, frame, row + 4, column,
               OUTPUTS)
        a, b = halves(right)
        frame, row, column = _place(pair * 2 + 1, frames, boxes_across, TIME)
        _store(a, out_a, out_b, out_c, out_d, low, high, turned, boxes, 2 * INDEX, frame, row, column,
               OUTPUTS)
        _store(b, out_a, out_b, out_c, out_d, low, high, turned, boxes, 2 * INDEX + 1, frame, row + 4, column,
               OUTPUTS)
    tma.store_wait(0)


@gluon.jit
def _fetch(x_desc, past_desc, other_desc, step, frame, row, column, ready, target, target_other,
           EIGHT: gl.constexpr, PAST: gl.constexpr, OTHER: gl.constexpr, STEP: gl.constexpr,
           STEP_OTHER: gl.constexpr):
    """Load one box from the tensor, shift and channel of `step`."""
    chunk = step & 0xFF
    channel = chunk * STEP
    column += (step >> 8 & 3) - 1
    row += (step >> 10 & 3) - 1
    frame += (step >> 12 & 15) - 2
    from_other = (step >> 16) > 0
    from_past = frame < 0
    if OTHER:
        if from_other:
            tma.async_copy_global_to_shared(other_desc, [frame, row, column, chunk * STEP_OTHER], ready,
                                            target_other)
    if EIGHT:
        if from_past:
            tma.async_copy_global_to_shared(past_desc, [frame + 2, row, column, chunk, 0], ready, target)
        tma.async_copy_global_to_shared(x_desc, [frame, row, column, chunk, 0], ready, target,
                                        pred=(from_other | from_past) == 0)
    else:
        if PAST:
            if from_past:
                tma.async_copy_global_to_shared(past_desc, [frame + 2, row, column, channel], ready, target)
        tma.async_copy_global_to_shared(x_desc, [frame, row, column, channel], ready, target,
                                        pred=(from_other | from_past) == 0)


@gluon.jit
def _fetch_weights(w_desc, w_tail_desc, row, k, dense, ready, target, target_tail, pred, EIGHT: gl.constexpr,
                   OTHER: gl.constexpr, STEP: gl.constexpr, STEP_OTHER: gl.constexpr):
    """Load the weights of step k for the 64 rows from `row` on."""
    if EIGHT:
        tma.async_copy_global_to_shared(w_desc, [row, k, 0], ready, target, pred=pred & (k < dense))
        if OTHER:
            tma.async_copy_global_to_shared(w_tail_desc, [row, (k - dense) * STEP_OTHER], ready, target_tail,
                                            pred=pred & (k >= dense))
    else:
        tma.async_copy_global_to_shared(w_desc, [row, k * STEP], ready, target, pred=pred)


@gluon.jit
def _produce(x_desc, past_desc, other_desc, w_desc, w_tail_desc, steps_ptr, blocks, pairs, frames,
             boxes_across, steps, dense, stop, apart, w_boxes, x_boxes, w_tail, other_boxes, ready, empty,
             EIGHT: gl.constexpr, PAST: gl.constexpr, OTHER: gl.constexpr, TIME: gl.constexpr,
             STEP: gl.constexpr, STEP_OTHER: gl.constexpr, STAGES: gl.constexpr):
    """One warp: load pixels and weights step by step, into slots that all consumers have released."""
    at = 0
    for tile in range(gl.program_id(0), blocks * pairs, gl.num_programs(0)):
        block = tile % blocks
        pair = tile // blocks
        frame_a, row_a, column_a = _place(pair * 2, frames, boxes_across, TIME)
        frame_b, row_b, column_b = _place(pair * 2 + 1, frames, boxes_across, TIME)
        step = gl.load(steps_ptr + block * steps)
        for k in range(steps):
            following = gl.load(steps_ptr + block * steps + gl.minimum(k + 1, steps - 1))
            slot = (at + k) % STAGES
            mbarrier.wait(empty.index(slot), (at + k) // STAGES & 1 ^ 1)
            for_first = k < stop
            if EIGHT:
                for_first |= k >= dense
            for_last = k >= apart
            for_all = for_first & for_last
            mbarrier.expect(ready.index(slot), 2 * x_desc.block_type.nbytes + 3 * w_desc.block_type.nbytes,
                            pred=for_all)
            mbarrier.expect(ready.index(slot), 2 * x_desc.block_type.nbytes + 2 * w_desc.block_type.nbytes,
                            pred=for_all == 0)
            row = block * 192
            _fetch_weights(w_desc, w_tail_desc, row, k, dense, ready.index(slot), w_boxes.index(slot * 3),
                           w_tail.index(slot * 3), for_first, EIGHT, OTHER, STEP, STEP_OTHER)
            _fetch_weights(w_desc, w_tail_desc, row + 64, k, dense, ready.index(slot),
                           w_boxes.index(slot * 3 + 1), w_tail.index(slot * 3 + 1), k >= 0, EIGHT, OTHER,
                           STEP, STEP_OTHER)
            _fetch_weights(w_desc, w_tail_desc, row + 128, k, dense, ready.index(slot),
                           w_boxes.index(slot * 3 + 2), w_tail.index(slot * 3 + 2), for_last, EIGHT, OTHER,
                           STEP, STEP_OTHER)
            _fetch(x_desc, past_desc, other_desc, step, frame_a, row_a, column_a, ready.index(slot),
                   x_boxes.index(slot * 2), other_boxes.index(slot * 2), EIGHT, PAST, OTHER, STEP, STEP_OTHER)
            _fetch(x_desc, past_desc, other_desc, step, frame_b, row_b, column_b, ready.index(slot),
                   x_boxes.index(slot * 2 + 1), other_boxes.index(slot * 2 + 1), EIGHT, PAST, OTHER, STEP,
                   STEP_OTHER)
            step = following
        at += steps


@gluon.jit(do_not_specialize=["pairs", "frames", "boxes_across"])
def conv_kernel(x_desc, past_desc, other_desc, w_desc, w_tail_desc, out_a, out_b, out_c, out_d, bias_ptr,
                steps_ptr, pieces_ptr, blocks, pairs, frames, boxes_across, steps, dense, apart, stop,
                EIGHT: gl.constexpr, PAST: gl.constexpr, OTHER: gl.constexpr, TIME: gl.constexpr,
                OWN: gl.constexpr, SHIFT: gl.constexpr, OUTPUTS: gl.constexpr, STEP: gl.constexpr,
                STEP_OTHER: gl.constexpr, STAGES: gl.constexpr):
    """`ready` completes when its stage is loaded, `empty` when the third consumer arrives."""
    pieces: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=3)
    x_boxes = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES] + x_desc.block_shape, x_desc.layout)
    w_boxes = gl.allocate_shared_memory(w_desc.dtype, [3 * STAGES] + w_desc.block_shape, w_desc.layout)
    boxes = gl.allocate_shared_memory(gl.bfloat16, [12] + out_a.block_shape, out_a.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * STEP_OTHER, element_bitwidth=16, rank=2)
    x_tail = x_boxes._reinterpret(gl.bfloat16, [STAGES, 256, STEP_OTHER], flat)
    if EIGHT:
        flat8: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
        deep: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
        x_smem = x_boxes._reinterpret(x_desc.dtype, [STAGES, 256, 128], flat8)
        w_smem = w_boxes._reinterpret(w_desc.dtype, [3 * STAGES, 64, 128], flat8)
        w_tail = w_boxes._reinterpret(gl.bfloat16, [3 * STAGES, 64, STEP_OTHER], flat)
        other_boxes = x_boxes._reinterpret(gl.bfloat16, [2 * STAGES, 1, 8, 16, STEP_OTHER], deep)
    else:
        x_smem = x_tail
        w_smem = w_boxes
        w_tail = w_boxes
        other_boxes = x_boxes
    turned = boxes._reinterpret(gl.bfloat16, [6, 2, 64, 32], pieces)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=3)
    fence_async_shared()
    # The tuples are written out: one bound to a name would lose its compile-time constants.
    gl.warp_specialize(
        [(_consume, (0, out_a, out_b, out_c, out_d, bias_ptr, pieces_ptr, blocks, pairs, frames, boxes_across,
                     steps, dense, apart, w_smem, x_smem, w_tail, x_tail, turned, boxes, ready,
                     empty, EIGHT, TIME, OWN, SHIFT, OUTPUTS, STAGES)),
         (_consume, (1, out_a, out_b, out_c, out_d, bias_ptr, pieces_ptr, blocks, pairs, frames, boxes_across,
                     steps, dense, apart, w_smem, x_smem, w_tail, x_tail, turned, boxes, ready,
                     empty, EIGHT, TIME, OWN, SHIFT, OUTPUTS, STAGES)),
         (_consume, (2, out_a, out_b, out_c, out_d, bias_ptr, pieces_ptr, blocks, pairs, frames, boxes_across,
                     steps, dense, apart, w_smem, x_smem, w_tail, x_tail, turned, boxes, ready,
                     empty, EIGHT, TIME, OWN, SHIFT, OUTPUTS, STAGES)),
         (_produce, (x_desc, past_desc, other_desc, w_desc, w_tail_desc, steps_ptr, blocks, pairs, frames,
                     boxes_across, steps, dense, stop, apart, w_boxes, x_boxes, w_tail, other_boxes, ready,
                     empty, EIGHT, PAST, OTHER, TIME, STEP, STEP_OTHER, STAGES))],
        [4, 4, 1], [160, 160, 32 if EIGHT else 24])


def launch(plan: Plan, x: Tensor, past: Tensor | None, other: Tensor | None,
           outputs: Sequence[Tensor]) -> None:
    """Convolve x [T, H, W, C] into `outputs`, views [T, H, W, C'] of the result with any strides.

    Args:
        past: the two frames before x, [2, H, W, C].
        other: the input of the plan's residual or shortcut, [T, H, W, C''].
    """
    frames, height, width, _ = x.shape
    units = triton.cdiv(frames, plan.frames)
    across = triton.cdiv(width, BOX_WIDTH)
    total = tiles(plan, frames, height, width)
    programs = min(total, torch.cuda.get_device_properties(x.device).multi_processor_count)
    step, eight = plan.step, plan.eight_bit
    step_other = TAIL if eight else step
    tail = None
    if eight:
        sources = [_boxes8(x), _boxes8(past)]
        weight = TensorDescriptor.from_tensor(
            plan.weight.unflatten(1, (-1, step)), [CONSUMER_ROWS, 1, ROW_BYTES], _layout(ROW_BYTES, 3, 8))
        if plan.tail is not None:
            tail = TensorDescriptor.from_tensor(plan.tail, [CONSUMER_ROWS, TAIL], _layout(2 * TAIL, 2))
    else:
        sources = [None if t is None else _boxes(t, [1, BOX_HEIGHT, BOX_WIDTH, step]) for t in (x, past)]
        weight = TensorDescriptor.from_tensor(plan.weight, [CONSUMER_ROWS, step], _layout(2 * step, 2))
    added = None if other is None else _boxes(other, [1, BOX_HEIGHT, BOX_WIDTH, step_other])
    targets = [_boxes(out, [1, BOX_HEIGHT // 2, BOX_WIDTH, PIECE_ROWS]) for out in outputs]
    targets += [None] * (4 - len(targets))
    conv_kernel[(programs,)](
        *sources, added, weight, tail, *targets, plan.bias, plan.steps, plan.pieces, plan.blocks,
        total // plan.blocks, units, across, plan.steps.shape[1], plan.dense, plan.apart, plan.stop,
        EIGHT=eight, PAST=past is not None, OTHER=other is not None, TIME=plan.frames, OWN=plan.own,
        SHIFT=plan.shift, OUTPUTS=len(outputs), STEP=step, STEP_OTHER=step_other, STAGES=STAGES[step],
        num_warps=4, maxnreg=128)


@functools.cache
def _layout(width: int, rank: int, bits: int = 16) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


def _boxes(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """TMA descriptor of [T, H, W, C] in boxes, in the layout that the matrix product reads."""
    return TensorDescriptor.from_tensor(tensor, block, _layout(2 * block[-1], 4))


def _boxes8(tensor: Tensor) -> TensorDescriptor:
    """As `_boxes`, of e4m3 in boxes of `STEP8` channels, each filled up with zeros to `ROW_BYTES`."""
    return TensorDescriptor.from_tensor(tensor.unflatten(3, (-1, STEP8)), [1, BOX_HEIGHT, BOX_WIDTH, 1,
                                        ROW_BYTES], _layout(ROW_BYTES, 5, 8))
