"""Fused kernels: a transformer block as its linear layers, attention, and one Triton kernel in each gap.

Idea: between two linear layers, a block reads and writes its 14 MB of activations many times, for norms,
modulation, rotation, cache writes and gates. One kernel per gap reads and writes them once:

    q, k, v layer | RMS norms + rotation + cache write | self-attention | output layer
    | gate + residual + norm 3 | query layer | RMS norm | cross-attention | output layer
    | residual + norm 2 + modulation | layer with GELU | layer
    | gate + residual + norm 1 and modulation of the next block, or the head's

Cross-attention reads a prompt's own rows and one row of its padding. All rows of padding have the same keys
and values, so one of them stands for all, its score raised by the logarithm of their number: with 60 of 512
rows, 15 instead of 35 us on an H200, and with 500 of them 51.

Keys and values go directly to their slots of the ring, in bf16 or in 8 bit. The weights of q, k and v are
joined and multiplied once. The embedding and all modulation vectors depend only on the timestep and are
computed once. The clean pass ends with the last block's keys and values.

Replaces: `sampler.forward`. Needs a cache of fixed memory (`use_static_kv` or `use_quantized_kv`). With
`use_torch_compile`, the VAE is compiled and the transformer is not; CUDA graphs can capture its passes.

Costs: no memory for weights, because q's, k's and v's become views of the joined ones, block by block; the
vectors of a timestep take 2 to 7 MB at full size. On the CPU each kernel is plain PyTorch. Equal within
rounding: the kernels round where eager PyTorch does, but sums run in another order, rotation is in float32,
and on CUDA GELU is applied before its input is rounded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, ClassVar, NamedTuple, Protocol, Sequence, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import compilers, fused, fused_exchange, torch_internals
from ..models.dit import CausalDiT, DiTBlock, TextContext
from ..ranks.heads import HeadExchange
from ..streaming.kv_cache import KVCache
from ..streaming.pipeline import Pipeline
from ..streaming.sampler import uniform_timesteps
from .base import Exactness, Optimization
from .ring_cache import RingKVCache, RingLayer

Operand = TypeVar("Operand")
"""Input of a linear layer: activations [B, L, dim] in the model's dtype, or their 8-bit form."""


@dataclass(frozen=True)
class FusedKernels(Optimization):
    name: ClassVar[str] = "fused_kernels"
    exactness: ClassVar[Exactness] = "rounding"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        dit, cuda = pipeline.dit, pipeline.device.type == "cuda"
        if cuda:
            check_triton(dit.config.head_dim)
        products = [PlainProducts(block) for block in dit.blocks]
        forward = FusedForward(dit, products)
        pipeline = dataclasses.replace(pipeline, sampler=pipeline.sampler.with_forward(forward))
        kernels = "Triton kernels" if cuda else "plain PyTorch, one operator per kernel (CPU)"
        return self.report(
            pipeline, f"{len(dit.blocks)} transformer blocks on {kernels}; q, k and v are one linear layer, "
                      "which shares its weights with the separate ones",
            joined_weight_bytes=sum(own.weight.nbytes + own.bias.nbytes for own in products))


def check_triton(head_dim: int) -> None:
    """Check that the kernels can run on CUDA.

    Raises:
        NotAvailable: Triton, or something it needs to start kernels, is missing.
        UserError: the kernels do not support the size of the model's heads.
    """
    compilers.check_triton("use_fused_kernels")
    if head_dim & (head_dim - 1):
        raise UserError(f"use_fused_kernels: the kernels take heads of 2^n channels, but this model has "
                        f"{head_dim}; switch use_fused_kernels off.")


class Modulation(NamedTuple):
    """The vectors of one block at one timestep, each [B, F, dim]."""

    shift_a: Tensor
    scale_a: Tensor
    gate_a: Tensor
    shift_f: Tensor
    scale_f: Tensor
    gate_f: Tensor


class TimeTable(NamedTuple):
    """Everything that depends on a timestep: the vectors of each block, and shift and scale [B, F, dim] of
    the norm that follows it, which is the next block's or the head's.
    """

    blocks: list[Modulation]
    following: list[tuple[Tensor, Tensor]]


class Products(Protocol[Operand]):
    """The linear layers of a block that follow a norm, and the norms that make their inputs; an optimization
    may round both to fewer bits. `norm_qkv` is `fused.layernorm_modulate`. The others are the two operators
    of `fused` that add to the residual stream before the norm, each with the output type of its layer.
    """

    norm_qkv: Callable[..., Operand]
    add_norm_qkv: Callable[..., tuple[Tensor, Operand]]
    add_norm_query: Callable[..., tuple[Tensor, Operand]]
    add_norm_up: Callable[..., tuple[Tensor, Operand]]

    def qkv(self, h: Operand) -> Tensor:
        """Self-attention's q, k and v, concatenated: [B, L, 3 dim]."""

    def query(self, h: Operand) -> Tensor:
        """Cross-attention's q, [B, L, dim]."""

    def feed_forward(self, h: Operand) -> Tensor:
        """[B, L, dim]"""


class PlainProducts:
    """`Products` in the model's dtype. It joins weights of `block`, which still works as before."""

    norm_qkv = staticmethod(fused.layernorm_modulate)
    add_norm_qkv = add_norm_up = staticmethod(fused.gate_residual_layernorm_modulate)
    add_norm_query = staticmethod(fused.gate_residual_layernorm_affine)

    def __init__(self, block: DiTBlock):
        attention = block.self_attn
        self.weight, self.bias = join_linears((attention.q, attention.k, attention.v))
        self.query = block.cross_attn.q
        # The feed-forward's first layer with its GELU, and its second layer.
        self.up = partial(gelu_linear_cuda if self.weight.is_cuda else gelu_linear, linear=block.ffn[0])
        self.down = block.ffn[2]

    def qkv(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight, self.bias)

    def feed_forward(self, h: Tensor) -> Tensor:
        return self.down(self.up(h))


class FusedForward:
    """A `Forward` over fused blocks."""

    def __init__(self, dit: CausalDiT, products: Sequence[Products]):
        """Args: products: those of each block."""
        self.dit = dit
        self.products = list(products)
        # A block ends with the norm of the next block's qkv; the last block ends with the head's norm.
        ends = [*(own.add_norm_qkv for own in products[1:]), PlainProducts.add_norm_qkv]
        self._enter = products[0].norm_qkv
        kind = FusedBlock if dit.exchange.size == 1 else partial(ExchangedBlock, dit.exchange)
        self._blocks = [kind(*parts) for parts in zip(dit.blocks, products, ends, strict=True)]
        self._times: dict[tuple[float, torch.Size], TimeTable] = {}

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        assert isinstance(cache, RingKVCache)
        dit, time = self.dit, self._time_table(timestep, latents)
        x = dit.patchify(latents.transpose(1, 2))
        frame_tokens = x.shape[1] // latents.shape[1]
        first, text_rows = time.blocks[0], fused.prompt_rows(text.keys[0])
        h = self._enter(x, first.shift_a, first.scale_a, frame_tokens, dit.config.eps)
        for i, (block, layer) in enumerate(zip(self._blocks, cache.layers, strict=True)):
            q = block.write(h, layer)
            if keys_only and layer is cache.layers[-1]:
                return latents
            x, h = block.finish(x, block.read(q, layer), time.blocks[i], time.following[i], text.keys[i],
                                text.values[i], text_rows, frame_tokens)
        height, width = latents.shape[-2:]
        return dit.unpatchify(dit.head.head(h), height, width).transpose(1, 2)

    def _time_table(self, timestep: float, latents: Tensor) -> TimeTable:
        key = (timestep, latents.shape[:2])
        if key not in self._times:
            time = self.dit.embed_time(uniform_timesteps(timestep, latents))
            head = self.dit.head
            blocks = [Modulation(*(block.modulation + time.blocks).unbind(2)) for block in self.dit.blocks]
            last_shift, last_scale = (head.modulation + time.head).unbind(2)
            following = [(vectors.shift_a, vectors.scale_a) for vectors in blocks[1:]]
            self._times[key] = TimeTable(blocks, [*following, (last_shift, last_scale)])
        return self._times[key]


class FusedBlock:
    """The operations of one `DiTBlock`."""

    def __init__(self, block: DiTBlock, products: Products, end: Callable[..., tuple[Tensor, Operand]]):
        """Args: end: `add_norm_qkv` with the output type that the next step needs."""
        self.block = block
        self.products = products
        self._end = end

    def write(self, h: Operand, layer: RingLayer) -> Tensor:
        """Write keys and values of the normed, modulated h to `layer`; return rotated q [B, L, N, D]."""
        attention, cache = self.block.self_attn, layer.cache
        qkv = self.products.qkv(h)
        q = fused.qk_norm_rope_write(
            qkv, attention.norm_q.weight, attention.norm_k.weight, cache.cosine, cache.sine,
            cache.token_slots, *layer.memory, cache.geometry.tokens_per_frame, attention.norm_q.eps)
        if cache.turns_sink:
            layer.turn_sink(self._raw_keys(qkv) if cache.writes_sink else None)
        return q

    def read(self, q: Tensor, layer: RingLayer) -> Tensor:
        """Attend with rotated q; return [B, L, N, D]."""
        return layer.read(q)

    def _raw_keys(self, qkv: Tensor) -> Tensor:
        attention = self.block.self_attn
        k = qkv.unflatten(-1, (3, -1))[:, :, 1].contiguous()
        return fused.rms_norm(k, attention.norm_k.weight, attention.norm_k.eps).unflatten(
            -1, (-1, attention.head_dim))

    def finish(self, x: Tensor, attended: Tensor, vectors: Modulation, following: tuple[Tensor, Tensor],
               text_key: Tensor, text_value: Tensor, text_rows: Tensor,
               frame_tokens: int) -> tuple[Tensor, Operand]:
        """Run the rest of the block after self-attention.

        Args:
            x: the residual stream [B, L, dim].
            attended: self-attention's result [B, L, N, D].
            following: shift and scale [B, F, dim] of the norm after this block.
            text_rows: the prompt's own rows, [B] (`fused.prompt_rows`).

        Returns:
            The new residual stream [B, L, dim], and the same normed and modulated by `following`.
        """
        block, products, cross, eps = self.block, self.products, self.block.cross_attn, self.block.norm1.eps
        y = block.self_attn.output(attended)
        x, h = products.add_norm_query(x, y, vectors.gate_a, block.norm3.weight, block.norm3.bias,
                                       frame_tokens, eps)
        q = fused.rms_norm(products.query(h), cross.norm_q.weight, cross.norm_q.eps)
        q = q.unflatten(-1, (-1, cross.head_dim))
        y = cross.output(fused.cross_attention(q, text_key, text_value, text_rows))
        x, h = products.add_norm_up(x, y, None, vectors.shift_f, vectors.scale_f, frame_tokens, eps)
        y = products.feed_forward(h)
        return self._end(x, y, vectors.gate_f, *following, frame_tokens, eps)


class ExchangedBlock(FusedBlock):
    """The operations of one `DiTBlock` with this rank's tokens, and attention with this rank's heads."""

    def __init__(self, exchange: HeadExchange, *arguments: Any):
        super().__init__(*arguments)
        self._exchange = exchange

    def write(self, h: Operand, layer: RingLayer) -> Tensor:
        attention, cache = self.block.self_attn, layer.cache
        qkv = self._exchange.norm_to_heads(self.products.qkv(h), attention.norm_q.weight,
                                           attention.norm_k.weight, attention.norm_q.eps)
        q = fused_exchange.rope_write(qkv, cache.cosine, cache.sine, cache.token_slots, *layer.memory,
                                      cache.geometry.tokens_per_frame)
        if cache.turns_sink:
            k = qkv.unflatten(-1, (3, -1, attention.head_dim))[:, :, 1]
            layer.turn_sink(k if cache.writes_sink else None)
        return q

    def read(self, q: Tensor, layer: RingLayer) -> Tensor:
        return self._exchange.to_tokens(layer.read(self._exchange.queries(q)))


@torch.no_grad()
def join_linears(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Join several linear layers with the same input: one weight [sum of outputs, inputs] and one bias. The
    layers' own weights become views of them, so the layers still work and nothing is stored twice.
    """
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    sizes = [linear.out_features for linear in linears]
    for linear, own_weight, own_bias in zip(linears, weight.split(sizes), bias.split(sizes)):
        linear.weight = nn.Parameter(own_weight, requires_grad=False)
        linear.bias = nn.Parameter(own_bias, requires_grad=False)
    return weight, bias


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """GELU, in its tanh form, of a linear layer."""
    return F.gelu(linear(x), approximate="tanh")


def gelu_linear_cuda(x: Tensor, linear: nn.Linear) -> Tensor:
    """The same with GELU in the matrix product's epilogue: 0.204 instead of 0.245 ms at full size on an H100.
    (On the CPU this operator uses the other form of GELU.)
    """
    rows = torch_internals.gelu_linear(x.flatten(0, -2), linear.weight, linear.bias)
    return rows.unflatten(0, x.shape[:-1])
