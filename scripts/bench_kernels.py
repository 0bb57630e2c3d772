"""Check and time the kernels of longlive_opt.kernels on one CUDA GPU: bench_kernels.py --out FILE.json

Run it from the root of the repository, offline. It takes one to two minutes on an H100, mostly for
compilation:

    PYTHONPATH=. python3 scripts/bench_kernels.py --out outputs/bench_kernels.json

Each kernel is first checked on fresh random inputs against float64 or eager PyTorch, with its output memory
poisoned with NaN. An error above the row's limit marks the row WRONG. For 8-bit attention and linear layers
(GEMMs) the error is relative to the error that the formats explain (`kernels/tolerance.py`), and the inputs
share a common part, which must not shrink. Times are medians of `do_bench`, which clears the L2 cache between
runs. Linear layers are captured in a CUDA graph over more buffers than the cache can hold. A failing variant
becomes a row with its message, and the others continue. The Gluon kernels come last, because a fault would
destroy the CUDA context. If a kernel hangs, the rows so far are written after `--limit` seconds. Exit code 0
if all rows are ok.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_opt.kernels import attention8_reference, fused, gemm8, linear8
from longlive_opt.kernels.attention8 import TILES, Tile, attention8
from longlive_opt.kernels.quantize import MODES, QuantizedKV, allocate_kv, write_kv
from longlive_opt.kernels.tolerance import attention_limit, product_limit
from longlive_opt.kernels.torch_internals import gelu_linear

DEVICE = "cuda"
FRAME, WINDOW, HEADS, DIM, FFN = 1560, 12, 12, 128, 8960
TOKENS, SLOTS, CHANNELS = 3 * FRAME, WINDOW * FRAME, HEADS * DIM
# Upper limits for a correct kernel: error relative to the error that the format explains, shrinkage of the
# result as a whole (half a step of bfloat16), and relative error against the kernel's emulation.
FORMAT_LIMIT, SHRINK_LIMIT, EMULATION_LIMIT = 1.1, 2.0**-9, 0.02
MORE_TILES = {
    "int8_bf16": [Tile(64, 128, 4, 2), Tile(64, 128, 4, 3), Tile(128, 128, 8, 3)],
    "int8_int8": [Tile(64, 128, 4, 3)],
    "int8_fp8": [Tile(64, 128, 4, 3), Tile(128, 128, 8, 2)],
    "fp8_fp8": [Tile(64, 128, 4, 3), Tile(64, 128, 4, 2, 168), Tile(64, 64, 4, 4), Tile(128, 128, 8, 4)],
}
GLUON_TILES = {
    "int8_bf16": [Tile(block_n=128, num_stages=n, gluon=True) for n in (2, 3)],
    "int8_fp8": [Tile(block_n=128, num_stages=n, gluon=True) for n in (3, 4)],
    "fp8_fp8": [Tile(block_n=128, num_stages=n, gluon=True) for n in (2, 3, 4)],
}


@dataclass
class Row:
    """One line of the table. `rate`: TFLOP/s for attention and linear layers, else GB/s of the least traffic.
    """

    group: str
    name: str
    ms: float | None = None
    rate: float | None = None
    error: float | None = None
    emulation_error: float | None = None
    limit: float | None = None
    shrinkage: float | None = None
    message: str = ""

    @property
    def verdict(self) -> str:
        """ok, WRONG, FAILED, or empty without a limit."""
        if self.message:
            return "FAILED"
        if self.limit is None:
            return ""
        good = self.error <= self.limit and (self.emulation_error or 0) <= EMULATION_LIMIT
        return "ok" if good and abs(self.shrinkage or 0) <= SHRINK_LIMIT else "WRONG"


class Bench:
    """Collects rows. `row` runs one variant and turns an exception into a row."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.environment = environment()
        self.rows: list[Row] = []

    def row(self, group: str, name: str, call: Callable[[], Tensor], work: float,
            check: Callable[[Tensor], dict[str, float]] | None = None,
            timer: Callable[[Callable[[], Tensor]], float] | None = None) -> Row:
        """Check the output of `call`, then time it. `work`: floating-point operations or bytes."""
        timer = timer or partial(triton.testing.do_bench, warmup=20, rep=80, return_mode="median")
        row = Row(group, name)
        self.rows.append(row)
        try:
            if check:
                poison()
                for key, value in check(call()).items():
                    setattr(row, key, value)
            row.ms = timer(call)
            row.rate = work / row.ms / (1e9 if group in ("attention", "product") else 1e6)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            row.message = f"{type(error).__name__}: {lines[-1][:160]}"
        print(line(row), flush=True)
        return row

    def finish(self) -> int:
        """Print the table, write the JSON and return the exit code."""
        print(f"\n{'group':10} {'variant':58} {'ms':>9} {'rate':>8} {'error':>9} {'vs emu':>9} {'shrinks':>9}"
              "  verdict")
        for row in self.rows:
            print(line(row))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".tmp")
        rows = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        partial.write_text(json.dumps({"environment": self.environment, "rows": rows}, indent=1))
        os.replace(partial, self.out)
        return 0 if all(row.verdict in ("", "ok") for row in self.rows) else 1


def line(row: Row) -> str:
    """One row of the table, with a dash for a missing number."""
    numbers = ((row.ms, "9.4f"), (row.rate, "8.0f"), (row.error, "9.2e"), (row.emulation_error, "9.2e"),
               (row.shrinkage, "9.1e"))
    cells = " ".join(f"{'-':>{form[0]}}" if value is None else f"{value:{form}}" for value, form in numbers)
    return f"{row.group:10} {row.name:58} {cells}  {row.verdict} {row.message}"


def poison() -> None:
    """Fill the memory that the allocator returns next with NaN, so that an unwritten output is detected."""
    sizes = (TOKENS * CHANNELS * factor for factor in (1, 1, 2, 3, 6))
    blocks = [torch.full((size,), float("nan"), device=DEVICE, dtype=torch.bfloat16) for size in sizes]
    del blocks


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; NaN stays NaN and fails every limit."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


class Attention:
    """Inputs of a block's self-attention over the full window, with values that share a common part."""

    def __init__(self) -> None:
        self.q, self.k, self.v = (randn(1, n, HEADS, DIM) for n in (TOKENS, SLOTS, SLOTS))
        self.v += randn(1, 1, HEADS, DIM)
        self.sample = torch.cat([torch.randint(TOKENS, (191,)), torch.tensor([TOKENS - 1])]).to(DEVICE)
        self.flops = 4 * TOKENS * SLOTS * CHANNELS

    def cache(self, mode: str) -> QuantizedKV:
        """k and v in a cache of `mode`, through the reference writer."""
        cache = allocate_kv(mode, 1, SLOTS, HEADS, DIM, DEVICE)
        write_kv(cache, self.k, self.v, torch.arange(0, SLOTS, FRAME, device=DEVICE), FRAME)
        return cache

    def variants(self, bench: Bench, mode: str, tiles: list[Tile]) -> None:
        """Check and time one mode with several launch shapes, then time the fastest correct one at other
        lengths.
        """
        cache, good = self.cache(mode), []
        limit = attention_limit(self.q[:, self.sample], self.k, self.v, mode)
        for tile in tiles:
            emulated = attention8_reference.attention8_emulated(
                self.q[:, self.sample], cache.k, cache.v, cache.k_scale, cache.v_scale, SLOTS, tile.block_n)

            def check(out: Tensor) -> dict[str, float]:
                if not out.isfinite().all():
                    raise ArithmeticError("some values are not finite, or were never written")
                found = out[:, self.sample]
                shrinkage = limit.shrinkage(found)
                return {"error": limit.ratio(found), "limit": FORMAT_LIMIT, "shrinkage": shrinkage,
                        "emulation_error": relative(found, emulated)}

            row = bench.row("attention", f"{mode} {describe(tile)}",
                            lambda: attention8(self.q, cache, SLOTS, tile), self.flops, check)
            if row.verdict == "ok":
                good.append((row.ms, tile))
        if not good:
            return
        best = min(good)[1]
        for frames in (3, 6, 9):
            bench.row("attention", f"  {mode} best, {frames * FRAME} keys",
                      lambda: attention8(self.q, cache, frames * FRAME, best), self.flops * frames / WINDOW)
        recache = randn(1, 9 * FRAME, HEADS, DIM)
        bench.row("attention", f"  {mode} best, recache {9 * FRAME} queries",
                  lambda: attention8(recache, cache, SLOTS, best), self.flops * 3)

    def baseline(self, bench: Bench, name: str, backend: SDPBackend) -> None:
        """Check and time PyTorch's bf16 attention."""
        def call() -> Tensor:
            with sdpa_kernel(backend):
                heads_first = (t.transpose(1, 2) for t in (self.q, self.k, self.v))
                return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

        exact = attention_limit(self.q[:, self.sample], self.k, self.v, "int8_bf16").exact
        bench.row("attention", name, call, self.flops,
                  lambda out: {"error": relative(out[:, self.sample], exact), "limit": 0.006})


def describe(tile: Tile) -> str:
    """A launch shape in a few characters."""
    if tile.gluon:
        return f"gluon 128x{tile.block_n} s{tile.num_stages}"
    cap = f" r{tile.max_registers}" if tile.max_registers else ""
    return f"triton {tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages}{cap}"


def bench_attention(bench: Bench, more: bool) -> None:
    """PyTorch's bf16 attention and the Triton kernel. cuDNN runs twice to show the noise."""
    attention = Attention()
    attention.baseline(bench, "bf16 SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)
    attention.baseline(bench, "bf16 SDPA flash (FA2)", SDPBackend.FLASH_ATTENTION)
    for mode in MODES:
        cache = attention.cache(mode)
        default = TILES[cache.k.dtype, cache.v.dtype]
        attention.variants(bench, mode, [default, *(MORE_TILES[mode] if more else [])])
    attention.baseline(bench, "bf16 SDPA cuDNN, again", SDPBackend.CUDNN_ATTENTION)


def bench_gluon(bench: Bench, more: bool) -> None:
    """The Gluon kernel, with `more` in several depths of its pipeline."""
    attention = Attention()
    for mode, tiles in GLUON_TILES.items():
        attention.variants(bench, mode, tiles if more else tiles[1:2])


def bench_write(bench: Bench, more: bool) -> None:
    """RMS norm, rotary position embedding (RoPE) and the write of k and v into three frames of the ring, in
    every format.
    """
    qkv, weights = randn(1, TOKENS, 3 * CHANNELS), [1 + 0.1 * randn(CHANNELS) for _ in range(2)]
    angle = torch.rand(TOKENS, DIM // 2, device=DEVICE) * 100
    slots = torch.tensor([10 * FRAME, 4 * FRAME, 5 * FRAME], device=DEVICE, dtype=torch.int32)
    arguments = (qkv, *weights, angle.cos(), angle.sin(), slots)
    on_cpu = tuple(t.cpu() for t in arguments)
    read, part = qkv.nbytes + 2 * angle.nbytes, TOKENS * CHANNELS
    size = {"bf16": 2, "int8": 1, "fp8": 1}

    def tensors(mode: str, device: str) -> tuple[Tensor | None, ...]:
        if mode == "bf16_bf16":
            k, v = torch.zeros(2, 1, SLOTS, HEADS, DIM, device=device, dtype=torch.bfloat16)
            return k, v, None, None
        cache = allocate_kv(mode, 1, SLOTS, HEADS, DIM, device)
        return cache.k, cache.v, cache.k_scale, cache.v_scale

    for mode in ("bf16_bf16", *MODES):
        found, expected = tensors(mode, DEVICE), tensors(mode, "cpu")
        q = fused.qk_norm_rope_write(*on_cpu, *expected, FRAME)

        def check(out: Tensor) -> dict[str, float]:
            pairs = [(out, q), *((a, b) for a, b in zip(found, expected, strict=True) if a is not None)]
            return {"error": max(relative(a.cpu(), b) for a, b in pairs), "limit": 0.01}

        bench.row("write", f"qk_norm_rope_write {mode}",
                  lambda: fused.qk_norm_rope_write(*arguments, *found, FRAME),
                  read + part * (2 + sum(size[kind] for kind in mode.split("_"))), check)

    found = tensors("bf16_bf16", DEVICE)
    index = torch.cat([torch.arange(s, s + FRAME, device=DEVICE) for s in slots.tolist()])

    def eager() -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)) for t in qkv.chunk(3, -1))
        q, k = (fused.rms_norm_reference(t.flatten(2), w) for t, w in zip((q, k), weights, strict=True))
        q, k = (fused.rope_reference(t.view_as(v), *arguments[3:5]) for t in (q, k))
        found[0].index_copy_(1, index, k)
        found[1].index_copy_(1, index, v)
        return q

    bench.row("write", "  eager bf16_bf16", eager, read + part * 6)


def bench_norms(bench: Bench, more: bool) -> None:
    """The element-wise chains of a block, fused and eager."""
    x, y, table = randn(1, TOKENS, CHANNELS), randn(1, TOKENS, CHANNELS), randn(1, 3, 6, CHANNELS)
    shift, scale, gate = (table[:, :, i] for i in range(3))
    weight, bias = randn(CHANNELS), randn(CHANNELS)

    def modulate() -> Tensor:
        return fused.layernorm_modulate_reference(x, shift, scale, FRAME)

    def residual_modulate() -> Tensor:
        residual = fused.gate_residual_reference(x, y, gate, FRAME)
        return fused.layernorm_modulate_reference(residual, shift, scale, FRAME)

    def residual_affine() -> Tensor:
        residual = fused.gate_residual_reference(x, y, None, FRAME)
        return F.layer_norm(residual, (CHANNELS,), weight, bias, 1e-6)

    cases = {
        "layernorm_modulate": (2, lambda: fused.layernorm_modulate(x, shift, scale, FRAME), modulate),
        "gate_residual_layernorm_modulate": (
            4, lambda: fused.gate_residual_layernorm_modulate(x, y, gate, shift, scale, FRAME)[1],
            residual_modulate),
        "gate_residual_layernorm_affine": (
            4, lambda: fused.gate_residual_layernorm_affine(x, y, None, weight, bias, FRAME)[1],
            residual_affine),
        "rms_norm": (2, lambda: fused.rms_norm(x, weight), lambda: fused.rms_norm_reference(x, weight)),
    }
    for name, (passes, call, eager) in cases.items():
        expected = eager()
        bench.row("norm", name, call, passes * x.nbytes,
                  lambda out: {"error": relative(out, expected), "limit": 0.002})
        bench.row("norm", f"  eager {name}", eager, passes * x.nbytes)


def bench_gelu(bench: Bench, more: bool) -> None:
    """First linear layer of the feed-forward network (FFN), with GELU in its epilogue or in a separate pass.
    """
    x, weight, bias = randn(TOKENS, CHANNELS), randn(FFN, CHANNELS) / CHANNELS**0.5, randn(FFN)
    flops = 2 * TOKENS * CHANNELS * FFN
    expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")

    def check(out: Tensor) -> dict[str, float]:
        return {"error": relative(out, expected), "limit": 0.01}

    bench.row("product", "linear + gelu(tanh)",
              lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh"), flops, check)
    bench.row("product", "_addmm_activation(use_gelu)",
              lambda: gelu_linear(x, weight, bias), flops, check)
    bench.row("product", "linear alone", lambda: F.linear(x, weight, bias), flops)


def bench_rows(bench: Bench, more: bool) -> None:
    """The kernels that make the operands of 8-bit linear layers (GEMMs)."""
    x, y, table = randn(1, TOKENS, CHANNELS), randn(1, TOKENS, CHANNELS), randn(1, 3, 6, CHANNELS)
    wide, (shift, scale, gate) = randn(1, TOKENS, FFN), (table[:, :, i] for i in range(3))
    normed = fused.gate_residual_layernorm_modulate(x, y, gate, shift, scale, FRAME)[1]
    for form in linear8.FORMATS:
        cases = {
            f"gate_residual_layernorm_modulate {form}": (
                3.5 * x.nbytes, normed, lambda: linear8.gate_residual_layernorm_modulate(
                    x, y, gate, shift, scale, FRAME, form=form)[1].values),
            f"quantize rows {form}": (1.5 * wide.nbytes, wide,
                                      lambda: linear8.quantize_rows(wide, form).values),
            f"gelu, quantize rows {form}": (1.5 * wide.nbytes, F.gelu(wide, approximate="tanh"),
                                            lambda: linear8.quantize_rows(wide, form, True).values),
        }
        for name, (work, source, call) in cases.items():
            expected = linear8.rows_reference(source, form).values
            bench.row("norm", name, call, work,
                      lambda out: {"error": relative(out, expected), "limit": 0.005})


LAYERS = {"qkv": (CHANNELS, 3 * CHANNELS), "query": (CHANNELS, CHANNELS), "up": (CHANNELS, FFN),
          "down": (FFN, CHANNELS)}
COLD_BYTES = 200e6
"""Bytes of operands read between two uses of the same operand: four times an H100's L2 cache."""


class Product:
    """Operands of one linear layer, in enough copies to keep them out of the cache."""

    def __init__(self, tokens: int, inputs: int, outputs: int) -> None:
        self.flops = 2 * tokens * inputs * outputs
        self.bias = randn(outputs)
        copies = max(2, int(COLD_BYTES / (tokens * inputs + inputs * outputs)) + 1)
        self.plain = [(randn(1, tokens, inputs) + 0.25, (randn(outputs, inputs) + 0.25) / inputs**0.5)
                      for _ in range(copies)]
        self.sample = torch.randint(tokens, (512,), device=DEVICE)
        x, weight = self.plain[0]
        self.exact = x[0, self.sample].double() @ weight.double().t() + self.bias.double()

    def quantized(self, form: str) -> list[tuple[linear8.Rows8, Tensor, Tensor]]:
        """The operands in 8 bit: rows, weight and the weight's scales."""
        pairs = [(linear8.quantize_rows(x, form), linear8.rows_reference(weight, form))
                 for x, weight in self.plain]
        return [(rows, weight.values, weight.scale.t().contiguous()) for rows, weight in pairs]

    def row(self, bench: Bench, name: str, call: Callable[..., Tensor], operands: list[tuple],
            form: str | None, gelu: bool = False) -> Row:
        """Check `call` on the first operands, then time it over all of them in one CUDA graph."""
        x, weight = self.plain[0]
        exact = F.gelu(self.exact, approximate="tanh") if gelu else self.exact

        def check(out: Tensor) -> dict[str, float]:
            found = out[0, self.sample].double()
            if form is None:
                return {"error": relative(found, exact), "limit": 2.0**-8}
            limit = product_limit(x[0, self.sample], weight, self.bias, form)
            error = ((found - exact).square().mean() / limit.square().mean()).sqrt().item()
            shrinkage = 1 - ((found * exact).sum() / exact.square().sum()).item()
            return {"error": error, "limit": FORMAT_LIMIT, "shrinkage": shrinkage}

        return bench.row("product", name, lambda: call(*operands[0]), self.flops, check,
                         lambda _: graphed_ms(call, operands))


def graphed_ms(call: Callable[..., Tensor], operands: list[tuple]) -> float:
    """Milliseconds per call, from the median replay of a CUDA graph that calls once for each set of operands.
    """
    for arguments in operands[:2]:
        call(*arguments)
    torch.cuda.synchronize()
    rounds = max(1, 40 // len(operands))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for arguments in operands:
                call(*arguments)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[len(times[2:]) // 2] / (rounds * len(operands))


def bench_gemm(bench: Bench, more: bool) -> None:
    """Linear layers in bf16, e4m3 (cuBLAS) and int8 in every tile, for a pass (4680 tokens) and a recache
    (14040 tokens), then the whole feed-forward. Prints a table of the fastest at the end.
    """
    best: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for tokens in (TOKENS, 9 * FRAME):
        for layer, (inputs, outputs) in LAYERS.items():
            product, shape = Product(tokens, inputs, outputs), f"{layer} {tokens}x{inputs}x{outputs}"
            bias = product.bias

            def note(kind: str, name: str, call: Callable[..., Tensor], operands: list[tuple],
                     form: str | None, gelu: bool = False) -> None:
                row = product.row(bench, f"{shape} {kind}{' ' if name else ''}{name}", call, operands, form,
                                  gelu)
                if row.verdict == "ok":
                    best.setdefault((shape, kind), []).append((row.ms, name))

            note("bf16", "", lambda x, w: F.linear(x, w, bias), product.plain, None)
            fp8 = product.quantized("fp8")
            for short in (False, True):
                note("fp8 short sums" if short else "fp8", "", lambda rows, w, s: linear8.scaled_product(
                    rows.values[0], rows.scale[0], w, s, bias, short)[None], fp8, "fp8")
            int8 = product.quantized("int8")
            for tile in gemm8.CANDIDATES:
                for gelu in (False, True) if layer == "up" else (False,):
                    note("int8 gelu" if gelu else "int8", describe_product(tile),
                         lambda rows, w, s: gemm8.launch(*rows, w, s, bias, gelu, tile), int8, "int8", gelu)
    bench_feed_forward(bench)
    shapes = list(dict.fromkeys(shape for shape, _ in best))
    kinds = list(dict.fromkeys(kind for _, kind in best))
    print(f"\nms, the fastest of each kind\n{'':24}" + "".join(f"{kind:>16}" for kind in kinds)
          + "  int8's tile")
    for shape in shapes:
        fastest = {kind: min(best[shape, kind]) for kind in kinds if (shape, kind) in best}
        cells = "".join(f"{fastest[kind][0]:16.4f}" if kind in fastest else f"{'-':>16}" for kind in kinds)
        print(f"{shape:24}{cells}  {fastest.get('int8', (0, '-'))[1]}")


def bench_feed_forward(bench: Bench) -> None:
    """The two linear layers of the feed-forward, with different places for GELU and the rounding."""
    x, bias_up, bias_down = randn(1, TOKENS, CHANNELS), randn(FFN), randn(CHANNELS)
    weights = [(randn(FFN, CHANNELS) / CHANNELS**0.5, randn(CHANNELS, FFN) / FFN**0.5) for _ in range(4)]
    flops = 4 * TOKENS * CHANNELS * FFN
    up, down = weights[0]
    hidden = F.gelu(F.linear(x[:, :64].double(), up.double(), bias_up.double()), approximate="tanh")
    exact = F.linear(hidden, down.double(), bias_down.double())

    def plain(up: Tensor, down: Tensor) -> Tensor:
        h = torch._addmm_activation(bias_up, x[0], up.t(), use_gelu=True)
        return F.linear(h, down, bias_down)[None]

    def add(name: str, call: Callable[..., Tensor], operands: list[tuple], limit: float) -> None:
        bench.row("product", f"feed-forward {name}", lambda: call(*operands[0]), flops,
                  lambda out: {"error": relative(out[:, :64], exact), "limit": limit},
                  lambda _: graphed_ms(call, operands))

    add("bf16", plain, weights, 0.01)
    for form, limit in (("fp8", 0.08), ("int8", 0.03)):
        rows = linear8.quantize_rows(x, form)
        operands = []
        for pair in weights:
            quantized = [linear8.rows_reference(weight, form) for weight in pair]
            operands.append(tuple(part for weight in quantized
                                  for part in (weight.values, weight.scale.t().contiguous())))

        def run(up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor, inside: bool) -> Tensor:
            h = linear8.linear(rows, up, up_scale, bias_up, gelu=inside)
            h = linear8.quantize_rows(h, form, gelu=not inside)
            return linear8.linear(h, down, down_scale, bias_down)

        add(f"{form}, GELU with the rounding", partial(run, inside=False), operands, limit)
        if form == "int8":
            add(f"{form}, GELU in the product", partial(run, inside=True), operands, limit)


def describe_product(tile: gemm8.Tile) -> str:
    """A tile of the int8 linear layer (GEMM) in a few characters."""
    kind = "gluon" if tile.gluon else f"triton w{tile.num_warps}"
    return f"{kind} {tile.block_m}x{tile.block_n}x{tile.block_k} s{tile.stages} g{tile.group}"


def environment() -> dict[str, str | int | None]:
    """The hardware and versions behind the numbers."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.sm,temperature.gpu", "--format=csv"]
    smi = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else "absent"
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__, "nvidia_smi": smi.strip()}


GROUPS = {"attention": bench_attention, "write": bench_write, "norms": bench_norms, "gelu": bench_gelu,
          "rows": bench_rows, "gemm": bench_gemm, "gluon": bench_gluon}


def main() -> int:
    """Run the requested groups, in the order of GROUPS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to run")
    parser.add_argument("--more", action="store_true", help="more launch shapes of attention")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which to stop")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU; run tests/test_kernels.py to test the kernels' arithmetic on a CPU")
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = Bench(arguments.out)

    def stop() -> None:
        print(f"stopped after {arguments.limit:.0f} s; the last row did not finish")
        bench.finish()
        sys.stdout.flush()
        os._exit(2)

    timer = threading.Timer(arguments.limit, stop)
    timer.daemon = True
    timer.start()
    with torch.inference_mode():
        for name, run in GROUPS.items():
            if name in arguments.only:
                run(bench, arguments.more)
    timer.cancel()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
