"""A trace of a few steady blocks for ui.perfetto.dev or chrome://tracing: one track per stage, and below them
the kernels.

The blocks are streamed for the trace alone, after every measurement, because the profiler slows the host. The
window is full, and a prompt switch follows them, so that text encoding and recache are in the trace too.

The stages come from the session's timeline. For the trace, the sampler also records each denoising pass and
the clean pass. The kernels come from `torch.profiler`: on a GPU what ran on its streams, on the CPU PyTorch's
operators of at least `SHORTEST_OPERATOR_MS` in the streaming thread. The profiler's times are Unix times; the
timeline's origin is converted to that clock.

The file is JSON with the fields of Chrome's trace event format: "X" a slice, "i" an instant, "M" a name.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..config import TRACED_BLOCKS
from ..errors import UserError
from ..files import atomic_path
from ..models.dit import TextContext
from ..streaming.kv_cache import KVCache
from ..streaming.sampler import Sampler
from ..streaming.session import StreamingSession
from ..streaming.timeline import GARBAGE, Event, Timeline
from .metrics import CHUNK_READY, COPY, FIRST_FRAMES, marks

TRACE_FILE = "trace.json.gz"
SHORTEST_OPERATOR_MS = 0.02  # views and the like number tens of thousands
CLEAN_PASS = "clean_pass"
TRACKS = {"block": "blocks", "text_encode": "text encoder", "recache": "recache", "denoise": "denoise",
          CLEAN_PASS: "clean pass", "decode": "VAE decode", COPY: "handing out"}
"""Stage -> the name of its track, from top to bottom."""
_PASS = "denoise_pass"
_KERNELS = {"kernel", "gpu_memcpy", "gpu_memset", "cpu_op"}
_STAGES_PID, _HOST_PID, _KERNELS_PID = 1, 2, 3
_NAME_LENGTH = 160


@dataclass(frozen=True)
class Kernel:
    """One kernel on a stream of a GPU, or one operator on a thread of the CPU; ms on the timeline's clock."""

    name: str
    start_ms: float
    duration_ms: float
    stream: int


@dataclass(frozen=True)
class BlockTrace:
    """What was recorded: `blocks` in the steady state and, if any, the block of the prompt switch.

    `events` are the timeline's, with one "denoise" span per pass and "clean_pass" apart.
    """

    blocks: tuple[int, ...]
    switch_block: int | None
    events: tuple[Event, ...]
    kernels: tuple[Kernel, ...]

    @property
    def shown(self) -> tuple[int, ...]:
        """All traced blocks."""
        return self.blocks if self.switch_block is None else (*self.blocks, self.switch_block)

    def window_ms(self, blocks: Sequence[int]) -> tuple[float, float]:
        """From the start of the first of `blocks` to the time when the last one is handed out."""
        return marks(self.events, "block_start")[blocks[0]], marks(self.events, CHUNK_READY)[blocks[-1]]

    def steady_kernels(self) -> list[Kernel]:
        """The kernels of the steady blocks alone."""
        begin, end = self.window_ms(self.blocks)
        return [kernel for kernel in self.kernels if begin <= kernel.start_ms < end]

    def stages(self) -> list[Event]:
        """The spans of the stages, on the device's clock where a stage has one."""
        spans = [event for event in self.events if event.duration_ms > 0 and event.name in TRACKS]
        on_device = {event.name for event in spans if event.clock == "cuda"}
        return [event for event in spans if (event.clock == "cuda") == (event.name in on_device)]

    def to_json(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The trace as a JSON object; `facts` (preset, machine, commit) become its `otherData`."""
        stages = self.stages()
        host = [event for event in self.events if event.duration_ms > 0 and event.clock == "host"
                and event not in stages]
        rows = [*_process(_STAGES_PID, "stages", dict(enumerate(TRACKS.values(), 1)))]
        tracks = {name: number for number, name in enumerate(TRACKS, 1)}
        rows += map(dict, self._blocks(tracks["block"]))
        rows += [_slice(_STAGES_PID, tracks[event.name], event.name, event.start_ms, event.duration_ms,
                        {"block": event.block}) for event in stages]
        rows += [_instant(tracks["block" if event.name == "switch_request" else COPY], event)
                 for event in self.events if event.name in (CHUNK_READY, FIRST_FRAMES, "switch_request")]
        lanes = {name: number for number, name in enumerate(dict.fromkeys(event.name for event in host), 1)}
        rows += _process(_HOST_PID, "host", {number: name for name, number in lanes.items()}) if host else []
        rows += [_slice(_HOST_PID, lanes[event.name], event.name, event.start_ms, event.duration_ms,
                        {"block": event.block}) for event in host]
        streams = sorted({kernel.stream for kernel in self.kernels})
        rows += _process(_KERNELS_PID, "kernels", {number: f"stream {number}" for number in streams}) \
            if streams else []
        rows += [_slice(_KERNELS_PID, kernel.stream, kernel.name, kernel.start_ms, kernel.duration_ms)
                 for kernel in self.kernels]
        return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": dict(facts)}

    def _blocks(self, track: int) -> Iterator[dict[str, Any]]:
        started, ready = marks(self.events, "block_start"), marks(self.events, CHUNK_READY)
        for block in self.shown:
            words = "prompt switch" if block == self.switch_block else "steady state"
            yield _slice(_STAGES_PID, track, f"block {block}: {words}", started[block],
                         ready[block] - started[block], {"block": block})

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the trace as gzipped JSON, atomically; ui.perfetto.dev reads it as it is."""
        text = json.dumps(self.to_json(facts), ensure_ascii=False, separators=(",", ":"))
        with atomic_path(path) as temporary:
            temporary.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def _process(pid: int, name: str, threads: Mapping[int, str]) -> list[dict[str, Any]]:
    """The names of a process and its threads, in this order on the screen."""
    rows: list[dict[str, Any]] = [
        {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}]
    for place, (thread, words) in enumerate(threads.items()):
        rows += [{"ph": "M", "pid": pid, "tid": thread, "name": "thread_name", "args": {"name": words}},
                 {"ph": "M", "pid": pid, "tid": thread, "name": "thread_sort_index",
                  "args": {"sort_index": place}}]
    return rows


def _slice(pid: int, thread: int, name: str, start_ms: float, duration_ms: float,
           facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Chrome's times are in microseconds."""
    row = {"ph": "X", "pid": pid, "tid": thread, "name": name[:_NAME_LENGTH],
           "ts": round(start_ms * 1e3, 3), "dur": round(duration_ms * 1e3, 3)}
    return row | ({"args": dict(facts)} if facts else {})


def _instant(thread: int, event: Event) -> dict[str, Any]:
    return {"ph": "i", "pid": _STAGES_PID, "tid": thread, "s": "t", "name": event.name,
            "ts": round(event.start_ms * 1e3, 3), "args": {"block": event.block}}


@dataclass(frozen=True)
class TracedSampler(Sampler):
    """A sampler that records each denoising pass and each clean pass."""

    timeline: Timeline | None = None

    @classmethod
    def of(cls, sampler: Sampler, timeline: Timeline) -> TracedSampler:
        own = {field.name: getattr(sampler, field.name) for field in fields(Sampler)}
        return cls(**own, timeline=timeline)

    def run_pass(self, cache: KVCache, text: TextContext, start: int, latents: Tensor, timestep: float, *,
                 keys_only: bool = False, recache_sink: bool = False) -> Tensor:
        run = super().run_pass
        if keys_only:  # a clean pass, or a recache, which the session records
            return run(cache, text, start, latents, timestep, keys_only=True, recache_sink=recache_sink)
        with self.timeline.span(_PASS, start // self.plan.block_frames):
            return run(cache, text, start, latents, timestep, recache_sink=recache_sink)

    def clean_pass(self, cache: KVCache, text: TextContext, start: int, latents: Tensor) -> None:
        with self.timeline.span(CLEAN_PASS, start // self.plan.block_frames):
            super().clean_pass(cache, text, start, latents)


def record(session: StreamingSession, prompts: Sequence[str], *, first_block: int,
           blocks: int = TRACED_BLOCKS) -> BlockTrace:
    """Stream and trace `blocks` steady blocks, and one with a switch to the second of `prompts`, if any.

    The session holds no video afterwards. Everything that compiles or captures should have run before.

    Args:
        first_block: the first traced block.

    Raises:
        UserError: the session records no timeline, the window is not full at the first block, or the stream
            has no prompt or passes the last position.
    """
    timeline, plain = session.timeline, session.pipeline
    if not isinstance(timeline, Timeline):
        raise UserError("session: it records no timeline; make it with StreamingSession(pipeline, "
                        "timeline=Timeline(pipeline.device)).")
    window = plain.config.window_blocks
    if first_block < window or blocks < 1 or not prompts:
        raise UserError(f"trace: {blocks} blocks from block {first_block} with {len(prompts)} prompts; the "
                        f"window fills in {window} blocks, so give a first block from {window} on, at least "
                        "one block and one prompt.")
    last = first_block + blocks + (len(prompts) > 1)
    most = plain.config.max_blocks
    if most is not None and last + plain.config.overlaps_decoding > most:
        raise UserError(f"trace: it ends with block {last}, but absolute rotary positions end after {most} "
                        "blocks; set relative_rope: true.")
    session.reset()
    timeline.clear()
    host_frames, session.host_frames = session.host_frames, True
    session.pipeline = replace(plain, sampler=TracedSampler.of(plain.sampler, timeline))
    cuda = plain.device.type == "cuda"
    if not torch.cuda.is_available():
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it calls a missing GPU an error
    # Without `acc_events` it warns of cycles, and there is one.
    profiler = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True)
    running = False
    try:
        # Where decoding overlaps the next block, nothing would compete with the last one.
        for chunk in session.stream(prompts[0], last + plain.config.overlaps_decoding):
            if not running and session.next_block >= first_block - 1:
                profiler.start()
                running = True
            if session.next_block == first_block + blocks and len(prompts) > 1:
                session.switch_prompt(prompts[1])
            del chunk
        if cuda:
            torch.cuda.synchronize(plain.device)
    finally:
        if running:
            profiler.stop()
        session.pipeline, session.host_frames = plain, host_frames
    events = timeline.resolve()
    origin_ns = time.time_ns() - timeline.now_ms() * 1e6
    session.reset()
    shown = tuple(range(first_block, last))
    renamed = [replace(event, name="denoise") if event.name == _PASS else event for event in events
               if event.name != "denoise" and (event.block in shown or event.name == GARBAGE)]
    trace = BlockTrace(shown[:blocks], shown[blocks] if len(shown) > blocks else None, tuple(renamed), ())
    begin, end = trace.window_ms(shown)
    within = [event for event in renamed if begin <= event.start_ms <= end]
    kernels = [kernel for kernel in _kernels(profiler, origin_ns) if begin <= kernel.start_ms <= end]
    return replace(trace, events=tuple(within), kernels=tuple(kernels))


def _kernels(profiler: profile, origin_ns: float) -> list[Kernel]:
    """The profiler's kernels or operators, in ms since `origin_ns` of the Unix clock, by start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        profiler.export_chrome_trace(str(path))
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    base_ms = (found.get("baseTimeNanoseconds", 0) - origin_ns) / 1e6
    rows = [row for row in found["traceEvents"] if row.get("ph") == "X" and row.get("cat") in _KERNELS
            and (row["cat"] != "cpu_op" or float(row["dur"]) >= SHORTEST_OPERATOR_MS * 1e3)]
    kernels = [Kernel(str(row["name"]), base_ms + float(row["ts"]) / 1e3, float(row["dur"]) / 1e3,
                      int(row.get("args", {}).get("stream", row["tid"]))) for row in rows]
    return sorted(kernels, key=lambda kernel: (kernel.start_ms, -kernel.duration_ms))
