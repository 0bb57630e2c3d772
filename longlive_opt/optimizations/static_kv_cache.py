"""Static KV cache: a ring of fixed memory instead of a window that is rebuilt in every pass.

Idea: attention has no mask and keys carry their own rotation, so the order of cached keys does not matter. The sink
keeps its slots; the other slots form a ring in which a new block overwrites the oldest frames. Nothing is rolled,
concatenated or allocated; each pass writes the new frames' keys and values in place.

Seam: `make_cache`, and the sampler's recache, which leaves out the frames whose keys a protected sink would drop.
The cache owns rotation, so this also replaces the float64 rotation by one in float32 with tables made once per block.

Costs: nothing; memory equals the reference's. Does not help where attention itself dominates.
Equal to the reference up to the order of summation over keys and float32 against float64 rotation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Callable, ClassVar

import torch
from torch import Tensor

from ..kv_cache import CacheGeometry, PassPlan, plan_pass
from ..models.attention import Attention, make_attention
from ..models.rope import check_positions, rope_angles
from ..pipeline import Pipeline, cache_geometry
from .room import Level, Room


@dataclass(frozen=True)
class StaticKV(Room):
    name: ClassVar[str] = "static_kv"
    level: ClassVar[Level] = "rounding"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        geometry = cache_geometry(pipeline.config, pipeline.model)
        attention = make_attention(pipeline.attention_backend)
        rotation = rotate_real if pipeline.config.use_torch_compile else rotate_complex

        def make_cache() -> StaticKVCache:
            return StaticKVCache(geometry, attention, 1, pipeline.device, pipeline.dtype, rotation)

        pipeline = dataclasses.replace(pipeline, make_cache=make_cache, sampler=pipeline.sampler.trimming_recache())
        ring = geometry.window - geometry.sink
        return self.report(pipeline, f"ring of {ring} latent frames behind a sink of {geometry.sink}")


Rotation = Callable[[Tensor, Tensor], Tensor]
"""Rotates the pairs (2j, 2j+1) of x [B, tokens, N, D] by a table, float32 [tokens, 1, D/2, 2] of cosine and sine; computed
in float32, returned in the dtype of x."""


def rotate_complex(x: Tensor, table: Tensor) -> Tensor:
    """A `Rotation` in three kernels when run eagerly."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table)).flatten(-2).to(x.dtype)


def rotate_real(x: Tensor, table: Tensor) -> Tensor:
    """A `Rotation` that Inductor fuses with its neighbours; it has no complex numbers."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).to(x.dtype)


class RingKVCache:
    """What static caches share: which physical slot a frame goes to, and the rotation tables, both at fixed
    addresses. How keys and values are stored and attended is the layers' business.

    With `relative_rope` only distances matter: frames keep their absolute positions, without a limit, and the sink is
    rotated anew whenever the window moves, so that its distance stays that of its slot.
    """

    def __init__(self, geometry: CacheGeometry, device: torch.device, rotation: Rotation):
        self.geometry = geometry
        self.device = device
        self.rotation = rotation
        self._tables: dict[tuple[str, int], Tensor] = {}
        self._slots: dict[int, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        self._end = self._filled = self._offset = 0
        self._sink_shift = 0
        self._prepared: tuple[int, ...] | None = None
        self.plan: PassPlan | None = None

    @property
    def pointers(self) -> tuple[int, int]:
        """(highest frame processed plus one, filled slots), in latent frames."""
        return self._end, self._filled

    @property
    def signature(self) -> tuple[object, ...]:
        assert self.plan is not None, "signature outside begin() and end()"
        return (self.frames, self.stored, self.filled, self.turns_sink,
                self.plan.write_from if self.writes_sink else None)

    def begin(self, start: int, frames: int, *, recache_sink: bool = False) -> PassPlan:
        geometry = self.geometry
        if not geometry.relative_rope:
            check_positions(start + frames - 1)
        plan = plan_pass(start, frames, window=geometry.window, sink=geometry.sink, end=self._end,
                         filled=self._filled, recache_sink=recache_sink)
        ring = geometry.window - geometry.sink
        self._offset = (self._offset + plan.evict) % ring
        self.frames, self.stored, self.filled = frames, frames - plan.dropped, plan.filled
        shift = start - plan.first
        self.writes_sink = geometry.relative_rope and plan.write_from < geometry.sink
        self.turns_sink = geometry.relative_rope and geometry.sink > 0 and (self.writes_sink or shift != self._sink_shift)
        self._sink_shift = shift
        moment = (start, frames, plan.write_from, self._offset)
        if moment != self._prepared:
            self.table = self._table("new", start, frames)
            self.slots = self._slot_indices(plan, ring)
            self._prepared = moment
        if self.turns_sink:
            self.sink_slots = min(geometry.sink, plan.filled)
            self.sink_table = self._table("sink", shift, self.sink_slots)
        self.plan = plan
        return plan

    def end(self) -> None:
        assert self.plan is not None, "end() without begin()"
        self._end, self._filled = self.plan.end, self.plan.filled
        self.plan = None

    def _table(self, role: str, start: int, frames: int) -> Tensor:
        positions = torch.arange(start, start + frames, device=self.device)
        angles = rope_angles(self.geometry.head_dim, positions, self.geometry.rows, self.geometry.columns)[:, None]
        fresh = torch.stack((angles.cos(), angles.sin()), dim=-1).float()
        return self._tables.setdefault((role, frames), fresh).copy_(fresh)

    def _slot_indices(self, plan: PassPlan, ring: int) -> Tensor:
        """Physical slots of the stored frames, int64 [stored]: the sink stays, the rest turns."""
        sink = self.geometry.sink
        slots = torch.arange(plan.write_from, plan.filled, device=self.device)
        slots = torch.where(slots < sink, slots, sink + (slots - sink + self._offset) % ring)
        return self._slots.setdefault(len(slots), slots).copy_(slots)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate q or k of the new frames, [B, tokens, N, D]."""
        return self.rotation(x, self.table)

    def stored_frames(self, x: Tensor) -> Tensor:
        """k or v of the new frames, [B, L, N, D], as the frames that are stored, [B, stored, tokens, N, D]."""
        return x.unflatten(1, (self.frames, -1))[:, self.frames - self.stored:]


class StaticKVCache(RingKVCache):
    """A ring in the model's dtype."""

    def __init__(self, geometry: CacheGeometry, attention: Attention, batch: int, device: torch.device,
                 dtype: torch.dtype, rotation: Rotation = rotate_complex):
        super().__init__(geometry, device, rotation)
        self.layers = [StaticLayer(self, attention, batch, dtype) for _ in range(geometry.layers)]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class StaticLayer:
    """One layer of the ring: `key` and `value` [B, window, tokens, N, D], keys rotated; with relative positions also
    the sink's keys as they came.
    """

    def __init__(self, cache: RingKVCache, attention: Attention, batch: int, dtype: torch.dtype):
        geometry = cache.geometry
        self.cache = cache
        self.attention = attention
        shape = (geometry.tokens_per_frame, geometry.heads, geometry.head_dim)
        self.key = torch.zeros(batch, geometry.window, *shape, device=cache.device, dtype=dtype)
        self.value = torch.zeros_like(self.key)
        self.raw_sink = torch.zeros(batch, geometry.sink if geometry.relative_rope else 0, *shape, device=cache.device,
                                    dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes + self.raw_sink.nbytes

    def store(self, k: Tensor, v: Tensor) -> None:
        cache = self.cache
        self.key.index_copy_(1, cache.slots, cache.stored_frames(cache.rotate(k)))
        self.value.index_copy_(1, cache.slots, cache.stored_frames(v))
        if cache.turns_sink:
            self._turn_sink(k)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store(k, v)
        filled = self.cache.filled
        return self.attention(self.cache.rotate(q), self.key[:, :filled].flatten(1, 2),
                              self.value[:, :filled].flatten(1, 2))

    def _turn_sink(self, k: Tensor) -> None:
        cache = self.cache
        if cache.writes_sink:
            assert cache.plan is not None
            first, slots = cache.plan.write_from, cache.sink_slots
            self.raw_sink[:, first:slots] = cache.stored_frames(k)[:, :slots - first]
        raw = self.raw_sink[:, :cache.sink_slots]
        turned = cache.rotation(raw.flatten(1, 2), cache.sink_table)
        self.key[:, :cache.sink_slots] = turned.unflatten(1, raw.shape[1:3])
