"""torch.compile by region: one transformer block, one VAE stage; the same compiled code serves all of them.

Idea: fuse the element-wise work around the matrix products (norms, modulation, rotation, cache write, gates,
SiLU). Compiling one block instead of the whole transformer keeps compilation at seconds, since the 30 blocks
differ only in their weights. Full graphs, static shapes: a graph break is an error, and after the rehearsal
nothing is compiled again. What depends on the timestep alone is computed once, the clean pass leaves out what
only serves the flow, and the VAE decodes a whole block of latents in one call in the channels-last layout.

`compile_mode`: `default`; `reduce-overhead` adds CUDA graphs; `max-autotune` also lets Inductor time its
kernel choices for the transformer. (For the VAE it would time dozens of slow convolution templates, minutes
of set-up that cuDNN wins.) The graphs are those of the CUDA-graph room (one per kind of pass) and not
Inductor's trees, which would keep one recording per block and address.

With `use_fused_kernels` the transformer's passes are that room's; the VAE is compiled, and the modes' graphs
capture the fused passes.

Seams: `sampler.forward`, `make_vae_decoder`. Costs: compilation, reported apart. Equal within rounding: fused
kernels keep float32 where eager rounds to bf16 between operations.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import NotAvailable, UserError
from ..kv_cache import KVCache
from ..models.dit import CausalDiT, TextContext, TimeContext
from ..models.vae import StreamingDecoder
from ..pipeline import Pipeline
from ..sampler import uniform_timesteps
from .cuda_graphs import GraphedForward
from .room import Level, Room

# One block is specialised for every fill of the window, for recaches of several lengths and for each kind of
# pass.
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class TorchCompile(Room):
    name: ClassVar[str] = "torch_compile"
    level: ClassVar[Level] = "rounding"

    mode: str = "default"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        config = pipeline.config
        if not (config.use_static_kv or config.use_quantized_kv):
            raise UserError("use_torch_compile: the reference cache changes its shapes in Python; switch on "
                            "use_static_kv or use_quantized_kv as well.")
        check_compiler(pipeline.device)
        inductor_mode = {"default": "default", "reduce-overhead": "default",
                         "max-autotune": "max-autotune-no-cudagraphs"}[self.mode]
        regions = compile_regions(pipeline, inductor_mode)
        # Without it cuDNN takes a kernel of an older generation for the VAE's 96-channel convolutions.
        torch.backends.cudnn.benchmark = True
        fused = config.use_fused_kernels
        forward = pipeline.sampler.forward if fused else CompiledForward(pipeline.dit)
        facts = {"regions": regions, "inductor_mode": inductor_mode, "cudnn_benchmark": True}
        # A captured pass cannot be captured again: with use_cuda_graphs that room captures.
        if self.mode != "default" and pipeline.device.type == "cuda" and not config.use_cuda_graphs:
            forward = GraphedForward(forward, pipeline.device)
            facts["stats"] = forward.stats
        latents = config.vae_chunk_latents or config.block_frames
        vae, model = pipeline.vae, pipeline.model
        pipeline = dataclasses.replace(
            pipeline, sampler=pipeline.sampler.with_forward(forward),
            make_vae_decoder=lambda: CompiledDecoder(vae, 1, model.latent_height, model.latent_width,
                                                     latents))
        blocks = "" if fused else f"{len(pipeline.dit.blocks)} transformer blocks and "
        done = f"{blocks}the VAE decoder's stages are compiled; {latents} latents a VAE call, channels last"
        if self.mode != "default" and pipeline.device.type != "cuda":
            done += "; no CUDA graphs on the CPU"
        return self.report(pipeline, done, **facts)


def compile_regions(pipeline: Pipeline, mode: str) -> int:
    """Compile every VAE decoder stage, and every block that no other room runs, in place; returns how many
    modules were marked.
    """
    dit, vae = pipeline.dit, pipeline.vae.use_channels_last()
    modes = {} if pipeline.config.use_fused_kernels else dict.fromkeys((*dit.blocks, dit.head), mode)
    modes |= dict.fromkeys(vae.decoder.stages(), "default")
    for module, module_mode in modes.items():
        module.compile(fullgraph=True, dynamic=False, mode=module_mode)
    return len(modes)


def check_compiler(device: torch.device) -> None:
    """Inductor writes C++ for the CPU.

    Raises:
        NotAvailable: there is no C++ compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise NotAvailable("use_torch_compile: compiling for the CPU needs a C++ compiler; install g++ or "
                           "clang++.")


def many_recompiles() -> Any:
    """Room for all specialisations. Set around calls: a setting made in one notebook cell need not reach the
    next.
    """
    return torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)


class CompiledDecoder(StreamingDecoder):
    """A decoder whose stages are compiled."""

    def push(self, latents: Tensor) -> list[Tensor]:
        with many_recompiles():
            return super().push(latents)


class CompiledForward:
    """Calls compiled blocks; embeds each timestep once, and fills the cache without computing a flow nobody
    reads.
    """

    def __init__(self, dit: CausalDiT):
        self.dit = dit
        self._times: dict[tuple[float, torch.Size], TimeContext] = {}

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        time, x = self._embedded(timestep, latents), latents.transpose(1, 2)
        with many_recompiles():
            if keys_only:
                self.dit.store_keys(x, time, text, cache.layers)
                return latents
            return self.dit.forward_embedded(x, time, text, cache.layers).transpose(1, 2)

    def _embedded(self, timestep: float, latents: Tensor) -> TimeContext:
        key = (timestep, latents.shape[:2])
        if key not in self._times:
            self._times[key] = self.dit.embed_time(uniform_timesteps(timestep, latents))
        return self._times[key]
