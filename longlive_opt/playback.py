"""What a viewer of the stream sees: start-up buffer, stalls, missed deadlines. No torch."""

from collections.abc import Sequence
from typing import Any

from longlive_opt.errors import UserError


def playback(chunk_ready_ms: Sequence[float], frames_per_chunk: Sequence[int], fps: float) -> dict[str, Any]:
    """What a viewer sees who shows frame i at start + i / fps, given when each chunk became ready.

    `startup_buffer_ms`: smallest delay of the start after the first chunk's arrival that never stalls. With
    no delay, playback pauses when the next chunk is not there and resumes on its arrival:
    `stalls_at_zero_buffer` pauses, `stall_ms_at_zero_buffer` in total (which equals the start-up buffer: one
    waits at once or in pieces). `deadline_miss_share`: share of the chunks after the first that come later
    than the chunk before them lasts on screen. `sustained`: production keeps up with `fps`; if it does not,
    the buffer grows with the stream's length.

    Raises UserError for fps <= 0, unequal lengths, empty chunks or decreasing times.
    """
    steps = list(zip(chunk_ready_ms, chunk_ready_ms[1:], frames_per_chunk, strict=False))
    if fps <= 0:
        raise UserError(f"playback_fps: {fps} must be greater than 0.")
    if len(chunk_ready_ms) != len(frames_per_chunk) or not frames_per_chunk or min(frames_per_chunk) < 1 \
            or any(ready < before for before, ready, _ in steps):
        raise UserError(f"playback: {len(chunk_ready_ms)} times for {len(frames_per_chunk)} chunks; give one "
                        "time per chunk, in order, and at least one frame in each.")
    # When a chunk is to start on screen: without any pause, and with the pauses so far.
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
