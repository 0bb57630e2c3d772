"""Linear layers in 8 bit on top of the fused blocks: their arithmetic, whole passes, and other optimizations
with them.

Its Triton kernels are tested in test_kernels.py, the int8 product's in test_gemm8.py, keys-only passes,
capture and replay in test_fused_kernels.py.
"""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from micro import micro_config, micro_pipeline
from test_fused_kernels import (
    CACHES,
    INT8,
    SIZES,
    SMALL,
    STATIC,
    flows_of,
    gpu_flows,
    gpu_pipeline,
    unfused,
)
from test_optimizations import EXACT_FLAGS, scripted
from test_quantized_kv import latents_of, models, relative_error
from test_session import same_video
from torch import Tensor, nn

from longlive_opt.config import LINEAR_LAYERS
from longlive_opt.errors import NotAvailable, UserError
from longlive_opt.kernels import fused, linear8
from longlive_opt.kernels.quantize import dequantize
from longlive_opt.optimizations import optimizations_of
from longlive_opt.optimizations.quantized_linears import QuantizedLinear, check_linears

FUSED = {"use_fused_kernels": True}
FORMS = ["int8", "fp8"]
LINEARS = {form: {"use_quantized_linears": True, "linear_quantization": form} for form in FORMS}
# Relative RMS error that the format gives a product of normal rows of C channels. int8: the row's largest is
# about sqrt(2 ln 2C) standard deviations, a step 1/127 of it, an error 1/sqrt(12) of a step. e4m3: a step is
# 2^-3 of a binade's start; over a binade's values that is 2^-3 / sqrt(12) / 1.4. Two factors, so times 1.41.
FLOW_TOLERANCE = {"int8": 0.017, "fp8": 0.037}
"""Of the flow that one pass predicts: what the format gives one product, since on demanding weights a block
hangs on its products. The linear layers of an 8-bit cache also round what attention made of it.
"""


def product_error(form: str, channels: int) -> float:
    """What the format puts into a product of normal factors, relative RMS."""
    if form == "fp8":
        return math.sqrt(2) * 2**-3 / math.sqrt(12) / 1.4
    return math.sqrt(2) * math.sqrt(2 * math.log(2 * channels)) / 127 / math.sqrt(12)


@pytest.fixture(autouse=True, scope="module")
def known_models():
    with models():
        yield


def rows_of_every_size(rows: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal rows of sizes from 1e-3 to 1e3 in mixed order, and the sizes [rows, 1]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, rows)[torch.randperm(rows, generator=generator)][:, None]
    return torch.randn(rows, channels, generator=generator) * sizes, sizes


def linear_of_every_size(inputs: int, outputs: int, seed: int = 1) -> tuple[nn.Linear, Tensor]:
    """A linear without bias whose output channels differ in size, and the sizes [1, outputs]."""
    linear = nn.Linear(inputs, outputs)
    weight, sizes = rows_of_every_size(outputs, inputs, seed)
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(outputs))
    return linear, sizes.t()


@pytest.mark.parametrize("form", FORMS)
def test_product_is_that_of_the_dequantised_factors(form):
    """A scale of another row or channel, a bias that is scaled, a product summed in 8 bit."""
    linear, _ = linear_of_every_size(192, 48)
    linear.bias = nn.Parameter(torch.linspace(-1, 1, 48))
    product, x = QuantizedLinear((linear,), form), rows_of_every_size(30, 192, 0)[0].view(2, 15, 192)
    rows = linear8.rows_reference(x, form)
    assert product.weight.dtype == rows.values.dtype == linear8.FORMATS[form]
    a, b = (dequantize(values, scale).double() for values, scale in
            ((rows.values, rows.scale[..., 0]), (product.weight, product.scale[0])))
    rounding = 1e-6 * (a.abs() @ b.abs().t() + 1)  # of a float32 sum: of what is summed, not of what is left
    wanted = a @ b.t() + linear.bias
    assert ((product(rows) - wanted).abs() < rounding).all()
    found = product(rows, gelu=True)
    assert ((found - nn.functional.gelu(wanted, approximate="tanh")).abs() < 2 * rounding).all()


def test_long_int8_sums_are_exact():
    """A float32 sum of large int8 products: beyond 2^24 it loses what is common to all of them."""
    values = torch.full((1, 2, 8960), 127, dtype=torch.int8)
    values[0, 1, 0] = 126
    weight, one = torch.full((16, 8960), 127, dtype=torch.int8), torch.ones(1, 2, 1)
    product = linear8.linear(linear8.Rows8(values, one), weight, torch.ones(1, 16), torch.zeros(16))
    sums = 8960 * 127**2
    assert torch.equal(product[0, :, 0], torch.tensor([sums, sums - 127]).float())


@pytest.mark.parametrize("form", FORMS)
def test_product_is_off_by_no_more_than_the_format(form):
    """Weights or activations quantised along the other axis: most rows or channels would be rounded to 0."""
    linear, channel_sizes = linear_of_every_size(192, 64)
    x, row_sizes = rows_of_every_size(60, 192, 0)
    found = QuantizedLinear((linear,), form)(linear8.rows_reference(x[None], form))[0]
    found, expected = ((y / row_sizes / channel_sizes).detach() for y in (found, linear(x)))
    limit = product_error(form, 192)
    assert 0.7 * limit < relative_error(found, expected) < 1.2 * limit
    for axis in (0, 1):
        worst = ((found - expected).norm(dim=axis) / expected.norm(dim=axis)).max()
        assert worst < 1.8 * limit


@pytest.mark.parametrize("form", FORMS)
def test_joined_linears_are_the_separate_ones_side_by_side(form):
    """q, k and v in another order, or all under the scales of the largest."""
    linears = [linear_of_every_size(32, 16, seed)[0] for seed in range(3)]
    for seed, linear in enumerate(linears):
        nn.init.constant_(linear.bias, seed)
    joined = QuantizedLinear(linears, form)
    separate = [QuantizedLinear((linear,), form) for linear in linears]
    assert torch.equal(joined.weight.float(), torch.cat([own.weight.float() for own in separate]))
    assert torch.equal(joined.scale, torch.cat([own.scale for own in separate], 1))
    assert torch.equal(joined.bias, torch.cat([own.bias for own in separate]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gated", [False, True])
def test_operators_are_those_of_the_fused_block_quantised(gated, dtype, form):
    """A norm quantised before it is rounded, a residual stream in 8 bit, weight and bias swapped."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 15, 96, generator=generator).to(dtype)
    shift, scale, gate = torch.randn(2, 3, 3, 96, generator=generator).to(dtype).unbind(2)
    weight, bias = torch.randn(2, 96, generator=generator).to(dtype)
    gate = gate if gated else None

    def assert_same(rows: linear8.Rows8, expected: Tensor) -> None:
        for found, wanted in zip(rows, linear8.rows_reference(expected, form), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))

    assert_same(linear8.layernorm_modulate(x, shift, scale, 5, form=form),
                fused.layernorm_modulate(x, shift, scale, 5))
    for name, vectors in (("gate_residual_layernorm_modulate", (shift, scale)),
                          ("gate_residual_layernorm_affine", (weight, bias))):
        residual, rows = getattr(linear8, name)(x, y, gate, *vectors, 5, form=form)
        wanted, normed = getattr(fused, name)(x, y, gate, *vectors, 5)
        assert torch.equal(residual, wanted)
        assert_same(rows, normed)
    assert_same(linear8.quantize_rows(x, form), x)
    assert_same(linear8.quantize_rows(x, form, gelu=True), nn.functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e30])
def test_rows_of_zeros_and_of_huge_numbers_stay_finite(size, form):
    """0 / 0 in a row's scale, or a scale that overflows: one such row makes the whole video black."""
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).mul(size).bfloat16()
    linear = linear_of_every_size(64, 32)[0].bfloat16()
    nn.init.zeros_(linear.weight[:3])
    shift, scale = torch.zeros(1, 1, 64).bfloat16(), torch.full((1, 1, 64), size).bfloat16()
    for rows in (linear8.quantize_rows(x, form, gelu=True), linear8.quantize_rows(x, form),
                 linear8.layernorm_modulate(x.sign(), shift, scale, 4, form=form)):
        out = QuantizedLinear((linear,), form)(rows)
        assert out.isfinite().all() and (rows.scale > 0).all()
        assert size or not out.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_every_output_of_its_token(bad, form):
    """A broken layer whose output is clamped to a number and passes every check for finite values."""
    linear = nn.Linear(64, 32).bfloat16()
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 2, 63] = bad
    ones, zeros = torch.ones(1, 1, 64).bfloat16(), torch.zeros(1, 1, 64).bfloat16()
    for rows in (linear8.quantize_rows(x, form), linear8.quantize_rows(x, form, gelu=True),
                 linear8.layernorm_modulate(x, zeros, ones, 4, form=form),
                 linear8.gate_residual_layernorm_modulate(x, x, None, zeros, ones, 4, form=form)[1],
                 linear8.gate_residual_layernorm_affine(x, x, None, ones[0, 0], zeros[0, 0], 4,
                                                        form=form)[1]):
        out = QuantizedLinear((linear,), form)(rows)
        assert out[:, 2].isnan().all() and out[:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_misfits_are_refused(form):
    """Scales that PyTorch would spread over all rows, or that cuBLAS would read as another kind of scale."""
    product = QuantizedLinear((nn.Linear(32, 16),), form)
    values, scale = linear8.rows_reference(torch.randn(2, 3, 32), form)
    for rows in (linear8.Rows8(values, scale[:, :1]), linear8.Rows8(values, scale[..., 0]),
                 linear8.Rows8(values[..., :16], scale)):
        with pytest.raises(ValueError, match="values .*row_scale .*needs values"):
            product(rows)
    other = linear8.rows_reference(torch.randn(2, 3, 32), "fp8" if form == "int8" else "int8")
    with pytest.raises(ValueError, match="both must be"):
        product(other)
    with pytest.raises(ValueError, match="whole number of frames"):
        linear8.layernorm_modulate(torch.randn(1, 7, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 8), 3,
                                   form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("size", SIZES[::3], ids=str)
def test_passes_stay_near_those_in_the_models_dtype(size, cache, form):
    """A product of another block, a norm in 8 bit before the head, a scale that stays behind in a recache of
    other row counts: growth, switches, wrap-around, sinks that turn.
    """
    plain, rounded = (flows_of(micro_pipeline(**FUSED, **keys, **cache, **size, **SMALL))
                      for keys in ({}, LINEARS[form]))
    errors = list(map(relative_error, rounded, plain))
    assert 0.0005 < min(errors) and max(errors) < FLOW_TOLERANCE[form]


@pytest.mark.parametrize("form", FORMS)
def test_each_named_layer_is_rounded_and_no_other(form):
    """A norm that rounds for a layer in bfloat16, or a layer whose name switches another one."""
    plain = flows_of(micro_pipeline(**FUSED, **STATIC, **SMALL))
    alone = {}
    for layers in (*((name,) for name in LINEAR_LAYERS), ("qkv", "down"), ("query", "up"), ("up", "down")):
        pipeline = micro_pipeline(**FUSED, **STATIC, **SMALL, **LINEARS[form], linear_layers=list(layers))
        kinds = {name: isinstance(getattr(pipeline.sampler.forward.products[0], name), QuantizedLinear)
                 for name in ("qkv", "query")}
        assert kinds == {name: name in layers for name in kinds}
        flows = flows_of(pipeline)
        alone[layers] = max(map(relative_error, flows, plain))
        assert 0 < alone[layers] < FLOW_TOLERANCE[form]
        others = [name for name in LINEAR_LAYERS if name not in layers]
        report = pipeline.optimizations[-1]["report"]["done"]
        assert all(f"{name}," not in report and f"{name})" not in report for name in others)
    assert len(set(alone.values())) == len(alone)


def test_int8_is_nearer_than_e4m3():
    """A scale that spans the format badly: int8 puts a third of e4m3's error into a product."""
    plain = flows_of(micro_pipeline(**FUSED, **STATIC, **SMALL))
    keys = {**FUSED, **STATIC, **SMALL}
    int8, fp8 = (sum(map(relative_error, flows_of(micro_pipeline(**keys, **LINEARS[form])), plain))
                 for form in FORMS)
    assert int8 < 0.5 * fp8


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_models_take_it_too(form):
    """A float32 tensor that comes out of a product and stays, or that the cache refuses."""
    keys = {"model": "tiny", "weights": "random", "model_dtype": "bfloat16", "height": 32, "width": 32,
            "denoising_steps": [1000], **STATIC, **FUSED}
    plain, rounded = (latents_of(micro_pipeline(**keys, **flag)) for flag in ({}, LINEARS[form]))
    assert rounded[0].dtype == torch.bfloat16
    assert 0.0005 < relative_error(rounded[0], plain[0]) < FLOW_TOLERANCE[form]


def test_plain_weights_are_released():
    """1.1 GB more than in bfloat16 alone instead of 1.1 GB less; a plain pass that multiplies nonsense."""
    fused_only = micro_pipeline(**STATIC, **FUSED, **SMALL)
    joined = weakref.ref(fused_only.sampler.forward.products[0].weight)
    wanted = optimizations_of(micro_config(**STATIC, **FUSED, **LINEARS["int8"], **SMALL))
    pipeline = next(one for one in wanted if one.name == "quantized_linears").apply(fused_only)
    on_meta = [name for name, weight in pipeline.dit.named_parameters() if weight.is_meta]
    linears = ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "ffn.0", "ffn.2")
    assert on_meta == [f"blocks.{block}.{linear}.{part}"
                       for block in range(2) for linear in linears for part in ("weight", "bias")]
    with pytest.raises(RuntimeError, match="meta"):
        latents_of(unfused(pipeline))
    del fused_only
    gc.collect()
    assert joined() is None


def test_report_counts_layers_and_bytes():
    """Memory that nobody accounts for, or layers that were left out unseen."""
    report = micro_pipeline(**STATIC, **FUSED, **LINEARS["int8"]).optimizations[-1]["report"]
    assert report["done"].startswith("8 of 12 linear layers of a pass in int8 (qkv, query, up, down), scales")
    outputs = 3 * 48 + 48 + 64 + 48
    weights = 4 * 48 * 48 + 2 * 48 * 64
    assert report["quantized_weight_bytes"] == 2 * (weights + outputs * (4 + 4))
    assert report["released_weight_bytes"] == 2 * (weights + outputs) * 4


@pytest.mark.parametrize("cache, form", [(STATIC, "int8"), (INT8, "fp8")], ids=str)
def test_exact_optimizations_with_it_keep_every_bit(cache, form):
    """An optimization that wraps the pass of the fused kernels instead of this one."""
    keys = {**cache, **FUSED, **LINEARS[form], **SMALL}
    alone = scripted(micro_pipeline(**keys))
    assert all(chunk.latents.isfinite().all() for chunk in alone)
    for flags in (*((flag,) for flag in EXACT_FLAGS), EXACT_FLAGS):
        assert same_video(alone, scripted(micro_pipeline(**dict.fromkeys(flags, True), **keys)))


def test_it_comes_after_the_kernels_and_before_what_wraps_passes():
    """A captured pass that goes on multiplying in bfloat16, or a format that is not the preset's."""
    flags = {"use_cuda_graphs": True, "use_torch_compile": True, **FUSED, **LINEARS["fp8"], **INT8}
    optimizations = optimizations_of(micro_config(**flags, linear_layers=["qkv", "up"]))
    assert [optimization.name for optimization in optimizations] == [
        "quantized_kv", "fused_kernels", "quantized_linears", "vae_chunk", "torch_compile", "cuda_graphs"]
    assert (optimizations[2].quantization, optimizations[2].layers) == ("fp8", ("qkv", "up"))


@pytest.mark.parametrize("form, dim, capability, kind, says", [
    ("fp8", 1536, (8, 6), NotAvailable, "linear_quantization fp8 .*8.9.*8.6; use linear_quantization: int8"),
    ("fp8", 1536, (7, 5), NotAvailable, "linear_quantization fp8 .*8.9.*7.5; switch use_quantized_linears"),
    ("int8", 1536, (7, 5), NotAvailable, "linear_quantization int8 .*8.0.*7.5"),
    ("int8", 1544, (9, 0), UserError, "multiples of 16 channels.*1544"),
])
def test_names_what_it_lacks(form, dim, capability, kind, says):
    """A library's own words in the first pass, on a GPU or model that has no such products."""
    with pytest.raises(kind, match=f"use_quantized_linears: .*{says}"):
        check_linears(form, dim, 8960, capability)
    check_linears("fp8", 1536, 8960, (8, 9))
    check_linears("int8", 1536, 8960, (8, 0))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows, inputs, outputs", [(48, 256, 768), (105, 1536, 4608), (105, 8960, 1536)])
@torch.no_grad()
def test_gpu_product_equals_float64(rows, inputs, outputs, form):
    """A layout that cuBLAS takes for another one, the scales of rows and channels swapped, a lost bias; in
    e4m3 sums that are left in the tensor core: what all products have in common shrinks by percents there.
    """
    linear = nn.Linear(inputs, outputs).bfloat16()
    x, _ = rows_of_every_size(rows, inputs, 0)
    x, linear.weight.data = x + x.abs().mean(-1, keepdim=True), linear.weight.data + 0.25 / inputs**0.5
    product, parts = QuantizedLinear((linear,), form), linear8.rows_reference(x[None], form)
    wanted = (dequantize(parts.values, parts.scale[..., 0]).double()
              @ dequantize(product.weight, product.scale[0]).double().t() + linear.bias.double())
    found = QuantizedLinear((linear.cuda(),), form)(linear8.Rows8(*(part.cuda() for part in parts))).cpu()
    assert found.dtype == torch.bfloat16 and found.shape == (1, rows, outputs)
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert errors.max() < 2**-8  # half a step of bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [LINEAR_LAYERS, ("up",), ("down",), ("qkv", "query")], ids=str)
def test_gpu_every_block_stays_near_that_in_bfloat16(layers, form):
    """A kernel at a size that its own tests do not have; 8 bit where bfloat16 was left; errors that grow as
    the window fills, the ring turns and a prompt is switched.
    """
    keys = {"model": "wide", **INT8, "model_dtype": "bfloat16"}
    plain = gpu_pipeline(**keys)
    rounded = gpu_pipeline(**keys, **LINEARS[form], linear_layers=list(layers))
    errors = list(map(relative_error, gpu_flows(rounded), gpu_flows(plain)))
    assert 0 < max(errors) < FLOW_TOLERANCE[form] + 2**-7  # and where bfloat16 rounds another way
