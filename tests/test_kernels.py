"""8-bit cache formats, fused kernels and their operators.

Tests named test_triton_... launch kernels: on CUDA where there is one, else in a subprocess under Triton's
interpreter (`test_kernels_under_the_interpreter`), where they equal the plain PyTorch forms bit for bit.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longlive_opt.kernels import attention8_reference, fused, fused_exchange, linear8, quantize
from longlive_opt.kernels.attention8 import Tile, attention8, default_tile
from longlive_opt.kernels.quantize import FP8, MODES, QuantizedKV, allocate_kv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_CUDA else "cpu"
# Relative error against float32 attention on random normal data; the reference form gives 0.9, 1.1, 3.8 and
# 5.3 %.
TOLERANCE = {"int8_bf16": 0.013, "int8_int8": 0.016, "int8_fp8": 0.045, "fp8_fp8": 0.062}

NO_KERNELS = pytest.mark.skipif(not INTERPRETED, reason="needs CUDA or the interpreter")
runs_kernels = pytest.mark.gpu if ON_CUDA else NO_KERNELS


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return difference.item()


def random_cache(mode: str, tokens: int, heads: int, dim: int,
                 frame_tokens: int) -> tuple[QuantizedKV, Tensor, Tensor]:
    """A cache written frame by frame from the last slot to the first; its k and v in the order of slots."""
    k, v = torch.randn(2, 1, tokens, heads, dim, device=DEVICE)
    cache = allocate_kv(mode, 1, tokens, heads, dim, DEVICE, torch.float32)
    for first in reversed(range(0, tokens, frame_tokens)):
        frame = slice(first, first + frame_tokens)
        quantize.write_kv(cache, k[:, frame], v[:, frame], torch.tensor([first], device=DEVICE), frame_tokens)
    return cache, k, v


@pytest.mark.parametrize("mode", MODES)
def test_error_against_float32_stays_within_its_named_tolerance(mode):
    """A scale on the wrong axis, a lost log2(e), a shuffled V, or P out of e4m3's range."""
    torch.manual_seed(0)
    cache, k, v = random_cache(mode, 192, 2, 64, 24)
    q = torch.randn(1, 64, 2, 64, device=DEVICE)
    for num_keys in (192, 130, 1):
        expected = attention8_reference.attention_reference(q, k[:, :num_keys], v[:, :num_keys])
        arguments = (q, cache.k, cache.v, cache.k_scale, cache.v_scale, num_keys)
        out = attention8_reference.attention8_emulated(*arguments, block_n=64)
        assert relative_error(out, expected) < TOLERANCE[mode]


def test_the_error_is_the_formats_and_not_the_softmax():
    """A bias from the running maximum or its shift: tiles must not matter, and storage explains the error."""
    torch.manual_seed(1)
    cache, k, v = random_cache("int8_int8", 192, 2, 64, 24)
    q = 3 * torch.randn(1, 32, 2, 64, device=DEVICE)
    arguments = (q, cache.k, cache.v, cache.k_scale, cache.v_scale, 192)
    outs = [attention8_reference.attention8_emulated(*arguments, block_n=n) for n in (16, 64, 256)]
    assert relative_error(outs[0], outs[2]) < 1e-3 and relative_error(outs[1], outs[2]) < 1e-3
    assert relative_error(outs[0], attention8_reference.attention8_dequantized(*arguments)) < 0.025


def test_large_values_survive_where_the_format_promises_it():
    """Overflow of fp8 to NaN (it saturates at 448 scales), a zero row's 0/0."""
    k = torch.full((1, 16, 1, 32), 1000.0)
    cache = allocate_kv("fp8_fp8", 1, 16, 1, 32, "cpu")
    quantize.write_kv(cache, k, k, torch.tensor([0]), 16)
    assert quantize.gather_v(cache.v, 16).float().unique().tolist() == [448.0]
    zeros = torch.zeros(2, 8)
    for quantized, scale in (quantize.quantize_int8(zeros), quantize.quantize_fp8(zeros)):
        assert not quantized.float().any() and (scale > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_ring_slots_receive_their_frames(mode):
    """Frames in the wrong slots after the ring wraps, a dropped frame stored, a neighbour overwritten."""
    torch.manual_seed(3)
    fs, heads, dim, tokens = 6, 2, 16, 30
    k, v = torch.randn(2, 1, 5 * fs, heads, dim)
    cache = allocate_kv(mode, 1, tokens, heads, dim, "cpu", torch.float32)
    first, second = torch.tensor([[4 * fs, 0, fs], [-1, 2 * fs, 0]], dtype=torch.int32)
    quantize.write_kv(cache, k[:, :3 * fs], v[:, :3 * fs], first, fs)
    quantize.write_kv(cache, k[:, 2 * fs:], v[:, 2 * fs:], second, fs)
    stored_v = quantize.gather_v(cache.v, tokens) if cache.v.dtype == FP8 else cache.v
    for stored, scale, original in ((cache.k, cache.k_scale, k), (stored_v, cache.v_scale, v)):
        if scale is None:
            scale = torch.ones(1, 1, heads)
        scale = scale.transpose(1, 2) if scale.shape[-1] == tokens else scale.view(1, 1, heads)
        found = quantize.dequantize(stored, scale).unflatten(1, (5, fs))
        frames = original.unflatten(1, (5, fs))
        for slot, frame in {0: 4, 1: 2, 2: 3, 4: 0}.items():
            assert relative_error(found[:, slot], frames[:, frame]) < 0.04
        assert not found[:, 3].any()


def test_columns_of_v_are_a_permutation_within_groups_of_sixteen():
    """A slot order that loses tokens, or that reaches beyond the group that tiles and padding rely on."""
    columns = quantize.slot_column(torch.arange(48))
    assert sorted(columns.tolist()) == list(range(48))
    assert (columns // 16 == torch.arange(48) // 16).all()
    assert columns[:10].tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3]


def test_an_8_bit_cache_halves_memory():
    """Scales stored per element, or V kept in two copies."""
    for mode, share in (("int8_bf16", 0.77), ("int8_int8", 0.54), ("int8_fp8", 0.52), ("fp8_fp8", 0.51)):
        assert allocate_kv(mode, 1, 1560, 12, 128, "meta").nbytes < share * 2 * 2 * 1560 * 12 * 128


def block_inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Small inputs of the element-wise operators: 2 x (3 frames of 5 tokens), 3 heads of 32."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(2, 3, 6, 96, generator=generator)
    draws = {"x": (2, 15, 96), "y": (2, 15, 96), "weight": (96,), "bias": (96,), "qkv": (2, 15, 288)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in draws.items()}
    inputs |= {name: table[:, :, i] for i, name in enumerate(("shift", "scale", "gate"))}
    inputs = {name: tensor.to(DEVICE, dtype) for name, tensor in inputs.items()}
    angle = torch.rand(15, 16, generator=generator) * 100
    return inputs | {"cos": angle.cos().to(DEVICE), "sin": angle.sin().to(DEVICE)}


def test_references_follow_the_formulas_of_the_block():
    """Modulation by the wrong frame, RMS per head instead of over all heads, RoPE on half-split pairs."""
    i = block_inputs(torch.float32)
    frame = torch.arange(15, device=DEVICE) // 5
    residual = i["x"] + i["gate"][:, frame] * i["y"]
    deviation = (residual.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    normed = (residual - residual.mean(-1, keepdim=True)) / deviation
    expected = normed * (1 + i["scale"][:, frame]) + i["shift"][:, frame]
    found = fused.gate_residual_reference(i["x"], i["y"], i["gate"], 5)
    torch.testing.assert_close(found, residual)
    torch.testing.assert_close(fused.layernorm_modulate_reference(found, i["shift"], i["scale"], 5), expected)

    rms = i["x"] / i["x"].square().mean(-1, keepdim=True).add(1e-6).sqrt() * i["weight"]
    torch.testing.assert_close(fused.rms_norm_reference(i["x"], i["weight"]), rms)
    heads = rms.view(2, 15, 3, 32)
    pairs = torch.view_as_complex(heads.double().unflatten(-1, (16, 2)))
    rotated = torch.view_as_real(pairs * torch.complex(i["cos"], i["sin"])[:, None]).flatten(-2).float()
    torch.testing.assert_close(fused.rope_reference(heads, i["cos"], i["sin"]), rotated, rtol=1e-4, atol=1e-4)


def write(inputs: dict[str, Tensor], mode: str, slots: Tensor) -> tuple[Tensor, QuantizedKV]:
    """q and the cache after one write through the operator. Scales per head differ, so that a swap shows."""
    cache = allocate_kv(mode, 2, 64, 3, 32, inputs["qkv"].device)
    for scale in (cache.k_scale, cache.v_scale):
        if scale is not None and scale.dim() == 2:
            scale.copy_(torch.linspace(0.005, 0.02, scale.numel()).view_as(scale))
    return fused.qk_norm_rope_write8(*write_arguments(inputs), slots, cache, 5), cache


def write_arguments(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(inputs[name] for name in ("qkv", "weight", "bias", "cos", "sin"))


@pytest.mark.parametrize("mode", MODES)
def test_operators_compile_in_one_graph(mode):
    """A graph break, a fake output of the wrong shape, or a cache write that functionalisation drops."""
    inputs = {name: tensor.cpu() for name, tensor in block_inputs().items()}
    slots = torch.tensor([40, -1, 7], dtype=torch.int32)

    def block(inputs: dict[str, Tensor], cache: QuantizedKV) -> Tensor:
        h = fused.layernorm_modulate(inputs["x"], inputs["shift"], inputs["scale"], 5)
        q = fused.qk_norm_rope_write8(*write_arguments(inputs), slots, cache, 5)
        y = attention8(q, cache, 50, Tile(32, 32)).flatten(2)
        x, h = fused.gate_residual_layernorm_affine(h, y, inputs["gate"], inputs["weight"], inputs["bias"], 5)
        x, h = fused.gate_residual_layernorm_modulate(x, h, None, inputs["shift"], inputs["scale"], 5)
        return x + fused.rms_norm(h, inputs["weight"])

    plain, compiled = (allocate_kv(mode, 2, 64, 3, 32, "cpu") for _ in range(2))
    expected = block(inputs, plain)
    found = torch.compile(block, backend="eager", fullgraph=True)(inputs, compiled)
    assert torch.equal(found, expected)
    assert plain.k.float().any() and torch.equal(plain.k.float(), compiled.k.float())
    assert torch.equal(plain.v.float(), compiled.v.float())


def test_operators_are_registered_consistently():
    """An undeclared mutation or an aliased output, which corrupt compiled graphs without a message."""
    i = {name: tensor.cpu() for name, tensor in block_inputs().items()}
    slots = torch.tensor([40, -1, 7], dtype=torch.int32)
    cache = allocate_kv("int8_int8", 2, 64, 3, 32, "cpu")  # the checks cannot copy float8
    ops = torch.ops.longlive
    torch.library.opcheck(ops.layernorm_modulate, (i["x"], i["shift"], i["scale"], 5, 1e-6))
    torch.library.opcheck(ops.rms_norm, (i["x"], i["weight"], 1e-6))
    arguments = (i["x"], i["y"], i["gate"], i["shift"], i["scale"], 5, 1e-6)
    torch.library.opcheck(ops.gate_residual_layernorm_modulate, arguments)
    arguments = (*write_arguments(i), slots, cache.k, cache.v, cache.k_scale, cache.v_scale, 5, 1e-6)
    torch.library.opcheck(ops.qk_norm_rope_write, arguments)
    k, v = torch.randn(2, 2, 15, 3, 32)
    torch.library.opcheck(ops.store_kv, (k, v, slots, cache.k, cache.v, cache.k_scale, cache.v_scale, 5))
    for form in ("int8", "fp8"):
        torch.library.opcheck(ops.layernorm_modulate8, (i["x"], i["shift"], i["scale"], 5, 1e-6, form))
        torch.library.opcheck(ops.quantize_rows8, (i["x"], form, True))
        for op, first, second in ((ops.gate_residual_layernorm_modulate8, "shift", "scale"),
                                  (ops.gate_residual_layernorm_affine8, "weight", "bias")):
            torch.library.opcheck(op, (i["x"], i["y"], i["gate"], i[first], i[second], 5, 1e-6, form))
    rows, weight = linear8.rows_reference(i["x"], "int8"), linear8.rows_reference(torch.randn(16, 96), "int8")
    torch.library.opcheck(ops.linear_int8, (*rows, weight.values, weight.scale.mT.contiguous(),
                                            torch.zeros(16), True))
    q = torch.randn(2, 8, 3, 32)
    torch.library.opcheck(ops.attention8, (q, cache.k, cache.v, cache.k_scale, cache.v_scale, 64, *Tile()))


def test_misfits_are_refused():
    """A shape that does not fit: a kernel would read another head's memory and return plausible numbers."""
    cache = allocate_kv("int8_int8", 1, 32, 2, 16, "cpu")
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="num_keys is 33"):
        attention8(q, cache, 33)
    with pytest.raises(ValueError, match="v_scale absent"):
        attention8(q, QuantizedKV(cache.k, cache.v, cache.k_scale, None), 32)
    with pytest.raises(ValueError, match="k_scale is"):
        attention8(q, QuantizedKV(cache.k, cache.v, cache.k_scale.mT.contiguous(), cache.v_scale), 32)
    with pytest.raises(ValueError, match="2 frames of 4 tokens need"):
        fused.store_kv(q, q, torch.tensor([0, 4]), cache, 4)
    with pytest.raises(ValueError, match="whole number of frames"):
        fused.layernorm_modulate(torch.randn(1, 7, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 8), 3)
    with pytest.raises(ValueError, match="use one of"):
        allocate_kv("int4", 1, 8, 1, 8, "cpu")


@pytest.mark.parametrize("mode, tokens, dim, hopper, gluon", [
    ("int8_fp8", 64, 128, True, True), ("fp8_fp8", 62, 128, True, True), ("int8_bf16", 64, 128, True, True),
    ("int8_fp8", 62, 128, True, False), ("int8_fp8", 64, 64, True, False), ("fp8_fp8", 64, 128, False, False),
    ("int8_int8", 64, 128, True, False)])
def test_default_tile_fits_the_cache(mode, tokens, dim, hopper, gluon):
    """The hand-scheduled kernel on sizes that its copies cannot address, or on another GPU than Hopper."""
    cache = allocate_kv(mode, 1, tokens, 2, dim, "meta")
    assert default_tile(cache, hopper).gluon == gluon


def test_reading_a_cache_back_undoes_writing_it():
    """A value under another slot's scale, V left in the order of the product, keys written to other slots."""
    torch.manual_seed(7)
    for mode in MODES:
        cache, k, v = random_cache(mode, 40, 2, 16, 8)
        keys, values = quantize.dequantize_kv(cache, 36)
        assert relative_error(keys, k[:, :36]) < 0.04 and relative_error(values, v[:, :36]) < 0.04
        quantize.write_keys(cache, 2 * k[:, 8:16])
        found = quantize.dequantize_kv(cache, 40)[0]
        assert relative_error(found[:, :8], 2 * k[:, 8:16]) < 0.04
        assert torch.equal(found[:, 8:36], keys[:, 8:])


def test_the_package_loads_without_triton():
    """A module-level Triton import, which breaks laptops."""
    code = "import sys; sys.modules['triton'] = None; from longlive_opt.kernels import attention8, fused"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.skipif(INTERPRETED, reason="this is the subprocess")
def test_kernels_under_the_interpreter():
    """A wrong index, mask or tail in a Triton kernel, seen without a GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton < 3.7 cannot loop to a tensor with NumPy >= 2.4")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "test_triton", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[1],
                          capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture
def exact_interpreter(monkeypatch):
    """Give the interpreter PyTorch's casts: its own truncate bf16, misround e4m3, multiply bf16 as ints."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    kinds = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: FP8, tl.float16: torch.float16,
             tl.float32: torch.float32}
    bits = {1: (torch.uint8, np.uint8), 2: (torch.uint16, np.uint16), 4: (torch.uint32, np.uint32)}

    def convert(data, source, target, rounding):
        values = torch.from_numpy(np.ascontiguousarray(data)).view(kinds[source]).to(kinds[target])
        raw, numpy_raw = bits[values.element_size()]
        return values.view(raw).numpy().view(numpy_raw).reshape(data.shape)

    def operand(handle):
        kind = handle.dtype.scalar
        if kind in kinds:
            return convert(handle.data, kind, tl.float32, None).view(np.float32)
        return handle.data.astype(np.int32)

    def dot(self, a, b, d, *_):
        return interpreter.TensorHandle(np.matmul(operand(a), operand(b)) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def assert_agrees(found: Tensor, expected: Tensor, tolerance: float = 3e-3, exact: bool = True) -> None:
    """Bit for bit under the interpreter (unless not `exact`); on CUDA sums run in another order."""
    found, expected = found.float(), expected.to(found.device).float()
    assert torch.isfinite(found).all()
    if INTERPRETED and exact:
        assert torch.equal(found, expected)
    else:
        assert relative_error(found, expected) < tolerance


@runs_kernels
@pytest.mark.parametrize("mode", MODES)
def test_triton_attention_equals_its_emulation(mode, exact_interpreter):
    """Tails of queries and keys, the permutation of P, a scale of another head, a stale tile in the pipe."""
    from longlive_opt.kernels import attention8_triton

    torch.manual_seed(5)
    tokens, heads, dim, block_m, block_n = (1040, 3, 128, 64, 128) if ON_CUDA else (112, 2, 32, 32, 64)
    cache, _, _ = random_cache(mode, tokens, heads, dim, tokens // 2)
    if cache.v.dtype == torch.float32:
        cache = QuantizedKV(cache.k, cache.v.bfloat16(), cache.k_scale, None)
    q = torch.randn(1, block_m + 8, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    for num_keys in (tokens, tokens // 2, block_n):
        arguments = (q, cache.k, cache.v, cache.k_scale, cache.v_scale, num_keys)
        expected = attention8_reference.attention8_emulated(*arguments, block_n=block_n)
        out = attention8_triton.launch(*arguments, block_m, block_n, 4, 2, 0)
        # Sums of e4m3 products depend on their order, and Hopper keeps fewer bits of them.
        tolerance = 5e-3 if mode.startswith("int8") and "fp8" not in mode else 0.02 if ON_CUDA else 2e-3
        assert_agrees(out, expected, tolerance, exact=mode != "fp8_fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8_bf16", "int8_fp8", "fp8_fp8"])
def test_gluon_attention_equals_its_emulation(mode):
    """A barrier's phase off by one (a stale or half-filled tile), registers reused while a product reads."""
    from longlive_opt.kernels import attention_gluon

    torch.manual_seed(6)
    cache, _, _ = random_cache(mode, 1040, 3, 128, 520)
    if cache.v.dtype == torch.float32:
        cache = QuantizedKV(cache.k, cache.v.bfloat16(), cache.k_scale, None)
    q = torch.randn(1, 200, 3, 128, device="cuda", dtype=torch.bfloat16)
    for num_keys in (1040, 520, 256, 128, 100):
        arguments = (q, cache.k, cache.v, cache.k_scale, cache.v_scale, num_keys)
        outs = [attention_gluon.launch(*arguments, 128, 3) for _ in range(3)]
        emulated = attention8_reference.attention8_emulated(*arguments)
        assert_agrees(outs[0], emulated, 0.02 if "fp8" in mode else 5e-3)
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("blocks, key_tiles, multiprocessors, expected", [
    (444, 147, 132, (396, 2)), (1320, 147, 132, (1320, 1)), (444, 4, 132, (444, 1)), (6, 9, 132, (0, 2)),
    (111, 147, 132, (111, 1))])
def test_last_wave_is_split_where_that_takes_less_time(blocks, key_tiles, multiprocessors, expected):
    """A part without keys, which would divide by an empty sum; whole waves that are merged for nothing."""
    attention_gluon = pytest.importorskip("longlive_opt.kernels.attention_gluon")
    whole, parts = attention_gluon.split_last_wave(blocks, key_tiles, multiprocessors)
    assert (whole, parts) == expected
    firsts = [part * key_tiles // parts for part in range(parts + 1)]
    assert min(b - a for a, b in zip(firsts, firsts[1:])) >= 1


def test_attention_bf16_says_where_it_runs():
    """A GPU that lacks the kernel's instructions found in the first pass; a CPU that gives something else."""
    from longlive_opt.errors import NotAvailable
    from longlive_opt.kernels.attention_bf16 import attention_bf16, check_gpu

    torch.manual_seed(9)
    q, k, v = (torch.randn(1, tokens, 2, 24) for tokens in (5, 9, 9))
    assert relative_error(attention_bf16(q, k, v), attention8_reference.attention_reference(q, k, v)) < 1e-6
    with pytest.raises(NotAvailable, match="Hopper"):
        check_gpu(torch.device("cpu"), torch.bfloat16, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("queries, keys, heads", [(4680, 18720, 12), (200, 1040, 3), (129, 512, 2)])
def test_attention_bf16_equals_float64(queries, keys, heads):
    """The second copy of a tile lost where K is twice as wide, a part of a split block weighted wrongly."""
    from longlive_opt.kernels.attention_bf16 import attention_bf16

    torch.manual_seed(7)
    q, k, v = (torch.randn(1, tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
               for tokens in (queries, keys, keys))
    v = v + torch.randn(1, 1, heads, 128, device="cuda", dtype=torch.bfloat16)
    out = attention_bf16(q, k, v)
    sample = slice(0, queries, 37)
    scores = torch.einsum("lnd,tnd->nlt", q[0, sample].double(), k[0].double()) / 128**0.5
    expected = torch.einsum("nlt,tnd->lnd", scores.softmax(-1), v[0].double())
    # P and the result are rounded to bf16, 2^-9 of their size at most.
    assert (out[0, sample].double() - expected).norm() / expected.norm() < 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8_fp8", "fp8_fp8"])
def test_gluon_attention_keeps_nan(mode):
    """A broken layer that gives finite numbers, since a maximum or a conversion to 8 bit drops NaN."""
    from longlive_opt.kernels import attention_gluon

    torch.manual_seed(8)
    cache, _, _ = random_cache(mode, 1040, 2, 128, 520)
    q = torch.randn(1, 200, 2, 128, device="cuda", dtype=torch.bfloat16)
    q[0, 3, 1, 5], q[0, 150, 0, 0] = float("nan"), float("inf")
    out = attention_gluon.launch(q, cache.k, cache.v, cache.k_scale, cache.v_scale, 1040, 128, 3)
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 3, 1], [0, 150, 0]]


def packed(pack, qkv: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """`qk_norm_pack` for three groups of two ranks, into memory full of NaN: [6, B, L, C]."""
    batch, tokens, width = qkv.shape
    out = torch.full((6, batch, tokens, width // 3), torch.nan, dtype=qkv.dtype, device=qkv.device)
    pack(qkv, inputs["weight"].to(qkv.device), inputs["bias"].to(qkv.device), out.unbind(), 3, 1e-6)
    assert torch.equal(out[:3], out[3:])
    return out


def exchanged(inputs: dict[str, Tensor], mode: str, slots: Tensor) -> tuple[Tensor, QuantizedKV]:
    """`write` by three ranks with one head and a third of the tokens each, joined."""
    one = write(inputs, mode, slots)[1]
    parts = [packed(fused_exchange.qk_norm_pack, qkv.contiguous(), inputs)
             for qkv in inputs["qkv"].chunk(3, 1)]
    queries, caches = [], []
    for head in range(3):
        scales = [None if scale is None else scale[:, head:head + 1].contiguous()
                  for scale in (one.k_scale, one.v_scale)]
        own = allocate_kv(mode, 2, 64, 1, 32, inputs["qkv"].device)
        own = QuantizedKV(own.k, own.v, *(old if new is None or new.dim() == 3 else new
                                          for old, new in zip((own.k_scale, own.v_scale), scales)))
        received = torch.cat([part[head] for part in parts], dim=1)
        queries.append(fused_exchange.rope_write(received, inputs["cos"], inputs["sin"], slots, own.k, own.v,
                                                 own.k_scale, own.v_scale, 5))
        caches.append(own)
    heads_of = {"k": 2, "v": 1 if one.v.dtype == FP8 else 2, "k_scale": 1, "v_scale": 1}
    joined = {name: None if getattr(one, name) is None else
              torch.cat([getattr(own, name) for own in caches], dim=axis) for name, axis in heads_of.items()}
    return torch.cat(queries, dim=2), QuantizedKV(**joined)


@pytest.mark.parametrize("mode", MODES)
def test_the_halves_around_an_exchange_equal_the_whole(mode):
    """A norm over the heads of one rank, a token rotated by its place in a message, the scales of other
    heads."""
    inputs, slots = block_inputs(), torch.tensor([-1, 20, 5], dtype=torch.int32, device=DEVICE)
    q, cache = write(inputs, mode, slots)
    found, own = exchanged(inputs, mode, slots)
    assert relative_error(found, q) < (3e-3 if ON_CUDA else 1e-12)
    for name in ("k", "v", "k_scale", "v_scale"):
        ours, theirs = getattr(own, name), getattr(cache, name)
        tolerance = 0.02 if ON_CUDA else 1e-12
        assert ours is theirs is None or relative_error(ours.float(), theirs.float()) < tolerance


def test_halves_refuse_what_they_would_misread():
    """Strides, tables or slots that the kernels do not check."""
    i = block_inputs()
    memory = torch.zeros(2, 64, 1, 32, device=DEVICE)
    with pytest.raises(ValueError, match="3 \\* 5 equal parts"):
        fused_exchange.qk_norm_pack(i["qkv"], i["weight"], i["bias"], [i["qkv"]] * 5, 5)
    with pytest.raises(ValueError, match="parts .* must be contiguous"):
        fused_exchange.qk_norm_pack(i["qkv"], i["weight"], i["bias"], [i["qkv"]] * 3, 3)
    with pytest.raises(ValueError, match="for a multiple of 3 ranks, not 4"):
        fused_exchange.qk_norm_pack(i["qkv"], i["weight"], i["bias"], [i["qkv"]] * 4, 3)
    x = torch.zeros(1, 6, 2, 4, device=DEVICE)
    for parts, message in (([x, x], "tokens in order"), ([x[:, ::2]] * 3, "with strides"),
                           ([torch.zeros(1, 1, 2, 4)] * 4, "4 equal parts")):
        with pytest.raises(ValueError, match=message):
            fused_exchange.scatter_tokens(x, parts)
    for qkv, slots in ((i["qkv"], 3), (i["qkv"][..., :96].contiguous(), 2), (i["qkv"][..., :96], 3)):
        with pytest.raises(ValueError, match="heads of 32 need|tokens, slots|must be contiguous"):
            fused_exchange.rope_write(qkv, i["cos"], i["sin"], torch.zeros(slots), memory, memory, None, None,
                                      5)


@runs_kernels
@pytest.mark.parametrize("mode", MODES)
def test_triton_halves_equal_plain_pytorch(mode, exact_interpreter):
    """A head in the message of another rank, a role that is normalised and should not be, a lost token."""
    from longlive_opt.kernels import fused_exchange_triton

    i, slots = block_inputs(), torch.tensor([-1, 20, 5], dtype=torch.int32, device=DEVICE)
    sent = packed(fused_exchange_triton.qk_norm_pack, i["qkv"], i)
    assert_agrees(sent, packed(fused_exchange.qk_norm_pack, i["qkv"].cpu(), i))
    caches = [allocate_kv(mode, 2, 64, 1, 32, device) for device in (DEVICE, "cpu")]
    tables = i["cos"], i["sin"], slots
    found = fused_exchange_triton.rope_write(sent[1].contiguous(), *tables, caches[0].k, caches[0].v,
                                             caches[0].k_scale, caches[0].v_scale, 5)
    wanted = fused_exchange.rope_write(sent[1].cpu().contiguous(), *(table.cpu() for table in tables),
                                       caches[1].k, caches[1].v, caches[1].k_scale, caches[1].v_scale, 5)
    assert_agrees(found, wanted)
    for name in ("k", "v", "k_scale", "v_scale"):
        if getattr(caches[0], name) is not None:
            assert_agrees(getattr(caches[0], name), getattr(caches[1], name), 0.02)


def prompt(own: int, tokens: int, total: int, heads: int, dim: int,
           dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, key, value and own rows of two prompts: rows after the own ones are equal. The second has no row
    of its own, only padding.
    """
    generator = torch.Generator().manual_seed(own)
    q = torch.randn(2, tokens, heads, dim, generator=generator) * 2
    key, value = torch.randn(2, 2, total, heads, dim, generator=generator)
    for x in (key, value):
        x[0, own:] = x[0, -1].clone()
        x[1, :] = x[1, -1].clone()
    counts = torch.tensor([min(own, total - 1), 0], dtype=torch.int32, device=DEVICE)
    return (*(x.to(DEVICE, dtype) for x in (q, key, value)), counts)


def attend_float64(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, key, value = (x.double().transpose(1, 2) for x in (q, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, key, value).transpose(1, 2)


@pytest.mark.parametrize("own", [1, 7, 15, 16])
def test_a_prompts_padding_counts_as_one_weighted_row(own):
    """Padding left out, counted once, or a count that is off by one."""
    q, key, value, counts = prompt(own, 9, 16, 3, 8, torch.float32)
    assert torch.equal(fused.prompt_rows(key), counts)
    found = fused.cross_attention(q, key, value, counts)
    torch.testing.assert_close(found.double(), attend_float64(q, key, value), rtol=1e-4, atol=1e-5)


def test_a_prompt_without_padding_keeps_its_rows():
    """The last row is taken for padding and counted twice."""
    key = torch.randn(1, 6, 2, 4)
    assert fused.prompt_rows(key).tolist() == [5]
    key[0, 2] = key[0, 5]  # an equal row before the end is none
    assert fused.prompt_rows(key).tolist() == [5]
    assert fused.prompt_rows(torch.full((1, 6, 2, 4), torch.nan)).tolist() == [6]


@pytest.mark.parametrize("misfit", ["key", "value", "own_rows"])
def test_cross_attention_refuses_misfits(misfit):
    arguments = dict(zip(("q", "key", "value", "own_rows"), prompt(3, 5, 8, 2, 4, torch.float32)))
    with pytest.raises(ValueError, match="the same batch, heads and channels"):
        fused.cross_attention(**arguments | {misfit: arguments[misfit][:1]})


@runs_kernels
@pytest.mark.parametrize("own, tokens, total", [(1, 16, 64), (63, 70, 512), (64, 65, 512), (200, 33, 512),
                                                (511, 20, 512), (40, 30, 40)])
def test_triton_cross_attention_equals_float64(own, tokens, total, exact_interpreter):
    """A tail of tokens or rows, the weight of the padding in another tile, a prompt that fills its rows."""
    from longlive_opt.kernels import fused_triton

    q, key, value, counts = prompt(own, tokens, total, 3, 32, torch.bfloat16)
    found = fused_triton.cross_attention(q, key, value, counts)
    assert relative_error(found, attend_float64(q, key, value)) < 5e-3


@runs_kernels
def test_triton_scatter_returns_tokens_to_their_ranks(exact_interpreter):
    """A token in the memory of another rank, heads beside their place, a second video over the first."""
    from longlive_opt.kernels import fused_exchange_triton

    x = torch.randn(2, 12, 3, 32, device=DEVICE).bfloat16()
    memory = [torch.full((2, 4, 9, 32), torch.nan, device=DEVICE, dtype=x.dtype) for _ in range(3)]
    fused_exchange_triton.scatter_tokens(x, [part[:, :, 3:6] for part in memory])
    for part, rows in zip(memory, x.chunk(3, 1), strict=True):
        assert torch.equal(part[:, :, 3:6], rows)
        assert part[:, :, :3].isnan().all() and part[:, :, 6:].isnan().all()


@runs_kernels
def test_triton_arrival_counts_for_all_ranks(exact_interpreter):
    """A rank that tells the wrong place of its arrival, or that does not wait for the last one."""
    from longlive_opt.kernels import fused_exchange_triton

    flags = [torch.zeros(3, dtype=torch.int64, device=DEVICE) for _ in range(3)]
    flags[1][:] = torch.tensor([2, 0, 5])
    epoch = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for _ in range(2):
        fused_exchange_triton.arrive(flags, flags[1], epoch, 1)
    assert epoch.item() == 2 and flags[1].tolist() == [2, 2, 5]
    assert flags[0].tolist() == flags[2].tolist() == [0, 2, 0]


@runs_kernels
@pytest.mark.parametrize("gated", [False, True])
def test_triton_norms_equal_eager_pytorch(gated, exact_interpreter):
    """A rounding left out, the gate of another frame, variance over the padding, weight and bias swapped."""
    from longlive_opt.kernels import fused_triton

    i = block_inputs()
    gate = i["gate"] if gated else None
    _, h = fused_triton.norm(i["x"], None, None, i["scale"], i["shift"], 5, True, 1e-6)
    assert_agrees(h, fused.layernorm_modulate_reference(i["x"], i["shift"], i["scale"], 5))
    residual = fused.gate_residual_reference(i["x"], i["y"], gate, 5)
    x, h = fused_triton.norm(i["x"], i["y"], gate, i["scale"], i["shift"], 5, True, 1e-6)
    assert_agrees(x, residual, 1e-6)
    assert_agrees(h, fused.layernorm_modulate_reference(residual, i["shift"], i["scale"], 5))
    x, h = fused_triton.norm(i["x"], i["y"], gate, i["weight"], i["bias"], 5, False, 1e-6)
    assert_agrees(h, torch.nn.functional.layer_norm(residual, (96,), i["weight"], i["bias"], 1e-6))
    assert_agrees(fused_triton.rms_norm(i["x"], i["weight"], 1e-6),
                  fused.rms_norm_reference(i["x"], i["weight"]))


def assert_rows_agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """8-bit rows and their scales: bit for bit under the interpreter, else but for values that lie where
    rounding turns, which may be one step away.
    """
    (values, scale), (wanted, wanted_scale) = ((v.cpu(), s.cpu()) for v, s in (found, expected))
    assert values.dtype == wanted.dtype and values.shape == wanted.shape
    assert scale.shape == (*values.shape[:-1], 1)
    torch.testing.assert_close(scale, wanted_scale, rtol=0 if INTERPRETED else 0.01, atol=0)
    codes, wanted_codes = (t.view(torch.int8).int() for t in (values, wanted))
    if values.dtype == FP8:
        codes, wanted_codes = (torch.where(t < 0, -128 - t, t) for t in (codes, wanted_codes))
    assert (codes - wanted_codes).abs().max() <= 1
    assert (codes != wanted_codes).float().mean() <= (0 if INTERPRETED else 0.01)


def rows_inputs(channels: int) -> dict[str, Tensor]:
    """The inputs of norms and GELU, 2 x (3 frames of 5 tokens): rows of every size, one of zeros."""
    generator = torch.Generator().manual_seed(5)
    size = torch.logspace(-4, 4, 30).view(2, 15, 1)
    inputs = {name: torch.randn(2, 15, channels, generator=generator) * size for name in ("x", "y")}
    inputs |= {name: torch.randn(channels, generator=generator) for name in ("weight", "bias")}
    table = torch.randn(2, 3, 3, channels, generator=generator)
    inputs |= {name: table[:, :, i] for i, name in enumerate(("shift", "scale", "gate"))}
    inputs["x"][1, 3] = inputs["y"][1, 3] = 0
    return {name: tensor.to(DEVICE, torch.bfloat16) for name, tensor in inputs.items()}


@runs_kernels
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("channels", [96, 1536] if ON_CUDA else [64, 88])
@pytest.mark.parametrize("gated", [False, True])
def test_triton_8_bit_norms_equal_their_emulation(gated, channels, form, exact_interpreter):
    """The largest of the padding or of the unrounded row, a scale in another row's place, a cast that keeps
    the bfloat16 rounding out.
    """
    from longlive_opt.kernels import linear8_triton

    i = rows_inputs(channels)
    c = {name: tensor.cpu() for name, tensor in i.items()}
    gate, gate_cpu = (inputs["gate"] if gated else None for inputs in (i, c))
    _, *rows = linear8_triton.norm(i["x"], None, None, i["scale"], i["shift"], 5, True, 1e-6, form)
    assert_rows_agree(rows, linear8.layernorm_modulate(c["x"], c["shift"], c["scale"], 5, form=form))
    x, *rows = linear8_triton.norm(i["x"], i["y"], gate, i["scale"], i["shift"], 5, True, 1e-6, form)
    residual, expected = linear8.gate_residual_layernorm_modulate(c["x"], c["y"], gate_cpu, c["shift"],
                                                                  c["scale"], 5, form=form)
    assert_agrees(x, residual, 1e-6)
    assert_rows_agree(rows, expected)
    x, *rows = linear8_triton.norm(i["x"], i["y"], gate, i["weight"], i["bias"], 5, False, 1e-6, form)
    residual, expected = linear8.gate_residual_layernorm_affine(c["x"], c["y"], gate_cpu, c["weight"],
                                                                c["bias"], 5, form=form)
    assert_agrees(x, residual, 1e-6)
    assert_rows_agree(rows, expected)


@runs_kernels
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("channels", [64, 88, 8960] if ON_CUDA else [64, 88])
def test_triton_rows_equal_their_emulation(channels, form, exact_interpreter):
    """The rest of the row left out of its largest, or stored in its first part; a constant of GELU's; a tie
    that is rounded away from even.
    """
    from longlive_opt.kernels import linear8_triton

    x = rows_inputs(channels)["x"]
    x[0, 7, -1] = x[0, 8, 0] = 1000  # the row's largest at either end
    x[0, 9, 5] = -1e38  # squared and cubed, it overflows
    assert_rows_agree(linear8_triton.quantize_rows(x, form, True), linear8.quantize_rows(x.cpu(), form, True))
    x[0, 9, 5] = -1e30
    x[1, 2] = torch.arange(channels, device=x.device) % 128 / 2  # the largest is 63.5: steps of a half
    assert_rows_agree(linear8_triton.quantize_rows(x, form, False), linear8.quantize_rows(x.cpu(), form))


@runs_kernels
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_triton_rows_keep_what_is_not_finite(bad, form, exact_interpreter):
    """NaN that a maximum or a clamp drops: the row becomes a number, and a broken layer passes `isfinite`.
    At either end of the row, which are reduced apart.
    """
    from longlive_opt.kernels import linear8_triton

    i = rows_inputs(88)
    i["x"][0, 3, 0] = i["x"][0, 11, -1] = bad
    found = [linear8_triton.quantize_rows(i["x"], form, gelu) for gelu in (False, True)]
    found += [linear8_triton.norm(i["x"], *rest, 1e-6, form)[1:] for rest in (
        (None, None, i["scale"], i["shift"], 5, True), (i["y"], None, i["weight"], i["bias"], 5, False))]
    for position, (values, scale) in enumerate(found):
        widened = values.float() * scale
        lost = ~widened.isfinite().all(-1)
        # GELU of minus infinity is NaN in its tanh form, everything else passes through.
        assert lost.nonzero().tolist() == [[0, 3], [0, 11]], position
        weight = torch.ones(16, 88).to(values.dtype)
        out = linear8.linear(linear8.Rows8(values.cpu(), scale.cpu()), weight, torch.ones(1, 16),
                             torch.zeros(16))
        assert out.isnan().all(-1).nonzero().tolist() == [[0, 3], [0, 11]]


@runs_kernels
@pytest.mark.parametrize("gelu", [False, True])
def test_triton_int8_product_equals_its_emulation(gelu, exact_interpreter):
    """The rest of rows, columns or channels; a tile of another program; a scale that is another row's."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from longlive_opt.kernels import gemm8_triton

    generator = torch.Generator().manual_seed(8)
    x, weight = (torch.randn(size, 80, generator=generator) for size in (72, 48))
    rows, weight = linear8.rows_reference(x[None], "int8"), linear8.rows_reference(weight, "int8")
    column_scale, bias = weight.scale.t().contiguous(), torch.randn(48, generator=generator).bfloat16()
    wanted = linear8.linear(rows, weight.values, column_scale, bias, gelu=gelu)[0]
    values, row_scale, weights, column_scale, bias = (
        t.to(DEVICE) for t in (rows.values[0], rows.scale[0], weight.values, column_scale, bias))
    out = torch.full((72, 48), math.nan, device=DEVICE, dtype=torch.bfloat16)
    blocks = ((values, [32, 32]), (weights, [32, 32]), (out, [32, 32]))
    gemm8_triton.linear_kernel[(2,)](
        *(TensorDescriptor.from_tensor(*pair) for pair in blocks), row_scale, column_scale, bias, 72, 48, 80,
        BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, GROUP=2, GELU=gelu, FLATTEN=False, num_warps=4)
    assert_agrees(out, wanted, 2**-8, exact=not gelu)


@runs_kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_triton_writes_keep_what_is_not_finite(mode, bad, exact_interpreter):
    """A clamp that makes a number of NaN: a broken layer's keys attended as -448."""
    from longlive_opt.kernels import fused_triton

    k, v = torch.randn(2, 1, 10, 3, 32)
    k[0, 4, 1, 7] = v[0, 6, 2, 31] = bad
    slots = torch.tensor([20, 3], dtype=torch.int32)
    found, wanted = (allocate_kv(mode, 1, 64, 3, 32, device, torch.float32) for device in (DEVICE, "cpu"))
    quantize.write_kv(wanted, k, v, slots, 5)
    fused_triton.store_kv(*(t.to(DEVICE) for t in (k, v, slots)), found.k, found.v, found.k_scale,
                          found.v_scale, 5)
    for cache in (found, wanted):
        keys, values = quantize.dequantize_kv(cache, 64)
        assert (~keys.isfinite().all(-1)).nonzero().tolist() == [[0, 24, 1]]
        assert (~values.isfinite().all(-1)).nonzero().tolist() == [[0, 4, 2]]


@runs_kernels
@pytest.mark.parametrize("mode", [*MODES, "bf16"])
def test_triton_writes_equal_the_reference(mode, exact_interpreter):
    """A token in another frame's slot, a dropped frame stored, edges of the transposed V, k and v swapped."""
    from longlive_opt.kernels import fused_triton

    i = block_inputs()
    reference = {name: tensor.cpu() for name, tensor in i.items()}
    slots = torch.tensor([40, -1, 7], dtype=torch.int32)
    if mode == "bf16":
        caches = [torch.zeros(2, 2, 64, 3, 32, dtype=torch.bfloat16) for _ in range(2)]
        expected = (*caches[0], None, None)
        q = fused.qk_norm_rope_write(*write_arguments(reference), slots, *expected, 5)
        found = (*caches[1].to(DEVICE), None, None)
    else:
        q, cache = write(reference, mode, slots)
        expected = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        blank = [t if t is None or t.dim() == 2 else torch.zeros_like(t) for t in expected[:2]]
        scales = [t if t is None or t.dim() == 2 else torch.ones_like(t) for t in expected[2:]]
        found = tuple(t if t is None else t.to(DEVICE) for t in (*blank, *scales))
    out = fused_triton.qk_norm_rope_write(*write_arguments(i), slots.to(DEVICE), *found, 5, 1e-6)
    assert_agrees(out, q)
    for stored, wanted in zip(found, expected, strict=True):
        if stored is not None:
            assert_agrees(stored, wanted)


@runs_kernels
@pytest.mark.parametrize("mode", MODES)
def test_triton_plain_writes_equal_the_reference(mode, exact_interpreter):
    """A stride of the QKV product where k and v stand alone, a dropped frame stored, a batch mixed up."""
    from longlive_opt.kernels import fused_triton

    k, v = torch.randn(2, 2, 15, 3, 32)
    slots = torch.tensor([40, -1, 7], dtype=torch.int32)
    found, wanted = (allocate_kv(mode, 2, 64, 3, 32, device, torch.float32) for device in (DEVICE, "cpu"))
    quantize.write_kv(wanted, k, v, slots, 5)
    parts = (found.k, found.v, found.k_scale, found.v_scale)
    fused_triton.store_kv(*(t.to(DEVICE) for t in (k, v, slots)), *parts, 5)
    for stored, expected in zip(parts, (wanted.k, wanted.v, wanted.k_scale, wanted.v_scale), strict=True):
        if stored is not None:
            assert_agrees(stored, expected)


@runs_kernels
def test_triton_transposed_v_takes_both_its_store_paths(exact_interpreter, monkeypatch):
    """Whole groups of slots stored without a mask where the frame begins or ends inside one."""
    from longlive_opt.kernels import fused_triton

    monkeypatch.setattr(fused_triton, "V_TOKENS", 16)
    qkv = torch.randn(1, 40, 3 * 16)
    cos, sin = torch.rand(2, 40, 8)
    arguments = (qkv, torch.ones(16), torch.ones(16), cos, sin, torch.tensor([8], dtype=torch.int32))
    found, wanted = (allocate_kv("int8_fp8", 1, 64, 1, 16, device) for device in (DEVICE, "cpu"))
    fused.qk_norm_rope_write8(*arguments, wanted, 40)
    scales = (found.k_scale, found.v_scale)
    fused_triton.qk_norm_rope_write(*(t.to(DEVICE) for t in arguments), found.k, found.v, *scales, 40, 1e-6)
    assert_agrees(found.v, wanted.v)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_CUDA, reason="needs CUDA")
def test_one_captured_graph_serves_every_ring_position():
    """Slots baked into the graph at capture: the second replay would overwrite the first one's frames."""
    i = block_inputs()
    slots = torch.tensor([0, 5, 10], dtype=torch.int32, device="cuda")
    cache = allocate_kv("int8_fp8", 2, 64, 3, 32, "cuda")

    def step() -> Tensor:
        q = fused.qk_norm_rope_write8(*write_arguments(i), slots, cache, 5)
        return attention8(q, cache, 64, Tile(64, 64))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for first in ([0, 5, 10], [30, 45, 50], [50, 0, -1]):
        before = [t.clone() for t in (cache.k, cache.v, cache.k_scale)]
        slots.copy_(torch.tensor(first))
        expected = step().clone()
        after = cache.k.clone()
        for tensor, old in zip((cache.k, cache.v, cache.k_scale), before, strict=True):
            tensor.copy_(old)
        graph.replay()
        assert torch.equal(out, expected) and torch.equal(cache.k, after)
    assert math.isfinite(out.float().sum().item())
