"""8-bit linear layers and the element-wise operators that feed them: Triton, Gluon and cuBLAS on CUDA, plain
PyTorch elsewhere.

Both operands have float32 scales: activations one per token, weights one per output channel. The scale is the
row's largest magnitude / 127 in int8, / 448 in e4m3. A matrix product is scaled once, after the sum. In int8
the sum is exact (int32), and a row of normal numbers has a root-mean-square (RMS) error of 0.9 %. e4m3 keeps
three bits of mantissa, which gives 2.6 % for any scale.

Rounding an activation to 8 bit costs a separate pass unless the kernel that computes it does the rounding.
Therefore the norms here are those of `fused` with this step at the end: they round to x's dtype first, then
to 8 bit. GELU must process a whole row of the feed-forward before its largest value is known; the int8 matrix
product applies it to its sums, and `quantize_rows` reads and writes the row once more.

If a row contains NaN or infinity, so does its scale (int8) or its codes (e4m3), and all outputs of its token
become NaN.

Operators take and return only tensors, so each one has a wrapper function that uses `Rows8`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import fused
from .quantize import FP8, quantize_fp8, quantize_int8
from .torch_internals import scaled_mm

FORMATS = {"int8": torch.int8, "fp8": FP8}
# Sums of this many int8 products are exact in float32 for any values.
EXACT_IN_FLOAT32 = 2**24 // 127**2


class Rows8(NamedTuple):
    """Activations in int8 or e4m3, [B,L,C], and the scale of each row, float32 [B,L,1]."""

    values: Tensor
    scale: Tensor


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int, eps: float = 1e-6, *,
                       form: str) -> Rows8:
    """`fused.layernorm_modulate` with 8-bit output; form: int8 or fp8."""
    return Rows8(*torch.ops.longlive.layernorm_modulate8(x, shift, scale, frame_tokens, eps, form))


def gate_residual_layernorm_modulate(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
                                     frame_tokens: int, eps: float = 1e-6, *,
                                     form: str) -> tuple[Tensor, Rows8]:
    """`fused.gate_residual_layernorm_modulate` with its second result in 8 bit."""
    residual, *rows = torch.ops.longlive.gate_residual_layernorm_modulate8(
        x, y, gate, shift, scale, frame_tokens, eps, form)
    return residual, Rows8(*rows)


def gate_residual_layernorm_affine(x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor,
                                   frame_tokens: int, eps: float = 1e-6, *,
                                   form: str) -> tuple[Tensor, Rows8]:
    """`fused.gate_residual_layernorm_affine` with its second result in 8 bit."""
    residual, *rows = torch.ops.longlive.gate_residual_layernorm_affine8(
        x, y, gate, weight, bias, frame_tokens, eps, form)
    return residual, Rows8(*rows)


def quantize_rows(x: Tensor, form: str, gelu: bool = False) -> Rows8:
    """Quantize x [B,L,C] to 8 bit; with `gelu`, first apply GELU (tanh form) and round to x's dtype."""
    return Rows8(*torch.ops.longlive.quantize_rows8(x, form, gelu))


def linear(rows: Rows8, weight: Tensor, weight_scale: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """Multiply rows by weight [N,C] (same format, scales per output channel [1,N]) and add bias [N] ->
    [B,L,N] in the bias's dtype. On CUDA the bias is bfloat16, and C and N are multiples of 16.

    gelu: apply GELU in its tanh form; int8 does so before rounding. Raises ValueError when shapes or formats
    do not fit.
    """
    arguments = (rows.values, rows.scale, weight, weight_scale, bias)
    if weight.dtype == torch.int8:
        return torch.ops.longlive.linear_int8(*arguments, gelu)
    product = torch.ops.longlive.linear_fp8(*arguments)
    return F.gelu(product, approximate="tanh") if gelu else product


@torch.library.custom_op("longlive::layernorm_modulate8", mutates_args=())
def _layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int, eps: float,
                        form: str) -> tuple[Tensor, Tensor]:
    for vector in (shift, scale):
        fused.check_frames(x, vector, frame_tokens)
    if x.is_cuda:
        from . import linear8_triton

        return linear8_triton.norm(x, None, None, scale, shift, frame_tokens, True, eps, form)[1:]
    return rows_reference(fused.layernorm_modulate_reference(x, shift, scale, frame_tokens, eps), form)


@torch.library.custom_op("longlive::gate_residual_layernorm_modulate8", mutates_args=())
def _gate_residual_layernorm_modulate(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
                                      frame_tokens: int, eps: float,
                                      form: str) -> tuple[Tensor, Tensor, Tensor]:
    for vector in (gate, shift, scale):
        fused.check_frames(x, vector, frame_tokens)
    if x.is_cuda:
        from . import linear8_triton

        return linear8_triton.norm(x, y.contiguous(), gate, scale, shift, frame_tokens, True, eps, form)
    residual = fused.gate_residual_reference(x, y, gate, frame_tokens)
    return residual, *rows_reference(
        fused.layernorm_modulate_reference(residual, shift, scale, frame_tokens, eps), form)


@torch.library.custom_op("longlive::gate_residual_layernorm_affine8", mutates_args=())
def _gate_residual_layernorm_affine(x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor,
                                    frame_tokens: int, eps: float,
                                    form: str) -> tuple[Tensor, Tensor, Tensor]:
    fused.check_frames(x, gate, frame_tokens)
    if x.is_cuda:
        from . import linear8_triton

        return linear8_triton.norm(x, y.contiguous(), gate, weight, bias, frame_tokens, False, eps, form)
    residual = fused.gate_residual_reference(x, y, gate, frame_tokens)
    return residual, *rows_reference(F.layer_norm(residual, x.shape[-1:], weight, bias, eps), form)


@torch.library.custom_op("longlive::quantize_rows8", mutates_args=())
def _quantize_rows(x: Tensor, form: str, gelu: bool) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        from . import linear8_triton

        return linear8_triton.quantize_rows(x.contiguous(), form, gelu)
    return rows_reference(F.gelu(x, approximate="tanh") if gelu else x, form)


@torch.library.custom_op("longlive::linear_int8", mutates_args=())
def _linear_int8(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
                 gelu: bool) -> Tensor:
    _check(values, row_scale, weight, weight_scale, bias, torch.int8)
    if values.is_cuda:
        from . import gemm8

        return gemm8.launch(values, row_scale, weight, weight_scale, bias, gelu)
    wide = torch.float32 if weight.shape[1] <= EXACT_IN_FLOAT32 else torch.float64
    product = (values.to(wide) @ weight.to(wide).t()).float()
    product = product * row_scale * weight_scale + bias.float()
    return (F.gelu(product, approximate="tanh") if gelu else product).to(bias.dtype)


@torch.library.custom_op("longlive::linear_fp8", mutates_args=())
def _linear_fp8(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor,
                bias: Tensor) -> Tensor:
    _check(values, row_scale, weight, weight_scale, bias, FP8)
    if values.is_cuda:
        return scaled_product(values.flatten(0, -2), row_scale.flatten(0, -2), weight, weight_scale,
                              bias).unflatten(0, values.shape[:-1])
    product = values.float() @ weight.float().t()
    return (product * row_scale * weight_scale + bias.float()).to(bias.dtype)


def scaled_product(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
                   short_sums: bool = False) -> Tensor:
    """cuBLAS's e4m3 matrix product of values [M,C] and weight [N,C] -> [M,N].

    short_sums: keep the sum in the tensor core, which retains about 14 bits, instead of adding to a float32
    sum every few steps. The loss is measurable over the feed-forward's 8960 channels, so only the benchmark
    uses it.
    """
    return scaled_mm(values, weight.t(), row_scale, weight_scale, bias, use_fast_accum=short_sums)


def rows_reference(x: Tensor, form: str) -> Rows8:
    """Quantize x [...,C] in plain PyTorch -> int8 or e4m3 [...,C] and one scale per row [...,1]."""
    values, scale = {"int8": quantize_int8, "fp8": quantize_fp8}[form](x)
    return Rows8(values, scale[..., None])


def empty_rows(x: Tensor, form: str) -> Rows8:
    """Allocate memory for the result of `rows_reference` on x."""
    return Rows8(torch.empty_like(x, dtype=FORMATS[form]),
                 x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))


def _check(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
           dtype: torch.dtype) -> None:
    outputs, channels = weight.shape
    expected = ((*values.shape[:-1], 1), (1, outputs), (outputs,))
    if values.shape[-1] != channels or expected != tuple(
            tuple(t.shape) for t in (row_scale, weight_scale, bias)):
        raise ValueError(f"values {tuple(values.shape)}, row_scale {tuple(row_scale.shape)}, weight "
                         f"{tuple(weight.shape)}, weight_scale {tuple(weight_scale.shape)}, bias "
                         f"{tuple(bias.shape)}; a weight [N,C] needs values [...,C] with scales [...,1], "
                         "scales [1,N] and a bias [N]")
    if values.dtype != dtype or weight.dtype != dtype:
        raise ValueError(f"values are {values.dtype} and weight is {weight.dtype}; both must be {dtype}")


@_quantize_rows.register_fake
def _quantize_rows_fake(x: Tensor, form: str, gelu: bool) -> tuple[Tensor, Tensor]:
    return empty_rows(x, form)


@_layernorm_modulate.register_fake
def _layernorm_fake(x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int, eps: float,
                    form: str) -> tuple[Tensor, Tensor]:
    return empty_rows(x, form)


def _gate_residual_fake(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
                        frame_tokens: int, eps: float, form: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *empty_rows(x, form)


def _gate_residual_affine_fake(x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor,
                               frame_tokens: int, eps: float, form: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *empty_rows(x, form)


_gate_residual_layernorm_modulate.register_fake(_gate_residual_fake)
_gate_residual_layernorm_affine.register_fake(_gate_residual_affine_fake)


@_linear_int8.register_fake
def _linear_int8_fake(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor,
                      gelu: bool) -> Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[0], dtype=bias.dtype)


@_linear_fp8.register_fake
def _linear_fp8_fake(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor,
                     bias: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[0], dtype=bias.dtype)
