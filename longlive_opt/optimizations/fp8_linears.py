"""FP8 linears: the products that have a norm or GELU before them, in e4m3 with a scale a row.

Idea: Hopper multiplies e4m3 at up to twice the rate of bf16, if rounding the activations to 8 bit costs no
pass of its own. So the kernel that makes an activation rounds it: `use_fused_kernels`' norms write e4m3 and
a scale per token, and GELU, in a kernel of its own between the feed-forward's two products, does the same.
Weights are quantised once, with a scale per output channel.

Four of a block's six products a pass are done so: q, k and v as one, cross-attention's q, and the two of the
feed-forward. The two behind attention stay in the model's dtype: one takes 0.035 ms at full size on an H100
and 0.026 in 8 bit, and what it multiplies comes from an attention kernel, so that reading it once more and
rounding it would cost about what the product gains. By the ceilings there the four gain 0.21 ms a block and
GELU's pass, now apart from the product, takes 0.04 back: 5 ms of a pass of 30 blocks.

Seam: the products of `sampler.forward`, which must be that of `use_fused_kernels`. The head, attention, what
reads the prompt and the time embedding are left alone.

Costs: precision, about 3.7 % RMS of each product on random normal data. It gives memory back: at full size
1.1 GB of weights in 8 bit stand for 2.2 GB in bfloat16, which are let go, so the plain model cannot run any
more. Does not help where a product is small, or where a GPU has no 8-bit products. On the CPU they are
emulated: the same arithmetic in float32, slower than a plain product.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Sequence

import torch
from torch import Tensor, nn

from ..errors import NotAvailable, UserError
from ..kernels import fp8
from ..models.dit import DiTBlock
from ..pipeline import Pipeline
from .fused_kernels import FusedForward
from .room import Level, Room

# Multiples that cuBLAS's 8-bit products take, in channels.
CHANNEL_GROUP = 16
# Products of a block in a pass: q k v, output, cross-attention's q and output, two of the feed-forward.
BLOCK_PRODUCTS = 6


@dataclass(frozen=True)
class Fp8Linears(Room):
    name: ClassVar[str] = "fp8_linears"
    level: ClassVar[Level] = "lossy"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        dit, cuda = pipeline.dit, pipeline.device.type == "cuda"
        assert isinstance(pipeline.sampler.forward, FusedForward)
        if cuda:
            check_products(dit.config.dim, dit.config.ffn_dim,
                           torch.cuda.get_device_capability(pipeline.device))
        products = [Fp8Products(block) for block in dit.blocks]
        released = sum(release(linear) for block in dit.blocks for linear in plain_linears(block))
        pipeline = dataclasses.replace(
            pipeline, sampler=pipeline.sampler.with_forward(FusedForward(dit, products)))
        linears = [linear for own in products for linear in own.linears]
        where = "cuBLAS and Triton" if cuda else "emulated in PyTorch (CPU)"
        done = (f"{len(linears)} of {BLOCK_PRODUCTS * len(products)} products of a pass in e4m3, row-wise "
                f"scales; {where}")
        return self.report(pipeline, done, fp8_weight_bytes=sum(linear.nbytes for linear in linears),
                           released_weight_bytes=released)


def plain_linears(block: DiTBlock) -> tuple[nn.Linear, ...]:
    """Those of a transformer block that `Fp8Products` stands for."""
    attention = block.self_attn
    return attention.q, attention.k, attention.v, block.cross_attn.q, block.ffn[0], block.ffn[2]


def release(linear: nn.Linear) -> int:
    """Let go of the weights of `linear`, which keeps their shapes and refuses to be called; returns bytes."""
    parameters = dict(linear.named_parameters())
    for name, value in parameters.items():
        setattr(linear, name, nn.Parameter(value.to("meta"), requires_grad=False))
    return sum(value.nbytes for value in parameters.values())


def check_products(dim: int, ffn_dim: int, capability: tuple[int, int]) -> None:
    """Check that 8-bit products of these widths run on a GPU of this compute capability. Triton, which makes
    their operands, is what `use_fused_kernels` has asked for.

    Raises:
        NotAvailable: the GPU has no e4m3.
        UserError: widths that the products do not take.
    """
    if capability < (8, 9):
        raise NotAvailable("use_quantized_linears: e4m3 products need compute capability 8.9 (Ada, Hopper) or "
                           f"newer, and this GPU has {capability[0]}.{capability[1]}; switch "
                           "use_quantized_linears off.")
    if dim % CHANNEL_GROUP or ffn_dim % CHANNEL_GROUP:
        raise UserError(f"use_quantized_linears: the products take multiples of {CHANNEL_GROUP} channels, and this "
                        f"model has {dim} and, in the feed-forward, {ffn_dim}; switch use_quantized_linears off.")


class Fp8Linear:
    """Linears of the same input as one product in e4m3, with copies of their weights: one scale per output
    channel, so that those of one linear do not depend on the others'.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        with torch.no_grad():
            self.weight, scale = fp8.quantize_rows(torch.cat([linear.weight for linear in linears]))
            self.bias = torch.cat([linear.bias for linear in linears])
        self.scale = scale.t().contiguous()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes + self.bias.nbytes

    def __call__(self, rows: fp8.Rows8) -> Tensor:
        return fp8.linear(rows, self.weight, self.scale, self.bias)


class Fp8Products:
    """`Products` in e4m3."""

    modulate = staticmethod(fp8.layernorm_modulate)
    add_modulate = staticmethod(fp8.gate_residual_layernorm_modulate)
    add_affine = staticmethod(fp8.gate_residual_layernorm_affine)

    def __init__(self, block: DiTBlock):
        *qkv, query, first, second = plain_linears(block)
        self.qkv, self.query = Fp8Linear(qkv), Fp8Linear((query,))
        self._first, self._second = Fp8Linear((first,)), Fp8Linear((second,))

    @property
    def linears(self) -> tuple[Fp8Linear, ...]:
        return self.qkv, self.query, self._first, self._second

    def feed_forward(self, rows: fp8.Rows8) -> Tensor:
        return self._second(fp8.gelu(self._first(rows)))
