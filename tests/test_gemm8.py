"""The int8 product on CUDA: compiled for Hopper without a GPU, and against exact sums on one.

What it computes on a CPU is tested in test_quantized_linears.py.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longlive_opt.kernels import gemm8, linear8
from longlive_opt.kernels.gemm8 import CANDIDATES, PLAIN, Tile, choose_tile

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed")
# Shared memory that a program may have, in bytes.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
SHAPES = {"qkv": (1536, 4608), "query": (1536, 1536), "up": (1536, 8960), "down": (8960, 1536)}


def compiled(tile: Tile, capability: int = 90, gelu: bool = True):
    """The kernel of a tile, compiled by the Triton that is installed; no GPU is asked."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    scalars = {"row_scale_ptr": "*fp32", "column_scale_ptr": "*fp32", "bias_ptr": "*bf16", "rows": "i32",
               "columns": "i32", "channels": "i32"}
    if tile.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        from longlive_opt.kernels.gemm8_gluon import STEP, gl, linear_kernel, plan

        consumers, rows, piece, registers = plan(tile.block_m)
        constants = {"CONSUMERS": consumers, "ROWS": rows, "COLUMNS": tile.block_n, "STEP": STEP,
                     "PIECE": piece, "STAGES": tile.stages, "GROUP": tile.group, "GELU": gelu}
        blocks = {"a_desc": ("i8", gl.int8, [rows, STEP]), "b_desc": ("i8", gl.int8, [tile.block_n, STEP]),
                  "out_desc": ("bf16", gl.bfloat16, [rows, piece])}
        signature = {name: f"tensordesc<{short}[{block[0]},{block[1]}],"
                           f"{gl.NVMMASharedLayout.get_default_for(block, kind)!r}>"
                     for name, (short, kind, block) in blocks.items()}
        source, options = GluonASTSource, {"num_warps": 4, "maxnreg": registers}
    else:
        from longlive_opt.kernels.gemm8_triton import linear_kernel

        constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                     "GROUP": tile.group, "GELU": gelu, "FLATTEN": capability >= 90}
        blocks = {"a_desc": ("i8", tile.block_m, tile.block_k), "b_desc": ("i8", tile.block_n, tile.block_k),
                  "out_desc": ("bf16", tile.block_m, tile.block_n)}
        signature = {name: f"tensordesc<{kind}[{m},{n}]>" for name, (kind, m, n) in blocks.items()}
        source, options = ASTSource, {"num_warps": tile.num_warps, "num_stages": tile.stages}
    names = linear_kernel.arg_names
    signature |= {**scalars, **dict.fromkeys(constants, "constexpr")}
    aligned = ("row_scale_ptr", "column_scale_ptr", "bias_ptr", "columns", "channels")
    return triton.compile(
        source(linear_kernel, signature, {(names.index(key),): value for key, value in constants.items()},
               {(names.index(key),): [["tt.divisibility", 16]] for key in aligned}),
        target=GPUTarget("cuda", capability, 32), options=options)


def tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that Triton brings."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("tile", CANDIDATES, ids=lambda tile: "-".join(map(str, tile)))
def test_kernels_compile_for_hopper_as_meant(tile, gelu, tmp_path):
    """A renamed function of Gluon; products that the compiler makes wait for one another (its notes C7510 and
    C7515); sums that are kept in memory, because the registers do not suffice; a product of another kind.
    """
    kernel = compiled(tile, gelu=gelu)
    assert kernel.metadata.shared <= SHARED[90]
    (tmp_path / "kernel.ptx").write_text(kernel.asm["ptx"])
    notes = tool("ptxas", "-v", "-arch=sm_90a", str(tmp_path / "kernel.ptx"), "-o", os.devnull)
    assert not re.search(r"C75\d\d|serializ", notes), notes
    assert int(re.search(r"(\d+) bytes stack frame", notes).group(1)) <= 16, notes
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    code = tool("nvdisasm", "-c", str(tmp_path / "kernel.cubin"))
    assert code.count("IGMMA.64x") >= 4 and "UTMALDG" in code and "UTMASTG" in code


@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 120])
def test_the_plain_kernel_compiles_for_other_gpus(capability):
    """A tile that does not fit an RTX's shared memory, or a descriptor where there is no copy engine."""
    assert compiled(PLAIN, capability).metadata.shared <= SHARED[capability]


def test_tiles_are_chosen_for_every_size():
    """A tile for Hopper's copy engine on another GPU, or one that Gluon's kernel does not take."""
    for rows in (48, 4680, 14040):
        for _, columns in SHAPES.values():
            assert choose_tile(rows, columns, hopper=True).gluon
            assert choose_tile(rows, columns, hopper=False) == PLAIN
    assert not PLAIN.gluon


# On a GPU.


def inputs(rows: int, channels: int, columns: int) -> tuple[Tensor, ...]:
    """Random factors, all of one sign in part so that sums are long, and the exact result in float64."""
    generator = torch.Generator().manual_seed(rows + channels + columns)
    values = torch.randint(-127, 128, (rows, channels), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (columns, channels), generator=generator, dtype=torch.int8)
    values[:, : channels // 2].abs_()
    weight[::3, : channels // 2].abs_()
    row_scale = torch.rand(rows, 1, generator=generator) * 0.01
    column_scale = torch.rand(1, columns, generator=generator) * 0.01
    bias = torch.randn(columns, generator=generator).bfloat16()
    exact = values.double() @ weight.double().t() * row_scale.double() * column_scale.double() + bias.double()
    return values, row_scale, weight, column_scale, bias, exact


GPU_TILES = [None, *CANDIDATES, PLAIN]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", GPU_TILES, ids=str)
@pytest.mark.parametrize("rows, channels, columns", [
    (300, 1536, 4608), (4680, 1536, 1536), (200, 8960, 512), (48, 256, 768), (1, 16, 16), (129, 1552, 272),
    (9000, 640, 1536)])
def test_gpu_product_equals_exact_sums(rows, channels, columns, tile):
    """A barrier's phase off by one, a stage that is overwritten while it is read, the rest of rows, columns
    or channels, several tiles per program, a buffer stored before the one before has left; memory that is
    not written, where the allocator hands out NaN.
    """
    values, row_scale, weight, column_scale, bias, exact = inputs(rows, channels, columns)
    arguments = [t.cuda() for t in (values, row_scale, weight, column_scale, bias)]
    for gelu in (False, True):
        wanted = torch.nn.functional.gelu(exact, approximate="tanh") if gelu else exact
        outs = []
        for _ in range(3):
            poison = torch.full((rows, columns), math.nan, device="cuda", dtype=torch.bfloat16)
            del poison
            outs.append(gemm8.launch(*arguments, gelu, tile))
        assert all(torch.equal(outs[0], out) for out in outs[1:])
        # Half a step of bfloat16; GELU's tanh is off by 2^-11 of the input, which is what is left of -x.
        limit = 2**-8 * wanted.abs() + (2**-11 * exact.abs() if gelu else 0) + 1e-6 * exact.abs() + 1e-6
        assert ((outs[0].cpu().double() - wanted).abs() <= limit).all()


@pytest.mark.gpu
def test_gpu_product_keeps_nan_in_its_row_and_column():
    """A scale of NaN that a comparison drops."""
    values, row_scale, weight, column_scale, bias, _ = (t.cuda() for t in inputs(300, 256, 512))
    row_scale[7] = column_scale[0, 300] = math.nan
    for gelu in (False, True):
        lost = gemm8.launch(values, row_scale, weight, column_scale, bias, gelu).isnan()
        assert lost[7].all() and lost[:, 300].all() and lost.sum() == 512 + 300 - 1


@pytest.mark.gpu
def test_gpu_operator_equals_its_twin_and_can_be_captured():
    """Another rounding than on the CPU; a descriptor or a size that a graph bakes in wrongly."""
    linear, x = torch.nn.Linear(1536, 8960).bfloat16(), torch.randn(2, 150, 1536).bfloat16()
    rows, weight = linear8.rows_reference(x, "int8"), linear8.rows_reference(linear.weight.detach(), "int8")
    rest = (weight.values, weight.scale.t().contiguous(), linear.bias.detach())
    wanted = linear8.linear(rows, *rest, gelu=True)
    rows, rest = linear8.Rows8(*(t.cuda() for t in rows)), [t.cuda() for t in rest]
    out = linear8.linear(rows, *rest, gelu=True)
    assert out.shape == wanted.shape
    assert (out.cpu() - wanted).float().norm() / wanted.float().norm() < 2**-9
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear8.linear(rows, *rest, gelu=True)
    rows.values.copy_(rows.values.flip(1))
    graph.replay()
    assert torch.equal(captured, linear8.linear(rows, *rest, gelu=True))
