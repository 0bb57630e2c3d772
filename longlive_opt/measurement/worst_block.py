"""Explains where the slowest steady-state block of a run lost its time, because a worst case needs a cause as
well as a number. Needs no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..streaming.timeline import GARBAGE, Event
from .metrics import CHUNK_READY, marks, stage_totals, steady_intervals

OUTLIER = 1.1  # a slowest block within a tenth of the median needs no explanation
LAUNCH_BOUND = 0.95  # share of a stage's time on the GPU; below it, the host was ahead of the stage


def explain(result: Mapping[str, Any]) -> str:
    """Name the stages in which the slowest block was slower than the median; empty if it was no outlier.

    If a GPU stage took longer because the host launched it late, the text says so: launching took as long as
    the stage, and exceeded its usual time by at least half of what the stage lost.
    """
    events = [Event.from_row(row) for row in result["events"]]
    intervals = steady_intervals(events, result["sizes"]["warmup_blocks"])
    block = max(intervals, key=intervals.__getitem__)
    usual = statistics.median(intervals.values())
    if intervals[block] <= OUTLIER * usual:
        return ""
    parts = [_stage(name, *figures) for name, figures in _excess(events, block, intervals).items()]
    text = (f"Slowest block: {block}, {intervals[block]:.1f} ms against {usual:.1f} in the median"
            f"{': ' if parts else ''}{', '.join(parts)}")
    if "interruptions" in result:
        text += f"; garbage collection {_garbage_ms(events, block):.1f} ms of it"
    return f"{text}."


def _excess(events: Sequence[Event], block: int,
            steady: Mapping[int, float]) -> dict[str, tuple[float, float, float, float]]:
    """Stage -> (ms above its median, ms, ms of launching, median of launching) in `block`, the largest first.
    Launching is 0 for stages with only the host's clock.
    """
    totals, clocks = stage_totals(events)
    on_host, _ = stage_totals([event for event in events if event.clock == "host"])
    found = {}
    for name, times in totals.items():
        if not steady.keys() & times.keys():
            continue
        launches = on_host.get(name, {}) if clocks[name] == "cuda" else {}
        ours, launching = ([of.get(at, 0.0) for at in steady] for of in (times, launches))
        found[name] = (times.get(block, 0.0) - statistics.median(ours), times.get(block, 0.0),
                       launches.get(block, 0.0), statistics.median(launching))
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def _stage(name: str, excess: float, ms: float, launching: float, usual: float) -> str:
    late = launching >= LAUNCH_BOUND * ms and launching - usual >= 0.5 * excess > 0
    why = f" (launched for {launching:.1f} ms instead of {usual:.1f}: the GPU waited for the host)"
    return f"{name} {excess:+.1f} ms{why if late else ''}"


def _garbage_ms(events: Sequence[Event], block: int) -> float:
    """Milliseconds of garbage collection in the interval that ends with `block`."""
    ready = marks(events, CHUNK_READY)
    return sum(event.duration_ms for event in events
               if event.name == GARBAGE and ready[block - 1] <= event.start_ms < ready[block])
