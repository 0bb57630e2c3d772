"""The ring that the static caches share: fixed memory, a permanent sink, and slots that are reused in turn.

Attention has no mask and keys carry their own rotation, so the order of cached keys does not matter. The sink
keeps its slots; the others form a ring in which a new block overwrites the oldest frames. The optimizations
that use the ring decide how keys and values are stored and attended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ExperimentConfig
from ..streaming.kv_cache import CacheGeometry, PassPlan, WindowCache

Rotation = Callable[[Tensor, Tensor], Tensor]
"""Rotates the pairs (2j, 2j+1) of x [B, tokens, N, D] by a table, float32 [tokens, 1, D/2, 2] of cosine and
sine. Computes in float32 and returns the dtype of x.
"""


def rotate_complex(x: Tensor, table: Tensor) -> Tensor:
    """A `Rotation` with three kernels when run eagerly."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table)).flatten(-2).to(x.dtype)


def rotate_real(x: Tensor, table: Tensor) -> Tensor:
    """A `Rotation` without complex numbers, which Inductor fuses with neighbouring operations."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unbind(-1)
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotation_for(config: ExperimentConfig) -> Rotation:
    """The rotation that suits the way the passes run."""
    return rotate_real if config.use_torch_compile else rotate_complex


class RingKVCache(WindowCache):
    """Base of static caches: assigns frames to physical slots and holds the rotation tables, both at fixed
    addresses. The layers store and attend keys and values.

    With `relative_rope` only distances matter. Frames keep their absolute positions, without a limit, and the
    sink is rotated again whenever the window moves, so that its distance stays that of its slot.

    While a pass is planned, `slots`, int64 [stored], are the physical slots of the stored frames. For
    kernels, `token_slots`, int32 [frames], is the first token of each new frame's slot (-1: the frame is not
    stored), and `cosine` and `sine`, float32 [tokens, D/2], are `table` in two parts.
    """

    layers: Sequence[RingLayer] = ()

    def __init__(self, geometry: CacheGeometry, device: torch.device, rotation: Rotation):
        super().__init__(geometry, device)
        self.rotation = rotation
        self._tables: dict[tuple[str, int], Tensor] = {}
        self._slots: dict[tuple[str, int], Tensor] = {}
        self.reset()

    def reset(self) -> None:
        self._forget_frames()
        self._offset = self._sink_shift = 0
        self._prepared: tuple[int, ...] | None = None
        for layer in self.layers:
            layer.clear()

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def signature(self) -> tuple[object, ...]:
        assert self.plan is not None, "signature outside begin() and end()"
        return (self.frames, self.stored, self.attended, self.turns_sink,
                self.plan.write_from if self.writes_sink else None)

    def begin(self, start: int, frames: int, *, recache_sink: bool = False) -> PassPlan:
        geometry, plan = self.geometry, self._plan(start, frames, recache_sink)
        self._offset = (self._offset + plan.evict) % (geometry.window - geometry.sink)
        self.frames, self.stored, self.attended = frames, frames - plan.dropped, plan.attended
        shift = start - plan.first
        self.writes_sink = geometry.relative_rope and plan.write_from < geometry.sink
        self.turns_sink = geometry.relative_rope and geometry.sink > 0 and (
            self.writes_sink or shift != self._sink_shift)
        self._sink_shift = shift
        moment = (start, frames, plan.write_from, self._offset)
        if moment != self._prepared:
            self._set_rotation(start, frames)
            self._set_slots(plan)
            self._prepared = moment
        if self.turns_sink:
            self.sink_slots = min(geometry.sink, plan.filled)
            self.sink_table = self._table("sink", shift, self.sink_slots)
        return plan

    def _set_rotation(self, start: int, frames: int) -> None:
        self.table = self._table("new", start, frames)
        cosine, sine = self.table[:, 0].unbind(-1)
        self.cosine = _kept(self._tables, ("cosine", frames), cosine.contiguous())
        self.sine = _kept(self._tables, ("sine", frames), sine.contiguous())

    def _table(self, role: str, start: int, frames: int) -> Tensor:
        angles = self._angles(start, frames)
        table = torch.stack((angles.cos(), angles.sin()), dim=-1)[:, None].float()
        return _kept(self._tables, (role, frames), table)

    def _set_slots(self, plan: PassPlan) -> None:
        """Assign the slots: the sink stays, the rest rotates."""
        geometry = self.geometry
        sink, ring = geometry.sink, geometry.window - geometry.sink
        slots = torch.arange(plan.write_from, plan.filled, device=self.device)
        slots = torch.where(slots < sink, slots, sink + (slots - sink + self._offset) % ring)
        first_tokens = F.pad(slots * geometry.tokens_per_frame, (plan.dropped, 0), value=-1).int()
        self.slots = _kept(self._slots, ("frames", self.stored), slots)
        self.token_slots = _kept(self._slots, ("tokens", self.frames), first_tokens)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate q or k of the new frames, [B, tokens, N, D]."""
        return self.rotation(x, self.table)

    def stored_frames(self, x: Tensor) -> Tensor:
        """Select from k or v of the new frames, [B, L, N, D], those to store, [B, stored, tokens, N, D]."""
        return x.unflatten(1, (self.frames, -1))[:, self.frames - self.stored:]


def _kept(memory: dict[tuple[str, int], Tensor], name: tuple[str, int], fresh: Tensor) -> Tensor:
    """Copy `fresh` to the memory of the first tensor of this name, where captured passes read it."""
    return memory.setdefault(name, fresh).copy_(fresh)


class RingLayer:
    """One layer of a ring; defines the steps of a pass and their order. With relative positions it also holds
    the sink's unrotated keys in the model's dtype.
    """

    def __init__(self, cache: RingKVCache, batch: int, dtype: torch.dtype):
        geometry = cache.geometry
        self.cache = cache
        self.raw_sink = torch.zeros(batch, geometry.sink if geometry.relative_rope else 0,
                                    geometry.tokens_per_frame, geometry.heads, geometry.head_dim,
                                    device=cache.device, dtype=dtype)

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys, values and their scales (None: none), one row per token, as `kernels.fused` takes them."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of memory, including scales and the sink's unrotated keys."""
        return self.raw_sink.nbytes + sum(part.nbytes for part in self.memory if part is not None)

    def clear(self) -> None:
        """Set every slot to zero and every scale to one. An empty sink is attended, and 0 times the NaN of a
        former stream is a NaN.
        """
        for number, part in enumerate(self.memory):
            if part is not None:
                part.fill_(number // 2)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Write rotated k and v of the new frames, [B, L, N, D], to their slots."""
        raise NotImplementedError

    def write_sink(self, k: Tensor) -> None:
        """Write rotated k, [B, sink tokens, N, D], to the sink's slots."""
        raise NotImplementedError

    def read(self, q: Tensor) -> Tensor:
        """Attend to the valid slots with rotated q, [B, L, N, D]."""
        raise NotImplementedError

    def store(self, k: Tensor, v: Tensor) -> None:
        self.write(self.cache.rotate(k), v)
        if self.cache.turns_sink:
            self.turn_sink(k)

    def enter(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run the steps before attention: store k and v, and return rotated q."""
        self.store(k, v)
        return self.cache.rotate(q)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.read(self.enter(q, k, v))

    def turn_sink(self, k: Tensor | None) -> None:
        """Rotate the sink to its new distance. k, [B, L, N, D], are the new frames' unrotated keys; None is
        enough unless the cache `writes_sink`.
        """
        cache = self.cache
        if cache.writes_sink:
            assert cache.plan is not None and k is not None
            first, slots = cache.plan.write_from, cache.sink_slots
            self.raw_sink[:, first:slots] = cache.stored_frames(k)[:, :slots - first]
        raw = self.raw_sink[:, :cache.sink_slots].flatten(1, 2)
        self.write_sink(cache.rotation(raw, cache.sink_table))
