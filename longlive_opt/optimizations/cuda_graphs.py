"""CUDA graphs: capture each kind of transformer pass once and replay it afterwards.

Idea: a pass is a few thousand kernel launches that are the same every time; replaying them costs one launch.
Data that changes between replays stays at fixed addresses: latents and prompt are copied in, and the cache
keeps its slots and rotation tables in place (`KVCache.signature` says which passes are alike). Positions,
ring and roll therefore need no recapture. A new kind of pass (another fill of the window, a recache, another
timestep) runs eagerly once and is captured for the next time.

Replaces: `sampler.forward`. Costs: the graphs' private memory and the capture time; both are reported. A
recache takes most of the memory, because its activations are three to four times a block's. `capture_recache:
false` leaves recaches eager, which hardly slows down such large kernels. It does not help on a busy GPU:
launches of large kernels already overlap with the previous kernels. Bit-exact: the same kernels on the same
numbers.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import NotAvailable
from ..models.dit import TextContext
from ..streaming.kv_cache import KVCache
from ..streaming.pipeline import Pipeline
from ..streaming.sampler import Forward
from .base import Exactness, Optimization


@dataclass(frozen=True)
class CudaGraphs(Optimization):
    name: ClassVar[str] = "cuda_graphs"
    exactness: ClassVar[Exactness] = "bitwise"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        forward = graphed(pipeline, pipeline.sampler.forward)
        pipeline = dataclasses.replace(pipeline, sampler=pipeline.sampler.with_forward(forward))
        kinds = "" if forward.max_frames is None else " but recaches"
        return self.report(pipeline, f"each kind of transformer pass{kinds} is captured once and replayed",
                           stats=forward.stats)


def graphed(pipeline: Pipeline, inner: Forward) -> GraphedForward:
    """Wrap `inner` in the graphs that the pipeline's preset requests."""
    config = pipeline.config
    return GraphedForward(inner, pipeline.device, None if config.capture_recache else config.block_frames)


@dataclass
class GraphStats:
    """Counts, seconds and bytes of captures."""

    captured: int = 0
    replayed: int = 0
    eager: int = 0
    capture_s: float = 0.0
    memory_bytes: int = 0

    def summary(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    latents: Tensor
    flow: Tensor


def check_device(device: torch.device) -> None:
    """Raise NotAvailable unless `device` has CUDA graphs."""
    if device.type != "cuda":
        raise NotAvailable("use_cuda_graphs: CUDA graphs need device: cuda, but this run is on "
                           f"{device.type}.")


@dataclass
class GraphedForward:
    """Replays captured passes of `inner`. The next call overwrites the returned flow. Passes of more than
    `max_frames` latent frames, if given, run eagerly.
    """

    inner: Forward
    device: torch.device
    max_frames: int | None = None
    stats: GraphStats = field(default_factory=GraphStats)

    def __post_init__(self) -> None:
        check_device(self.device)
        self._pool: Any = None
        self._graphs: dict[Any, _Captured] = {}
        self._cache: weakref.ref[Any] = weakref.ref(self)
        self._text: TextContext | None = None
        self._shown: TextContext | None = None

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        if self.max_frames is not None and latents.shape[1] > self.max_frames:
            self.stats.eager += 1
            return self.inner(latents, timestep, text, cache, keys_only=keys_only)
        if self._cache() is not cache:
            # Graphs point into the memory of one cache. Their pool cannot capture again while anyone holds a
            # flow from it, so the new graphs get their own pool.
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()
            self._cache = weakref.ref(cache)
        text = self._at_fixed_addresses(text)
        key = (cache.signature, tuple(latents.shape), timestep, keys_only)
        captured = self._graphs.get(key)
        if captured is None:
            flow = self.inner(latents, timestep, text, cache, keys_only=keys_only)
            self.stats.eager += 1
            self._graphs[key] = self._capture(latents, timestep, text, cache, keys_only)
            return flow
        captured.latents.copy_(latents)
        captured.graph.replay()
        self.stats.replayed += 1
        return captured.flow

    def forget(self) -> None:
        """Release all graphs; the next passes are captured again."""
        self._graphs.clear()

    def _at_fixed_addresses(self, text: TextContext) -> TextContext:
        if self._text is None:
            self._text = TextContext(
                tuple(t.clone() for t in text.keys), tuple(t.clone() for t in text.values)
            )
        elif text is not self._shown:
            torch._foreach_copy_([*self._text.keys, *self._text.values], [*text.keys, *text.values])
        self._shown = text
        return self._text

    def _capture(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache,
                 keys_only: bool) -> _Captured:
        """Record the pass that `inner` just ran. Nothing is executed, so the cache does not change."""
        # Capture empties the allocator's cache too; doing so first makes the difference show the graph alone.
        torch.cuda.empty_cache()
        started, before = time.perf_counter(), torch.cuda.memory_reserved(self.device)
        graph, static_latents = torch.cuda.CUDAGraph(), latents.clone()
        # Only this thread's calls may break a capture, not those of NCCL's watching thread.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            flow = self.inner(static_latents, timestep, text, cache, keys_only=keys_only)
        self.stats.captured += 1
        self.stats.capture_s += time.perf_counter() - started
        self.stats.memory_bytes += torch.cuda.memory_reserved(self.device) - before
        return _Captured(graph, static_latents, flow)
