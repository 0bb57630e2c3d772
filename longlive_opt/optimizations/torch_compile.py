"""torch.compile by region: the two halves of a transformer block and each VAE stage; one piece of compiled
code serves all regions of a kind.

Idea: fuse the element-wise work around the linear layers (norms, modulation, rotation, cache write, gates,
SiLU). A block is compiled up to the write into the cache and from self-attention's result on; in between, the
attention kernel runs unchanged. So no compiled code depends on how full the window is. Compilation takes
seconds, because the 30 blocks differ only in their weights. Graphs are full and shapes static: a graph break
is an error, and nothing is compiled after the rehearsal. Values that depend only on the timestep are computed
once, and the clean pass skips work that only serves the flow. The first block of a video, whose latents come
as 1 and 2, is decoded uncompiled: two more variants would triple the compilation time. By default the VAE's
layout, its latents per call and cuDNN's search change as well: `vae_switches` implements them with their own
keys, and `params/compile_parts.yaml` measures them separately.

`compile_mode`: `default`; `reduce-overhead` adds CUDA graphs; `max-autotune` also lets Inductor time its
choices for the transformer's blocks: cuBLAS's algorithms for a matrix product and the tilings of its own
kernels. Its Triton matrix products are excluded. On an H100 those of the feed-forward were 18 to 20 % slower
than cuBLAS, the square ones between 11 % slower and 10 % (5 us) faster, and timing them took minutes. The VAE
is excluded too: there cuDNN wins, after more minutes. The graphs are those of the CUDA-graph optimization
(one per kind of pass) instead of Inductor's trees, which would keep one recording per block and address.

With `use_fused_kernels`, the transformer's passes are that optimization's. The VAE is compiled, and the
modes' graphs capture the fused passes. With `use_fused_vae`, the VAE is that optimization's and not compiled.
A tiny VAE is compiled as one piece.

Replaces: `sampler.forward`, `make_vae_decoder`. Costs: compilation, reported separately. Equal within
rounding: fused kernels keep float32 where eager PyTorch rounds to bf16 between operations.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..kernels import torch_internals
from ..kernels.compilers import check_cpp, check_triton
from ..models.dit import CausalDiT, DiTBlock, Head, TextContext, TimeContext
from ..models.taehv import TAEHV, TAEHVDecoder
from ..models.vae import History, StageHistory, StreamingDecoder
from ..ranks.heads import HeadExchange
from ..streaming.kv_cache import KVCache
from ..streaming.pipeline import Pipeline
from ..streaming.sampler import Forward, uniform_timesteps
from .base import Exactness, Optimization
from .cuda_graphs import graphed
from .ring_cache import RingKVCache, RingLayer

# A VAE residual block is specialised for each size, a transformer block's halves for each recache's size.
RECOMPILE_LIMIT = 64
AUTOTUNE = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}


@dataclass(frozen=True)
class TorchCompile(Optimization):
    name: ClassVar[str] = "torch_compile"
    exactness: ClassVar[Exactness] = "rounding"

    mode: str = "default"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        config = pipeline.config
        if pipeline.device.type == "cpu":
            check_cpp("use_torch_compile")
        else:
            check_triton("use_torch_compile")
        options = AUTOTUNE if self.mode == "max-autotune" else {}
        fused = config.use_fused_kernels
        forward: Forward = pipeline.sampler.forward
        if not fused:
            alone = pipeline.dit.exchange.size == 1
            forward = (CompiledForward if alone else ExchangedForward)(pipeline.dit, options)
        facts: dict[str, Any] = {"inductor_options": options}
        # A captured pass cannot be captured again, so with use_cuda_graphs that optimization captures.
        if self.mode != "default" and pipeline.device.type == "cuda" and not config.use_cuda_graphs:
            forward = graphed(pipeline, forward)
            facts["stats"] = forward.stats
        pipeline = dataclasses.replace(pipeline, sampler=pipeline.sampler.with_forward(forward))
        compiled = [] if fused else [f"{len(pipeline.dit.blocks)} transformer blocks"]
        vae, (_, height, width) = pipeline.vae, pipeline.latent_shape
        if isinstance(vae, TAEHV):
            network = torch.compile(vae, fullgraph=True, dynamic=False)
            pipeline = dataclasses.replace(
                pipeline, make_vae_decoder=lambda: CompiledTAEHVDecoder(network, vae, 1, height, width,
                                                                        config.latents_per_vae_call))
            compiled.append("the tiny VAE's decoder")
        elif not config.use_fused_vae:
            stages = compiled_stages(pipeline)
            pipeline = dataclasses.replace(
                pipeline, make_vae_decoder=lambda: CompiledDecoder(stages, vae, 1, height, width,
                                                                   config.latents_per_vae_call))
            compiled.append("the VAE decoder's stages")
        done = f"{' and '.join(compiled)} are compiled" if compiled else "nothing is left to compile"
        if self.mode != "default" and pipeline.device.type != "cuda":
            done += "; no CUDA graphs on the CPU"
        return self.report(pipeline, done, **facts)


def compiled_stages(pipeline: Pipeline) -> list[nn.Module]:
    """The stages of the VAE's decoder, compiled; they share the weights of the plain ones."""
    return [torch.compile(stage, fullgraph=True, dynamic=False)
            for stage in pipeline.vae.decoder.stages()]


def many_recompiles() -> Any:
    """Allow all specialisations. Set around calls, because a setting made in one notebook cell need not reach
    the next.
    """
    return torch_internals.many_recompiles(RECOMPILE_LIMIT)


class CompiledDecoder(StreamingDecoder):
    """A decoder with compiled stages for full chunks of latents, and plain ones for a first block."""

    def __init__(self, stages: Sequence[nn.Module], *arguments: Any):
        super().__init__(*arguments)
        self._stages = stages

    def decode(self, z: Tensor, history: StageHistory, first: bool) -> tuple[Tensor, History]:
        if first or z.shape[2] != self.chunk_latents:
            return super().decode(z, history, first)
        with many_recompiles():
            return self.vae.decode(z, history, first, self._stages)


class CompiledTAEHVDecoder(TAEHVDecoder):
    """A tiny VAE's decoder that is compiled for full chunks of latents, as in `CompiledDecoder`."""

    def __init__(self, network: nn.Module, *arguments: Any):
        super().__init__(*arguments)
        self._network = network

    def run(self, z: Tensor, memory: History) -> Tensor:
        if z.shape[2] != self.chunk_latents:
            return super().run(z, memory)
        with many_recompiles():
            return self._network(z, *memory)


class CompiledForward:
    """Calls compiled halves of blocks, embeds each timestep once, and fills the cache without computing a
    flow that nobody reads.
    """

    def __init__(self, dit: CausalDiT, options: Mapping[str, Any]):
        """Args: options: Inductor's options for the blocks."""
        self.dit = dit
        self._options = dict(options)
        self._write, self._finish = map(self._compiled, (write_half, finish_half))
        self._head = torch.compile(call_head, fullgraph=True, dynamic=False)
        self._times: dict[tuple[float, torch.Size], TimeContext] = {}

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        assert isinstance(cache, RingKVCache)
        dit, time = self.dit, self._embedded(timestep, latents)
        x = dit.patchify(latents.transpose(1, 2))
        with many_recompiles():
            for block, layer, key, value in zip(dit.blocks, cache.layers, text.keys, text.values,
                                                strict=True):
                q = self._enter(block, x, time.blocks, layer)
                if keys_only and layer is cache.layers[-1]:
                    return latents
                x = self._finish(block, x, self._read(q, layer), time.blocks, key, value)
            patches = self._head(dit.head, x, time.head)
        return dit.unpatchify(patches, *latents.shape[-2:]).transpose(1, 2)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False, options=dict(self._options))

    def _enter(self, block: DiTBlock, x: Tensor, time: Tensor, layer: RingLayer) -> Tensor:
        return self._write(block, x, time, layer)

    def _read(self, q: Tensor, layer: RingLayer) -> Tensor:
        return layer.read(q)

    def _embedded(self, timestep: float, latents: Tensor) -> TimeContext:
        key = (timestep, latents.shape[:2])
        if key not in self._times:
            self._times[key] = self.dit.embed_time(uniform_timesteps(timestep, latents))
        return self._times[key]


class ExchangedForward(CompiledForward):
    """The same on one of several ranks. The exchanges are not compiled, so the first half is in two parts."""

    def __init__(self, dit: CausalDiT, options: Mapping[str, Any]):
        super().__init__(dit, options)
        self._exchange: HeadExchange = dit.exchange
        self._project, self._store = map(self._compiled, (project_part, store_part))

    def _enter(self, block: DiTBlock, x: Tensor, time: Tensor, layer: RingLayer) -> Tensor:
        return self._store(layer, *self._exchange.to_heads(*self._project(block, x, time)))

    def _read(self, q: Tensor, layer: RingLayer) -> Tensor:
        return self._exchange.to_tokens(layer.read(self._exchange.queries(q)))


def project_part(block: DiTBlock, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`DiTBlock.project` as a function."""
    return block.project(x, time)


def store_part(layer: RingLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`RingLayer.enter` as a function."""
    return layer.enter(q, k, v)


def write_half(block: DiTBlock, x: Tensor, time: Tensor, layer: RingLayer) -> Tensor:
    """Run a block up to self-attention: write keys and values to the cache; return rotated q [B, L, N, D]."""
    return layer.enter(*block.project(x, time))


def finish_half(block: DiTBlock, x: Tensor, attended: Tensor, time: Tensor, text_key: Tensor,
                text_value: Tensor) -> Tensor:
    """`DiTBlock.finish` as a function, so that one piece of compiled code serves all blocks."""
    return block.finish(x, attended, time, text_key, text_value)


def call_head(head: Head, x: Tensor, time: Tensor) -> Tensor:
    """`Head.forward` as a function; the module itself does not change."""
    return head(x, time)
