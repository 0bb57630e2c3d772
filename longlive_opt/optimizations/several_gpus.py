"""Several GPUs: one stream on several ranks, one process and one GPU each.

Idea: a block's 4680 tokens and 12 heads can be shared. The transformer splits linear layers by tokens and
attention by heads (`ranks.heads`). The VAE splits the picture into bands of rows (`vae_bands`); with
`vae_ranks: own`, the last rank decodes alone while the others denoise the next block. Every rank has all
weights and applies the preset's optimizations itself. Rank 0 is the process that builds the pipeline: only it
reads prompts, draws noise and hands out frames. Its components announce every call to the other ranks
(`rank_worker`): a cache and each pass over it, a decoder and each push. So whatever uses the pipeline works
as on one GPU.

Replaces: `sampler.forward`, `make_cache`, `make_vae_decoder`, `make_decoder`. Costs: the weights on every
GPU, two exchanges per layer and pass, one per stage of the VAE. It does not help where they take longer than
the work that is shared, as with a tiny model. Equal within rounding.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import ExperimentConfig
from ..errors import NotAvailable
from ..models.dit import TextContext
from ..models.specs import VAE_TEMPORAL_STRIDE
from ..models.vae import IMAGE_CHANNELS, StreamingDecoder
from ..ranks.group import Group, Kept
from ..ranks.heads import Alone, Exchange, HeadExchange, PeerExchange
from ..ranks.peers import reachable
from ..ranks.processes import Family
from ..streaming.decoder import Decoder, Delivery
from ..streaming.kv_cache import KVCache, PassPlan
from ..streaming.pipeline import Pipeline
from ..streaming.sampler import Forward
from ..streaming.timeline import NullTimeline, Timeline
from . import cuda_graphs
from .base import Exactness, Optimization
from .vae_bands import Bands, banded_decoders

WORKER = "longlive_opt.optimizations.rank_worker"
READY_SECONDS = 3600.0
"""Longest time for a rank to load its weights."""


class Team:
    """What a rank knows about its job: who denoises and who decodes. Made by all ranks at the same time."""

    def __init__(self, config: ExperimentConfig, rank: int, device: torch.device):
        size, denoising = config.gpus, range(config.denoising_ranks)
        self.rank, self.size, self.device = rank, size, device
        self.denoisers = tuple(denoising)
        self.decoders = tuple(range(size)) if config.vae_ranks == "split" else (size - 1,)
        self.all = Group(range(size), rank, device)
        groups = [self.all]
        self.exchange: Exchange = Alone()
        self.pair: Group | None = None
        """Rank 0 and the one that decodes alone; None on other ranks and if all decode."""
        if config.vae_ranks == "own":
            # Each has a communicator, since both are used at the same time. Every rank makes all of them.
            handles = [dist.new_group([0, size - 1])]
            handles += [dist.new_group(list(denoising))] if len(denoising) > 1 else []
            if rank in (0, size - 1):
                self.pair = Group((0, size - 1), rank, device, handles[0])
                groups.append(self.pair)
            if rank in denoising and len(denoising) > 1:
                groups.append(Group(denoising, rank, device, handles[1]))
        self.passes = groups[-1] if config.vae_ranks == "own" and len(denoising) > 1 else self.all
        if rank in denoising and len(denoising) > 1:
            kind = PeerExchange if config.rank_exchange == "peer" else HeadExchange
            self.exchange = kind(self.passes, config.head_groups)
        height = config.model_config().latent_height
        self.bands = Bands(self.all, height) if config.vae_ranks == "split" else None
        self._groups = groups

    def mute(self, muted: bool) -> None:
        """Stop communication, or start it again; all ranks have to."""
        for group in self._groups:
            group.muted = muted


class TextMessage:
    """A prompt's keys and values in one message, at a fixed address."""

    def __init__(self, team: Team):
        self._group = team.passes
        self._kept = Kept(team.device)

    def send(self, text: TextContext) -> None:
        parts = (*text.keys, *text.values)
        whole = self._kept("text", (len(parts), *parts[0].shape), parts[0].dtype)
        torch._foreach_copy_(list(whole.unbind()), list(parts))
        self._group.broadcast(whole)

    def receive(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> TextContext:
        """Args: count: number of keys and values together; shape: of each."""
        whole = self._kept("text", (count, *shape), dtype)
        self._group.broadcast(whole)
        return TextContext(whole[:count // 2].unbind(), whole[count // 2:].unbind())


class Leader:
    """Rank 0's side: the ranks, and the orders to them. A number names a cache or decoder on all ranks."""

    def __init__(self, family: Family, team: Team):
        self.family, self.team = family, team
        self.numbers = itertools.count()
        self._dropped: collections.deque[tuple[str, int]] = collections.deque()

    @classmethod
    def of(cls, config: ExperimentConfig, family: Family) -> Leader:
        """Let the ranks of `family` build their part of a preset."""
        family.announce(("build", config, config.model_config()))
        with family.watched():
            team = Team(config, 0, rank_device(config, 0))
        if isinstance(team.exchange, PeerExchange):
            family.at_end(team.exchange.memory.release)
        return cls(family, team)

    def order(self, to: Sequence[int], name: str, *arguments: Any) -> None:
        """Let the ranks `to` call a method of their `rank_worker.Follower`."""
        while self._dropped:
            # Sent with the next order, because objects are released at any moment, also within `announce`.
            self.family.announce(("drop", *self._dropped.popleft()))
        self.family.announce((name, *arguments), to)

    def replies(self, name: str, *arguments: Any, seconds: float = READY_SECONDS) -> list[Any]:
        """The answers of all other ranks to an order, in the order of ranks."""
        self.order(range(self.team.size), name, *arguments)
        return [self.family.reply(rank, seconds) for rank in range(1, self.team.size)]

    def drop_with(self, owner: Any, kind: str, number: int) -> None:
        """Let the other ranks release cache or decoder `number` when `owner` is released."""
        weakref.finalize(owner, self._dropped.append, (kind, number)).atexit = False

    def mute(self, muted: bool) -> None:
        """Stop communication on all ranks, or start it again (`Group.muted`)."""
        self.replies("mute", muted)
        self.team.mute(muted)

    def close(self) -> None:
        """End the other ranks."""
        self.family.close()


def start_ranks(config: ExperimentConfig) -> Family:
    """Start the other ranks of a preset.

    Raises:
        NotAvailable: there are not enough GPUs, or they lack what the preset needs: CUDA graphs, or access
            to each other's memory.
        UserError: this process has other ranks.
        RankFailed: a rank did not start.
    """
    if config.use_cuda_graphs:
        cuda_graphs.check_device(torch.device(config.device))
    devices = [rank_device(config, rank) for rank in range(config.gpus)]
    if config.rank_exchange == "peer" and not reachable(devices):
        raise NotAvailable("rank_exchange: peer needs GPUs that can write to each other's memory (NVLink, or "
                           "PCIe with peer access), and these cannot; set it to collective or leave it out.")
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // config.gpus))}
    return Family(WORKER, devices, threads if config.device == "cpu" else {})


def rank_device(config: ExperimentConfig, rank: int) -> torch.device:
    """The device of a rank.

    Raises:
        NotAvailable: there are not enough GPUs.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    first, found = torch.device(config.device).index or 0, torch.cuda.device_count()
    if first + config.gpus > found:
        raise NotAvailable(f"gpus: {config.gpus} GPUs from cuda:{first} on were requested, but PyTorch "
                           f"{torch.__version__} sees {found}; write gpus: {max(1, found - first)} or less.")
    return torch.device("cuda", first + rank)


@dataclass(frozen=True)
class SeveralGPUs(Optimization):
    """Applied last, on rank 0 only."""

    name: ClassVar[str] = "several_gpus"
    exactness: ClassVar[Exactness] = "rounding"

    gpus: int
    vae_ranks: str

    def lead(self, pipeline: Pipeline, leader: Leader) -> Pipeline:
        """Return rank 0's pipeline with components that announce their calls."""
        team, model = leader.team, pipeline.model
        make_cache, make_decoder = pipeline.make_cache, pipeline.make_decoder
        if isinstance(pipeline.sampler.forward, cuda_graphs.GraphedForward):
            leader.family.at_end(pipeline.sampler.forward.forget)
        ranks = len(team.denoisers)
        heads = model.dit.num_heads // pipeline.config.head_groups
        how = "" if ranks == 1 else f", exchanged by {team.exchange.how}"
        if pipeline.config.head_groups < ranks:
            how = f" and 1/{ranks // pipeline.config.head_groups} of the queries" + how
        done = (f"{self.gpus} ranks; {ranks} denoise, with {heads} heads and 1/{ranks} of the tokens each"
                f"{how}; ")
        if team.bands is not None:
            make_banded = banded_decoders(pipeline, team.bands)
            done += f"the VAE in bands of {', '.join(map(str, team.bands.rows))} rows of latents"

            def make_vae_decoder() -> StreamingDecoder:
                return LeadingDecoder(leader, make_banded())

            def make_watched(vae: StreamingDecoder, timeline: Timeline | NullTimeline,
                             delivery: Delivery) -> Decoder:
                return WatchedDecoder(leader, make_decoder(vae, timeline, delivery))
        else:
            done += "the last decodes alone, while the next block is denoised"

            def make_vae_decoder() -> RemoteDecoder:
                return RemoteDecoder(leader, (model.height, model.width), pipeline.dtype)

            def make_watched(vae: RemoteDecoder, timeline: Timeline | NullTimeline,
                             delivery: Delivery) -> Decoder:
                return WatchedDecoder(leader, OverlappingDecoder(vae, timeline, delivery))
        pipeline = dataclasses.replace(
            pipeline, ranks=leader, sampler=pipeline.sampler.with_forward(
                LeadingForward(leader, pipeline.sampler.forward)),
            make_cache=lambda: LeadingCache(leader, make_cache()),
            make_vae_decoder=make_vae_decoder, make_decoder=make_watched)
        return self.report(pipeline, done, backend=dist.get_backend())


class LeadingCache:
    """Rank 0's cache. `LeadingForward` lets the other ranks plan the same pass on theirs."""

    def __init__(self, leader: Leader, own: KVCache):
        self.own, self.number = own, next(leader.numbers)
        self._leader = leader
        leader.order(leader.team.denoisers, "make_cache", self.number)
        leader.drop_with(self, "caches", self.number)

    @property
    def layers(self) -> Sequence[Any]:
        return self.own.layers

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return self.own.nbytes

    @property
    def signature(self) -> tuple[object, ...]:
        return self.own.signature

    def begin(self, start: int, frames: int, *, recache_sink: bool = False) -> PassPlan:
        self.planned = (start, frames, recache_sink)
        return self.own.begin(start, frames, recache_sink=recache_sink)

    def end(self) -> None:
        self.own.end()

    def reset(self) -> None:
        self._leader.order(self._leader.team.denoisers, "reset_cache", self.number)
        self.own.reset()


class LeadingForward:
    """Runs a pass on all ranks that denoise."""

    def __init__(self, leader: Leader, own: Forward):
        self._leader, self._own = leader, own
        self._message = TextMessage(leader.team)
        self._sent: TextContext | None = None

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        assert isinstance(cache, LeadingCache)
        leader, new = self._leader, text is not self._sent
        latents = latents.contiguous()
        prompt = (2 * len(text.keys), tuple(text.keys[0].shape)) if new else None
        with leader.family.watched():
            leader.order(leader.team.denoisers, "run_pass", cache.number, cache.planned, tuple(latents.shape),
                         timestep, keys_only, prompt)
            if len(leader.team.denoisers) > 1:
                if new:
                    self._message.send(text)
                leader.team.passes.broadcast(latents)
            self._sent = text
            return self._own(latents, timestep, text, cache.own, keys_only=keys_only)


class LeadingDecoder:
    """Rank 0's part of a `StreamingDecoder` in bands."""

    def __init__(self, leader: Leader, own: StreamingDecoder):
        self.own, self.number = own, next(leader.numbers)
        self._leader = leader
        leader.order(leader.team.decoders, "make_decoder", self.number)
        leader.drop_with(self, "decoders", self.number)

    def push(self, latents: Tensor) -> list[Tensor]:
        """As `StreamingDecoder.push`."""
        leader, latents = self._leader, latents.contiguous()
        with leader.family.watched():
            leader.order(leader.team.decoders, "push", self.number, tuple(latents.shape))
            leader.team.all.broadcast(latents)
            return self.own.push(latents)

    def flush(self) -> list[Tensor]:
        return []

    def reset(self) -> None:
        self._leader.order(self._leader.team.decoders, "reset_decoder", self.number)
        self.own.reset()

    def continue_from(self, other: LeadingDecoder) -> None:
        self._leader.order(self._leader.team.decoders, "continue_decoder", self.number, other.number)
        self.own.continue_from(other.own)


class WatchedDecoder:
    """A decoder component that never hands out frames to which a dead rank has contributed."""

    def __init__(self, leader: Leader, own: Decoder):
        self._leader, self._own = leader, own

    def push(self, latents: Tensor, urgent: bool = False) -> Iterator[Tensor]:
        with self._leader.family.watched():
            ready = iter(self._own.push(latents, urgent))
        while True:
            with self._leader.family.watched():
                frames = next(ready, None)
            if frames is None:
                return
            yield frames

    def flush(self) -> list[Tensor]:
        with self._leader.family.watched():
            return self._own.flush()

    def reset(self) -> None:
        self._own.reset()


class RemoteDecoder:
    """A `StreamingDecoder` on another rank, which decodes alone. `send` and `receive` are the two halves of
    `push`, in turn.
    """

    def __init__(self, leader: Leader, size: tuple[int, int], dtype: torch.dtype):
        """Args: size: height and width of a frame."""
        self.number = next(leader.numbers)
        self._leader, self._size, self._dtype = leader, size, dtype
        self.first = True
        assert leader.team.pair is not None
        self._pair = leader.team.pair
        leader.order(leader.team.decoders, "make_decoder", self.number)
        leader.drop_with(self, "decoders", self.number)

    def push(self, latents: Tensor) -> list[Tensor]:
        """As `StreamingDecoder.push`."""
        with self._leader.family.watched():
            return [self.receive(self.send(latents, torch.float32), torch.float32)]

    def send(self, latents: Tensor, kind: torch.dtype) -> tuple[int, ...]:
        """Let the rank decode latents [B, F, C, h, w] to frames of dtype `kind`; return their shape."""
        latents = latents.contiguous()
        batch, count = latents.shape[:2]
        frames = VAE_TEMPORAL_STRIDE * count - (VAE_TEMPORAL_STRIDE - 1) * self.first
        self.first = False
        self._leader.order(self._leader.team.decoders, "push_alone", self.number, tuple(latents.shape), kind)
        self._pair.broadcast(latents)
        return batch, frames, IMAGE_CHANNELS, *self._size

    def receive(self, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        """Wait for the frames of the last `send`."""
        # The rank answers before it sends: a receiving kernel that has to wait would occupy multiprocessors.
        self._leader.family.reply(self._leader.team.decoders[0])
        frames = torch.empty(tuple(shape), dtype=kind, device=self._leader.team.device)
        self._pair.broadcast(frames, source=1)
        return frames

    def flush(self) -> list[Tensor]:
        return []

    def reset(self) -> None:
        self.first = True
        self._leader.order(self._leader.team.decoders, "reset_decoder", self.number)

    def continue_from(self, other: RemoteDecoder) -> None:
        self.first = other.first
        self._leader.order(self._leader.team.decoders, "continue_decoder", self.number, other.number)


class OverlappingDecoder:
    """Decodes a block on another rank while the next one is denoised. A chunk comes one block later, as with
    `use_async_vae`. Its span `decode` is the time in which rank 0 waits for frames.
    """

    def __init__(self, vae: RemoteDecoder, timeline: Timeline | NullTimeline, delivery: Delivery):
        self._vae, self._timeline, self._delivery = vae, timeline, delivery
        device = vae._leader.team.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: tuple[int, ...] | None = None
        self._block = 0

    def push(self, latents: Tensor, urgent: bool = False) -> list[Tensor]:
        ready = self.flush()
        if self._stream is None:
            self._pending = self._vae.send(latents, torch.uint8)
            return ready
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            self._pending = self._vae.send(latents, torch.uint8)
        return ready

    def flush(self) -> list[Tensor]:
        if self._pending is None:
            return []
        shape, self._pending = self._pending, None
        with torch.cuda.stream(self._stream):
            with self._timeline.span("decode", self._block):
                frames = self._vae.receive(shape, torch.uint8)
            if self._delivery.copies:
                with self._timeline.span("copy_to_host", self._block):
                    frames = self._delivery(frames)
        self._block += 1
        if self._stream is not None:
            self._stream.synchronize()
        return [frames]

    def reset(self) -> None:
        self.flush()
        self._vae.reset()
        self._block = 0


def rank_memory(device: torch.device, kv_cache_bytes: int) -> dict[str, float]:
    """Memory of one rank in 1e9 bytes: {kv_cache}, and on a GPU the allocator's {peak_allocated,
    peak_reserved}.
    """
    found = {"kv_cache": kv_cache_bytes / 1e9}
    if device.type == "cuda":
        found |= {"peak_allocated": torch.cuda.max_memory_allocated(device) / 1e9,
                  "peak_reserved": torch.cuda.max_memory_reserved(device) / 1e9}
    return found
