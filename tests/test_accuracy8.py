"""8-bit kernels against float64, at the sizes and tiles of production, with limits from the formats alone.

What `test_kernels.py` compares with is the same arithmetic in PyTorch; here it is the truth. On a CPU the
emulation stands in for the kernels and has to keep the same limits.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longlive_opt.kernels import linear8
from longlive_opt.kernels.attention8 import attention8, default_tile
from longlive_opt.kernels.quantize import MODES, allocate_kv, write_kv
from longlive_opt.kernels.tolerance import attention_limit, plain_rounding, product_limit, rounding

KEYS = 18_720
DIM = 128
BF16_HALF_STEP = 2.0**-9
SCATTER = 1.12  # of an RMS over the outputs of one draw
"""A limit is what is expected at most; the error of one sample scatters around it."""


def data(kind: str, tokens: int, heads: int, seed: int) -> Tensor:
    """[1, tokens, heads, DIM] in bfloat16.

    common: a part that all tokens share, of the spread's size. outliers: a few values beyond e4m3's 448.
    tiny: of a size around e4m3's smallest normal number, a third of them below it. large: one channel that
    is 50 times larger than the others.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, heads, DIM, generator=generator)
    if kind == "common":
        x += torch.randn(1, 1, heads, DIM, generator=generator)
    elif kind == "outliers":
        x[:, ::97, :, 5] = 2000
        x[:, 3::211, :, 17] = -700
    elif kind == "tiny":
        x *= 2.0**-5
    elif kind == "large":
        x[..., 9] *= 50
    return x.bfloat16()


def attend(mode: str, q: Tensor, k: Tensor, v: Tensor, device: str) -> Tensor:
    """The public operator with its default tile over a cache written by the reference, on memory of NaN."""
    slots = -(-k.shape[1] // 16) * 16
    cache = allocate_kv(mode, 1, slots, k.shape[2], DIM, device)
    write_kv(cache, k.to(device), v.to(device), torch.tensor([0], device=device), k.shape[1])
    if device == "cuda":
        assert default_tile(cache).gluon or mode == "int8_int8"
    q = q.to(device)
    poison = torch.full_like(q, math.nan)
    del poison
    return attention8(q, cache, k.shape[1]).cpu()


def assert_within_the_format(mode: str, kinds: tuple[str, str, str], tokens: int, queries: int, heads: int,
                             device: str) -> None:
    q, k, v = (data(kind, count, heads, seed) for seed, (kind, count) in enumerate(
        zip(kinds, (queries, tokens, tokens), strict=True)))
    limit = attention_limit(q, k, v, mode)
    found = attend(mode, q, k, v, device)
    assert limit.ratio(found) < SCATTER
    assert abs(limit.shrinkage(found)) < BF16_HALF_STEP + 3 * float(
        limit.error.square().mean().sqrt() / limit.exact.square().mean().sqrt() / math.sqrt(queries * heads))


KINDS = [("normal", "normal", "common"), ("normal", "common", "outliers"), ("large", "normal", "tiny"),
         ("normal", "tiny", "common")]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "int8_int8"])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_attention_equals_float64_within_the_format(mode, kinds):
    """A part that all values share shrinks with every tile; a saturated value that becomes NaN or wraps; a
    probability that is lost; tails of queries and keys.
    """
    assert_within_the_format(mode, kinds, 1_111, 40, 2, "cpu")


def test_attention_over_the_full_window_equals_float64():
    """An error that grows with the number of keys, which a test of a thousand does not see."""
    assert_within_the_format("fp8_fp8", ("normal", "normal", "common"), KEYS, 16, 1, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, queries", [(KEYS, 300), (4680, 129), (1_111, 300), (640, 64), (130, 300),
                                             (100, 1)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_gpu_attention_equals_float64_within_the_format(mode, kinds, tokens, queries):
    """Sums that are left in the tensor core's short accumulators: what V has in common shrinks by 10 % over
    the full window. Also whatever only the production tile does: more stages than tiles, odd sizes, none.
    """
    assert_within_the_format(mode, kinds, tokens, queries, 2, "cuda")


def rows(kind: str, count: int, channels: int, seed: int) -> Tensor:
    """Normal rows [count, channels] in bfloat16; `common` have a part that all share, `outliers` a channel
    ten times larger."""
    x = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    if kind == "common":
        x = x + 0.5
    elif kind == "outliers":
        x[:, 7] *= 10
    return x.bfloat16()


def assert_product_within_the_format(form: str, kind: str, count: int, channels: int, outputs: int,
                                     device: str) -> None:
    x, weight = rows(kind, count, channels, 0), rows("common", outputs, channels, 1) / channels**0.5
    bias = torch.linspace(-1, 1, outputs).bfloat16()
    exact = x.double() @ weight.double().t() + bias.double()
    limit = product_limit(x, weight, bias, form)
    weight8 = linear8.rows_reference(weight, form)
    quantized = linear8.quantize_rows(x[None].to(device), form)
    found = linear8.linear(quantized, weight8.values.to(device), weight8.scale.t().contiguous().to(device),
                           bias.to(device))[0].cpu()
    assert ((found.double() - exact).square().mean() / limit.square().mean()).sqrt() < SCATTER
    shrinkage = 1 - (found.double() * exact).sum() / exact.square().sum()
    noise = limit.square().mean().sqrt() / exact.square().mean().sqrt() / math.sqrt(min(count, outputs))
    assert abs(shrinkage) < BF16_HALF_STEP + 3 * noise


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["normal", "common", "outliers"])
def test_products_equal_float64_within_the_format(form, kind):
    """A scale that wastes the format's range, sums that lose what all products have in common."""
    assert_product_within_the_format(form, kind, 60, 8960, 96, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["normal", "common", "outliers"])
@pytest.mark.parametrize("channels, outputs", [(1536, 4608), (1536, 1536), (1536, 8960), (8960, 1536)])
def test_gpu_products_equal_float64_within_the_format(form, kind, channels, outputs):
    """Sums of e4m3 products in the tensor core's 14 bits; a tile of production that no small test meets."""
    assert_product_within_the_format(form, kind, 1000, channels, outputs, "cuda")


@pytest.mark.parametrize("form, dtype", [("fp8", torch.float8_e4m3fn), ("bf16", torch.bfloat16)])
def test_limits_are_those_of_the_formats(form, dtype):
    """A limit so wide that nothing fails it, or narrower than the format."""
    x = torch.logspace(-7, 7, 100_000, base=2.0, dtype=torch.float64)
    error = (x.float().to(dtype).double() - x).square().mean().sqrt()
    assert 0.6 < error / plain_rounding(x, form).square().mean().sqrt() < 1
    assert rounding(form) < 2.0 ** -{"fp8": 4, "bf16": 8}[form]


def test_a_shrunk_common_part_fails():
    """A limit that lets pass what the FP8 accumulators do: a tenth of V's common part lost."""
    q, k, v = (data(kind, count, 1, seed) for seed, (kind, count) in enumerate(
        (("normal", 16), ("normal", 4680), ("common", 4680))))
    limit = attention_limit(q, k, v, "fp8_fp8")
    assert limit.ratio(0.99 * limit.exact) > SCATTER and limit.shrinkage(0.99 * limit.exact) > BF16_HALF_STEP
    assert limit.ratio(0.999 * limit.exact) < 1
