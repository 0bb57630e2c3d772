"""Few-step sampling of one block of latent frames, and the KV recache at a prompt switch (LongLive,
arXiv:2509.22622).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Sequence

import torch
from torch import Tensor

from .kv_cache import KVCache
from .models.dit import CausalDiT, TextContext
from .scheduler import FlowSchedule


@dataclass(frozen=True)
class SamplingPlan:
    """How a block is sampled; counts in latent frames."""

    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    context_noise: int = 0
    block_frames: int = 3
    window: int = 12
    sink: int = 3
    global_sink: bool = True


class Forward(Protocol):
    """One pass of the transformer: the seam of everything that makes denoising faster."""

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        """Run latents [B, F, C, H, W], all at one timestep, against a cache whose `begin` planned this pass.

        Returns the flow, [B, F, C, H, W]. With `keys_only` the caller wants the cache filled and nothing
        else: what is returned then means nothing, and whatever only serves the flow may be left out.
        """


def uniform_timesteps(timestep: float, latents: Tensor) -> Tensor:
    """One timestep for every latent frame of latents [B, F, ...]: float32 [B, F]."""
    return torch.full(latents.shape[:2], timestep, dtype=torch.float32, device=latents.device)


class EagerForward:
    """The reference: a plain call of the transformer, the time embedding included, whatever is wanted of it.
    """

    def __init__(self, dit: CausalDiT):
        self.dit = dit

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        timesteps = uniform_timesteps(timestep, latents)
        return self.dit(latents.transpose(1, 2), timesteps, text, cache.layers).transpose(1, 2)


@dataclass(frozen=True)
class Sampler:
    """Denoises blocks and recaches. Latents are [B, F, C, H, W].

    `trim_recache`: leave out of a recache the frames whose keys a protected sink would drop.
    `defer_clean_pass`: a session hands a block on before its clean pass.
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
        """Sample latent frames start .. start + F - 1 and leave their clean keys and values in the cache.

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
        """The clean estimate after each denoising step; the last one is the block."""
        noisy, estimates = noise, []
        for i, timestep in enumerate(self.timesteps):
            flow = self.run_pass(cache, text, start, noisy, timestep)
            estimates.append(self.schedule.x0_from_flow(flow, noisy, timestep))
            if i + 1 < len(self.timesteps):
                noisy = self.schedule.add_noise(estimates[-1], step_noise[i], self.timesteps[i + 1])
        return estimates

    @torch.no_grad()
    def clean_pass(self, cache: KVCache, text: TextContext, start: int, latents: Tensor) -> None:
        """The clean pass: leave the keys and values of clean latents [B, F, C, H, W] in the cache."""
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
        """One pass over latents [B, F, C, H, W] that begin at latent frame `start`; returns the flow, same
        shape.
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
