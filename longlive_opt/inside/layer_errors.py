"""The error of every layer of a preset against the reference, at each denoising step, on equal inputs.

The truth is the reference pipeline in float32 with the preset's weights. It streams to the examined block.
All pipelines then get the same inputs, rounded once to the preset's dtype: the past latents, from which a
clean pass per block fills their caches, the noisy latents of each step, and the encoded prompt. A layer's
error is the root mean square of the difference of its output, the residual stream, divided by that of the
truth's output. It contains the errors of the layers before it. The reference in the preset's own dtype goes
through the same, so that the plot shows what its rounding alone costs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ExperimentConfig, keys_of
from ..errors import UserError
from ..measurement.fidelity import full_float32
from ..models.dit import TextContext
from ..streaming.kv_cache import KVCache
from ..streaming.pipeline import Pipeline, build_reference, float32_twin
from ..streaming.sampler import StreamNoise
from .passes import layer_outputs, without_graphs


@dataclass(frozen=True)
class LayerErrors:
    """Relative errors, float64 [steps, layers]: the preset's, and the reference's in the preset's dtype
    (None if that is float32, the truth's).
    """

    preset: str
    block: int
    dtype: str
    timesteps: tuple[float, ...]
    errors: Tensor
    reference: Tensor | None


@dataclass(frozen=True)
class _Inputs:
    """What every pipeline gets, in the preset's dtype: the past blocks, the noisy latents of each step, the
    encoded prompt.
    """

    past: list[Tensor]
    noisy: list[Tensor]
    prompt: Tensor


def plain_config(config: ExperimentConfig) -> ExperimentConfig:
    """The same experiment without any optimization."""
    defaults = ExperimentConfig()
    return replace(config, name="reference", title="Reference",
                   **{key: getattr(defaults, key) for key in keys_of("optimizations")})


def layer_errors(pipeline: Pipeline, prompt: str, block: int) -> LayerErrors:
    """Compare every layer of `pipeline` in the denoising passes of `block`.

    Builds the reference in float32 and, if the preset's dtype is another one, in that.

    Raises:
        UserError: the block is negative, or the layers cannot be watched.
    """
    if block < 0:
        raise UserError(f"block: {block} is negative; the first block is 0.")
    embedding = pipeline.text_encoder.encode([prompt]).to(pipeline.dtype)
    with full_float32():
        twin = float32_twin(pipeline)
        inputs = _inputs(twin, embedding, block, pipeline.dtype)
        truth = _steps(twin, inputs)
        found = _compare(pipeline, inputs, truth)
        own = None
        if pipeline.dtype != torch.float32:
            own = _compare(build_reference(plain_config(pipeline.config)), inputs, truth)
    del twin, truth
    gc.collect()
    if pipeline.device.type == "cuda":
        torch.cuda.empty_cache()
    return LayerErrors(pipeline.config.name, block, str(pipeline.dtype).removeprefix("torch."),
                       tuple(pipeline.sampler.timesteps), found, own)


@torch.no_grad()
def _inputs(twin: Pipeline, embedding: Tensor, block: int, dtype: torch.dtype) -> _Inputs:
    """Stream the truth to `block` on its own past, as rounded to `dtype`, with the noise of the config."""
    sampler, plan = twin.sampler, twin.sampler.plan
    cache, text = twin.make_cache(), twin.embed_text(embedding.float())
    source = StreamNoise(plan, twin.latent_shape, twin.config.seed, twin.device, dtype)
    past: list[Tensor] = []
    for number in range(block + 1):
        noise, step_noise = (part.float() for part in source.next_block())
        start = number * plan.block_frames
        if number < block:
            past.append(sampler.denoise(cache, text, start, noise, step_noise)[-1].to(dtype))
            sampler.clean_pass(cache, text, start, past[-1].float())
    noisy, latents = [], noise
    for step, timestep in enumerate(sampler.timesteps):
        noisy.append(latents.to(dtype))
        rounded = noisy[-1].float()
        flow = sampler.run_pass(cache, text, start, rounded, timestep)
        if step + 1 < len(sampler.timesteps):
            clean = sampler.schedule.x0_from_flow(flow, rounded, timestep)
            latents = sampler.schedule.add_noise(clean, step_noise[step], sampler.timesteps[step + 1])
    return _Inputs(past, noisy, embedding)


def _filled(pipeline: Pipeline, inputs: _Inputs) -> tuple[KVCache, TextContext]:
    """A cache with the past of `inputs`, and the prompt as the transformer takes it."""
    cache, text = pipeline.make_cache(), pipeline.embed_text(inputs.prompt.to(pipeline.dtype))
    for number, latents in enumerate(inputs.past):
        start = number * pipeline.sampler.plan.block_frames
        pipeline.sampler.clean_pass(cache, text, start, latents.to(pipeline.dtype))
    return cache, text


@torch.no_grad()
def _watch(pipeline: Pipeline, inputs: _Inputs, note: Callable[[int, int, Tensor], None]) -> None:
    """Call `note(step, layer, x)` for every layer's output in every denoising pass."""
    sampler = pipeline.sampler.with_forward(without_graphs(pipeline.sampler.forward))
    pipeline = replace(pipeline, sampler=sampler)
    cache, text = _filled(pipeline, inputs)
    start = len(inputs.past) * sampler.plan.block_frames
    for step, (noisy, timestep) in enumerate(zip(inputs.noisy, sampler.timesteps, strict=True)):
        with layer_outputs(sampler.forward, lambda layer, x: note(step, layer, x)):
            sampler.run_pass(cache, text, start, noisy.to(pipeline.dtype), timestep)


def _steps(twin: Pipeline, inputs: _Inputs) -> list[list[Tensor]]:
    """Every layer's output in every step of the truth, in host memory."""
    found: list[list[Tensor]] = [[] for _ in inputs.noisy]
    _watch(twin, inputs, lambda step, layer, x: found[step].append(x.cpu()))
    return found


def _compare(pipeline: Pipeline, inputs: _Inputs, truth: list[list[Tensor]]) -> Tensor:
    errors = torch.zeros(len(truth), len(truth[0]), dtype=torch.float64)

    def note(step: int, layer: int, x: Tensor) -> None:
        right = truth[step][layer].to(x.device)
        errors[step, layer] = ((x.float() - right).double().square().mean()
                               / right.double().square().mean()).sqrt().cpu()

    _watch(pipeline, inputs, note)
    return errors
