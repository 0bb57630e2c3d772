"""Check and time the kernels of longlive_opt.kernels on one CUDA GPU: bench_kernels.py --out FILE.json

From the root of the repository, offline, one to two minutes on an H100, most of it compilation:

    PYTHONPATH=. python3 scripts/bench_kernels.py --out outputs/bench_kernels.json

Every kernel is first checked on fresh random inputs, its output memory poisoned with NaN, against float32 or
eager PyTorch; an error above the row's limit marks the row WRONG. Times are medians of `do_bench`, which
clears the L2 cache between runs. A variant that fails is a row with its message, and the rest go on: this is
a benchmark, not a test. The Gluon kernel comes last, since a fault of it would take the CUDA context along,
and after `--limit` seconds (a kernel that hangs) the rows so far are written. Exit code 0 if all is well.
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
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_opt.kernels import emulation, fp8, fused
from longlive_opt.kernels.attention8 import TILES, Tile, attention8
from longlive_opt.kernels.quantize import MODES, QuantizedKV, allocate_kv, write_kv
from longlive_opt.torch_internals import gelu_linear

DEVICE = "cuda"
FRAME, WINDOW, HEADS, DIM, FFN = 1560, 12, 12, 128, 8960
TOKENS, SLOTS, CHANNELS = 3 * FRAME, WINDOW * FRAME, HEADS * DIM
# Relative error that a correct kernel stays below: against float32 attention, and against its emulation.
LIMITS = {"int8_bf16": 0.013, "int8_int8": 0.016, "int8_fp8": 0.045, "fp8_fp8": 0.062}
EMULATION_LIMIT = 0.02
MORE_TILES = {
    "int8_bf16": [Tile(64, 128, 4, 2), Tile(64, 128, 4, 3), Tile(128, 128, 8, 3)],
    "int8_int8": [Tile(64, 128, 4, 3)],
    "int8_fp8": [Tile(64, 128, 4, 3), Tile(64, 128, 4, 3, True), Tile(128, 128, 8, 2)],
    "fp8_fp8": [Tile(64, 128, 4, 3), Tile(64, 128, 4, 2, True, 168), Tile(64, 64, 4, 4),
                Tile(128, 128, 8, 3, True), Tile(128, 128, 8, 4)],
}
GLUON_TILES = {
    "int8_bf16": [Tile(block_n=128, num_stages=n, gluon=True) for n in (2, 3)],
    "int8_fp8": [Tile(block_n=128, num_stages=n, gluon=True) for n in (3, 4)],
    "fp8_fp8": [Tile(block_n=128, num_stages=n, gluon=True) for n in (2, 3, 4)],
}


@dataclass
class Row:
    """One line of the table. `rate`: TFLOP/s for attention and products, else GB/s of the least traffic."""

    group: str
    name: str
    ms: float | None = None
    rate: float | None = None
    error: float | None = None
    emulation_error: float | None = None
    limit: float | None = None
    message: str = ""

    @property
    def verdict(self) -> str:
        """ok, WRONG, FAILED, or nothing where no limit is set."""
        if self.message:
            return "FAILED"
        if self.limit is None:
            return ""
        good = self.error <= self.limit and (self.emulation_error or 0) <= EMULATION_LIMIT
        return "ok" if good else "WRONG"


class Bench:
    """Collects rows; `row` runs one variant and turns an exception into a row."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.environment = environment()
        self.rows: list[Row] = []

    def row(self, group: str, name: str, call: Callable[[], Tensor], work: float,
            check: Callable[[Tensor], dict[str, float]] | None = None) -> Row:
        """Check the output of `call`, then time it. `work`: floating-point operations or bytes."""
        row = Row(group, name)
        self.rows.append(row)
        try:
            if check:
                poison()
                for key, value in check(call()).items():
                    setattr(row, key, value)
            row.ms = triton.testing.do_bench(call, warmup=20, rep=80, return_mode="median")
            row.rate = work / row.ms / (1e9 if group in ("attention", "product") else 1e6)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            row.message = f"{type(error).__name__}: {lines[-1][:160]}"
        print(line(row), flush=True)
        return row

    def finish(self) -> int:
        """Print the table, write the JSON, return the exit code."""
        print(f"\n{'group':10} {'variant':44} {'ms':>9} {'rate':>8} {'error':>9} {'vs emu':>9}  verdict")
        for row in self.rows:
            print(line(row))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".tmp")
        rows = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        partial.write_text(json.dumps({"environment": self.environment, "rows": rows}, indent=1))
        os.replace(partial, self.out)
        return 0 if all(row.verdict in ("", "ok") for row in self.rows) else 1


def line(row: Row) -> str:
    """One row of the table; a dash where there is no number."""
    numbers = ((row.ms, "9.4f"), (row.rate, "8.0f"), (row.error, "9.2e"), (row.emulation_error, "9.2e"))
    cells = " ".join(f"{'-':>{form[0]}}" if value is None else f"{value:{form}}" for value, form in numbers)
    return f"{row.group:10} {row.name:44} {cells}  {row.verdict} {row.message}"


def poison() -> None:
    """Fill memory that the allocator hands out next with NaN, so that an unwritten output shows."""
    sizes = (TOKENS * CHANNELS * factor for factor in (1, 1, 2, 3, 6))
    blocks = [torch.full((size,), float("nan"), device=DEVICE, dtype=torch.bfloat16) for size in sizes]
    del blocks


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; NaN stays NaN and fails every limit."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


class Attention:
    """Inputs of a block's self-attention over the full window, and its float32 result for some queries."""

    def __init__(self) -> None:
        self.q, self.k, self.v = (randn(1, n, HEADS, DIM) for n in (TOKENS, SLOTS, SLOTS))
        self.sample = torch.cat([torch.randint(TOKENS, (191,)), torch.tensor([TOKENS - 1])]).to(DEVICE)
        self.expected = emulation.attention_reference(self.q[:, self.sample], self.k, self.v)
        self.flops = 4 * TOKENS * SLOTS * CHANNELS

    def cache(self, mode: str) -> QuantizedKV:
        """k and v in a cache of `mode`, through the reference writer."""
        cache = allocate_kv(mode, 1, SLOTS, HEADS, DIM, DEVICE)
        write_kv(cache, self.k, self.v, torch.arange(0, SLOTS, FRAME, device=DEVICE), FRAME)
        return cache

    def variants(self, bench: Bench, mode: str, tiles: list[Tile]) -> None:
        """Check and time one mode with several launch shapes; the fastest good one at other lengths, too."""
        cache, good = self.cache(mode), []
        for tile in tiles:
            emulated = emulation.attention8_emulated(self.q[:, self.sample], cache.k, cache.v, cache.k_scale,
                                                     cache.v_scale, SLOTS, tile.block_n)

            def check(out: Tensor) -> dict[str, float]:
                if not out.isfinite().all():
                    raise ArithmeticError("some values are not finite, or were never written")
                found = out[:, self.sample]
                return {"error": relative(found, self.expected), "limit": LIMITS[mode],
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
        """bf16 attention by PyTorch."""
        def call() -> Tensor:
            with sdpa_kernel(backend):
                heads_first = (t.transpose(1, 2) for t in (self.q, self.k, self.v))
                return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

        bench.row("attention", name, call, self.flops,
                  lambda out: {"error": relative(out[:, self.sample], self.expected), "limit": 0.006})


def describe(tile: Tile) -> str:
    """A launch shape in a few characters."""
    if tile.gluon:
        return f"gluon 128x{tile.block_n} s{tile.num_stages}"
    level, cap = " 2level" if tile.two_level else "", f" r{tile.max_registers}" if tile.max_registers else ""
    return f"triton {tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages}{level}{cap}"


def bench_attention(bench: Bench, more: bool) -> None:
    """PyTorch's bf16 attention (cuDNN twice: the spread is the noise) and the Triton kernel."""
    attention = Attention()
    attention.baseline(bench, "bf16 SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)
    attention.baseline(bench, "bf16 SDPA flash (FA2)", SDPBackend.FLASH_ATTENTION)
    for mode in MODES:
        cache = attention.cache(mode)
        default = TILES[cache.k.dtype, cache.v.dtype]
        attention.variants(bench, mode, [default, *(MORE_TILES[mode] if more else [])])
    attention.baseline(bench, "bf16 SDPA cuDNN, again", SDPBackend.CUDNN_ATTENTION)


def bench_gluon(bench: Bench, more: bool) -> None:
    """The Gluon kernel; with `more`, in several depths of its pipeline."""
    attention = Attention()
    for mode, tiles in GLUON_TILES.items():
        attention.variants(bench, mode, tiles if more else tiles[1:2])


def bench_write(bench: Bench, more: bool) -> None:
    """RMS norm, RoPE and the write of k and v into three frames of the ring, in every format."""
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
    """First product of the FFN: GELU in the product's epilogue, or as its own pass."""
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


def bench_fp8(bench: Bench, more: bool) -> None:
    """e4m3 products, the bf16 ones in whose place they come, and the kernels that make their operands."""
    x, y, table = randn(1, TOKENS, CHANNELS), randn(1, TOKENS, CHANNELS), randn(1, 3, 6, CHANNELS)
    wide, (shift, scale, gate) = randn(1, TOKENS, FFN), (table[:, :, i] for i in range(3))
    normed = fused.gate_residual_layernorm_modulate(x, y, gate, shift, scale, FRAME)[1]
    cases = {
        "gate_residual_layernorm_modulate fp8": (
            3.5 * x.nbytes, normed,
            lambda: fp8.gate_residual_layernorm_modulate(x, y, gate, shift, scale, FRAME)[1].values),
        "gelu fp8": (1.5 * wide.nbytes, F.gelu(wide, approximate="tanh"), lambda: fp8.gelu(wide).values),
    }
    for name, (work, source, call) in cases.items():
        expected = fp8.quantize_rows(source)[0]
        bench.row("norm", name, call, work, lambda out: {"error": relative(out, expected), "limit": 0.005})
    for inputs, outputs in ((CHANNELS, 3 * CHANNELS), (CHANNELS, CHANNELS), (CHANNELS, FFN), (FFN, CHANNELS)):
        a, weight, bias = randn(1, TOKENS, inputs), randn(outputs, inputs) / inputs**0.5, randn(outputs)
        rows = fp8.Rows8(*fp8.quantize_rows(a))
        weight8, channel_scale = fp8.quantize_rows(weight)
        wanted = F.linear(rows.values.float() * rows.scale, weight8.float() * channel_scale, bias.float())
        weight_scale, flops = channel_scale.t().contiguous(), 2 * TOKENS * inputs * outputs
        bench.row("product", f"linear fp8 {inputs} to {outputs}",
                  lambda: fp8.linear(rows, weight8, weight_scale, bias), flops,
                  lambda out: {"error": relative(out, wanted), "limit": EMULATION_LIMIT})
        bench.row("product", f"linear {inputs} to {outputs}", lambda: F.linear(a, weight, bias), flops)


def environment() -> dict[str, str | int | None]:
    """What the numbers depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.sm,temperature.gpu", "--format=csv"]
    smi = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else "absent"
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__, "nvidia_smi": smi.strip()}


GROUPS = {"attention": bench_attention, "write": bench_write, "norms": bench_norms, "gelu": bench_gelu,
          "fp8": bench_fp8, "gluon": bench_gluon}


def main() -> int:
    """Run the groups asked for, in the order of GROUPS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to run")
    parser.add_argument("--more", action="store_true", help="more launch shapes of attention")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which to stop")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: the kernels' arithmetic is tested on a CPU by tests/test_kernels.py")
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
