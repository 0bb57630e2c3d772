"""What the charts read from a result; what is missing there is None or empty."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..results import is_finite, lookup, number, numbers
from ..timeline import Event
from .chart import plain
from .palette import STAGES, colour_of

Result = Mapping[str, Any]


TARGET_MS = 40.0  # per video frame: 25 FPS, for results that do not state a target


def target_of(result: Result) -> float:
    """The line that the run was to stay under, in ms per video frame: its `target_ms_per_frame`."""
    return number(result, "latency.ss_over_target.target_ms") or TARGET_MS


def targets_of(results: Iterable[Result]) -> list[float]:
    """The targets of the runs, each once."""
    return sorted({target_of(result) for result in results})


def first_runs(results: Iterable[Result]) -> list[Result]:
    """One result per preset, the first: an A/A repeat measures noise and is no preset of its own."""
    kept: dict[str, Result] = {}
    for result in results:
        kept.setdefault(preset_of(result), result)
    return list(kept.values())


def preset_of(result: Result) -> str:
    return str(result.get("preset"))


def name_of(result: Result) -> str:
    return plain(preset_of(result), 22)


def result_colour(result: Result) -> str:
    return colour_of(preset_of(result))


def frames_per_block(result: Result) -> float:
    return number(result, "sizes.frames_per_block") or 12.0


def mean_of(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def ms_per_frame(result: Result) -> list[float]:
    return [interval / frames_per_block(result) for interval in numbers(result, "latency.ss_block_ms")]


def steady_blocks(result: Result) -> list[int]:
    """Block index of each steady-state sample; consecutive numbers where the result does not say."""
    blocks = [int(block) for block in numbers(result, "latency.ss_blocks")]
    n = len(numbers(result, "latency.ss_block_ms"))
    return blocks if len(blocks) == n else list(range(n))


def first_measured(result: Result) -> int:
    """First block after warm-up, which both streams of a result share."""
    return int(number(result, "sizes.warmup_blocks") or 0)


def stage_names(result: Result) -> list[str]:
    stages = lookup(result, "latency.stages_ms")
    return ordered(stages) if isinstance(stages, Mapping) else []


def ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (STAGES.index(name) if name in STAGES else len(STAGES), name))


def is_identical(result: Result) -> bool:
    return preset_of(result) == "baseline" or lookup(result, "quality.identical") is True


def events_of(result: Result, stream: str) -> list[Event]:
    rows = result.get(stream)
    return [Event.from_row(list(row)) for row in (rows if isinstance(rows, list) else [])
            if isinstance(row, (list, tuple)) and len(row) == 5 and is_finite(row[1]) and is_finite(row[2])]


def spans_of(result: Result, stream: str) -> list[Event]:
    """Stage spans with a block, on the device's clock where the stage has one."""
    spans = [event for event in events_of(result, stream)
             if event.duration_ms > 0 and event.block is not None]
    on_device = {event.name for event in spans if event.clock == "cuda"}
    return [event for event in spans if (event.clock == "cuda") == (event.name in on_device)]
