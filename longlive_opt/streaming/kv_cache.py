"""The key-value (KV) cache: a window of past latent frames with an attention sink (LongLive,
arXiv:2509.22622; sinks: arXiv:2309.17453).

`plan_pass` defines which slot holds what, in latent frames and plain integers. `WindowCache` does the
bookkeeping around it. Every cache uses both. `RollingKVCache` is the reference; it applies the plan with
concatenations. Usage:

    cache.begin(start_frame, frames)     # plan one pass
    dit(x, timestep, text, cache.layers) # every layer rotates, stores and attends
    cache.end()                          # count the pass

A pass over frames that are already in the cache overwrites their slots and moves nothing, so a block's
denoising passes and its clean pass may repeat. Only a pass over new frames moves the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Sequence

import torch
from torch import Tensor

from ..models.attention import Attention
from ..models.dit import LayerCache
from ..models.rope import Rotary, check_positions, rope_angles


@dataclass(frozen=True)
class CacheGeometry:
    """Sizes of a cache: window and sink in latent frames, rows and columns in tokens."""

    layers: int
    heads: int
    head_dim: int
    rows: int
    columns: int
    window: int
    sink: int
    relative_rope: bool = False

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class PassPlan:
    """One pass over `frames` new latent frames, in slots of one latent frame each.

    First, slots [sink, sink + evict) leave the window. New frame i belongs to slot `first + i` and is stored
    there unless the slot is below `write_from` (a recomputed frame never overwrites the sink). Afterwards
    `filled` slots hold frames, and `attended` slots are attended: the filled ones and all of the sink, even
    while it is empty and zero (only with a sink larger than a block).
    """

    start: int
    frames: int
    evict: int
    first: int
    write_from: int
    filled: int
    attended: int
    end: int

    @property
    def dropped(self) -> int:
        """Number of new frames that are only queries: their keys are not stored."""
        return self.write_from - self.first


def plan_pass(start: int, frames: int, *, window: int, sink: int, end: int, filled: int,
              recache_sink: bool = False) -> PassPlan:
    """Plan a pass over the latent frames start .. start + frames - 1.

    Args:
        end: one more than the highest latent frame processed so far (0 at first).
        filled: number of slots that hold frames so far.
        recache_sink: let a recache overwrite the sink (LongLive's `global_sink: false`).

    Raises:
        ValueError: the pass neither follows the processed frames nor ends with them, or exceeds the window.
    """
    new_end = start + frames
    if not 0 < frames <= window or end not in (start, new_end):
        raise ValueError(
            f"cannot place latent frames {start}..{new_end - 1}: the cache ends at frame {end} and holds "
            f"{window}"
        )
    recompute = new_end == end and start > 0
    rolls = new_end > end and filled + frames > window
    evict = filled + frames - window if rolls else 0
    new_filled = filled + new_end - end - evict
    first = new_filled - frames
    protect = recompute and not (recache_sink and not rolls)
    write_from = min(max(first, sink), new_filled) if protect else first
    return PassPlan(start, frames, evict, first, write_from, new_filled, max(new_filled, sink), new_end)


class KVCache(Protocol):
    """The methods that the sampler needs from a cache."""

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory used by the cache."""

    @property
    def signature(self) -> tuple[object, ...]:
        """Describe what the planned pass does in Python. Passes with the same signature run the same kernels
        on the same addresses, so one captured CUDA graph works for all of them.
        """

    def begin(self, start: int, frames: int, *, recache_sink: bool = False) -> PassPlan:
        """Plan a pass over latent frames start .. start + frames - 1."""

    def end(self) -> None:
        """Count the pass that `begin` planned."""

    def reset(self) -> None:
        """Forget everything."""


class WindowCache:
    """Base of all caches: counts processed frames and holds the planned pass. Subclasses prepare a pass in
    `begin` and clear the stored data in `reset`.
    """

    def __init__(self, geometry: CacheGeometry, device: torch.device):
        self.geometry = geometry
        self.device = device
        self._forget_frames()

    def _forget_frames(self) -> None:
        self._end = self._filled = 0
        self.plan: PassPlan | None = None

    @property
    def pointers(self) -> tuple[int, int]:
        """(highest processed frame plus one, filled slots), in latent frames."""
        return self._end, self._filled

    def end(self) -> None:
        """Count the pass that `begin` planned."""
        assert self.plan is not None, "end() without begin()"
        self._end, self._filled = self.plan.end, self.plan.filled
        self.plan = None

    def _plan(self, start: int, frames: int, recache_sink: bool) -> PassPlan:
        """Plan a pass; refuse frames past the last absolute position."""
        geometry = self.geometry
        if not geometry.relative_rope:
            check_positions(start + frames - 1)
        self.plan = plan_pass(start, frames, window=geometry.window, sink=geometry.sink, end=self._end,
                              filled=self._filled, recache_sink=recache_sink)
        return self.plan

    def _angles(self, start: int, frames: int) -> Tensor:
        """Rotation angles of `frames` latent frames from position `start`, float64 [tokens, D/2]."""
        positions = torch.arange(start, start + frames, device=self.device)
        return rope_angles(self.geometry.head_dim, positions, self.geometry.rows, self.geometry.columns)


class RollingKVCache(WindowCache):
    """The reference, as in LongLive. Each pass concatenates the attended window, attends, and copies the
    window back to the layer's buffer.

    With absolute positions, keys are stored rotated. With `relative_rope` (LongLive's infinity variant), keys
    are stored unrotated and every pass rotates all of them, with the slot number as the position.
    """

    def __init__(self, geometry: CacheGeometry, attention: Attention, batch: int, device: torch.device,
                 dtype: torch.dtype):
        super().__init__(geometry, device)
        self._rotaries: dict[tuple[str, int], Rotary] = {}
        shape = (batch, geometry.window * geometry.tokens_per_frame, geometry.heads, geometry.head_dim)
        self.layers = [
            _RollingLayer(
                self,
                attention,
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )
            for _ in range(geometry.layers)
        ]

    def reset(self) -> None:
        self._forget_frames()
        for layer in self.layers:
            layer.key.zero_()
            layer.value.zero_()

    @property
    def nbytes(self) -> int:
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self.layers)

    @property
    def signature(self) -> tuple[object, ...]:
        assert self.plan is not None, "signature outside begin() and end()"
        return self.plan.frames, self.plan.evict, self.plan.write_from, self.plan.filled

    def begin(self, start: int, frames: int, *, recache_sink: bool = False) -> PassPlan:
        plan = self._plan(start, frames, recache_sink)
        if self.geometry.relative_rope:
            self.rotate_new = self._rotary("new", plan.first, frames)
            self.rotate_window = self._rotary("window", 0, plan.attended)
        else:
            self.rotate_new = self._rotary("new", start, frames)
        return plan

    def _rotary(self, role: str, start: int, frames: int) -> Rotary:
        """Return the rotary for a role and length, set to positions from `start`. Its memory stays at a fixed
        address, so a captured pass finds the new positions there.
        """
        fresh = Rotary(self._angles(start, frames))
        kept = self._rotaries.setdefault((role, frames), fresh)
        kept.factors.copy_(fresh.factors)
        return kept


class _RollingLayer:
    def __init__(self, cache: RollingKVCache, attention: Attention, key: Tensor, value: Tensor):
        self._cache = cache
        self._attention = attention
        self.key = key
        self.value = value

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key, value = self.store(k, v)
        if self._cache.geometry.relative_rope:
            key = self._cache.rotate_window(key)
        return self._attention(self._cache.rotate_new(q), key, value)

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v of the new frames; return the attended keys and values."""
        k = k if self._cache.geometry.relative_rope else self._cache.rotate_new(k)
        return self._update(self.key, k), self._update(self.value, v)

    def _update(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Update `buffer` to the state after the pass; return the attended slots, [B, tokens, N, D]."""
        geometry, plan = self._cache.geometry, self._cache.plan
        assert plan is not None, "attend() outside begin() and end()"
        tokens = geometry.tokens_per_frame
        sink, window = buffer[:, :geometry.sink * tokens], buffer[:, (geometry.sink + plan.evict) * tokens:]
        kept = torch.cat([sink, window], dim=1)[:, :plan.write_from * tokens]
        empty = buffer[:, plan.filled * tokens:plan.attended * tokens]
        attended = torch.cat([kept, new[:, plan.dropped * tokens:], empty], dim=1)
        buffer[:, :attended.shape[1]] = attended
        return attended
