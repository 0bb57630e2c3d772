"""The log's notes on the GPU during the streams, and on drift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...measurement.metrics import CHUNK_READY, marks
from ...measurement.result import is_finite, is_na, lookup, number, numbers
from ...streaming.timeline import Event
from ..campaign import Result
from .markdown import escape, percent

FIFTH_BLOCKS = 5  # a mean of fewer blocks is too noisy to show drift


def load(result: Result) -> list[str]:
    """Clock, power, temperature and energy during the streams. Nothing for results without readings."""
    samples = result.get("gpu_samples")
    if not isinstance(samples, Mapping):
        return []
    if is_na(samples):
        return [] if lookup(result, "environment.gpu") is None else [
            f"GPU during the streams: n/a, {escape(samples['reason'])}; {escape(samples['how_to_fix'])}."]
    clocks, power, heat = (_finite(samples.get(key)) for key in ("sm_mhz", "power_w", "temperature_c"))
    words = []
    if clocks:
        words.append(f"{_mean(clocks):.0f} MHz ({min(clocks):.0f} to {max(clocks):.0f})")
    if power:
        words.append(f"{_mean(power):.0f} W (up to {max(power):.0f})")
    if heat:
        words.append(f"up to {max(heat):.0f} C")
    words += [f"throttled by {escape(reason)} in {share:.0%} of the readings"
              for reason, share in (samples.get("throttled") or {}).items()]
    text = f"GPU during the steady stream, {len(samples['t_s'])} readings: {', '.join(words) or 'n/a'}."
    joules = [number(result, f"energy.{path}joules_per_frame") for path in ("", "switch_stream.")]
    if joules[0] is None:
        reason = lookup(result, "energy.joules_per_frame.reason")
        return [f"{text} Energy: n/a, {escape(reason)}." if reason else text]
    text += (f" Energy: {joules[0]:.1f} J per video frame, {number(result, 'energy.mean_power_w'):.0f} W on "
             "average, by the GPU's own counter")
    switched = "" if joules[1] is None else f"; {joules[1]:.1f} J where every second block is a switch"
    return [f"{text}{switched}."]


def drift(result: Result) -> str:
    """SS mean of the first and of the last fifth of the blocks. Empty for fewer than 25 blocks."""
    intervals, blocks = (numbers(result, f"latency.{key}") for key in ("ss_block_ms", "ss_blocks"))
    fifth = len(intervals) // 5
    if fifth < FIFTH_BLOCKS or len(blocks) != len(intervals):
        return ""
    frames = result["sizes"]["frames_per_block"]
    first, last = (_mean(part) / frames for part in (intervals[:fifth], intervals[-fifth:]))
    text = (f"Drift: SS mean {first:.2f} ms in the first fifth of the {len(intervals)} blocks, {last:.2f} in "
            f"the last ({percent(100 * (last / first - 1))})")
    ready = marks(map(Event.from_row, result["events"]), CHUNK_READY)
    clocks = [_clock_between(result, *(ready.get(int(block), math.nan) / 1e3 for block in ends))
              for ends in ((blocks[0], blocks[fifth - 1]), (blocks[-fifth], blocks[-1]))]
    if None not in clocks:
        text += f"; GPU clock {clocks[0]:.0f} and {clocks[1]:.0f} MHz"
    return f"{text}."


def _clock_between(result: Result, begin_s: float, end_s: float) -> float | None:
    times, clocks = (lookup(result, f"gpu_samples.{key}") or () for key in ("t_s", "sm_mhz"))
    read = [clock for at, clock in zip(times, clocks) if begin_s <= at <= end_s and is_finite(clock)]
    return _mean(read) if read else None


def _finite(values: Any) -> list[float]:
    return [value for value in values or () if is_finite(value)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
