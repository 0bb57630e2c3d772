"""Measure where the time of a training step goes, and compute what a budget buys.

Every stage is timed on untrained networks. `wall` is the time of consecutive steps. `host` is the time of
Python and launching alone, with an idle device. `device` is the time of the kernels, from the profiler. The
larger of `host` and `device` limits `wall`. `plan` is the cost of a chunk of data for the processes that plan
it, and `chunk` its cost for the device once planned. `ready` is the time before the first timed step,
including compilation.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ...errors import UserError
from .clips import CLIP_BLOCKS

if TYPE_CHECKING:
    from .loop import Stage
    from .trainer import Settings

logger = logging.getLogger(__name__)

BENCH_NAME = "bench.json"
CASES = ("vae_crop", "vae_whole", "text", "opening", "teacher", "student")
COLUMNS = ("wall", "host", "device", "kernels", "plan", "chunk", "ready", "memory")
TOP = 15
PROFILED_STEPS = 2


@dataclass(frozen=True)
class Case:
    """A stage to time: its constructor, its progress, its warm-up steps, its timed steps, and the ring that
    holds its data.
    """

    name: str
    make: Callable[[], Stage]
    progress: float
    warm: int
    steps: int
    ring: str = "ring"


def run_bench(cases: Sequence[Case], device: torch.device) -> dict[str, dict[str, float]]:
    """Time the cases. Logs a table of COLUMNS in ms (`kernels` is a number per step, `ready` is in s,
    `memory` in GB) and the most expensive kernels of each case, or operations on the CPU.
    """
    rows = {}
    for case in cases:
        rows[case.name] = _bench(case, device)
        logger.info("\n%s", table(rows, COLUMNS))
    return rows


def _bench(case: Case, device: torch.device) -> dict[str, float]:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    steps: Iterator[int] = iter(range(10**9))

    def run(count: int) -> None:
        for _ in range(count):
            stage.step(next(steps), case.progress)
            stage.masters.update(case.progress)

    def timed(action: Callable[[], Any], then_wait: bool = True) -> float:
        wait()
        began = time.perf_counter()
        action()
        if then_wait:
            wait()
        return 1e3 * (time.perf_counter() - began)

    began = time.perf_counter()
    stage = case.make()
    run(case.warm)
    wait()
    row = {"ready": time.perf_counter() - began}
    row["wall"] = timed(lambda: run(case.steps)) / case.steps
    hosts = [timed(lambda: run(1), then_wait=False) for _ in range(case.steps)]
    row["host"] = sum(hosts) / len(hosts)
    ring = getattr(stage, case.ring, None)
    if ring is not None:
        planner = ring.maker.planner if hasattr(ring, "maker") else ring.planner
        index = ring.produced
        row["plan"] = timed(lambda: planner.function(index + 100))
        ring.refresh()  # waits for the workers and allocates the memory
        planner.expect(index + 1)
        planner.wait(index + 1)
        row["chunk"] = timed(ring.refresh)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run(PROFILED_STEPS)
        wait()
    averages = profiler.key_averages()
    if cuda:
        row["memory"] = torch.cuda.max_memory_allocated(device) / 1e9
        kernels = [a for a in averages if a.device_type == DeviceType.CUDA]
        row["device"] = sum(a.self_device_time_total for a in kernels) / 1e3 / PROFILED_STEPS
        row["kernels"] = sum(a.count for a in kernels) / PROFILED_STEPS
        _log_top(case.name, "kernel", kernels, "self_device_time_total")
    else:
        _log_top(case.name, "operation", averages, "self_cpu_time_total")
    return row


def _log_top(name: str, kind: str, averages: Sequence[Any], key: str) -> None:
    best = sorted(averages, key=lambda a: getattr(a, key), reverse=True)[:TOP]
    lines = [f"{getattr(a, key) / 1e3 / PROFILED_STEPS:9.2f} ms {a.count / PROFILED_STEPS:7.0f} x  "
             f"{a.key[:80]}" for a in best]
    logger.info("%s: time per step by %s\n%s", name, kind, "\n".join(lines))


def table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    """Rows of numbers as text, with a dash for a missing number."""
    lines = ["".join([f"{'':14}", *(f"{column:>12}" for column in columns)])]
    for name, row in rows.items():
        cells = (f"{row[column]:12.1f}" if column in row else f"{'-':>12}" for column in columns)
        lines.append("".join([f"{name:14}", *cells]))
    return "\n".join(lines)


def times_of(text: str) -> dict[str, float]:
    """Parse times in ms such as `vae_crop=60,teacher=100,teacher_chunk=500`.

    Raises:
        UserError: an unknown name, or a value that is not a positive number.
    """
    known = [*CASES, *(f"{case}_chunk" for case in ("vae", "opening", "teacher", "student"))]
    times = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            times[name] = float(value)
        except ValueError as error:
            raise UserError(f"--ms: {part!r} is not of the form name=milliseconds.") from error
        if name not in known or not times[name] > 0:
            raise UserError(f"--ms: {part!r}: give positive times of {', '.join(known)}.")
    return times


def times_of_bench(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The result of `run_bench` in the form of `times_of`."""
    times = {name: row["wall"] for name, row in rows.items()}
    for name, row in rows.items():
        if "chunk" in row:
            times["vae_chunk" if name.startswith("vae") else f"{name}_chunk"] = row["chunk"]
    return times


def budget(settings: Settings, times: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The training that each stage gets in its minutes: steps, clips, video frames, chunks, different clips,
    and how often each clip is seen. Stages without a time are left out.

    Args:
        times: ms per step, and ms per chunk (such as `teacher_chunk`; 0 if unknown).
    """
    vae, teacher, student, mix = settings.vae, settings.teacher, settings.student, settings.mix
    per_chunk = mix.start + mix.far + mix.after + mix.late + mix.early
    opening_frames, clip_frames = (12 * blocks - 3 for blocks in (1, CLIP_BLOCKS))
    minutes = dict(zip(("vae", "teacher", "student"), settings.minutes))
    shares = {"text": settings.reading_minutes, "student": minutes["student"]}
    for stage, phases, until in (("vae", ("vae_crop", "vae_whole"), vae.whole_from),
                                 ("teacher", ("opening", "teacher"), teacher.clips_from)):
        if minutes[stage] is not None:
            shares |= zip(phases, (minutes[stage] * until, minutes[stage] * (1 - until)))
    sizes = {  # clips of a step, frames of a clip, clips of a chunk, steps per chunk
        "vae_crop": (vae.crop_batch, vae.crop_frames, vae.ring_videos, vae.refresh_every),
        "vae_whole": (vae.whole_batch, vae.whole_frames, vae.ring_videos, vae.refresh_every),
        "text": (settings.reading_batch, 0, 0, math.inf),
        "opening": (teacher.opening_batch, opening_frames, teacher.opening_chunk,
                    teacher.opening_refresh_every),
        "teacher": (teacher.plain_batch + teacher.switch_batch, clip_frames, per_chunk,
                    teacher.refresh_every),
        "student": (student.true_batch + student.stream_batch, clip_frames, per_chunk,
                    student.refresh_every),
    }
    first = {"vae_crop": vae.first_chunks, "opening": teacher.opening_first_chunks,
             "teacher": teacher.first_chunks, "student": student.first_chunks}
    rows = {}
    for name, (clips, frames, chunk_clips, every) in sizes.items():
        share = shares.get(name)
        if name not in times or share is None:
            continue
        chunk = times.get(f"{name.split('_')[0]}_chunk", 0.0)
        available = max(0.0, 60e3 * share - first.get(name, 0) * chunk)
        steps = int(available / (times[name] + chunk / every))
        chunks = first.get(name, 0) + (0 if math.isinf(every) else steps // every)
        rows[name] = {"minutes": share, "ms": times[name], "steps": steps, "clips": steps * clips,
                      "frames": steps * clips * frames}
        if chunks:
            rows[name] |= {"chunks": chunks, "different": chunks * chunk_clips,
                           "seen": steps * clips / (chunks * chunk_clips)}
    return rows


BUDGET_COLUMNS = ("minutes", "ms", "steps", "clips", "frames", "chunks", "different", "seen")
