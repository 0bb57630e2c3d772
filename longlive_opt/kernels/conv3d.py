"""The convolutions of the VAE's decoder as PyTorch operators: Gluon on Hopper, plain PyTorch elsewhere.

Tensors are [B, C, T, H, W] with their channels last in memory. A convolution over time takes the two frames
before its input as a tensor of their own, `past` [B, C, 2, H, W], and pads the picture with zeros; nothing is
joined or copied. Sums are in float32 and rounded once, with bias and residual.

    plan = causal_plan(weight, bias, residual=True)     # once: weights packed, the order of work decided
    n, new_past = norm_silu(x, gamma, past)             # RMS norm over channels, SiLU, the new history
    y = convolve(plan, n, past, x)                      # 3x3x3 convolution of past and n, + x

A `Plan` says what `conv3d_gluon` does, step by step, and `convolve_reference` follows it in plain PyTorch. An
enlarged picture (`picture_plan`) is never made: an output pixel's 3x3 taps fall on 2x2 pixels of the small
one, and weights that fall on the same are added, in float32 before they are rounded: 4 products for 9.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 192
"""Outputs per pixel that a program of the kernel makes."""
PIECE = 32
CONSUMERS = 3
Kind = Literal["same", "frames", "picture"]
"""What the result is compared to the input: of its size, of twice the frames, of twice the height and width."""
Shift = tuple[int, int, int]


class Rows(NamedTuple):
    """Rows of a product that have their taps in common: 96 or 192 channels of one output.

    taps: how far the input is moved in frames, rows and columns -> weights [rows, C] in float32.
    output: which of the outputs; frame: how many frames behind the first of the tile; channel: the first.
    """

    taps: dict[Shift, Tensor]
    bias: Tensor
    output: int
    frame: int
    channel: int


class Plan(NamedTuple):
    """A convolution as the kernel does it.

    Attributes:
        weight: bf16 [blocks * ROWS, steps * step].
        bias: float32 [blocks * ROWS].
        steps: int32 [blocks, steps], `_pack_step`: what each step of the product reads.
        pieces: int32 [blocks, ROWS / PIECE], `_pack_piece`: where each 32 rows go.
        kind: what the result is like; channels: how many it has.
        step: input channels per step.
        frames: that follow one another in a tile.
        dense: steps before those of a residual, of which each consumer has `own`.
        apart: steps at the beginning that the last consumer, and at the end that the first has no part in.
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

    @property
    def blocks(self) -> int:
        return self.steps.shape[0]


def supported(in_channels: int, out_channels: int) -> bool:
    """Whether the kernel can convolve that many channels."""
    return in_channels % PIECE == 0 and (out_channels == ROWS // 2 or out_channels % ROWS == 0)


def causal_plan(weight: Tensor, bias: Tensor, residual: bool = False, shortcut: Tensor | None = None,
                shortcut_bias: Tensor | None = None) -> Plan:
    """Convolution [O, C, 3, 3, 3] over two frames of history and the frame itself.

    Args:
        residual: add another tensor of the result's size.
        shortcut: [O, C'], add that product of another tensor instead, and `shortcut_bias`.
    """
    outputs = weight.shape[0]
    weight, bias = weight.float(), bias.float()
    if shortcut_bias is not None:
        bias = bias + shortcut_bias.float()
    pair = outputs == ROWS // 2
    blocks = []
    for channel in range(0, outputs, ROWS):
        part = slice(channel, channel + ROWS)
        blocks.append([Rows({(t - 2 + f, y - 1, x - 1): weight[part, :, t, y, x] for t in range(3)
                             for y in range(3) for x in range(3)}, bias[part], 0, f, channel)
                       for f in range(2 if pair else 1)])
    return _plan(blocks, "same", outputs, 2 if pair else 1, residual, shortcut)


def frames_plan(weight: Tensor, bias: Tensor) -> Plan:
    """Convolution [2C, C, 3, 1, 1] over time whose halves are every other frame of the result."""
    channels = weight.shape[0] // 2
    weight, bias = weight.float(), bias.float()
    blocks = []
    for first in range(0, 2 * channels, ROWS):
        part = slice(first, first + ROWS)
        taps = {(t - 2, 0, 0): weight[part, :, t, 0, 0] for t in range(3)}
        blocks.append([Rows(taps, bias[part], first // channels, 0, first % channels)])
    return _plan(blocks, "frames", channels, 1)


def picture_plan(weight: Tensor, bias: Tensor) -> Plan:
    """Convolution [O, C, 3, 3] of each frame, enlarged to twice its height and width by repeating pixels."""
    outputs = weight.shape[0]
    weight, bias = weight.float(), bias.float()
    moved = {0: (-1, 0, 0), 1: (0, 0, 1)}  # place among the two -> which small pixel each tap falls on
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
        blocks = [[Rows(taps, bias, output, 0, 0) for output, taps in units[pair:pair + 2]] for pair in (0, 2)]
    else:
        blocks = [[Rows({shift: w[first:first + ROWS] for shift, w in taps.items()}, bias[first:first + ROWS],
                        output, 0, first)] for output, taps in units for first in range(0, outputs, ROWS)]
    return _plan(blocks, "picture", outputs, 1)


def _plan(blocks: Sequence[Sequence[Rows]], kind: Kind, channels: int, frames: int, residual: bool = False,
          shortcut: Tensor | None = None) -> Plan:
    inputs = next(iter(blocks[0][0].taps.values())).shape[1]
    if not supported(inputs, channels):
        raise ValueError(f"{inputs} to {channels} channels: the kernel takes multiples of {PIECE} and makes "
                         f"{ROWS // 2} or multiples of {ROWS}")
    step = 2 * PIECE if inputs % (2 * PIECE) == 0 else PIECE
    tables, weights, biases, pieces = [], [], [], []
    dense = apart = 0
    for units in blocks:
        table, columns = [], []
        shifts = sorted({shift for rows in units for shift in rows.taps},
                        key=lambda shift: [shift in rows.taps for rows in reversed(units)])
        first, last = units[0], units[-1]
        apart = sum(shift not in last.taps for shift in shifts) * (inputs // step)
        for shift in shifts:
            column = torch.cat([rows.taps[shift] if shift in rows.taps
                                else torch.zeros_like(next(iter(rows.taps.values()))) for rows in units])
            for channel in range(0, inputs, step):
                table.append(_pack_step(0, shift, channel // step))
                columns.append(column[:, channel:channel + step])
        if shortcut is not None:
            part = shortcut.float()[first.channel:first.channel + ROWS]
            for channel in range(0, shortcut.shape[1], step):
                table.append(_pack_step(1, (0, 0, 0), channel // step))
                columns.append(part[:, channel:channel + step])
        dense = len(table)
        if residual:
            size = ROWS // len(units)
            for row in range(0, ROWS, step):
                rows = units[row // size]
                table.append(_pack_step(1, (rows.frame, 0, 0), (rows.channel + row % size) // step))
                columns.append(torch.eye(ROWS, device=column.device)[:, row:row + step])
        tables.append(table)
        weights.append(torch.cat(columns, 1))
        biases += [rows.bias for rows in units]
        pieces.append([_pack_piece(rows.output, rows.frame, rows.channel + i) for rows in units
                       for i in range(0, ROWS // len(units), PIECE)])
    device = weights[0].device
    return Plan(
        torch.cat(weights).to(torch.bfloat16).contiguous(), torch.cat(biases).contiguous(),
        torch.tensor(tables, dtype=torch.int32, device=device),
        torch.tensor(pieces, dtype=torch.int32, device=device), kind, channels, step, frames, dense, apart,
        ROWS // CONSUMERS // step if residual else 0)


def _pack_step(source: int, shift: Shift, chunk: int) -> int:
    """source: 0 is the input, 1 the other tensor; chunk: of the channels, in steps."""
    t, y, x = shift
    return chunk | (x + 1) << 8 | (y + 1) << 10 | (t + 2) << 12 | source << 16


def _pack_piece(output: int, frame: int, channel: int) -> int:
    return channel | frame << 16 | output << 20


def convolve(plan: Plan, x: Tensor, past: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    """Convolve x as `plan` says.

    Args:
        x: bf16 [B, C, T, H, W], channels last.
        past: the two frames before x, [B, C, 2, H, W]; None where the plan looks at no earlier frame.
        other: what a residual or shortcut adds, [B, C', T, H, W].

    Returns:
        [B, O, T, H, W], of twice the frames or twice the height and width if the plan says so; channels last.
    """
    return torch.ops.longlive.vae_conv(
        x, past, other, plan.weight, plan.bias, plan.steps, plan.pieces, plan.kind,
        [plan.channels, plan.step, plan.frames, plan.dense, plan.apart, plan.own])


@torch.library.custom_op("longlive::vae_conv", mutates_args=())
def _convolve(x: Tensor, past: Tensor | None, other: Tensor | None, weight: Tensor, bias: Tensor,
              steps: Tensor, pieces: Tensor, kind: str, numbers: Sequence[int]) -> Tensor:
    plan = Plan(weight, bias, steps, pieces, kind, *numbers)  # type: ignore[arg-type]
    _check(plan, x, past, other)
    if not x.is_cuda:
        return convolve_reference(plan, x, past, other).to(x.dtype)
    from . import conv3d_gluon

    out = _result(x, kind, plan.channels)
    for b in range(x.shape[0]):
        conv3d_gluon.launch(plan, _rows(x, b), None if past is None else _rows(past, b),
                            None if other is None else _rows(other, b), _views(_rows(out, b), kind))
    return out


@_convolve.register_fake
def _convolve_fake(x: Tensor, past: Tensor | None, other: Tensor | None, weight: Tensor, bias: Tensor,
                   steps: Tensor, pieces: Tensor, kind: str, numbers: Sequence[int]) -> Tensor:
    return _result(x, kind, numbers[0])


def convolve_reference(plan: Plan, x: Tensor, past: Tensor | None = None,
                       other: Tensor | None = None) -> Tensor:
    """`convolve` step by step in plain PyTorch, in float32 or, for such an x, float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = _result(x, plan.kind, plan.channels).to(wide).fill_(float("nan"))
    weight, frames = plan.weight.to(wide), x.shape[2]
    for b in range(x.shape[0]):
        sources = [_rows(x, b), None if other is None else _rows(other, b)]
        if past is not None:
            sources[0] = torch.cat([_rows(past, b), sources[0]])
        # Two frames or rows of zeros on each side stand in for what the copy engine writes outside.
        padded = [None if t is None else F.pad(t.to(wide), (0, 0, 1, 1, 1, 1, 0, 2)) for t in sources]
        views = _views(_rows(out, b), plan.kind)
        for block in range(plan.blocks):
            base = range(0, frames, plan.frames)
            total = plan.bias[block * ROWS:(block + 1) * ROWS].to(wide)
            total = total.expand(len(base), *x.shape[3:], ROWS)
            for k, code in enumerate(plan.steps[block].tolist()):
                source, chunk = code >> 16, (code & 0xFF) * plan.step
                t, row, column = (code >> 12 & 15) - 2, code >> 10 & 3, code >> 8 & 3
                t += 2 if source == 0 and past is not None else 0
                picture = padded[source]
                assert picture is not None
                picked = picture[[first + t for first in base], row:row + x.shape[3],
                                 column:column + x.shape[4], chunk:chunk + plan.step]
                part = weight[block * ROWS:(block + 1) * ROWS, k * plan.step:(k + 1) * plan.step]
                total = total + picked @ part.t()
            for i, code in enumerate(plan.pieces[block].tolist()):
                first, channel = code >> 16 & 15, code & 0xFFFF
                kept = total[:len(range(first, frames, plan.frames)), ..., i * PIECE:(i + 1) * PIECE]
                views[code >> 20][first::plan.frames, ..., channel:channel + PIECE] = kept
    return out


def _result(x: Tensor, kind: str, channels: int) -> Tensor:
    batch, _, frames, height, width = x.shape
    frames, scale = frames * (2 if kind == "frames" else 1), 2 if kind == "picture" else 1
    shape = (batch, channels, frames, height * scale, width * scale)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _rows(x: Tensor, b: int) -> Tensor:
    """[B, C, T, H, W] -> [T, H, W, C] of one video."""
    return x[b].permute(1, 2, 3, 0)


def _views(out: Tensor, kind: str) -> list[Tensor]:
    """The outputs of a plan in its result [T, H, W, C]."""
    if kind == "frames":
        return [out[0::2], out[1::2]]
    if kind == "picture":
        return [out[:, y::2, x::2] for y in range(2) for x in range(2)]
    return [out]


def _check(plan: Plan, x: Tensor, past: Tensor | None, other: Tensor | None) -> None:
    """Refuse what the kernel would misread."""
    for name, t in (("x", x), ("past", past), ("other", other)):
        if t is None:
            continue
        if not t.permute(0, 2, 3, 4, 1).is_contiguous():
            raise ValueError(f"{name} {tuple(t.shape)} must be channels last: the kernel takes no strides")
        if x.is_cuda and t.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {t.dtype}; on CUDA the kernel takes bfloat16")
    batch, channels, frames, height, width = x.shape
    if past is not None and tuple(past.shape) != (batch, channels, 2, height, width):
        raise ValueError(f"past is {tuple(past.shape)}; x {tuple(x.shape)} needs two frames of its size")
    used = (plan.steps >> 16).amax() if not x.is_cuda else plan.dense < plan.steps.shape[1]
    if other is None and bool(used):
        raise ValueError("the plan adds another tensor, and there is none")
    if other is not None and tuple(other.shape[2:]) != tuple(x.shape[2:]):
        raise ValueError(f"other is {tuple(other.shape)}; x is {tuple(x.shape)}")


# ---- norm


@torch.library.custom_op("longlive::vae_norm_silu", mutates_args=())
def norm_silu(x: Tensor, gamma: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU of the RMS norm of x [B, C, T, H, W] over its channels, times gamma (C values).

    Returns:
        The result, and its last two frames [B, C, 2, H, W] as the history to come; where x is one frame, the
        second of `past` is the first of them.
    """
    if x.is_cuda:
        from . import conv3d_triton

        return conv3d_triton.norm_silu(x, gamma, past)
    y = norm_silu_reference(x, gamma)
    return y, torch.empty_like(past).copy_(torch.cat([past, y], 2)[:, :, -2:])


@norm_silu.register_fake
def _norm_silu_fake(x: Tensor, gamma: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(past)


def norm_silu_reference(x: Tensor, gamma: Tensor) -> Tensor:
    """The norm and SiLU in float32 (float64 for such an x), rounded once."""
    wide = x if x.dtype == torch.float64 else x.float()
    norm = F.normalize(wide, dim=1, eps=1e-12) * x.shape[1]**0.5 * gamma.to(wide.dtype).view(-1, 1, 1, 1)
    return F.silu(norm).to(x.dtype)
