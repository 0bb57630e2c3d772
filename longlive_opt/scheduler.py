"""Flow-matching schedule of LongLive: 1000 shifted noise levels, of which a few are visited (Wan 2.1,
arXiv:2503.20314).
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

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
        """Timesteps that the model is given for nominal steps such as [1000, 750, 500, 250]; float32 values.
        """
        padded = torch.cat([self.timesteps, torch.zeros(1)])
        return [padded[TRAIN_STEPS - step].item() for step in steps]

    def sigma(self, timestep: float | Tensor) -> Tensor:
        """Sigma (float32) of the tabulated timestep nearest to `timestep`; a tensor [n] gives [n]."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32).cpu()
        return self.sigmas[(self.timesteps - timestep[..., None]).abs().argmin(dim=-1)]

    def x0_from_flow(self, flow: Tensor, noisy: Tensor, timestep: float | Tensor) -> Tensor:
        """Clean estimate noisy - sigma * flow, in float64, returned in the dtype of `flow`.

        `timestep` is one number, or a tensor [n] that belongs to the first axis.
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
        # Copied once: a copy from the host waits for the stream, in every step of every block.
        key = (timestep, device)
        if key not in self._on_device:
            self._on_device[key] = self.sigma(timestep).to(device)
        return self._on_device[key]
