"""A timeline records what happened when; `metrics.py` derives every metric from it.

It has two clocks. "host" is `time.perf_counter`. For a span on a GPU it only shows how long launching took,
but a mark after a synchronise at a block edge shows what a viewer experiences; in a measurement, the block's
frames have reached host memory by then (stage `copy_to_host`). "cuda" is a pair of CUDA events on the current
stream and shows how long the device took. Recording never synchronises; `resolve()` does so once, at the end.
"""

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


GARBAGE = "garbage_collection"
GARBAGE_MS = 1.0  # shorter collections, of young objects, number thousands and delay nothing


@dataclass(frozen=True)
class Event:
    """One interval (or instant, `duration_ms` 0), in ms since the timeline's origin.

    `block` is the index of its block or None. `clock` is "host" or "cuda".
    """

    name: str
    start_ms: float
    duration_ms: float
    block: int | None
    clock: str

    def to_row(self) -> list[Any]:
        """Compact JSON form [name, start_ms, duration_ms, block, clock], times rounded to a microsecond."""
        return [self.name, round(self.start_ms, 3), round(self.duration_ms, 3), self.block, self.clock]

    @classmethod
    def from_row(cls, row: list[Any]) -> "Event":
        """Inverse of `to_row`."""
        return cls(*row)


class Timeline:
    """Records spans and marks of one stream of blocks on `device`.

    On a CUDA device a span yields two Events after `resolve()`, one per clock. CUDA events come from a pool
    and are reused after `resolve()`. Creating and clearing a timeline synchronise once, so both clocks share
    their origin to within a kernel launch. A span whose body raises leaves no event. Do not use it during
    CUDA graph capture.
    """

    def __init__(self, device: "torch.device | str") -> None:
        import torch

        self.device = torch.device(device)
        self._cuda = torch.cuda if self.device.type == "cuda" else None
        self._pool: list[torch.cuda.Event] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything and restart both clocks at zero."""
        self._events: list[Event] = []
        self._pending: list[tuple[str, int | None, Any, Any]] = []
        if self._cuda:
            self._cuda.synchronize(self.device)
            self._cuda_origin = self._record()
            self._cuda.synchronize(self.device)
        self._origin = time.perf_counter()

    def mark(self, name: str, block: int | None = None) -> None:
        """Record an instant on the host clock. Synchronise first if it must mean "done on the device"."""
        self._events.append(Event(name, self.now_ms(), 0.0, block, "host"))

    @contextlib.contextmanager
    def span(self, name: str, block: int | None = None) -> Iterator[None]:
        """Time the body on the host clock and, on CUDA, on the stream current at its begin and end."""
        start_ms = self.now_ms()
        start = self._record() if self._cuda else None
        yield
        if start is not None:
            self._pending.append((name, block, start, self._record()))
        self._events.append(Event(name, start_ms, self.now_ms() - start_ms, block, "host"))

    @contextlib.contextmanager
    def garbage(self) -> Iterator[None]:
        """Record Python's garbage collections of at least `GARBAGE_MS` while the body runs, on the host clock
        and without a block, because they stop the host.
        """
        begun = 0.0

        def note(phase: str, _: dict[str, int]) -> None:
            nonlocal begun
            if phase == "start":
                begun = self.now_ms()
            elif self.now_ms() - begun >= GARBAGE_MS:
                self._events.append(Event(GARBAGE, begun, self.now_ms() - begun, None, "host"))

        gc.callbacks.append(note)
        try:
            yield
        finally:
            gc.callbacks.remove(note)

    def resolve(self) -> list[Event]:
        """Synchronise once, convert CUDA events to times, and return all events by start. Idempotent."""
        if self._pending:
            self._cuda.synchronize(self.device)
            for name, block, start, end in self._pending:
                # The duration is read directly: differences of times since the origin are float32 and coarse
                # (16 us after 200 s).
                start_ms, duration_ms = self._cuda_origin.elapsed_time(start), start.elapsed_time(end)
                self._events.append(Event(name, start_ms, duration_ms, block, "cuda"))
                self._pool += (start, end)
            self._pending = []
        return sorted(self._events, key=lambda event: (event.start_ms, -event.duration_ms))

    def now_ms(self) -> float:
        """Time since the origin on the host clock."""
        return (time.perf_counter() - self._origin) * 1e3

    def _record(self) -> "torch.cuda.Event":
        try:  # not "if": an asynchronous decoder may record from its own thread
            event = self._pool.pop()
        except IndexError:
            event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self.device))
        return event


class NullTimeline:
    """The interface of `Timeline` for runs that are not measured: records nothing and costs nothing."""

    def clear(self) -> None:
        """Do nothing."""

    def mark(self, name: str, block: int | None = None) -> None:
        """Do nothing."""

    def span(self, name: str, block: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that does nothing."""
        return contextlib.nullcontext()

    def resolve(self) -> list[Event]:
        """Return an empty list."""
        return []
