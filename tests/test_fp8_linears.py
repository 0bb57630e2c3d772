"""Products in e4m3 on top of the fused blocks: their arithmetic, whole passes, and other rooms beside them.

Its Triton kernels are tested in test_kernels.py, keys-only passes, capture and replay in
test_fused_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from micro import micro_config, micro_pipeline
from test_fused_kernels import CACHES, INT8, LINEARS, SIZES, SMALL, STATIC, flows_of, gpu_pipeline, unfused
from test_quantized_kv import latents_of, models, relative_error
from test_rooms import EXACT_FLAGS, scripted
from test_session import same_video
from torch import Tensor, nn

from longlive_opt.errors import NotAvailable, UserError
from longlive_opt.kernels import fp8, fused
from longlive_opt.kernels.quantize import FP8, dequantize
from longlive_opt.optimizations import rooms_of
from longlive_opt.optimizations.fp8_linears import Fp8Linear, check_products

FUSED = {"use_fused_kernels": True}
# Relative RMS error: of a product of random normal numbers (3.7 %), and of the flow that one pass predicts
# (0.9 to 2.1 %, for most of a block does not come out of these products).
PRODUCT_TOLERANCE, FLOW_TOLERANCE = 0.045, 0.03


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


def test_product_is_that_of_the_dequantised_factors():
    """A scale of another row or channel, a bias that is scaled, a product summed in 8 bit."""
    linear, _ = linear_of_every_size(192, 48)
    linear.bias = nn.Parameter(torch.linspace(-1, 1, 48))
    product, x = Fp8Linear((linear,)), rows_of_every_size(30, 192, 0)[0].view(2, 15, 192)
    rows = fp8.Rows8(*fp8.quantize_rows(x))
    assert product.weight.dtype == rows.values.dtype == FP8
    a, b = (dequantize(values, scale).double() for values, scale in
            ((rows.values, rows.scale[..., 0]), (product.weight, product.scale[0])))
    rounding = 1e-6 * (a.abs() @ b.abs().t() + 1)  # of a float32 sum: of what is summed, not of what is left
    assert ((product(rows) - (a @ b.t() + linear.bias)).abs() < rounding).all()


def test_product_is_off_by_no_more_than_the_format():
    """Weights or activations quantised along the other axis: most rows or channels would be rounded to 0."""
    linear, channel_sizes = linear_of_every_size(192, 64)
    x, row_sizes = rows_of_every_size(60, 192, 0)
    found = Fp8Linear((linear,))(fp8.Rows8(*fp8.quantize_rows(x[None])))[0]
    found, expected = ((y / row_sizes / channel_sizes).detach() for y in (found, linear(x)))
    assert 0.03 < relative_error(found, expected) < PRODUCT_TOLERANCE
    for axis in (0, 1):
        worst = ((found - expected).norm(dim=axis) / expected.norm(dim=axis)).max()
        assert worst < 1.5 * PRODUCT_TOLERANCE


def test_joined_linears_are_the_separate_ones_side_by_side():
    """q, k and v in another order, or all under the scales of the largest."""
    linears = [linear_of_every_size(32, 16, seed)[0] for seed in range(3)]
    for seed, linear in enumerate(linears):
        nn.init.constant_(linear.bias, seed)
    joined, separate = Fp8Linear(linears), [Fp8Linear((linear,)) for linear in linears]
    assert torch.equal(joined.weight.float(), torch.cat([own.weight.float() for own in separate]))
    assert torch.equal(joined.scale, torch.cat([own.scale for own in separate], 1))
    assert torch.equal(joined.bias, torch.cat([own.bias for own in separate]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gated", [False, True])
def test_operators_are_those_of_the_fused_block_quantised(gated, dtype):
    """A norm quantised before it is rounded, a residual stream in 8 bit, weight and bias swapped."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 15, 96, generator=generator).to(dtype)
    shift, scale, gate = torch.randn(2, 3, 3, 96, generator=generator).to(dtype).unbind(2)
    weight, bias = torch.randn(2, 96, generator=generator).to(dtype)
    gate = gate if gated else None

    def assert_same(rows: fp8.Rows8, expected: Tensor) -> None:
        for found, wanted in zip(rows, fp8.quantize_rows(expected), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))

    assert_same(fp8.layernorm_modulate(x, shift, scale, 5), fused.layernorm_modulate(x, shift, scale, 5))
    for name, vectors in (("gate_residual_layernorm_modulate", (shift, scale)),
                          ("gate_residual_layernorm_affine", (weight, bias))):
        residual, rows = getattr(fp8, name)(x, y, gate, *vectors, 5)
        wanted, normed = getattr(fused, name)(x, y, gate, *vectors, 5)
        assert torch.equal(residual, wanted)
        assert_same(rows, normed)
    assert_same(fp8.gelu(x), nn.functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e30])
def test_rows_of_zeros_and_of_huge_numbers_stay_finite(size):
    """0 / 0 in a row's scale, or a scale that overflows: one such row makes the whole video black."""
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).mul(size).bfloat16()
    linear = linear_of_every_size(64, 32)[0].bfloat16()
    nn.init.zeros_(linear.weight[:3])
    shift, scale = torch.zeros(1, 1, 64).bfloat16(), torch.full((1, 1, 64), size).bfloat16()
    for rows in (fp8.gelu(x), fp8.Rows8(*fp8.quantize_rows(x)),
                 fp8.layernorm_modulate(x.sign(), shift, scale, 4)):
        out = Fp8Linear((linear,))(rows)
        assert out.isfinite().all() and (rows.scale > 0).all()
        assert size or not out.any()


def test_misfits_are_refused():
    """Scales that PyTorch would spread over all rows, or that cuBLAS would read as another kind of scale."""
    product = Fp8Linear((nn.Linear(32, 16),))
    values, scale = fp8.quantize_rows(torch.randn(2, 3, 32))
    for rows in (fp8.Rows8(values, scale[:, :1]), fp8.Rows8(values, scale[..., 0]),
                 fp8.Rows8(values[..., :16], scale)):
        with pytest.raises(ValueError, match="values .*row_scale .*needs values"):
            product(rows)
    with pytest.raises(ValueError, match="whole number of frames"):
        fp8.layernorm_modulate(torch.randn(1, 7, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 8), 3)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_passes_stay_near_those_in_the_models_dtype(size, cache):
    """A product of another block, a norm in 8 bit before the head, a scale that stays behind in a recache of
    other row counts: growth, switches, wrap-around, sinks that turn.
    """
    plain, rounded = (flows_of(micro_pipeline(**FUSED, **keys, **cache, **size, **SMALL))
                      for keys in ({}, LINEARS))
    errors = list(map(relative_error, rounded, plain))
    assert 0.002 < min(errors) and max(errors) < FLOW_TOLERANCE


def test_bfloat16_models_take_it_too():
    """A float32 tensor that comes out of a product and stays, or that the cache refuses."""
    keys = {"model": "tiny", "weights": "random", "model_dtype": "bfloat16", "height": 32, "width": 32,
            "denoising_steps": [1000], **STATIC, **FUSED}
    plain, rounded = (latents_of(micro_pipeline(**keys, **flag)) for flag in ({}, LINEARS))
    assert rounded[0].dtype == torch.bfloat16
    assert 0.002 < relative_error(rounded[0], plain[0]) < FLOW_TOLERANCE


def test_plain_weights_are_let_go():
    """1.1 GB more than in bfloat16 alone instead of 1.1 GB less; a plain pass that multiplies nonsense."""
    pipeline = micro_pipeline(**STATIC, **FUSED, **LINEARS, **SMALL)
    on_meta = [name for name, weight in pipeline.dit.named_parameters() if weight.is_meta]
    linears = ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "ffn.0", "ffn.2")
    assert on_meta == [f"blocks.{block}.{linear}.{part}"
                       for block in range(2) for linear in linears for part in ("weight", "bias")]
    with pytest.raises(RuntimeError, match="meta"):
        latents_of(unfused(pipeline))


def test_report_counts_products_and_bytes():
    """Memory that nobody accounts for, or products that were left out unseen."""
    report = micro_pipeline(**STATIC, **FUSED, **LINEARS).rooms[-1]["report"]
    assert report["done"].startswith("8 of 12 products of a pass in e4m3, row-wise scales")
    outputs = 3 * 48 + 48 + 64 + 48
    weights = 4 * 48 * 48 + 2 * 48 * 64
    assert report["fp8_weight_bytes"] == 2 * (weights + outputs * (4 + 4))
    assert report["released_weight_bytes"] == 2 * (weights + outputs) * 4


@pytest.mark.parametrize("cache", [STATIC, INT8], ids=str)
def test_exact_rooms_beside_it_keep_every_bit(cache):
    """A room that wraps the pass of the fused kernels instead of this one."""
    keys = {**cache, **FUSED, **LINEARS, **SMALL}
    alone = scripted(micro_pipeline(**keys))
    assert all(chunk.latents.isfinite().all() for chunk in alone)
    for flags in (*((flag,) for flag in EXACT_FLAGS), EXACT_FLAGS):
        assert same_video(alone, scripted(micro_pipeline(**dict.fromkeys(flags, True), **keys)))


def test_room_comes_after_the_kernels_and_before_what_wraps_passes():
    """A captured pass that goes on multiplying in bfloat16."""
    flags = {"use_cuda_graphs": True, "use_torch_compile": True, **FUSED, **LINEARS, **INT8}
    assert [room.name for room in rooms_of(micro_config(**flags))] == [
        "quantized_kv", "fused_kernels", "fp8_linears", "torch_compile", "cuda_graphs"]


@pytest.mark.parametrize("dim, capability, kind, says", [
    (1536, (8, 6), NotAvailable, "compute capability 8.9.*8.6"),
    (1544, (9, 0), UserError, "multiples of 16 channels.*1544"),
])
def test_names_what_it_lacks(dim, capability, kind, says):
    """cuBLAS's or Triton's own words in the first pass, on a GPU or model that has no such products."""
    with pytest.raises(kind, match=f"use_quantized_linears: .*{says}"):
        check_products(dim, 8960, capability)
    check_products(1536, 8960, (8, 9))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("rows, inputs, outputs, tolerance", [
    (48, 256, 768, 0.01), (105, 1536, 4608, 0.01), (105, 8960, 1536, 0.02)])
@torch.no_grad()
def test_gpu_product_equals_its_emulation(rows, inputs, outputs, tolerance):
    """A layout that cuBLAS takes for another one, the scales of rows and channels swapped, a lost bias. Fast
    accumulation loses more in a longer sum.
    """
    linear = nn.Linear(inputs, outputs).bfloat16()
    x, _ = rows_of_every_size(rows, inputs, 0)
    found, expected = (Fp8Linear((linear.to(device),))(
        fp8.Rows8(*(part.to(device) for part in fp8.quantize_rows(x[None])))).cpu()
        for device in ("cuda", "cpu"))
    assert found.dtype == torch.bfloat16 and found.shape == (1, rows, outputs)
    errors = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert errors.max() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["wide", "tiny"])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_gpu_first_block_stays_near_that_in_bfloat16(model, cache):
    """A kernel at a size that its own tests do not have; 8 bit where bfloat16 was left."""
    plain, rounded = (latents_of(gpu_pipeline(model=model, **cache, **flag)) for flag in ({}, LINEARS))
    assert 0.002 < relative_error(rounded[0], plain[0]) < 0.05
    assert all(latents.isfinite().all() for latents in rounded)
