"""The convolutions of the VAE's decoder as PyTorch operators: Gluon on Hopper, plain PyTorch on the CPU.

Tensors are [B, C, T, H, W] with channels last in memory. A causal convolution takes the two frames before its
input as a separate tensor, `past` [B, C, 2, H, W], and pads the image with zeros; nothing is concatenated or
copied. Sums are in float32 and rounded once, with bias and residual.

    plan = causal_plan(weight, bias, residual=True)     # once: packs the weights and decides the steps
    n, new_past = norm_silu(x, gamma, past)             # RMS norm over channels, SiLU, the new history
    y = convolve(plan, n, past, x)                      # 3x3x3 convolution of past and n, + x

A `Plan` says what `conv3d_gluon` does step by step, and `convolve_reference` does the same in plain PyTorch.
The upsampled image of `picture_plan` is never stored: the 3x3 taps of one of its pixels read 2x2 pixels of
the small image. Weights of taps that read the same pixel are summed in float32 and rounded to bf16.

Causal convolutions also come in 8 bit (e4m3), which Hopper multiplies at twice the rate:

    unit = norm_unit(gamma)                             # a power of two: no result of the norm can overflow
    plan = causal_plan(weight, bias, residual=True, unit=unit)
    n, new_past = norm_silu(x, gamma, past, unit)       # e4m3, because `past` is; times `unit`
    y = convolve(plan, n, past, x)                      # y and x in bf16

Weights have one scale per output channel, a power of two. So sums are in units of a power of two as well, and
bias, residual (an identity matrix of 1 / scale) and shortcut join them exactly, in bf16 and after all 8-bit
steps: the tensor core's sums of 8-bit products keep some 14 bits, those of bf16 products about all 24.

The kernels multiply some values by zero weights. So a NaN or an infinity can reach all channels of its
pixel's outputs and, with 96 channels, the frame before.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 192
"""Outputs per pixel of a tile."""
PIECE = 32
CONSUMERS = 3
PIXELS = 256
"""Pixels per tile: two boxes of `BOX`."""
BOX = (8, 16)
HEAD_FRAMES, HEAD_ROWS, COLOURS = 4, 4, 3
"""The last convolution computes this many frames, image rows and colours as rows of one tile."""
STEP8, TAIL = 96, 64
"""Input channels per 8-bit step, and per bf16 step after those."""
E4M3 = torch.float8_e4m3fn
LARGEST8 = 448.0
"""The largest number of e4m3."""
Kind = Literal["same", "frames", "picture"]
"""Size of the result: as the input, twice the frames, or twice the height and width."""
Shift = tuple[int, int, int]


class Rows(NamedTuple):
    """Rows of a tile that share their taps: 96 or 192 channels of one output.

    Attributes:
        taps: the input's shift in frames, rows and columns -> float32 weights [rows, C].
        bias: float32 [rows].
        output: index of the output tensor.
        frame: offset from the tile's first frame.
        channel: first channel in the output.
    """

    taps: dict[Shift, Tensor]
    bias: Tensor
    output: int
    frame: int
    channel: int


class Plan(NamedTuple):
    """A convolution as the steps of the kernel.

    Attributes:
        weight: bf16 [blocks * ROWS, steps * step]; in 8 bit, e4m3 [blocks * ROWS, dense * step].
        bias: float32 [blocks * ROWS]; in 8 bit [2, blocks * ROWS]: bias / scale, and the scale, a power of
            two, that the sums are multiplied by.
        steps: int32 [blocks, steps]: what each step loads (`_pack_step`).
        pieces: int32 [blocks, ROWS / PIECE]: where each group of 32 rows is stored (`_pack_piece`).
        kind: size of the result.
        channels: channels of the result.
        step: input channels per step.
        frames: consecutive frames per tile.
        dense: number of steps before those that only one consumer computes.
        apart: the last consumer skips this many steps at the beginning, and the first consumer as many at the
            end of the dense ones.
        own: number of steps after the dense ones that a consumer computes. Each begins `shift` steps after
            the previous consumer, so they may share some.
        adds: whether it adds another tensor.
        tail: bf16 [blocks * ROWS, tail steps * TAIL], an 8-bit plan's weights of the steps after the dense
            ones.
    """

    weight: Tensor
    bias: Tensor
    steps: Tensor
    pieces: Tensor
    kind: Kind
    channels: int
    step: int
    frames: int
    dense: int
    apart: int
    own: int
    adds: bool
    tail: Tensor | None = None

    @property
    def eight_bit(self) -> bool:
        return self.weight.dtype == E4M3

    @property
    def blocks(self) -> int:
        return self.steps.shape[0]

    @property
    def shift(self) -> int:
        """Steps between the first own steps of two consumers."""
        return (self.steps.shape[1] - self.dense - self.own) // (CONSUMERS - 1)

    @property
    def nbytes(self) -> int:
        """Of the packed weights."""
        return self.weight.nbytes + (0 if self.tail is None else self.tail.nbytes)

    def width(self, source: int) -> int:
        """Input channels of a step that reads the input (0) or the other tensor (1)."""
        return TAIL if source and self.eight_bit else self.step

    @property
    def stop(self) -> int:
        """First step that does not need the first consumer's weights."""
        return self.dense - self.apart if self.apart else self.steps.shape[1]


def supported(in_channels: int, out_channels: int) -> bool:
    """Whether the kernels support these channels: from 96 * 2^n to 96 or a multiple of 192."""
    parts, rest = divmod(in_channels, 3 * PIECE)
    powers = parts > 0 and rest == 0 and parts & (parts - 1) == 0
    return powers and (out_channels == ROWS // 2 or out_channels % ROWS == 0)


def tiles(plan: Plan, frames: int, height: int, width: int) -> int:
    """Number of tiles of an input of this size."""
    boxes = -(-frames // plan.frames) * -(-height // BOX[0]) * -(-width // BOX[1])
    return -(-boxes // (PIXELS // (BOX[0] * BOX[1]))) * plan.blocks


def causal_plan(weight: Tensor, bias: Tensor, residual: bool = False, shortcut: Tensor | None = None,
                shortcut_bias: Tensor | None = None, unit: float | None = None) -> Plan:
    """Plan of a causal convolution.

    Args:
        weight: [O, C, 3, 3, 3].
        bias: [O].
        residual: add another tensor of the result's size.
        shortcut: [O, C'], a 1x1 convolution of another tensor that is added.
        shortcut_bias: [O], its bias.
        unit: for a plan in 8 bit, the power of two that its input is multiplied by (`norm_unit`).

    Raises:
        ValueError: the kernel does not support these channels.
    """
    outputs = weight.shape[0]
    weight, bias = weight.float(), bias.float()
    if shortcut_bias is not None:
        bias = bias + shortcut_bias.float()
    pair = outputs == ROWS // 2
    if pair and shortcut is not None:
        raise ValueError(f"{outputs} channels with a shortcut: the kernel needs a multiple of {ROWS} for one")
    blocks = []
    for channel in range(0, outputs, ROWS):
        part = slice(channel, channel + ROWS)
        blocks.append([Rows({(t - 2 + f, y - 1, x - 1): weight[part, :, t, y, x] for t in range(3)
                             for y in range(3) for x in range(3)}, bias[part], 0, f, channel)
                       for f in range(2 if pair else 1)])
    if unit is not None:
        return _plan8(blocks, outputs, 2 if pair else 1, residual, shortcut, weight_scale(weight), unit)
    return _plan(blocks, "same", outputs, 2 if pair else 1, residual, shortcut)


def frames_plan(weight: Tensor, bias: Tensor) -> Plan:
    """Plan of a causal convolution [2C, C, 3, 1, 1] whose channel halves become alternating frames."""
    channels = weight.shape[0] // 2
    weight, bias = weight.float(), bias.float()
    blocks = []
    for first in range(0, 2 * channels, ROWS):
        part = slice(first, first + ROWS)
        taps = {(t - 2, 0, 0): weight[part, :, t, 0, 0] for t in range(3)}
        blocks.append([Rows(taps, bias[part], first // channels, 0, first % channels)])
    return _plan(blocks, "frames", channels, 1)


def picture_plan(weight: Tensor, bias: Tensor) -> Plan:
    """Plan of a convolution [O, C, 3, 3] of each frame, upsampled twofold to the nearest neighbour."""
    outputs = weight.shape[0]
    weight, bias = weight.float(), bias.float()
    moved = {0: (-1, 0, 0), 1: (0, 0, 1)}  # parity of an upsampled pixel -> the small pixel of each tap
    units = []
    for y in range(2):
        for x in range(2):
            taps: dict[Shift, Tensor] = {}
            for i in range(3):
                for j in range(3):
                    shift = (0, moved[y][i], moved[x][j])
                    taps[shift] = taps[shift] + weight[:, :, i, j] if shift in taps else weight[:, :, i, j]
            units.append((2 * y + x, taps))
    if outputs == ROWS // 2:
        blocks = [[Rows(taps, bias, output, 0, 0) for output, taps in units[i:i + 2]] for i in (0, 2)]
    else:
        blocks = [[Rows({shift: w[first:first + ROWS] for shift, w in taps.items()}, bias[first:first + ROWS],
                        output, 0, first)] for output, taps in units for first in range(0, outputs, ROWS)]
    return _plan(blocks, "picture", outputs, 1)


def _plan(blocks: Sequence[Sequence[Rows]], kind: Kind, channels: int, frames: int, residual: bool = False,
          shortcut: Tensor | None = None) -> Plan:
    inputs = _input_channels(blocks, channels)
    step = 2 * PIECE if inputs % (2 * PIECE) == 0 else PIECE
    tables, weights, biases, pieces = [], [], [], []
    dense = apart = 0
    for units in blocks:
        parts = _tap_steps(step, units)
        if shortcut is not None:
            parts[1].add_shortcut(shortcut.float()[units[0].channel:units[0].channel + ROWS])
        if residual and len(units) == 2:
            for part, rows in zip(parts, (range(64), range(64, 128), range(128, ROWS))):
                part.spread_residual(rows)
        apart, dense = len(parts[0].steps), sum(len(part.steps) for part in parts)
        if residual and len(units) == 1:
            parts[2].spread_residual(range(ROWS))
        table = [code for part in parts for code in part.steps]
        columns = [column for part in parts for column in part.columns]
        tables.append(table)
        weights.append(torch.cat(columns, 1))
        biases += [rows.bias for rows in units]
        pieces.append(_pieces(units))
    device = weights[0].device
    return Plan(
        torch.cat(weights).to(torch.bfloat16).contiguous(), torch.cat(biases).contiguous(),
        torch.tensor(tables, dtype=torch.int32, device=device),
        torch.tensor(pieces, dtype=torch.int32, device=device), kind, channels, step, frames, dense, apart,
        ROWS // CONSUMERS // step if residual and dense < len(tables[0]) else 0,
        residual or shortcut is not None)


def _plan8(blocks: Sequence[Sequence[Rows]], channels: int, frames: int, residual: bool,
           shortcut: Tensor | None, weight_scales: Tensor, unit: float) -> Plan:
    """As `_plan`, in 8 bit: the taps, then the steps in bf16.

    Args:
        weight_scales: [O].
    """
    _input_channels(blocks, channels)
    tables, weights, biases, pieces, scales, tails = [], [], [], [], [], []
    dense = apart = own = 0
    for units in blocks:
        parts, tail, size = _tap_steps(STEP8, units), _Product(TAIL, units), ROWS // len(units)
        apart, dense = len(parts[0].steps), sum(len(part.steps) for part in parts)
        if shortcut is not None:
            tail.add_shortcut(shortcut.float()[units[0].channel:units[0].channel + ROWS])
            own = len(tail.steps)
        elif residual:
            tail.add_residual()
            own = len(units)
        of_weights = torch.cat([weight_scales[rows.channel:rows.channel + size] for rows in units])
        scale = of_weights / unit
        weights.append(torch.cat([column for part in parts for column in part.columns], 1)
                       / of_weights[:, None])
        tails += [torch.cat(tail.columns, 1) / scale[:, None]] if tail.columns else []
        tables.append([code for part in (*parts, tail) for code in part.steps])
        biases.append(torch.cat([rows.bias for rows in units]) / scale)
        scales.append(scale)
        pieces.append(_pieces(units))
    device = weights[0].device
    return Plan(
        torch.cat(weights).to(E4M3).contiguous(), torch.stack([torch.cat(biases), torch.cat(scales)]),
        torch.tensor(tables, dtype=torch.int32, device=device),
        torch.tensor(pieces, dtype=torch.int32, device=device), "same", channels, STEP8, frames, dense, apart,
        own, residual or shortcut is not None, torch.cat(tails).to(torch.bfloat16) if tails else None)


def weight_scale(weight: Tensor) -> Tensor:
    """One power of two per output channel of weight [O, ...], so that the largest |weight| / scale is in
    (224, 448]; 1 for a channel of zeros. Float32 [O].
    """
    largest = weight.detach().float().flatten(1).abs().amax(1)
    fraction, exponent = torch.frexp(largest)
    exponent = exponent - 9 + (fraction > LARGEST8 / 512).int()
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def rounded_weight(weight: Tensor) -> Tensor:
    """Weight [O, ...] rounded as in a plan in 8 bit, in its own dtype and units."""
    scale = weight_scale(weight).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
    return to_e4m3(weight / scale).to(weight.dtype) * scale


def norm_unit(gamma: Tensor) -> float:
    """The largest power of two that cannot make an e4m3 overflow when it multiplies the results of
    `norm_silu`: |x| <= sqrt(C) * |gamma|.
    """
    bound = float(gamma.detach().float().abs().max()) * gamma.numel()**0.5
    return 2.0**math.floor(math.log2(LARGEST8 / bound)) if bound > 0 else 1.0


def to_e4m3(x: Tensor) -> Tensor:
    """Round x to e4m3; larger numbers become 448, and NaN stays."""
    return x.clamp(-LARGEST8, LARGEST8).to(E4M3)


def _input_channels(blocks: Sequence[Sequence[Rows]], channels: int) -> int:
    inputs = next(iter(blocks[0][0].taps.values())).shape[1]
    if not supported(inputs, channels):
        raise ValueError(f"{inputs} to {channels} channels: the kernel takes {3 * PIECE} * 2^n of them and "
                         f"makes {ROWS // 2} or a multiple of {ROWS}")
    return inputs


def _tap_steps(step: int, units: Sequence[Rows]) -> list[_Product]:
    """The taps that only the first of two units has, those of both (or of the only one), and the rest."""
    parts = [_Product(step, units), _Product(step, units), _Product(step, units)]
    first, last = units[0], units[-1]
    for shift in sorted({shift for rows in units for shift in rows.taps}):
        parts[0 if shift not in last.taps else 2 if shift not in first.taps else 1].add_tap(shift)
    return parts


def _pieces(units: Sequence[Rows]) -> list[int]:
    return [_pack_piece(rows.output, rows.frame, rows.channel + i) for rows in units
            for i in range(0, ROWS // len(units), PIECE)]


class _Product:
    """Steps of a tile with their columns of the weight."""

    def __init__(self, step: int, units: Sequence[Rows]):
        self.step = step
        self.units = units
        self.steps: list[int] = []
        self.columns: list[Tensor] = []

    def add_tap(self, shift: Shift) -> None:
        """All input channels, shifted, times the weights of the rows that have this tap."""
        some = next(iter(self.units[0].taps.values()))
        self._add(0, shift, torch.cat([rows.taps.get(shift, torch.zeros_like(some)) for rows in self.units]))

    def add_shortcut(self, weight: Tensor) -> None:
        """The other tensor's channels times `weight` [ROWS, C']."""
        self._add(1, (0, 0, 0), weight)

    def _add(self, source: int, shift: Shift, weight: Tensor) -> None:
        for channel in range(0, weight.shape[1], self.step):
            self.steps.append(_pack_step(source, shift, channel // self.step))
            self.columns.append(weight[:, channel:channel + self.step])

    def spread_residual(self, wanted: range) -> None:
        """Add the other tensor to the `wanted` rows, with steps spread evenly among the existing ones: its
        data comes from device memory, and the loads of several such steps in a row stall the consumers.
        """
        size = ROWS // len(self.units)
        starts = wanted[::self.step]
        for i, row in reversed(list(enumerate(starts))):
            rows = self.units[row // size]
            place = (i + 1) * len(self.steps) // (len(starts) + 1)
            self.steps.insert(place, _pack_step(1, (rows.frame, 0, 0),
                                                (rows.channel + row % size) // self.step))
            identity = torch.eye(ROWS, device=self.units[0].bias.device)
            self.columns.insert(place, identity[:, row:row + self.step])

    def add_residual(self) -> None:
        """Add the other tensor to all rows, unit by unit; a unit's last step may reach past its channels."""
        size = ROWS // len(self.units)
        identity = torch.eye(ROWS, device=self.units[0].bias.device)
        for i, rows in enumerate(self.units):
            for start in range(0, size, self.step):
                column = identity[:, i * size + start:i * size + min(start + self.step, size)]
                self.steps.append(_pack_step(1, (rows.frame, 0, 0), (rows.channel + start) // self.step))
                self.columns.append(F.pad(column, (0, self.step - column.shape[1])))


def _pack_step(source: int, shift: Shift, chunk: int) -> int:
    """source: 0 is the input, 1 the other tensor. chunk: first channel / channels per step."""
    t, y, x = shift
    return chunk | (x + 1) << 8 | (y + 1) << 10 | (t + 2) << 12 | source << 16


def _pack_piece(output: int, frame: int, channel: int) -> int:
    return channel | frame << 16 | output << 20


def convolve(plan: Plan, x: Tensor, past: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    """Convolve x by the plan.

    Args:
        x: [B, C, T, H, W], channels last; on CUDA bf16, or e4m3 for a plan in 8 bit.
        past: the two frames before x, [B, C, 2, H, W]; None for a plan without a temporal kernel.
        other: the tensor that a residual or shortcut adds, [B, C', T, H, W].

    Returns:
        [B, O, T, H, W] in the size that the plan's kind says, channels last; bf16 for e4m3.

    Raises:
        ValueError: a shape, dtype or layout that the kernel does not support.
    """
    return torch.ops.longlive.vae_conv(
        x, past, other, plan.weight, plan.bias, plan.steps, plan.pieces, plan.kind,
        [plan.channels, plan.step, plan.frames, plan.dense, plan.apart, plan.own, int(plan.adds)],
        plan.tail)


@torch.library.custom_op("longlive::vae_conv", mutates_args=())
def _convolve(x: Tensor, past: Tensor | None, other: Tensor | None, weight: Tensor, bias: Tensor,
              steps: Tensor, pieces: Tensor, kind: str, numbers: Sequence[int],
              tail: Tensor | None = None) -> Tensor:
    plan = Plan(weight, bias, steps, pieces, kind, *numbers, tail)  # type: ignore[arg-type]
    _check(plan, x, past, other)
    if not x.is_cuda:
        return convolve_reference(plan, x, past, other).to(_dtype_of_result(x))
    from . import conv3d_gluon

    out = _result(x, kind, plan.channels)
    for b in range(x.shape[0]):
        conv3d_gluon.launch(plan, _rows(x, b), None if past is None else _rows(past, b),
                            None if other is None else _rows(other, b), _views(_rows(out, b), kind))
    return out


@_convolve.register_fake
def _convolve_fake(x: Tensor, past: Tensor | None, other: Tensor | None, weight: Tensor, bias: Tensor,
                   steps: Tensor, pieces: Tensor, kind: str, numbers: Sequence[int],
                   tail: Tensor | None = None) -> Tensor:
    return _result(x, kind, numbers[0])


def convolve_reference(plan: Plan, x: Tensor, past: Tensor | None = None,
                       other: Tensor | None = None) -> Tensor:
    """`convolve` step by step in plain PyTorch, in float32, or float64 for a float64 x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = _result(x, plan.kind, plan.channels).to(wide).fill_(float("nan"))
    weight, frames = plan.weight.to(wide), x.shape[2]
    bias, scale = plan.bias if plan.eight_bit else (plan.bias, torch.ones_like(plan.bias))
    if plan.tail is not None:
        weight = torch.cat([weight, plan.tail.to(wide)], 1)
    for b in range(x.shape[0]):
        sources = [_rows(x, b).to(wide), None if other is None else _rows(other, b).to(wide)]
        if past is not None:
            sources[0] = torch.cat([_rows(past, b).to(wide), sources[0]])
        # The TMA unit writes these zeros.
        padded = [None if t is None else F.pad(t, (0, -t.shape[3] % plan.width(1) if source else 0, 1, 1, 1,
                                                   1, 0, 2)) for source, t in enumerate(sources)]
        views = _views(_rows(out, b), plan.kind)
        for block in range(plan.blocks):
            base = range(0, frames, plan.frames)
            total = bias[block * ROWS:(block + 1) * ROWS].to(wide)
            total = total.expand(len(base), *x.shape[3:], ROWS)
            column_of_weight = 0
            for k, code in enumerate(plan.steps[block].tolist()):
                source, width = code >> 16, plan.width(code >> 16)
                chunk = (code & 0xFF) * width
                t, row, column = (code >> 12 & 15) - 2, code >> 10 & 3, code >> 8 & 3
                t += 2 if source == 0 and past is not None else 0
                picture = padded[source]
                assert picture is not None
                picked = picture[[first + t for first in base], row:row + x.shape[3],
                                 column:column + x.shape[4], chunk:chunk + width]
                part = weight[block * ROWS:(block + 1) * ROWS, column_of_weight:column_of_weight + width]
                column_of_weight += width
                total = total + picked @ (part * _taking_part(plan, k)).t()
            total = total * scale[block * ROWS:(block + 1) * ROWS]
            for i, code in enumerate(plan.pieces[block].tolist()):
                first, channel = code >> 16 & 15, code & 0xFFFF
                kept = total[:len(range(first, frames, plan.frames)), ..., i * PIECE:(i + 1) * PIECE]
                views[code >> 20][first::plan.frames, ..., channel:channel + PIECE] = kept
    return out


def _taking_part(plan: Plan, k: int) -> Tensor:
    """Mask [ROWS, 1] of the rows whose consumer computes step k."""
    consumer = torch.arange(CONSUMERS)
    if k >= plan.dense:
        begins = plan.dense + consumer * plan.shift
        takes = (begins <= k) & (k < begins + plan.own)
    else:
        takes = ~((consumer == 0) & (k >= plan.dense - plan.apart) | (consumer == 2) & (k < plan.apart))
    return takes.repeat_interleave(ROWS // CONSUMERS)[:, None]


def _result(x: Tensor, kind: str, channels: int) -> Tensor:
    batch, _, frames, height, width = x.shape
    frames, scale = frames * (2 if kind == "frames" else 1), 2 if kind == "picture" else 1
    shape = (batch, channels, frames, height * scale, width * scale)
    return torch.empty(shape, dtype=_dtype_of_result(x), device=x.device,
                       memory_format=torch.channels_last_3d)


def _dtype_of_result(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == E4M3 else x.dtype


def _rows(x: Tensor, b: int) -> Tensor:
    """Video b of [B, C, T, H, W] as [T, H, W, C]."""
    return x[b].permute(1, 2, 3, 0)


def _views(out: Tensor, kind: str) -> list[Tensor]:
    """The output tensors of a plan, views of its result [T, H, W, C]."""
    if kind == "frames":
        return [out[0::2], out[1::2]]
    if kind == "picture":
        return [out[:, y::2, x::2] for y in range(2) for x in range(2)]
    return [out]


def _check(plan: Plan, x: Tensor, past: Tensor | None, other: Tensor | None) -> None:
    """Raise ValueError for what the kernel would misread."""
    _check_input(x, past, other, E4M3 if plan.eight_bit else torch.bfloat16)
    if plan.adds and other is None:
        raise ValueError("the plan adds another tensor, and there is none")
    if other is not None and tuple(other.shape[2:]) != tuple(x.shape[2:]):
        raise ValueError(f"other is {tuple(other.shape)}; x is {tuple(x.shape)}")


def _check_input(x: Tensor, past: Tensor | None, other: Tensor | None,
                 dtype: torch.dtype = torch.bfloat16) -> None:
    for name, t, wanted in (("x", x, dtype), ("past", past, dtype), ("other", other, torch.bfloat16)):
        if t is None:
            continue
        if not t.permute(0, 2, 3, 4, 1).is_contiguous():
            raise ValueError(f"{name} {tuple(t.shape)} must be channels last: the kernel takes no strides")
        if x.is_cuda and t.dtype != wanted:
            raise ValueError(f"{name} is {t.dtype}; on CUDA the kernel takes "
                             f"{str(wanted).removeprefix('torch.')}")
    batch, channels, frames, height, width = x.shape
    if past is not None and tuple(past.shape) != (batch, channels, 2, height, width):
        raise ValueError(f"past is {tuple(past.shape)}; x {tuple(x.shape)} needs two frames of its size")


# ---- the last convolution


class HeadPlan(NamedTuple):
    """The convolution to RGB as the steps of its kernel.

    Attributes:
        weight: bf16 [64, steps * 32]; the rows are (frame, image row, colour) and 16 rows of zeros.
        bias: float32 [3].
        steps: int32 [steps]: shift and first channel of the input.
    """

    weight: Tensor
    bias: Tensor
    steps: Tensor


def head_plan(weight: Tensor, bias: Tensor) -> HeadPlan:
    """Plan of a causal convolution [3, C, 3, 3, 3]; ValueError for other channels."""
    channels = weight.shape[1]
    if weight.shape[0] != COLOURS or channels % PIECE:
        raise ValueError(f"{channels} to {weight.shape[0]} channels: the kernel takes multiples of {PIECE} "
                         f"and makes {COLOURS}")
    steps, columns = [], []
    for t in range(HEAD_FRAMES + 2):
        for y in range(HEAD_ROWS + 2):
            for x in range(3):
                column = weight.new_zeros(64, channels)
                for f in range(max(t - 2, 0), min(t + 1, HEAD_FRAMES)):
                    for r in range(max(y - 2, 0), min(y + 1, HEAD_ROWS)):
                        row = (f * HEAD_ROWS + r) * COLOURS
                        column[row:row + COLOURS] = weight[:, :, t - f, y - r, x]
                group, inner = divmod(y - 1, HEAD_ROWS)
                for chunk in range(channels // PIECE):
                    steps.append(chunk | x << 8 | inner << 10 | (group + 1) << 12 | t << 14)
                    columns.append(column[:, chunk * PIECE:(chunk + 1) * PIECE])
    return HeadPlan(torch.cat(columns, 1).to(torch.bfloat16).contiguous(), bias.float(),
                    torch.tensor(steps, dtype=torch.int32, device=weight.device))


def convolve_head(plan: HeadPlan, x: Tensor, past: Tensor) -> Tensor:
    """Convolve x [B, C, T, H, W] and past [B, C, 2, H, W], both channels last and bf16 on CUDA.

    Returns:
        [B, 3, T, H, W], a view of a contiguous [B, T, 3, H, W].

    Raises:
        ValueError: H is not a multiple of 4, or a shape, dtype or layout is wrong.
    """
    return torch.ops.longlive.vae_head(x, past, plan.weight, plan.bias, plan.steps).transpose(1, 2)


@torch.library.custom_op("longlive::vae_head", mutates_args=())
def _convolve_head(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, steps: Tensor) -> Tensor:
    plan = HeadPlan(weight, bias, steps)
    _check_input(x, past, None)
    if x.shape[3] % HEAD_ROWS:
        raise ValueError(f"x is {tuple(x.shape)}; its height must be a multiple of {HEAD_ROWS}")
    if not x.is_cuda:
        return convolve_head_reference(plan, x, past).to(x.dtype)
    from . import conv3d_head_gluon

    out = _head_result(x)
    for b in range(x.shape[0]):
        conv3d_head_gluon.launch(plan, _rows(x, b), _rows(past, b), out[b])
    return out


@_convolve_head.register_fake
def _convolve_head_fake(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, steps: Tensor) -> Tensor:
    return _head_result(x)


def convolve_head_reference(plan: HeadPlan, x: Tensor, past: Tensor) -> Tensor:
    """`convolve_head` step by step in plain PyTorch -> [B, T, 3, H, W], float32 or, like x, float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, frames, height, width = x.shape
    out = _head_result(x).to(wide).fill_(float("nan"))
    groups, rows = -(-frames // HEAD_FRAMES), height // HEAD_ROWS
    weight = plan.weight.to(wide)
    for b in range(batch):
        padded = F.pad(torch.cat([_rows(past, b), _rows(x, b)]).to(wide),
                       (0, 0, 1, 1, HEAD_ROWS, HEAD_ROWS, 0, 2 * HEAD_FRAMES))
        total = torch.zeros(groups, rows, width, 64, dtype=wide, device=x.device)
        for k, code in enumerate(plan.steps.tolist()):
            chunk, column, inner = (code & 0xFF) * PIECE, code >> 8 & 3, code >> 10 & 3
            row, t = (code >> 12 & 3) * HEAD_ROWS + inner, code >> 14
            picked = padded[t:t + groups * HEAD_FRAMES:HEAD_FRAMES, row:row + height:HEAD_ROWS,
                            column:column + width, chunk:chunk + PIECE]
            total += picked @ weight[:, k * PIECE:(k + 1) * PIECE].t()
        shape = (groups, rows, width, HEAD_FRAMES, HEAD_ROWS, COLOURS)
        pictures = total[..., :shape[3] * shape[4] * COLOURS].reshape(shape).permute(0, 3, 5, 1, 4, 2)
        pictures = pictures.reshape(groups * HEAD_FRAMES, COLOURS, height, width)[:frames]
        out[b] = pictures + plan.bias.to(wide)[:, None, None]
    return out


def _head_result(x: Tensor) -> Tensor:
    batch, _, frames, height, width = x.shape
    return x.new_empty(batch, frames, COLOURS, height, width)


# ---- norm


@torch.library.custom_op("longlive::vae_norm_silu", mutates_args=())
def norm_silu(x: Tensor, gamma: Tensor, past: Tensor, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """SiLU of the RMS norm of x [B, C, T, H, W] over its channels, with weight gamma [C].

    Args:
        past: the old history. If it is e4m3, the result is `unit` times as large and rounded to e4m3.

    Returns:
        The result in past's dtype, and the new history: the last two frames of past and result together,
        [B, C, 2, H, W].
    """
    if x.is_cuda:
        from . import conv3d_triton

        return conv3d_triton.norm_silu(x, gamma, past, unit)
    y = norm_silu_reference(x, gamma, unit if past.dtype == E4M3 else None)
    new_past = torch.empty_like(past)
    kept = min(y.shape[2], 2)
    new_past[:, :, :2 - kept] = past[:, :, kept:]
    new_past[:, :, 2 - kept:] = y[:, :, -kept:]
    return y, new_past


@norm_silu.register_fake
def _norm_silu_fake(x: Tensor, gamma: Tensor, past: Tensor, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=past.dtype), torch.empty_like(past)


def norm_silu_reference(x: Tensor, gamma: Tensor, unit: float | None = None) -> Tensor:
    """Norm and SiLU in float32 (float64 for a float64 x), rounded once: to x's dtype or, times `unit`, to
    e4m3.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    norm = F.normalize(wide, dim=1, eps=1e-12) * x.shape[1]**0.5 * gamma.to(wide.dtype).view(-1, 1, 1, 1)
    y = F.silu(norm)
    y = y.to(x.dtype) if unit is None else to_e4m3(y * unit)
    return y.contiguous(memory_format=torch.channels_last_3d)
