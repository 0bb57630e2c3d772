"""Static KV (key-value) cache: a ring of fixed memory instead of a window that every pass rebuilds.

Idea: attention has no mask and keys carry their own rotation, so the order of cached keys does not matter.
The sink keeps its slots; the other slots form a ring in which a new block overwrites the oldest frames.
Nothing is rolled, concatenated or allocated; each pass writes the new frames' keys and values in place.

Replaces: `make_cache`, and the sampler's recache, which skips frames whose keys a protected sink would drop.
The cache does the rotation, so this also replaces the float64 rotation by float32 with tables made once per
block.

Costs: nothing; it needs as much memory as the reference. It does not help where attention itself dominates.
Equal to the reference up to the order of summation over keys and float32 instead of float64 rotation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..models.attention import Attention, make_attention
from ..streaming.kv_cache import CacheGeometry
from ..streaming.pipeline import Pipeline, cache_geometry
from .base import Exactness, Optimization
from .ring_cache import RingKVCache, RingLayer, Rotation, rotate_complex, rotation_for


@dataclass(frozen=True)
class StaticKV(Optimization):
    name: ClassVar[str] = "static_kv"
    exactness: ClassVar[Exactness] = "rounding"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        geometry = cache_geometry(pipeline.config, pipeline.model)
        attention = make_attention(pipeline.attention_backend)
        rotation = rotation_for(pipeline.config)

        def make_cache() -> StaticKVCache:
            return StaticKVCache(geometry, attention, 1, pipeline.device, pipeline.dtype, rotation)

        pipeline = dataclasses.replace(pipeline, make_cache=make_cache,
                                       sampler=dataclasses.replace(pipeline.sampler, trim_recache=True))
        ring = geometry.window - geometry.sink
        return self.report(pipeline, f"ring of {ring} latent frames after a sink of {geometry.sink}")


class StaticKVCache(RingKVCache):
    """A ring in the model's dtype."""

    def __init__(self, geometry: CacheGeometry, attention: Attention, batch: int, device: torch.device,
                 dtype: torch.dtype, rotation: Rotation = rotate_complex):
        super().__init__(geometry, device, rotation)
        self.layers = [StaticLayer(self, attention, batch, dtype) for _ in range(geometry.layers)]


class StaticLayer(RingLayer):
    """One layer: `key` (rotated) and `value` [B, window, tokens, N, D]."""

    def __init__(self, cache: RingKVCache, attention: Attention, batch: int, dtype: torch.dtype):
        super().__init__(cache, batch, dtype)
        geometry = cache.geometry
        self.attention = attention
        self.key = torch.zeros(batch, geometry.window, geometry.tokens_per_frame, geometry.heads,
                               geometry.head_dim, device=cache.device, dtype=dtype)
        self.value = torch.zeros_like(self.key)

    @property
    def memory(self) -> tuple[Tensor, Tensor, None, None]:
        return self.key.flatten(1, 2), self.value.flatten(1, 2), None, None

    def write(self, k: Tensor, v: Tensor) -> None:
        cache = self.cache
        self.key.index_copy_(1, cache.slots, cache.stored_frames(k))
        self.value.index_copy_(1, cache.slots, cache.stored_frames(v))

    def write_sink(self, k: Tensor) -> None:
        slots = self.cache.sink_slots
        self.key[:, :slots] = k.unflatten(1, (slots, -1))

    def read(self, q: Tensor) -> Tensor:
        slots = self.cache.attended
        return self.attention(q, self.key[:, :slots].flatten(1, 2), self.value[:, :slots].flatten(1, 2))
