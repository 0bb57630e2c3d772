"""Where a session's Gaussian noise comes from. A fixed order from one seeded generator makes presets
comparable frame by frame: on one kind of device every preset sees the same noise.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .sampler import SamplingPlan, block_noise_shapes


class NoiseSource(Protocol):
    """Yields the noise of one block after the other."""

    def next_block(self) -> tuple[Tensor, Tensor]:
        """(`noise` [B, F, C, H, W], `step_noise` [steps - 1, B, F, C, H, W]) of the next block."""

    def reset(self) -> None:
        """Start again with the first block."""


class StreamNoise:
    """Noise for an endless stream, drawn by the device's generator: per block the block's noise, then that of
    each step. LongLive draws the blocks of a whole video first, which a stream without an end cannot do: one
    seed gives other videos there than here.
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
