"""Pure functions from events to metrics. `catalogue` describes each metric.

On the host clock, the session records the marks "block_start", "switch_request" and, after a synchronise at
the block edge, CHUNK_READY (the block's frames are complete; in a measurement, in host memory). Where the
first frames of a block are handed out before the others, FIRST_FRAMES says when. It also records spans for
the stages.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..streaming.timeline import Event
from .result import na

FULL_BLOCKS = 100  # steady-state samples and switches of a full run; a smaller run is called quick
FULL_SWITCHES = 20
P99_SAMPLES = 299  # 0.99^299 < 5 %: with fewer, even the largest sample is not a 95 % upper bound of the p99
CLOCK_THRESHOLD = 0.05
COPY = "copy_to_host"  # a stage on devices that frames must be copied from
STAGES = ("text_encode", "recache", "denoise", "decode", COPY)
CHUNK_READY = "chunk_ready"
FIRST_FRAMES = "first_frames"


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between order statistics at rank q/100 * (n-1)."""
    ordered = sorted(values)
    rank = q / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def distribution(values: Sequence[float]) -> dict[str, Any]:
    """{n, mean, p50, p95, p99 (n/a below 299 samples), max} of at least one value; nothing is trimmed."""
    n = len(values)
    p99 = percentile(values, 99) if n >= P99_SAMPLES else na(
        f"n too small for p99 (n={n} < {P99_SAMPLES})", f"read max, or measure {P99_SAMPLES} samples")
    return {"n": n, "mean": math.fsum(values) / n, "p50": percentile(values, 50),
            "p95": percentile(values, 95), "p99": p99, "max": max(values)}


def grouped(values: Sequence[float], groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{group: distribution of its values}, one group name per value; {} without groups.

    Raises ValueError unless there are no groups or exactly one per value.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=bool(groups)):
        found[group].append(value)
    return {group: distribution(members) for group, members in found.items()}


def random_moments_by_group(latencies: Sequence[float], before: Sequence[float], groups: Sequence[str]
                            ) -> dict[str, dict[str, Any]]:
    """{group: `at_random_moments` of its switches}, one group name per switch; {} without groups."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for pair, group in zip(zip(latencies, before, strict=True), groups, strict=bool(groups)):
        found[group].append(pair)
    return {group: at_random_moments(*zip(*pairs)) for group, pairs in found.items()}


def marks(events: Iterable[Event], name: str) -> dict[int, float]:
    """block -> time of its mark; a repeated block means that the timeline holds two streams."""
    times: dict[int, float] = {}
    for event in events:
        if event.name == name and event.block is not None:
            if event.block in times:
                raise ValueError(f"two {name!r} marks for block {event.block}: one timeline holds one stream")
            times[event.block] = event.start_ms
    return dict(sorted(times.items()))


def stage_totals(events: Iterable[Event]) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """(stage -> block -> ms, stage -> clock), on the cuda clock if a stage has cuda events."""
    spans = [event for event in events if event.duration_ms > 0 and event.block is not None]
    clocks = {event.name: "host" for event in spans} | {e.name: "cuda" for e in spans if e.clock == "cuda"}
    totals: dict[str, dict[int, float]] = {name: defaultdict(float) for name in clocks}
    for event in spans:
        if event.clock == clocks[event.name]:
            totals[event.name][event.block] += event.duration_ms
    return totals, clocks


def stage_mean(events: Sequence[Event], stage: str, first_measured_block: int) -> float | None:
    """Mean ms of a stage per measured block: of the steady-state blocks, or of those with a switch if only
    they have the stage. None without any.
    """
    switched = marks(events, "switch_request")
    totals, _ = stage_totals(events)
    times = {block: ms for block, ms in totals.get(stage, {}).items() if block >= first_measured_block}
    counted = [ms for block, ms in times.items() if block not in switched] or list(times.values())
    return math.fsum(counted) / len(counted) if counted else None


def _intervals(events: Sequence[Event], first_measured_block: int) -> dict[int, float]:
    """block -> chunk_ready[block] - chunk_ready[block - 1], ms, of the measured blocks."""
    ready = marks(events, CHUNK_READY)
    intervals = {block: time - ready[block - 1] for block, time in ready.items()
                 if block >= first_measured_block and block - 1 in ready}
    if not intervals:
        raise UserError(f"no block was measured: the stream has {len(ready)} blocks and measuring starts "
                        f"at block {first_measured_block}; raise measure_blocks or lower warmup_blocks")
    return intervals


def steady_intervals(events: Sequence[Event], first_measured_block: int) -> dict[int, float]:
    """block -> interval of the steady-state blocks: measured blocks at which no switch took effect."""
    switched = marks(events, "switch_request")
    intervals = _intervals(events, first_measured_block)
    steady = {block: interval for block, interval in intervals.items() if block not in switched}
    if not steady:
        raise UserError(f"all {len(intervals)} measured blocks are switch blocks: lower num_switches or "
                        "raise measure_blocks")
    return steady


def latency_metrics(events: Sequence[Event], *, first_measured_block: int, frames_per_block: int = 12,
                    switch_events: Sequence[Event] | None = None, target_ms: float = 40.0) -> dict[str, Any]:
    """The `latency` section of result.json (shape in `result`, meanings in `catalogue`).

    `events`: one stream. `first_measured_block`: its first block after warm-up; the caller ensures that by
    then the window is full and compilation and capture are over. The interval of block k is chunk_ready[k] -
    chunk_ready[k - 1] and includes the consumer's work between blocks. Measured blocks with a
    "switch_request" mark count in PS (prompt switch), the others in SS (steady state). `switch_events`: a
    second stream with the same warm-up that provides the PS metrics, for runs whose switches would use up the
    steady-state samples. `target_ms`: per frame, for `ss_over_target`.

    Raises UserError if no SS block is left, ValueError if `events` hold more than one stream.
    """
    section = {"first_measured_block": first_measured_block, "frames_per_block": frames_per_block}
    steady = steady_intervals(events, first_measured_block)
    per_frame = [interval / frames_per_block for interval in steady.values()]
    ready = marks(events, CHUNK_READY)
    first = min(ready)
    begin = min(event.start_ms for event in events if event.block == first)
    stages, clocks = stage_totals(events)
    last = events if switch_events is None else switch_events
    over_target = sum(ms > target_ms for ms in per_frame)
    return {
        "ss_ms_per_frame": distribution(per_frame),
        "ss_block_ms": list(steady.values()),
        "ss_blocks": list(steady),
        "ss_over_target": {"target_ms": target_ms, "share": over_target / len(per_frame)},
        "ss_with_switches": with_switches(last, **section),
        **_switch_metrics(last, first_measured_block),
        "first_frame_ms": (ready | marks(events, FIRST_FRAMES))[first] - begin,
        "stages_ms": {
            name: distribution([totals.get(block, 0.0) for block in steady]) | {"clock": clocks[name]}
            for name, totals in stages.items() if steady.keys() & totals.keys()},
        "clock_disagreement": clock_agreement(events, first_measured_block=first_measured_block),
    }


def with_switches(events: Iterable[Event], *, first_measured_block: int,
                  frames_per_block: int = 12) -> dict[str, Any]:
    """{n, mean, max} of the interval per video frame over all measured blocks of a stream."""
    values = [ms / frames_per_block for ms in _intervals(list(events), first_measured_block).values()]
    return {"n": len(values), "mean": math.fsum(values) / len(values), "max": max(values)}


def _switch_metrics(events: Sequence[Event], first_measured_block: int) -> dict[str, Any]:
    early = marks(events, FIRST_FRAMES)
    ready = marks(events, CHUNK_READY) | early
    latencies = {block: ready[block] - request for block, request in marks(events, "switch_request").items()
                 if block >= first_measured_block and block in ready}
    if not latencies:
        missing = na("no prompt switch in the measured blocks", "set num_switches to at least 1")
        return {"ps_ms": {"n": 0} | dict.fromkeys(("mean", "p50", "p99", "max"), missing), "ps_ms_all": [],
                "ps_random_ms": {"n": 0, "mean": missing, "p95": missing}, "ps_before_ms_all": [],
                "ps_blocks": [], "ps_breakdown_ms": dict.fromkeys((*STAGES, "other"), missing)}
    values, started = list(latencies.values()), marks(events, "block_start")
    before = [started[block] - started[block - 1] for block in latencies]
    summary = distribution(values)
    stages, _ = stage_totals(_until_first_frames(events, early))
    parts = {name: math.fsum(stages.get(name, {}).get(block, 0.0) for block in latencies) / len(latencies)
             for name in STAGES if name in stages or name != COPY}
    return {"ps_ms": {key: summary[key] for key in ("n", "mean", "p50", "p99", "max")}, "ps_ms_all": values,
            "ps_random_ms": at_random_moments(values, before), "ps_before_ms_all": before,
            "ps_blocks": list(latencies),
            "ps_breakdown_ms": parts | {"other": summary["mean"] - math.fsum(parts.values())}}


def _until_first_frames(events: Sequence[Event], early: Mapping[int, float]) -> list[Event]:
    """`events` without the spans of later frames in blocks that handed out their first frames early: of each
    stage and clock the first span counts.
    """
    kept, seen = [], set()
    for event in sorted(events, key=lambda event: event.start_ms):
        key = (event.name, event.clock, event.block)
        if event.block not in early or key not in seen:
            kept.append(event)
        seen.add(key)
    return kept


def at_random_moments(latencies: Sequence[float], before: Sequence[float]) -> dict[str, Any]:
    """{n, mean, p95} of the wait for a switch requested at a random moment. `latencies` are those of requests
    at a block's edge, each after a block that took `before` ms; the random request comes at any time
    in that block.
    """
    spans = [(least, least + wait) for least, wait in zip(latencies, before, strict=True)]

    def share(ms: float) -> float:
        return sum(min(1.0, max(0.0, (ms - low) / (high - low) if high > low else float(ms >= low)))
                   for low, high in spans) / len(spans)

    # The share grows linearly from one end of a span to the next.
    ends = sorted(end for span in spans for end in span)
    above = next(index for index, end in enumerate(ends) if share(end) >= 0.95)
    low, high = ends[max(0, above - 1)], ends[above]
    rise = share(high) - share(low)
    p95 = low + (high - low) * (0.95 - share(low)) / rise if rise > 0 else high
    return {"n": len(spans), "mean": math.fsum(map(math.fsum, spans)) / 2 / len(spans), "p95": p95}


def clock_agreement(events: Sequence[Event], *, first_measured_block: int,
                    threshold: float = CLOCK_THRESHOLD) -> dict[str, Any]:
    """Compare the host's block interval with the sum of the CUDA spans of `STAGES` in the steady state.

    `share` is (host - cuda) / host of the totals: positive if no stage covers some host work and gaps,
    negative if stages overlap on several streams. `flag` is set when |share| exceeds `threshold`; `sentence`
    is for the report.
    """
    steady = steady_intervals(events, first_measured_block)
    stages, clocks = stage_totals(events)
    on_cuda = [stages[name] for name in STAGES if clocks.get(name) == "cuda"]
    if not on_cuda:
        return {"available": False, "share": None, "threshold": threshold, "flag": None,
                "sentence": "No CUDA events in this run: every time is on the host clock."}
    covered = {block: math.fsum(totals.get(block, 0.0) for totals in on_cuda) for block in steady}
    host_ms, cuda_ms = math.fsum(steady.values()) / len(steady), math.fsum(covered.values()) / len(steady)
    share = (host_ms - cuda_ms) / host_ms
    worst = max(((steady[block] - covered[block]) / steady[block] for block in steady), key=abs)
    both = f"host clock {host_ms:.1f} ms per block, CUDA stages {cuda_ms:.1f} ms ({abs(share):.1%} apart)"
    if abs(share) <= threshold:
        sentence = f"The clocks agree within {threshold:.0%}: {both}."
    else:
        cause = ("host work and gaps that no stage covers" if share > 0
                 else "stages that overlap on several streams, so that their sum exceeds the interval")
        sentence = f"The clocks disagree: {both}; the reason is {cause}. The host clock is the headline."
    return {"available": True, "share": share, "threshold": threshold, "flag": abs(share) > threshold,
            "worst_block_share": worst, "host_block_ms": host_ms, "cuda_block_ms": cuda_ms,
            "sentence": sentence}


def wall_clock_fps(events: Sequence[Event], *, first_measured_block: int,
                   frames_per_block: int = 12) -> float:
    """Video frames per second of wall-clock time over the measured blocks of `events`, switches included."""
    begin, end = measured_ms(events, first_measured_block)
    count = len(_intervals(events, first_measured_block))
    return count * frames_per_block / (end - begin) * 1e3


def measured_ms(events: Sequence[Event], first_measured_block: int) -> tuple[float, float]:
    """Begin and end of a stream's measured part. It begins with its first block or, if the previous chunk is
    still being decoded then, when that chunk is ready. It ends with its last chunk.
    """
    blocks = _intervals(events, first_measured_block)
    ready, first = marks(events, CHUNK_READY), min(blocks)
    started = marks(events, "block_start").get(first, ready[first - 1])
    return max(started, ready[first - 1]), ready[max(blocks)]


def measurements(events: Sequence[Event], *, first_measured_block: int, frames_per_block: int = 12,
                 switch_events: Sequence[Event] | None = None, playback_fps: float = 25.0,
                 target_ms: float = 40.0) -> dict[str, Any]:
    """The sections `sizes`, `latency`, `fps`, `fps_with_switches` and `playback` of result.json.

    Arguments are those of `latency_metrics`. Playback covers the measured blocks of `events`; the block
    before them starts the show. With `switch_events`, `playback.switch_stream` is the same for that stream.
    """
    section = {"first_measured_block": first_measured_block, "frames_per_block": frames_per_block}
    latency = latency_metrics(events, **section, switch_events=switch_events, target_ms=target_ms)

    def shown(stream: Sequence[Event]) -> dict[str, Any]:
        ready = [time for block, time in marks(stream, CHUNK_READY).items()
                 if block >= first_measured_block - 1]
        return playback(ready, [frames_per_block] * len(ready), playback_fps)

    viewed = shown(events)
    if switch_events is not None:
        viewed["switch_stream"] = shown(switch_events)
    blocks, switches = latency["ss_ms_per_frame"]["n"], latency["ps_ms"]["n"]
    quick = blocks < FULL_BLOCKS or switches < FULL_SWITCHES
    note = (f"{'quick' if quick else 'full'} run: {blocks} steady-state blocks, {switches} prompt switches "
            f"(a full run has at least {FULL_BLOCKS} and {FULL_SWITCHES})")
    return {
        "sizes": {"blocks_measured": blocks, "warmup_blocks": first_measured_block, "switches": switches,
                  "frames_per_block": frames_per_block, "quick": quick, "note": note},
        "latency": latency,
        "fps": wall_clock_fps(events, **section),
        "fps_with_switches": wall_clock_fps(switch_events or events, **section) if switches else
        na("no prompt switch in the measured blocks", "set num_switches to at least 1"),
        "playback": viewed,
    }


def playback(chunk_ready_ms: Sequence[float], frames_per_chunk: Sequence[int], fps: float) -> dict[str, Any]:
    """Simulate a viewer who sees frame i at start + i / fps, given the time when each chunk became ready.

    `startup_buffer_ms`: the smallest delay after the first chunk's arrival that never stalls. Without a
    delay, playback pauses when the next chunk is late and resumes on its arrival: `stalls_at_zero_buffer`
    pauses, with a total of `stall_ms_at_zero_buffer` (which equals the start-up buffer: one waits at once or
    in pieces). `deadline_miss_share`: the share of chunks after the first that arrive later than the previous
    chunk lasts on screen. `sustained`: production keeps up with `fps`; otherwise the buffer grows with the
    stream's length.

    Raises UserError for fps <= 0, unequal lengths, empty chunks or decreasing times.
    """
    steps = list(zip(chunk_ready_ms, chunk_ready_ms[1:], frames_per_chunk, strict=False))
    if fps <= 0:
        raise UserError(f"playback_fps: {fps} must be greater than 0.")
    if len(chunk_ready_ms) != len(frames_per_chunk) or not frames_per_chunk or min(frames_per_chunk) < 1 \
            or any(ready < before for before, ready, _ in steps):
        raise UserError(f"playback: {len(chunk_ready_ms)} times for {len(frames_per_chunk)} chunks; give one "
                        "time per chunk, in order, and at least one frame in each.")
    # When each chunk should start on screen: without any pause, and with the pauses so far.
    due = clock = chunk_ready_ms[0]
    buffer_ms = stall_ms = 0.0
    stalls = misses = 0
    for before, ready, frames in steps:
        lasts_ms = frames * 1e3 / fps
        misses += ready - before > lasts_ms
        due += lasts_ms
        buffer_ms = max(buffer_ms, ready - due)
        clock += lasts_ms
        if ready > clock:
            stalls += 1
            stall_ms += ready - clock
            clock = ready
    produced_ms = chunk_ready_ms[-1] - chunk_ready_ms[0]
    sustained = produced_ms <= sum(frames_per_chunk[1:]) * 1e3 / fps
    return {"fps": fps, "startup_buffer_ms": buffer_ms, "stalls_at_zero_buffer": stalls,
            "stall_ms_at_zero_buffer": stall_ms, "deadline_ms": max(frames_per_chunk) * 1e3 / fps,
            "deadline_miss_share": misses / len(steps) if steps else 0.0, "sustained": sustained,
            "chunks": len(chunk_ready_ms), "frames": sum(frames_per_chunk),
            "note": "" if sustained else f"slower than {fps:g} FPS: a longer stream needs a larger buffer"}
