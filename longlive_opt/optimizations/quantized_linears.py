"""Quantized linear layers: those after a norm or GELU, in 8 bit with one scale per row.

Idea: Hopper multiplies 8-bit numbers at up to twice the rate of bf16, provided that rounding the activations
costs no separate pass. So the kernel that computes an activation rounds it: the norms of `use_fused_kernels`
write 8 bit and one scale per token. Weights are quantised once, with one scale per output channel.

`linear_quantization`: `int8` adds an error of about 1.3 % RMS (root mean square) to a matrix product of
normal numbers, `fp8` (e4m3) about 3.7 %, because e4m3 keeps three bits of mantissa at any scale. The int8
matrix product is a kernel of this library, which applies GELU to its sums. The e4m3 one is cuBLAS's with
float32 sums; GELU runs together with the rounding after it.

`linear_layers` names the layers of a block: `qkv` (self-attention's q, k and v as one), `query`
(cross-attention's q), `up` and `down` (the feed-forward's). The others stay in the model's dtype, and so do
always the two layers after attention. Each of those takes 0.035 ms at full size on an H100 and 0.026 in 8
bit, but an attention kernel makes its input; reading and rounding that once more would cost about as much as
the 8-bit layer gains.

Replaces: the linear layers of `sampler.forward`, which must be that of `use_fused_kernels`. The head,
attention, the layers that read the prompt and the time embedding do not change.

Costs: precision. It saves memory: at full size, 1.1 GB of 8-bit weights replace 2.2 GB in bfloat16, which are
released, so the plain model can no longer run. It does not help with small layers or on GPUs without 8-bit
matrix products. On the CPU they are emulated: the same arithmetic, slower than a plain linear layer.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import LINEAR_LAYERS
from ..errors import NotAvailable, UserError
from ..kernels import linear8
from ..models.dit import DiTBlock
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization
from .fused_kernels import FusedForward, Operand, PlainProducts

# The 8-bit matrix products need multiples of this many channels.
CHANNEL_GROUP = 16
# Linear layers per block: qkv, output, cross-attention's q and output, and two in the feed-forward.
BLOCK_LINEARS = 6
NAMES = {"int8": "int8", "fp8": "e4m3"}
CAPABILITY = {"int8": ((8, 0), "8.0 (Ampere)"), "fp8": ((8, 9), "8.9 (Ada, Hopper)")}
"""The oldest GPU with matrix products of a format."""


@dataclass(frozen=True)
class QuantizedLinears(Optimization):
    name: ClassVar[str] = "quantized_linears"
    exactness: ClassVar[Exactness] = "lossy"

    quantization: str = "int8"
    layers: tuple[str, ...] = LINEAR_LAYERS

    def apply(self, pipeline: Pipeline) -> Pipeline:
        dit, cuda = pipeline.dit, pipeline.device.type == "cuda"
        assert isinstance(pipeline.sampler.forward, FusedForward)
        if cuda:
            check_linears(self.quantization, dit.config.dim, dit.config.ffn_dim,
                          torch.cuda.get_device_capability(pipeline.device))
        products = [QuantizedProducts(block, plain, self.quantization, self.layers)
                    for block, plain in zip(dit.blocks, pipeline.sampler.forward.products, strict=True)]
        released = sum(release(linear) for block in dit.blocks for linear in replaced(block, self.layers))
        pipeline = dataclasses.replace(
            pipeline, sampler=pipeline.sampler.with_forward(FusedForward(dit, products)))
        linears = [linear for own in products for linear in own.linears]
        kernels = "kernels of this library" if self.quantization == "int8" else "cuBLAS, sums in float32"
        done = (f"{len(linears)} of {BLOCK_LINEARS * len(products)} linear layers of a pass in "
                f"{NAMES[self.quantization]} ({', '.join(self.layers)}), scales per token and output "
                f"channel; {kernels if cuda else 'emulated in PyTorch (CPU)'}")
        return self.report(pipeline, done, quantized_weight_bytes=sum(linear.nbytes for linear in linears),
                           released_weight_bytes=released)


def linears_of(block: DiTBlock) -> dict[str, tuple[nn.Linear, ...]]:
    """The plain linear layers behind each name of `linear_layers`."""
    attention = block.self_attn
    return {"qkv": (attention.q, attention.k, attention.v), "query": (block.cross_attn.q,),
            "up": (block.ffn[0],), "down": (block.ffn[2],)}


def replaced(block: DiTBlock, layers: Sequence[str]) -> list[nn.Linear]:
    """The plain linear layers of a transformer block that `layers` names."""
    return [linear for name, linears in linears_of(block).items() if name in layers for linear in linears]


def release(linear: nn.Linear) -> int:
    """Release the weights of `linear`, which keeps their shapes and refuses calls; return the bytes."""
    parameters = dict(linear.named_parameters())
    for name, value in parameters.items():
        setattr(linear, name, nn.Parameter(value.to("meta"), requires_grad=False))
    return sum(value.nbytes for value in parameters.values())


def check_linears(quantization: str, dim: int, ffn_dim: int, capability: tuple[int, int]) -> None:
    """Check that 8-bit linear layers of these widths run on a GPU of this compute capability.

    Raises:
        NotAvailable: the GPU does not support the format's matrix product, or Triton is missing.
        UserError: the matrix products do not support these widths.
    """
    needed, which = CAPABILITY[quantization]
    if capability < needed:
        raise NotAvailable(
            f"use_quantized_linears: linear_quantization {quantization} needs compute capability {which} or "
            f"newer, but this GPU has {capability[0]}.{capability[1]}; "
            + ("use linear_quantization: int8." if capability >= CAPABILITY["int8"][0]
               else "switch use_quantized_linears off."))
    if importlib.util.find_spec("triton") is None:
        raise NotAvailable("use_quantized_linears: its kernels need Triton, which is not installed here; "
                           "install the one that belongs to this PyTorch, or switch use_quantized_linears "
                           "off.")
    if dim % CHANNEL_GROUP or ffn_dim % CHANNEL_GROUP:
        raise UserError(f"use_quantized_linears: the kernels take multiples of {CHANNEL_GROUP} channels, "
                        f"but this model has {dim} and, in the feed-forward, {ffn_dim}; switch "
                        "use_quantized_linears off.")


class QuantizedLinear:
    """Linear layers of the same input as one 8-bit matrix product, with copies of their weights. There is one
    scale per output channel, so the layers' scales are independent.
    """

    def __init__(self, linears: Sequence[nn.Linear], quantization: str):
        with torch.no_grad():
            weight = torch.cat([linear.weight for linear in linears])
            self.weight, scale = linear8.rows_reference(weight, quantization)
            self.bias = torch.cat([linear.bias for linear in linears])
        self.scale = scale.t().contiguous()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes + self.bias.nbytes

    def __call__(self, rows: linear8.Rows8, gelu: bool = False) -> Tensor:
        return linear8.linear(rows, self.weight, self.scale, self.bias, gelu=gelu)


class QuantizedProducts:
    """`Products` with the layers named in `layers`, and the norms before them, in 8 bit."""

    def __init__(self, block: DiTBlock, plain: PlainProducts, quantization: str, layers: Sequence[str]):
        """Args: plain: those of the same block. Layers not named in `layers` come from it, one by one, so
        that the joined weight of q, k and v is released when it is replaced.
        """
        own = {name: QuantizedLinear(linears, quantization)
               for name, linears in linears_of(block).items() if name in layers}
        self.linears = tuple(own.values())
        self._form, self._down = quantization, own.get("down")
        self._gelu_in_product = quantization == "int8"
        self.qkv = own["qkv"] if "qkv" in own else plain.qkv
        self.query = own.get("query", plain.query)
        self._up, self._plain_up, self._plain_down = own.get("up"), plain.up, plain.down
        in_8_bit = {"form": quantization}
        modulate = partial(linear8.gate_residual_layernorm_modulate, **in_8_bit)
        affine = partial(linear8.gate_residual_layernorm_affine, **in_8_bit)
        self.norm_qkv, self.add_norm_qkv = plain.norm_qkv, plain.add_norm_qkv
        if "qkv" in own:
            self.norm_qkv, self.add_norm_qkv = partial(linear8.layernorm_modulate, **in_8_bit), modulate
        self.add_norm_query = affine if "query" in own else plain.add_norm_query
        self.add_norm_up = modulate if "up" in own else plain.add_norm_up

    def feed_forward(self, h: Operand) -> Tensor:
        if self._up is None:
            h, rounded_only = self._plain_up(h), True
        else:
            rounded_only = self._gelu_in_product or self._down is None
            h = self._up(h, gelu=rounded_only)
        if self._down is None:
            return self._plain_down(h)
        return self._down(linear8.quantize_rows(h, self._form, gelu=not rounded_only))
