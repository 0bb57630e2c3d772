"""What every rank but 0 runs: it builds its part of a preset and obeys rank 0. Started by
`ranks.processes.Family`, not by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

import torch

from .. import config as catalogue
from ..config import ExperimentConfig
from ..models.dit import TextContext
from ..models.vae import StreamingDecoder, frames_to_uint8
from ..ranks.group import Kept
from ..ranks.processes import run_rank
from ..streaming.kv_cache import KVCache
from ..streaming.pipeline import Pipeline
from . import build_rank
from .several_gpus import Team, TextMessage, rank_memory
from .vae_bands import banded_decoders


class Follower:
    """Calls on its own pipeline what rank 0 orders; each public method is an order."""

    def __init__(self, pipeline: Pipeline, team: Team, answer: Callable[[Any], None]):
        self._pipeline, self._team, self._answer = pipeline, team, answer
        self._make_decoder = pipeline.make_vae_decoder
        if team.bands is not None:
            self._make_decoder = banded_decoders(pipeline, team.bands)
        self.caches: dict[int, KVCache] = {}
        self.decoders: dict[int, StreamingDecoder] = {}
        self._message = TextMessage(team)
        self._text: TextContext | None = None
        self._kept = Kept(team.device)

    def ready(self) -> None:
        self._answer("ready")

    def mute(self, muted: bool) -> None:
        self._team.mute(muted)
        self._answer("muted")

    def held(self) -> None:
        self._answer({"caches": len(self.caches), "decoders": len(self.decoders)})

    def memory(self) -> None:
        self._answer(rank_memory(self._pipeline.device, sum(cache.nbytes for cache in self.caches.values())))

    def reset_peak(self) -> None:
        if self._pipeline.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._pipeline.device)
        self._answer("reset")

    def drop(self, kind: str, number: int) -> None:
        getattr(self, kind).pop(number, None)

    def make_cache(self, number: int) -> None:
        self.caches[number] = self._pipeline.make_cache()

    def reset_cache(self, number: int) -> None:
        self.caches[number].reset()

    def run_pass(self, number: int, planned: tuple[int, int, bool], shape: tuple[int, ...], timestep: float,
                 keys_only: bool, prompt: tuple[int, tuple[int, ...]] | None) -> None:
        pipeline, cache = self._pipeline, self.caches[number]
        start, frames, recache_sink = planned
        cache.begin(start, frames, recache_sink=recache_sink)
        if prompt is not None:
            self._text = self._message.receive(*prompt, pipeline.dtype)
        latents = self._kept("latents", shape, pipeline.dtype)
        self._team.passes.broadcast(latents)
        assert self._text is not None
        pipeline.sampler.forward(latents, timestep, self._text, cache, keys_only=keys_only)
        cache.end()

    def make_decoder(self, number: int) -> None:
        self.decoders[number] = self._make_decoder()

    def reset_decoder(self, number: int) -> None:
        self.decoders[number].reset()

    def continue_decoder(self, number: int, other: int) -> None:
        self.decoders[number].continue_from(self.decoders[other])

    def push(self, number: int, shape: tuple[int, ...]) -> None:
        latents = self._kept("pushed", shape, self._pipeline.dtype)
        self._team.all.broadcast(latents)
        self.decoders[number].push(latents)

    def push_alone(self, number: int, shape: tuple[int, ...], kind: torch.dtype) -> None:
        pair, latents = self._team.pair, self._kept("pushed", shape, self._pipeline.dtype)
        assert pair is not None
        pair.broadcast(latents)
        (frames,) = self.decoders[number].push(latents)
        frames = frames_to_uint8(frames) if kind == torch.uint8 else frames
        if frames.is_cuda:
            torch.cuda.synchronize(frames.device)
        self._answer("decoded")
        pair.broadcast(frames.contiguous(), source=1)


def own_config(config: ExperimentConfig, device: torch.device) -> ExperimentConfig:
    """The preset without what only rank 0 does: prompts, and the order of decoding and denoising."""
    return dataclasses.replace(config, device=str(device), use_prompt_cache=False,
                               prompt_cache_dir=None, use_text_offload=False, use_async_vae=False)


@torch.no_grad()
def serve(rank: int, device: torch.device, orders: Connection) -> None:
    """Build this rank's pipeline when rank 0 says so, and obey until rank 0 hangs up."""
    follower: Follower | None = None
    while True:
        name, *arguments = orders.recv()
        if name == "build":
            config, model = arguments
            # It may have been defined at run time, as in a notebook.
            catalogue.MODELS = MappingProxyType({**catalogue.MODELS, config.model: catalogue.MODELS.get(
                config.model, model)})
            follower = None
            team = Team(config, rank, device)
            follower = Follower(build_rank(own_config(config, device), team.exchange), team, orders.send)
        else:
            getattr(follower, name)(*arguments)


if __name__ == "__main__":
    run_rank(serve)
