"""Few-step sampling of one block of latent frames: schedule, noise, denoising, clean pass, and the recache of
keys and values at a prompt switch (LongLive, arXiv:2509.22622; flow-matching schedule: Wan 2.1,
arXiv:2503.20314).

One seeded generator draws the noise in a fixed order. On one kind of device every preset sees the same noise,
so presets are comparable frame by frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Sequence

import torch
from torch import Tensor

from ..models.dit import CausalDiT, TextContext
from .kv_cache import KVCache


@dataclass(frozen=True)
class SamplingPlan:
    """How to sample a block; counts are in latent frames."""

    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    context_noise: int = 0
    block_frames: int = 3
    window: int = 12
    sink: int = 3
    global_sink: bool = True


class Forward(Protocol):
    """One pass of the transformer; optimizations replace this component to speed up denoising."""

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        """Run latents [B, F, C, H, W], all at one timestep, against a cache whose `begin` planned this pass.

        Returns the flow, [B, F, C, H, W]. With `keys_only`, the caller only wants the cache filled: the
        return value has no meaning, and work that only serves the flow may be skipped.
        """


def uniform_timesteps(timestep: float, latents: Tensor) -> Tensor:
    """One timestep for every latent frame of latents [B, F, ...]: float32 [B, F]."""
    return torch.full(latents.shape[:2], timestep, dtype=torch.float32, device=latents.device)


class EagerForward:
    """The reference: a plain call of the transformer with the time embedding; ignores `keys_only`."""

    def __init__(self, dit: CausalDiT):
        self.dit = dit

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        timesteps = uniform_timesteps(timestep, latents)
        return self.dit(latents.transpose(1, 2), timesteps, text, cache.layers).transpose(1, 2)


@dataclass(frozen=True)
class Sampler:
    """Denoises blocks and recaches. Latents are [B, F, C, H, W].

    `trim_recache`: skip the frames of a recache whose keys a protected sink would drop.
    `defer_clean_pass`: a session passes a block on before its clean pass.
    """

    plan: SamplingPlan
    forward: Forward
    trim_recache: bool = False
    defer_clean_pass: bool = False

    @cached_property
    def schedule(self) -> FlowSchedule:
        return FlowSchedule(self.plan.shift)

    @cached_property
    def timesteps(self) -> list[float]:
        return self.schedule.warped_steps(self.plan.denoising_steps)

    def with_forward(self, forward: Forward) -> Sampler:
        """The same sampler with another `forward`."""
        return replace(self, forward=forward)

    @torch.no_grad()
    def denoise_block(self, cache: KVCache, text: TextContext, start: int, noise: Tensor,
                      step_noise: Tensor) -> Tensor:
        """Sample latent frames start .. start + F - 1 and write their clean keys and values to the cache.

        Args:
            noise: [B, F, C, H, W].
            step_noise: [steps - 1, B, F, C, H, W], added back after each step but the last.

        Returns:
            Clean latents [B, F, C, H, W].
        """
        latents = self.denoise(cache, text, start, noise, step_noise)[-1]
        self.clean_pass(cache, text, start, latents)
        return latents

    def denoise(self, cache: KVCache, text: TextContext, start: int, noise: Tensor,
                step_noise: Tensor) -> list[Tensor]:
        """Return the clean estimate after each denoising step; the last one is the block."""
        noisy, estimates = noise, []
        for i, timestep in enumerate(self.timesteps):
            flow = self.run_pass(cache, text, start, noisy, timestep)
            estimates.append(self.schedule.x0_from_flow(flow, noisy, timestep))
            if i + 1 < len(self.timesteps):
                noisy = self.schedule.add_noise(estimates[-1], step_noise[i], self.timesteps[i + 1])
        return estimates

    @torch.no_grad()
    def clean_pass(self, cache: KVCache, text: TextContext, start: int, latents: Tensor) -> None:
        """Run the clean pass: write the keys and values of clean latents [B, F, C, H, W] to the cache."""
        self.run_pass(cache, text, start, latents, self.plan.context_noise, keys_only=True)

    @torch.no_grad()
    def recache(self, cache: KVCache, text: TextContext, start: int, latents: Tensor) -> None:
        """Recompute the cached keys and values of the frames before `start` under a new prompt.

        Args:
            latents: the last min(window, start) clean latent frames, [B, n, C, H, W].
        """
        plan = self.plan
        if self.trim_recache and plan.global_sink and start > plan.window:
            latents = latents[:, -(plan.window - plan.sink):]
        self.run_pass(cache, text, start - latents.shape[1], latents, plan.context_noise, keys_only=True,
                      recache_sink=not plan.global_sink)

    def run_pass(self, cache: KVCache, text: TextContext, start: int, latents: Tensor, timestep: float, *,
                 keys_only: bool = False, recache_sink: bool = False) -> Tensor:
        """Run one pass over latents [B, F, C, H, W] from latent frame `start`; return the flow, same shape.
        """
        cache.begin(start, latents.shape[1], recache_sink=recache_sink)
        flow = self.forward(latents, timestep, text, cache, keys_only=keys_only)
        cache.end()
        return flow


def block_noise_shapes(
    plan: SamplingPlan, latent_shape: Sequence[int], batch: int
) -> tuple[tuple[int, ...], ...]:
    """Shapes of (`noise`, `step_noise`) of one block; latent_shape is (C, H, W)."""
    block = (batch, plan.block_frames, *latent_shape)
    return block, (len(plan.denoising_steps) - 1, *block)


TRAIN_STEPS = 1000


class FlowSchedule:
    """Noise levels sigma = s*u / (1 + (s-1)*u) for u = 1 .. 0.001, with timesteps 1000 * sigma.

    `sigmas` and `timesteps` are float32 [1000], falling. There is no sigma of 0: timestep 0 maps to the last
    entry.
    """

    def __init__(self, shift: float = 5.0):
        raw = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
        self.sigmas = shift * raw / (1 + (shift - 1) * raw)
        self.timesteps = self.sigmas * TRAIN_STEPS
        self._on_device: dict[tuple[float, torch.device], Tensor] = {}

    def warped_steps(self, steps: Sequence[int]) -> list[float]:
        """Map nominal steps such as [1000, 750, 500, 250] to the model's timesteps, as float32 values."""
        padded = torch.cat([self.timesteps, torch.zeros(1)])
        return [padded[TRAIN_STEPS - step].item() for step in steps]

    def sigma(self, timestep: float | Tensor) -> Tensor:
        """Sigma (float32) of the tabulated timestep nearest to `timestep`; a tensor [n] gives [n]."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32).cpu()
        return self.sigmas[(self.timesteps - timestep[..., None]).abs().argmin(dim=-1)]

    def x0_from_flow(self, flow: Tensor, noisy: Tensor, timestep: float | Tensor) -> Tensor:
        """Clean estimate noisy - sigma * flow, in float64, returned in the dtype of `flow`.

        `timestep` is one number, or a tensor [n] along the first axis.
        """
        sigma = self._shaped(timestep, flow).double()
        return (noisy.double() - sigma * flow.double()).to(flow.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: float | Tensor) -> Tensor:
        """(1 - sigma) * clean + sigma * noise, in float32, returned in the dtype of `noise`."""
        sigma = self._shaped(timestep, noise)
        return ((1 - sigma) * clean + sigma * noise).to(noise.dtype)

    def _shaped(self, timestep: float | Tensor, like: Tensor) -> Tensor:
        return self._sigma_on(timestep, like.device).reshape(-1, *([1] * (like.ndim - 1)))

    def _sigma_on(self, timestep: float | Tensor, device: torch.device) -> Tensor:
        if isinstance(timestep, Tensor):
            return self.sigma(timestep).to(device)
        # Copied once, because a copy from the host would wait for the stream in every step of every block.
        key = (timestep, device)
        if key not in self._on_device:
            self._on_device[key] = self.sigma(timestep).to(device)
        return self._on_device[key]


class NoiseSource(Protocol):
    """Yields the noise of consecutive blocks."""

    def next_block(self) -> tuple[Tensor, Tensor]:
        """(`noise` [B, F, C, H, W], `step_noise` [steps - 1, B, F, C, H, W]) of the next block."""

    def reset(self) -> None:
        """Restart with the first block."""


class StreamNoise:
    """Noise for an endless stream from the device's generator: per block, first the block's noise, then each
    step's. LongLive draws the noise of a whole video first, which is impossible for an endless stream, so the
    same seed gives other videos there.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        latent_shape: tuple[int, int, int],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        batch: int = 1,
    ):
        self._shapes = block_noise_shapes(plan, latent_shape, batch)
        self._seed, self._device, self._dtype = seed, device, dtype
        self.reset()

    def reset(self) -> None:
        self._generator = torch.Generator(self._device).manual_seed(self._seed)

    def next_block(self) -> tuple[Tensor, Tensor]:
        noise, step_noise = (
            torch.randn(shape, generator=self._generator, device=self._device, dtype=self._dtype)
            for shape in self._shapes
        )
        return noise, step_noise
