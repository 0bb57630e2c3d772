"""The int8 matrix product in plain Triton: one persistent program per multiprocessor loops over the tiles.

It runs on every GPU with int8 tensor cores; on Hopper `gemm8_gluon` is faster. Tensor descriptors load the
operands `num_stages` steps ahead; on GPUs without a copy engine, Triton turns these into plain loads.
`flatten` merges the loops over tiles and steps, so the next tile's loads start while this one is scaled and
stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .linear8_triton import tanh_gelu


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(a_desc, b_desc, out_desc, row_scale_ptr, column_scale_ptr, bias_ptr, rows, columns,
                  channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  GROUP: tl.constexpr, GELU: tl.constexpr, FLATTEN: tl.constexpr):
    """out = act(a b^T * row scale * column scale + bias); a [rows, channels], b [columns, channels], int8."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    per_group = GROUP * column_tiles
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        first = index // per_group * GROUP
        height = tl.minimum(row_tiles - first, GROUP)
        row = (first + index % per_group % height) * BLOCK_M
        column = index % per_group // height * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for k in range(0, channels, BLOCK_K):
            sums = tl.dot(a_desc.load([row, k]), b_desc.load([column, k]).T, sums, out_dtype=tl.int32)
        own_rows = row + tl.arange(0, BLOCK_M)
        own_columns = column + tl.arange(0, BLOCK_N)
        row_scale = tl.load(row_scale_ptr + own_rows, mask=own_rows < rows, other=0.0)
        column_scale = tl.load(column_scale_ptr + own_columns, mask=own_columns < columns, other=0.0)
        bias = tl.load(bias_ptr + own_columns, mask=own_columns < columns, other=0.0).to(tl.float32)
        out = sums.to(tl.float32) * row_scale[:, None] * column_scale[None, :] + bias[None, :]
        if GELU:
            out = tanh_gelu(out)
        out_desc.store([row, column], out.to(out_desc.dtype))


def launch(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, gelu: bool,
           block_m: int, block_n: int, block_k: int, stages: int, group: int, num_warps: int) -> Tensor:
    """values [M,C] times weight [N,C] -> [M,N]; `linear8` has checked the arguments."""
    (rows, channels), columns = values.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=bias.dtype, device=values.device)
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
    properties = torch.cuda.get_device_properties(values.device)
    linear_kernel[(min(tiles, properties.multi_processor_count),)](
        TensorDescriptor.from_tensor(values, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        TensorDescriptor.from_tensor(out, [block_m, block_n]), row_scale, weight_scale, bias, rows, columns,
        channels, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=group, GELU=gelu,
        FLATTEN=properties.major >= 9, num_warps=num_warps, num_stages=stages)
    return out
