"""Every kernel compiles for every GPU that it claims to run on, with the Triton that is installed; no GPU.

To add a kernel: a function that launches it on tensors of `meta`, and a line in `CASES` with the compute
capabilities that it claims.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import pytest
import torch

pytest.importorskip("triton")  # there is none on macOS

import triton
from cross_compile import absent_gpu, check_binary, compiling_for, meta
from triton.runtime.jit import JITFunction

from longlive_opt.errors import NotAvailable
from longlive_opt.kernels import (
    attention8_triton,
    attention_bf16,
    attention_gluon,
    conv3d,
    conv3d_gluon,
    conv3d_head_gluon,
    conv3d_triton,
    fused_exchange_triton,
    fused_triton,
    gemm8,
    gemm8_gluon,
    gemm8_triton,
    gluon_api,
    linear8_triton,
)
from longlive_opt.kernels.attention8 import GLUON_TILES, TILES, default_tile
from longlive_opt.kernels.quantize import MODES, QuantizedKV, allocate_kv
from longlive_opt.optimizations import quantized_kv_cache

# A block and a full window of LongLive-1.3B at 832x480: latent frames of 1560 tokens, 12 heads of 128.
MODULES = (attention8_triton, fused_triton, fused_exchange_triton, gemm8_gluon, gemm8_triton, attention_gluon,
           linear8_triton, conv3d_gluon, conv3d_head_gluon, conv3d_triton)
FRAME, FRAMES, WINDOW = 1560, 3, 12
TOKENS, SLOTS, HEADS, DIM, CHANNELS, FFN = FRAME * FRAMES, FRAME * WINDOW, 12, 128, 1536, 8960


class Case(NamedTuple):
    """One launch: the compute capabilities it claims, and how many kernels it starts."""

    launch: Callable[[], Any]
    capabilities: tuple[int, ...]
    kernels: int = 1


def cache(mode: str) -> QuantizedKV:
    return allocate_kv(mode, 1, SLOTS, HEADS, DIM, "meta")


def attend_gluon(mode: str) -> None:
    kv = cache(mode)
    tile = GLUON_TILES[kv.k.dtype, kv.v.dtype]
    attention_gluon.launch(meta(1, TOKENS, HEADS, DIM), kv.k, kv.v, kv.k_scale, kv.v_scale, SLOTS,
                           tile.block_n, tile.num_stages)


def attend_bf16() -> None:
    q, k, v = (meta(1, tokens, HEADS, DIM) for tokens in (TOKENS, SLOTS, SLOTS))
    attention_gluon.launch(q, k, v, None, None, SLOTS, attention_bf16.KEY_TILE, attention_bf16.STAGES)


def attend_triton(mode: str, dim: int = DIM) -> None:
    kv = allocate_kv(mode, 1, SLOTS, HEADS, dim, "meta")
    tile = TILES[kv.k.dtype, kv.v.dtype]
    attention8_triton.launch(meta(1, TOKENS, HEADS, dim), kv.k, kv.v, kv.k_scale, kv.v_scale, SLOTS,
                             tile.block_m, tile.block_n, tile.num_warps, tile.num_stages,
                             tile.max_registers)


def norms(module: Any, *form: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The three norms of a transformer block: modulated, behind a gated residual, and affine."""
    x, vectors = meta(1, TOKENS, CHANNELS, dtype=dtype), meta(1, FRAMES, 6, CHANNELS, dtype=dtype)
    shift, scale, gate, weight = vectors[:, :, 0], vectors[:, :, 1], vectors[:, :, 2], vectors[0, 0, 0]
    module.norm(x, None, None, scale, shift, FRAME, True, 1e-6, *form)
    module.norm(x, x, gate, scale, shift, FRAME, True, 1e-6, *form)
    module.norm(x, x, None, weight, weight, FRAME, False, 1e-6, *form)


def rms_norm() -> None:
    fused_triton.rms_norm(meta(1, TOKENS, CHANNELS), meta(CHANNELS), 1e-6)


def cross_attend(dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS) -> None:
    text = meta(1, 512, HEADS, DIM, dtype=dtype)
    fused_triton.cross_attention(meta(1, tokens, HEADS, DIM, dtype=dtype), text, text,
                                 meta(1, dtype=torch.int32))


def write(kv: SimpleNamespace | QuantizedKV, dtype: torch.dtype = torch.bfloat16) -> None:
    """Norm, rotation and write of a block's queries, keys and values."""
    weight, table = meta(CHANNELS, dtype=dtype), meta(TOKENS, DIM // 2, dtype=torch.float32)
    fused_triton.qk_norm_rope_write(
        meta(1, TOKENS, 3 * CHANNELS, dtype=dtype), weight, weight, table, table,
        meta(FRAMES, dtype=torch.int32), kv.k, kv.v, kv.k_scale, kv.v_scale, FRAME, 1e-6)


def write_plain(dtype: torch.dtype = torch.bfloat16) -> None:
    memory = meta(1, SLOTS, HEADS, DIM, dtype=dtype)
    write(SimpleNamespace(k=memory, v=memory, k_scale=None, v_scale=None), dtype)


def exchange(ranks: int) -> None:
    """Pack, scatter and wait."""
    parts = [meta(1, TOKENS // ranks, 3 * CHANNELS // ranks)] * ranks
    fused_exchange_triton.qk_norm_pack(meta(1, TOKENS // ranks, 3 * CHANNELS), meta(CHANNELS), meta(CHANNELS),
                                       parts, ranks, 1e-6)
    fused_exchange_triton.scatter_tokens(meta(1, TOKENS, HEADS // ranks, DIM), [
        meta(1, TOKENS // ranks, HEADS, DIM)[:, :, :HEADS // ranks]] * ranks)
    flags = meta(ranks, dtype=torch.int64)
    fused_exchange_triton.arrive([flags] * ranks, flags, meta(1, dtype=torch.int64), ranks - 1)


def write_own_heads(mode: str | None, ranks: int) -> None:
    """Rotation and write of the heads of one of several ranks."""
    heads, table = HEADS // ranks, meta(TOKENS, DIM // 2, dtype=torch.float32)
    memory = meta(1, SLOTS, heads, DIM)
    kv = (SimpleNamespace(k=memory, v=memory, k_scale=None, v_scale=None) if mode is None else
          allocate_kv(mode, 1, SLOTS, heads, DIM, "meta"))
    slots = meta(FRAMES, dtype=torch.int32)
    fused_exchange_triton.rope_write(meta(1, TOKENS, 3 * heads * DIM), table, table, slots, kv.k, kv.v,
                                     kv.k_scale, kv.v_scale, FRAME)


def store(mode: str) -> None:
    kv, rows, slots = cache(mode), meta(1, TOKENS, HEADS, DIM), meta(FRAMES, dtype=torch.int32)
    fused_triton.store_kv(rows, rows, slots, kv.k, kv.v, kv.k_scale, kv.v_scale, FRAME)


def rows(width: int, form: str, gelu: bool) -> None:
    linear8_triton.quantize_rows(meta(1, TOKENS, width), form, gelu)


def multiply(tile: gemm8.Tile) -> None:
    """The feed-forward's first product, with and without GELU."""
    for gelu in (False, True):
        arguments = (meta(TOKENS, CHANNELS, dtype=torch.int8), meta(TOKENS, 1, dtype=torch.float32),
                     meta(FFN, CHANNELS, dtype=torch.int8), meta(1, FFN, dtype=torch.float32), meta(FFN),
                     gelu, tile.block_m, tile.block_n)
        if tile.gluon:
            gemm8_gluon.launch(*arguments, tile.stages, tile.group)
        else:
            gemm8_triton.launch(*arguments, tile.block_k, tile.stages, tile.group, tile.num_warps)


def frames(channels: int, count: int, height: int, width: int) -> torch.Tensor:
    """Frames of the VAE's decoder, channels last."""
    return meta(1, count, height, width, channels).permute(0, 4, 1, 2, 3)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    return x[0].permute(1, 2, 3, 0)


def convolve(inputs: int, outputs: int, *size: int, residual: bool = False, shortcut: bool = False,
             unit: float | None = None) -> None:
    with torch.device("meta"):
        plan = conv3d.causal_plan(torch.zeros(outputs, inputs, 3, 3, 3), torch.zeros(outputs), residual,
                                  torch.zeros(outputs, inputs) if shortcut else None, unit=unit)
    x, past, out = (rows_of(frames(channels, count, *size[1:])) for channels, count in
                    ((inputs, size[0]), (inputs, 2), (outputs, size[0])))
    other = out if residual else x if shortcut else None
    if unit is not None:
        x, past = x.to(conv3d.E4M3), past.to(conv3d.E4M3)
    conv3d_gluon.launch(plan, x, past, other, [out])


def convolve_frames() -> None:
    with torch.device("meta"):
        plan = conv3d.frames_plan(torch.zeros(768, 384, 3, 1, 1), torch.zeros(768))
    x, past, out = (rows_of(frames(384, count, 120, 208)) for count in (6, 2, 12))
    conv3d_gluon.launch(plan, x, past, None, [out[0::2], out[1::2]])


def convolve_picture(inputs: int, outputs: int, height: int, width: int) -> None:
    with torch.device("meta"):
        plan = conv3d.picture_plan(torch.zeros(outputs, inputs, 3, 3), torch.zeros(outputs))
    x, out = rows_of(frames(inputs, 12, height, width)), rows_of(frames(outputs, 12, 2 * height, 2 * width))
    conv3d_gluon.launch(plan, x, None, None, [out[:, y::2, x::2] for y in range(2) for x in range(2)])


def convolve_head() -> None:
    with torch.device("meta"):
        plan = conv3d.head_plan(torch.zeros(3, 96, 3, 3, 3), torch.zeros(3))
    x, past = (rows_of(frames(96, count, 480, 832)) for count in (12, 2))
    conv3d_head_gluon.launch(plan, x, past, meta(12, 3, 480, 832))


def norm_silu(channels: int, count: int, dtype: torch.dtype = torch.bfloat16) -> None:
    conv3d_triton.norm_silu(frames(channels, count, 120, 208), meta(channels),
                            frames(channels, 2, 120, 208).to(dtype), 16.0)


ALL, HAS_FP8, QUANTIZED, HOPPER = (80, 89, 90, 100, 120), (89, 90, 100, 120), (90, 100, 120), (90,)
CASES = {
    "attention, Gluon, int8_fp8": Case(partial(attend_gluon, "int8_fp8"), HOPPER, 2),
    "attention, Gluon, fp8_fp8": Case(partial(attend_gluon, "fp8_fp8"), HOPPER, 2),
    "attention, Gluon, int8_bf16": Case(partial(attend_gluon, "int8_bf16"), HOPPER, 2),
    "attention, Gluon, bf16": Case(attend_bf16, HOPPER, 2),
    "attention, Triton, int8_fp8": Case(partial(attend_triton, "int8_fp8"), QUANTIZED),
    "attention, Triton, fp8_fp8": Case(partial(attend_triton, "fp8_fp8"), QUANTIZED),
    "attention, Triton, int8_bf16": Case(partial(attend_triton, "int8_bf16"), HOPPER),
    "attention, Triton, int8_int8": Case(partial(attend_triton, "int8_int8"), HOPPER),
    "attention, Triton, heads of 64": Case(partial(attend_triton, "int8_fp8", 64), HOPPER),
    "norms": Case(partial(norms, fused_triton), ALL, 3),
    "norms, float32": Case(partial(norms, fused_triton, dtype=torch.float32), HOPPER, 3),
    "norms, int8": Case(partial(norms, linear8_triton, "int8"), ALL, 3),
    "norms, fp8": Case(partial(norms, linear8_triton, "fp8"), HAS_FP8, 3),
    "RMS norm": Case(rms_norm, ALL),
    "cross-attention": Case(cross_attend, ALL),
    "cross-attention, float32": Case(partial(cross_attend, torch.float32), HOPPER),
    "write": Case(write_plain, ALL),
    "write, float32": Case(partial(write_plain, torch.float32), HOPPER),
    **{f"write, {mode}": Case(lambda mode=mode: write(cache(mode)), QUANTIZED, 2 if mode[-3:] == "fp8" else 1)
       for mode in MODES},
    **{f"exchange of {ranks} ranks": Case(partial(exchange, ranks), HOPPER if ranks > 2 else ALL, 3)
       for ranks in (2, 3, 4, 6)},
    **{f"write of {HEADS // ranks} heads, {mode}": Case(
        partial(write_own_heads, mode, ranks), HOPPER if ranks > 2 else QUANTIZED if mode else ALL,
        2 if mode else 1)
       for ranks in (2, 3, 4, 6) for mode in (None, "fp8_fp8", "int8_fp8")},
    **{f"store, {mode}": Case(partial(store, mode), QUANTIZED, 2) for mode in MODES},
    "GELU, int8": Case(partial(rows, FFN, "int8", True), ALL),
    "GELU, fp8": Case(partial(rows, FFN, "fp8", True), HAS_FP8),
    "rows, int8, a power of two": Case(partial(rows, 4096, "int8", False), HOPPER),
    **{f"product, int8, {tile.block_m}x{tile.block_n}": Case(partial(multiply, tile), HOPPER, 2)
       for tile in {gemm8.choose_tile(TOKENS, columns, True) for columns in (CHANNELS, FFN)}},
    "convolution, 96": Case(partial(convolve, 96, 96, 12, 480, 832), HOPPER),
    "convolution, 96, residual": Case(partial(convolve, 96, 96, 12, 480, 832, residual=True), HOPPER),
    "convolution, 192, residual": Case(partial(convolve, 192, 192, 12, 240, 416, residual=True), HOPPER),
    "convolution, shortcut": Case(partial(convolve, 192, 384, 6, 120, 208, shortcut=True), HOPPER),
    **{f"convolution, e4m3, {name}": Case(partial(convolve, *sizes, unit=16.0, **added), HOPPER)
       for name, sizes, added in (
           ("96", (96, 96, 12, 480, 832), {}), ("96, residual", (96, 96, 12, 480, 832), {"residual": True}),
           ("192", (192, 192, 12, 240, 416), {}),
           ("192, residual", (192, 192, 12, 240, 416), {"residual": True}),
           ("192 to 384", (192, 384, 6, 120, 208), {}),
           ("384, residual", (384, 384, 6, 120, 208), {"residual": True}),
           ("384, shortcut", (384, 384, 6, 120, 208), {"shortcut": True}))},
    "convolution, frames": Case(convolve_frames, HOPPER),
    "convolution, picture, 384 to 192": Case(partial(convolve_picture, 384, 192, 120, 208), HOPPER),
    "convolution, picture, 192 to 96": Case(partial(convolve_picture, 192, 96, 240, 416), HOPPER),
    "convolution, colours": Case(convolve_head, HOPPER),
    **{f"norm and SiLU, {channels}": Case(partial(norm_silu, channels, 6), ALL)
       for channels in (96, 192, 384)},
    "norm and SiLU, one frame": Case(partial(norm_silu, 384, 1), ALL),
    **{f"norm and SiLU, {channels}, e4m3": Case(partial(norm_silu, channels, 6, conv3d.E4M3), HAS_FP8)
       for channels in (96, 192, 384)},
    "product, int8, other GPUs": Case(partial(multiply, gemm8.PLAIN), (80, 89, 120), 2),
}


@pytest.mark.parametrize("name, capability", [
    (name, capability) for name, case in CASES.items() for capability in case.capabilities])
def test_kernel_compiles(monkeypatch: pytest.MonkeyPatch, name: str, capability: int) -> None:
    """A function that a newer Triton renamed, or more shared memory than the GPU has: found by the first user
    on an H100, in the rehearsal.
    """
    with compiling_for(monkeypatch, capability) as kernels:
        CASES[name].launch()
    assert len(kernels) == CASES[name].kernels
    for kernel in kernels:
        check_binary(kernel, capability)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("convolution")])
def test_convolutions_are_asynchronous_and_keep_sums_in_registers(monkeypatch: pytest.MonkeyPatch, name: str,
                                                                  tmp_path: Path) -> None:
    """Matrix products that the compiler serialises (its notes C7510, C7515), or sums that spill to memory."""
    with compiling_for(monkeypatch, 90) as kernels:
        CASES[name].launch()
    (tmp_path / "kernel.ptx").write_text(kernels[0].asm["ptx"])
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    done = subprocess.run([assembler, "-v", "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", os.devnull],
                          capture_output=True, text=True, check=True)
    notes = done.stdout + done.stderr
    assert not re.search(r"C75\d\d|serializ", notes), notes
    assert "0 bytes spill stores, 0 bytes spill loads" in notes, notes
    bf16, e4m3 = (f"wgmma.mma_async.sync.aligned.m64n128k{kind}" in kernels[0].asm["ptx"]
                  for kind in ("16.f32.bf16.bf16", "32.f32.e4m3.e4m3"))
    assert e4m3 == ("e4m3" in name) and bf16 == (not e4m3 or "residual" in name or "shortcut" in name)


def test_every_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was added to the project and not to the table."""
    kernels = {f"{module.__name__}.{name}" for module in MODULES
               for name, function in vars(module).items()
               if isinstance(function, JITFunction) and function.fn.__module__ == module.__name__
               and name.endswith("_kernel")}
    launched = set()
    absent_gpu(monkeypatch, 90)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **options: launched.add(
        f"{self.fn.__module__}.{self.fn.__name__}"))
    for case in CASES.values():
        case.launch()
    assert launched == kernels


# ---- what is refused


@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
@pytest.mark.parametrize("mode", quantized_kv_cache.MODES.values())
def test_other_gpus_do_not_get_the_hopper_kernel(monkeypatch: pytest.MonkeyPatch, mode: str,
                                                 capability: tuple[int, int]) -> None:
    """Warpgroup products, which only Hopper has, asked of a B200 or an RTX 50."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    geometry = SimpleNamespace(heads=HEADS, head_dim=DIM)
    tile = quantized_kv_cache.choose_tile(geometry, mode, torch.device("cuda"))
    assert tile == default_tile(cache(mode), hopper=False) and not tile.gluon
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert quantized_kv_cache.choose_tile(geometry, mode, torch.device("cuda")).gluon


@pytest.mark.parametrize("version", ["3.5.1", "3.9.0", "4.0.0", "unknown"])
def test_unknown_triton_is_refused_in_one_sentence(version: str) -> None:
    """An AttributeError inside Triton's compiler, or a kernel that was never tried."""
    with pytest.raises(NotAvailable, match=f"^This is Triton {version}. .* 3.6 to 3.8; install .*dequantize"):
        gluon_api.check_version(version)


def test_gluon_comes_from_one_module() -> None:
    """A kernel that takes a name of triton.experimental by itself: the next renaming breaks it."""
    for module in MODULES:
        assert "triton.experimental" not in inspect.getsource(module)
