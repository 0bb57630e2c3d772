"""How much attention each latent frame gets: the softmax's probabilities, added up over a frame's keys.

A stream of the preset runs to the wanted block. There, every layer's queries and attended keys are caught as
they go into attention, rotated, and from an 8-bit cache as it stores them. Softmax is computed again from
them in float32 with the scale 1/sqrt(D), so the mass does not depend on the kernel. It is the mean over
queries and heads, and its sum over frames is 1. `cache_slots` says which frame lies in which slot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import UserError
from ..prompts import PromptSchedule
from ..streaming.kv_cache import KVCache
from ..streaming.pipeline import Pipeline
from ..streaming.sampler import Forward
from ..streaming.session import StreamingSession
from .cache_slots import SlotRow, cache_slots, without_decoding
from .passes import attended, without_graphs

_SCORES = 2**26
"""Most scores in memory at once, 256 MiB in float32."""


@dataclass(frozen=True)
class AttentionMass:
    """`mass` is float32 [steps, layers, frames]. `frames` and `roles` (`sink`, `past`, `present`, `empty`)
    describe its columns, oldest frame first. Empty slots, attended while a sink fills, come last.
    """

    block: int
    timesteps: tuple[float, ...]
    frames: tuple[int | None, ...]
    roles: tuple[str, ...]
    mass: Tensor

    def by_role(self) -> dict[str, float]:
        """The mean mass of all frames of a role together, over steps and layers."""
        mean = self.mass.mean((0, 1))
        return {role: sum(value for value, own in zip(mean.tolist(), self.roles) if own == role)
                for role in dict.fromkeys(self.roles)}


def frame_mass(q: Tensor, k: Tensor, tokens: int) -> Tensor:
    """Softmax in float32 of q [B, L, N, D] and k [B, T, N, D]; returns the mean mass of each group of
    `tokens` consecutive keys, float32 [T / tokens].
    """
    batch, length, heads, dim = q.shape
    rows = max(1, min(length, _SCORES // k.shape[1]))
    total = torch.zeros(k.shape[1] // tokens, device=q.device, dtype=torch.float64)
    for one in range(batch):
        for head in range(heads):
            keys = k[one, :, head].float().mT
            for part in q[one, :, head].float().split(rows):
                shares = torch.softmax(part @ keys / dim**0.5, dim=-1)
                total += shares.unflatten(-1, (-1, tokens)).sum((0, 2), dtype=torch.float64)
    return (total / (batch * heads * length)).float()


def attention_mass(pipeline: Pipeline, schedule: PromptSchedule, block: int) -> AttentionMass:
    """Stream the schedule and measure the denoising passes of `block`.

    Raises:
        UserError: the block is negative, a switch is past it, or the cache's attention cannot be watched.
    """
    if block < 0:
        raise UserError(f"block: {block} is negative; the first block is 0.")
    slots = cache_slots(pipeline, schedule, block + 1).rows[block]
    plan, sampler = pipeline.sampler.plan, pipeline.sampler
    found: list[dict[int, Tensor]] = []
    watched = _Watched(without_graphs(sampler.forward), block * plan.block_frames, found)
    session = StreamingSession(without_decoding(replace(pipeline, sampler=sampler.with_forward(watched))))
    for _ in session.play(schedule, block + 1):
        pass
    mass = torch.stack([torch.stack([step[layer] for layer in sorted(step)]) for step in found]).cpu()
    return _by_frame(mass, slots, block, plan.sink, tuple(pipeline.sampler.timesteps))


def _by_frame(mass: Tensor, row: SlotRow, block: int, sink: int, timesteps: tuple[float, ...]
              ) -> AttentionMass:
    """Sort mass [steps, layers, attended slots] by frame."""
    roles = [row.role(slot, sink) for slot in range(mass.shape[-1])]
    frames = [None if content is None else content.frame for content in row.slots[:mass.shape[-1]]]
    order = sorted(range(len(frames)), key=lambda slot: (frames[slot] is None, frames[slot] or 0))
    return AttentionMass(block, timesteps, tuple(frames[slot] for slot in order),
                         tuple(roles[slot] for slot in order), mass[..., order])


class _Watched:
    """A `Forward` that collects the mass of each layer in the denoising passes from latent frame `start`."""

    def __init__(self, inner: Forward, start: int, found: list[dict[int, Tensor]]):
        self.inner, self.start, self.found = inner, start, found

    def __call__(self, latents: Tensor, timestep: float, text: Any, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        def run() -> Tensor:
            return self.inner(latents, timestep, text, cache, keys_only=keys_only)

        plan, geometry = cast(Any, cache).plan, cast(Any, cache).geometry
        if keys_only or plan.start != self.start:
            return run()
        step: dict[int, Tensor] = {}
        self.found.append(step)
        tokens = geometry.tokens_per_frame
        with attended(cache, lambda layer, q, k: step.__setitem__(layer, frame_mass(q, k, tokens))):
            return run()
