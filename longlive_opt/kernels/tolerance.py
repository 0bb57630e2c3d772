"""Error limits of 8-bit kernels for tests and benchmarks, derived from the number formats.

A float with m bits of mantissa rounds a value to a step of 2^-m of its binade. The error is uniform within a
step, so its root mean square (RMS) is step / sqrt(12), at most 2^-m / sqrt(12) of the value: 3.6 % for e4m3
(m = 3), 0.23 % for bf16 (m = 7). Below the smallest normal number the step is constant. int8 has a step of
absmax / 127 per row.

Errors of single values are independent, so their squares add in a sum. `attention_limit` applies this to each
output: rounding q and k changes a score and thus its probability p, and rounding p and v enters directly. A
component common to all values averages out instead, and must not shrink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantize import FP8_MAX, INT8_MAX, MODES

MANTISSA = {"fp8": 3, "bf16": 7, "fp16": 10}
FP8_SUBNORMAL = 2.0**-9
"""The step of e4m3 below its smallest normal number, 2^-6."""
FP8_SUMS = 2.0**-9
"""Largest loss in a sum of one tile of e4m3 products, half a step of bf16: Hopper's accumulators keep about
14 bits. Tiles are added in float32, so the loss does not grow with their number.
"""
P_UNIT = 2.0**-8
"""e4m3 probabilities: the largest of a row is 256."""


def rounding(form: str) -> float:
    """Upper bound of the RMS relative error of a value in a float format."""
    return 2.0 ** -MANTISSA[form] / math.sqrt(12)


def row_rounding(x: Tensor, form: str) -> Tensor:
    """RMS error of the values of x [..., C] under one scale per row, float64, like x."""
    x = x.double()
    absmax = x.abs().amax(-1, keepdim=True)
    if form == "int8":
        return (absmax / INT8_MAX / math.sqrt(12)).expand_as(x)
    return torch.maximum(x.abs() * rounding(form), absmax / FP8_MAX * FP8_SUBNORMAL / math.sqrt(12))


def plain_rounding(x: Tensor, form: str) -> Tensor:
    """RMS error of the values of x in a float format without scales."""
    error = x.double().abs() * rounding(form)
    return error.clamp_min(FP8_SUBNORMAL / math.sqrt(12)) if form == "fp8" else error


def product_limit(x: Tensor, weight: Tensor, bias: Tensor, form: str) -> Tensor:
    """RMS error, float64 [M,N], of x [M,C] times weight [N,C] plus bias in 8 bit, rounded to bf16."""
    wide, wide_weight = x.double(), weight.double()
    variance = row_rounding(x, form).square() @ wide_weight.square().t()
    variance += wide.square() @ row_rounding(weight, form).square().t()
    result = wide @ wide_weight.t() + bias.double()
    return (variance + (result * rounding("bf16")).square()).sqrt()


@dataclass(frozen=True)
class AttentionLimit:
    """Exact attention over values that the formats can represent, [B,L,N,D] in float64, and the RMS error of
    each output that the formats explain.
    """

    exact: Tensor
    error: Tensor

    def ratio(self, found: Tensor) -> float:
        """RMS error of `found` relative to the limit; NaN if any value is not finite."""
        return ((found.double() - self.exact).square().mean() / self.error.square().mean()).sqrt().item()

    def shrinkage(self, found: Tensor) -> float:
        """Relative amount by which `found` is smaller than the exact result overall; negative if larger."""
        return 1 - ((found.double() * self.exact).sum() / self.exact.square().sum()).item()


def attention_limit(q: Tensor, k: Tensor, v: Tensor, mode: str) -> AttentionLimit:
    """Attention of q [B,L,N,D] over k, v [B,T,N,D] stored in `mode`, e4m3 with a scale of 1. Values beyond
    448 are taken as 448, as the format specifies.
    """
    k_form, v_form = MODES[mode]
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    if k_form == "fp8":
        k = k.clamp(-FP8_MAX, FP8_MAX)
    if v_form == "fp8":
        v = v.clamp(-FP8_MAX, FP8_MAX)
    k_error = row_rounding(k, "int8") if k_form == "int8" else plain_rounding(k, "fp8")
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    moved = row_rounding(q, k_form).square() @ k.square().mT + q.square() @ k_error.square().mT
    moved /= q.shape[-1]
    p = scores.softmax(-1)
    exact = p @ v
    # The sum of p^2 moved (v - exact)^2, expanded so that it needs only [L,T] x [T,D] matrix products.
    weight = p.square() * moved
    error = weight @ v.square() - 2 * exact * (weight @ v) + exact.square() * weight.sum(-1, keepdim=True)
    p_error = p * rounding({"fp8": "fp8", "int8": "fp16", "bf16": "bf16"}[v_form])
    if v_form == "fp8":
        p_error = torch.maximum(
            p_error, p.amax(-1, keepdim=True) * (P_UNIT * FP8_SUBNORMAL / math.sqrt(12)))
    error += p_error.square() @ v.square()
    v_error = row_rounding(v, "int8") if v_form == "int8" else plain_rounding(v, v_form)
    error += p.square() @ v_error.square()
    error += (exact * rounding("bf16")).square()
    if v_form == "fp8":
        error += (exact * FP8_SUMS).square()
    return AttentionLimit(exact.transpose(1, 2), error.clamp_min(0).sqrt().transpose(1, 2))
