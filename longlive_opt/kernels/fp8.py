"""Products in e4m3 and the element-wise operators that feed them: Triton and cuBLAS on CUDA, plain PyTorch
elsewhere.

Both factors have one float32 scale a row, an activation's per token and a weight's per output channel, each
the row's largest magnitude / 448 (`quantize.quantize_fp8`). A product of them is scaled once, after the sum.

Rounding an activation to 8 bit costs a pass of its own unless the kernel that makes it does it. So the norms
here are those of `fused` with that step at their end: they round to x's dtype as those do, and then to e4m3.
GELU, which the 8-bit product does not have in its epilogue, does the same.

Operators take and return tensors only, so each has a function around it that speaks of `Rows8`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longlive_opt.kernels import fused
from longlive_opt.kernels.quantize import FP8, quantize_fp8
from longlive_opt.torch_internals import scaled_mm


class Rows8(NamedTuple):
    """Activations in e4m3, [B,L,C], and the scale of each row, float32 [B,L,1]."""

    values: Tensor
    scale: Tensor


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int,
                       eps: float = 1e-6) -> Rows8:
    """`fused.layernorm_modulate` in 8 bit."""
    return Rows8(*torch.ops.longlive.layernorm_modulate_fp8(x, shift, scale, frame_tokens, eps))


def gate_residual_layernorm_modulate(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
                                     frame_tokens: int, eps: float = 1e-6) -> tuple[Tensor, Rows8]:
    """`fused.gate_residual_layernorm_modulate` with its second result in 8 bit."""
    residual, *rows = torch.ops.longlive.gate_residual_layernorm_modulate_fp8(
        x, y, gate, shift, scale, frame_tokens, eps)
    return residual, Rows8(*rows)


def gate_residual_layernorm_affine(x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor,
                                   frame_tokens: int, eps: float = 1e-6) -> tuple[Tensor, Rows8]:
    """`fused.gate_residual_layernorm_affine` with its second result in 8 bit."""
    residual, *rows = torch.ops.longlive.gate_residual_layernorm_affine_fp8(
        x, y, gate, weight, bias, frame_tokens, eps)
    return residual, Rows8(*rows)


def gelu(x: Tensor) -> Rows8:
    """GELU in its tanh form of x [B,L,C], rounded to x's dtype, in 8 bit."""
    return Rows8(*torch.ops.longlive.gelu_fp8(x))


def linear(rows: Rows8, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """rows times weight [N,C], e4m3 with a scale per output channel [1,N], plus bias [N] -> [B,L,N] in the
    bias's dtype, bfloat16 on CUDA. C and N are multiples of 16 there. Raises ValueError when shapes do not
    fit.
    """
    return torch.ops.longlive.linear_fp8(rows.values, rows.scale, weight, weight_scale, bias)


@torch.library.custom_op("longlive::layernorm_modulate_fp8", mutates_args=())
def _layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int,
                        eps: float) -> tuple[Tensor, Tensor]:
    for vector in (shift, scale):
        fused.check_frames(x, vector, frame_tokens)
    if x.is_cuda:
        from longlive_opt.kernels import fp8_triton

        return fp8_triton.norm(x, None, None, scale, shift, frame_tokens, True, eps)[1:]
    return quantize_rows(fused.layernorm_modulate_reference(x, shift, scale, frame_tokens, eps))


@torch.library.custom_op("longlive::gate_residual_layernorm_modulate_fp8", mutates_args=())
def _gate_residual_layernorm_modulate(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
                                      frame_tokens: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    for vector in (gate, shift, scale):
        fused.check_frames(x, vector, frame_tokens)
    if x.is_cuda:
        from longlive_opt.kernels import fp8_triton

        return fp8_triton.norm(x, y.contiguous(), gate, scale, shift, frame_tokens, True, eps)
    residual = fused.gate_residual_reference(x, y, gate, frame_tokens)
    return residual, *quantize_rows(
        fused.layernorm_modulate_reference(residual, shift, scale, frame_tokens, eps))


@torch.library.custom_op("longlive::gate_residual_layernorm_affine_fp8", mutates_args=())
def _gate_residual_layernorm_affine(x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor,
                                    frame_tokens: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    fused.check_frames(x, gate, frame_tokens)
    if x.is_cuda:
        from longlive_opt.kernels import fp8_triton

        return fp8_triton.norm(x, y.contiguous(), gate, weight, bias, frame_tokens, False, eps)
    residual = fused.gate_residual_reference(x, y, gate, frame_tokens)
    return residual, *quantize_rows(F.layer_norm(residual, x.shape[-1:], weight, bias, eps))


@torch.library.custom_op("longlive::gelu_fp8", mutates_args=())
def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        from longlive_opt.kernels import fp8_triton

        return fp8_triton.gelu(x.contiguous())
    return quantize_rows(F.gelu(x, approximate="tanh"))


@torch.library.custom_op("longlive::linear_fp8", mutates_args=())
def _linear(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    outputs, channels = weight.shape
    expected = ((*values.shape[:-1], 1), (1, outputs), (outputs,))
    if values.shape[-1] != channels or expected != tuple(
            tuple(t.shape) for t in (row_scale, weight_scale, bias)):
        raise ValueError(f"values {tuple(values.shape)}, row_scale {tuple(row_scale.shape)}, weight "
                         f"{tuple(weight.shape)}, weight_scale {tuple(weight_scale.shape)}, bias "
                         f"{tuple(bias.shape)}; a weight [N,C] needs values [...,C] with scales [...,1], "
                         "scales [1,N] and a bias [N]")
    if values.is_cuda:
        # Fast accumulation keeps fewer bits than float32 does; without it Hopper loses much of the gain.
        product = scaled_mm(values.flatten(0, -2), weight.t(), row_scale.flatten(0, -2), weight_scale, bias,
                            use_fast_accum=True)
        return product.unflatten(0, values.shape[:-1])
    product = values.float() @ weight.float().t()
    return (product * (row_scale * weight_scale) + bias.float()).to(bias.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [...,C] -> e4m3 [...,C] and the scale of each row [...,1]."""
    values, scale = quantize_fp8(x)
    return values, scale[..., None]


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for what `quantize_rows` makes of x."""
    return torch.empty_like(x, dtype=FP8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@_gelu.register_fake
def _gelu_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(x)


@_layernorm_modulate.register_fake
def _layernorm_fake(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return empty_rows(x)


def _gate_residual_fake(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *empty_rows(x)


_gate_residual_layernorm_modulate.register_fake(_gate_residual_fake)
_gate_residual_layernorm_affine.register_fake(_gate_residual_fake)


@_linear.register_fake
def _linear_fake(values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor,
                 bias: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[0], dtype=bias.dtype)
