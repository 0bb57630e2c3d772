"""Choose the kernel and tiles for the int8 matrix product on CUDA.

Nothing is timed at run time. `choose_tile` is a small table, written by hand from the times that
`scripts/bench_kernels.py --only gemm` measures for all `CANDIDATES` at the model's shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Output size per program, channels per step, and steps loaded ahead. `group`: tiles of rows done before
    the next column. The Gluon kernel uses steps of 128 and sets its own number of warps.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 128
    stages: int = 4
    group: int = 8
    gluon: bool = True
    num_warps: int = 8


CANDIDATES = (
    Tile(128, 256, stages=4),
    Tile(128, 256, stages=4, group=37),
    Tile(192, 256, stages=3),
    Tile(256, 128, stages=4),
    Tile(128, 128, stages=6),
    Tile(128, 256, stages=3, gluon=False),
    Tile(128, 128, stages=5, gluon=False),
    Tile(256, 128, stages=3, gluon=False),
)
"""For Hopper."""
PLAIN = Tile(128, 128, 64, 3, gluon=False)
"""For other GPUs: 64 KB of shared memory."""


def choose_tile(rows: int, columns: int, hopper: bool) -> Tile:
    """The tile for a matrix product of this size."""
    if not hopper:
        return PLAIN
    if rows <= 128:
        return Tile(128, 128, stages=6)
    # On an H100 the wide tile is faster only for the feed-forward's first layer (1233 against 1170 TOP/s).
    return Tile(128, 256, stages=4, group=37) if columns > 4608 else Tile(256, 128, stages=4)


def launch(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, gelu: bool,
           tile: Tile | None = None) -> Tensor:
    """Multiply the arguments that `linear8` has checked -> [..., N] in bfloat16; tile None: `choose_tile`.

    Raises ValueError when the kernels do not support the dtypes or layouts.
    """
    if bias.dtype != torch.bfloat16:
        raise ValueError(f"bias is {bias.dtype}; int8 linear layers on CUDA return bfloat16")
    if not all(t.is_contiguous() for t in (values, row_scale, weight, weight_scale, bias)):
        raise ValueError("values, weight, bias and scales must be contiguous: the kernel does not support "
                         "strides")
    columns, channels = weight.shape
    if columns % 16 or channels % 16:
        raise ValueError(f"weight is {tuple(weight.shape)}; both must be multiples of 16")
    flat = values.view(-1, channels)
    hopper = torch.cuda.get_device_capability(values.device)[0] == 9
    tile = tile or choose_tile(flat.shape[0], columns, hopper)
    arguments = (flat, row_scale, weight, weight_scale, bias, gelu, tile.block_m, tile.block_n)
    if tile.gluon:
        from . import gemm8_gluon

        out = gemm8_gluon.launch(*arguments, tile.stages, tile.group)
    else:
        from . import gemm8_triton

        out = gemm8_triton.launch(*arguments, tile.block_k, tile.stages, tile.group, tile.num_warps)
    return out.view(*values.shape[:-1], columns)
