"""The trace of steady blocks: which spans are on which track, and that kernels share the stages' clock."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict

import pytest
from micro import micro_model, micro_pipeline

from longlive_opt.errors import UserError
from longlive_opt.measurement import block_trace
from longlive_opt.measurement.block_trace import TRACKS, record
from longlive_opt.streaming.session import StreamingSession
from longlive_opt.streaming.timeline import Timeline

KEYS = {"denoising_steps": [1000, 500], "local_attn_size": 6, "warmup_blocks": 3}


@pytest.fixture(scope="module")
def session():
    with micro_model():
        yield StreamingSession(micro_pipeline(**KEYS), timeline=Timeline("cpu"))


@pytest.fixture(scope="module")
def trace(session):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_trace, "SHORTEST_OPERATOR_MS", 0)  # a quick machine leaves nothing
        return record(session, ["a fox", "a whale"], first_block=3)


def tracks(rows: list[dict], process: str) -> dict[str, list[dict]]:
    """Name of a thread -> its slices, of one process."""
    pid = next(row["pid"] for row in rows
               if row["name"] == "process_name" and row["args"]["name"] == process)
    names = {row["tid"]: row["args"]["name"] for row in rows
             if row["name"] == "thread_name" and row["pid"] == pid}
    found = {name: [] for name in names.values()}
    for row in rows:
        if row["ph"] == "X" and row["pid"] == pid:
            found[names[row["tid"]]].append(row)
    return found


def test_each_stage_has_a_track_of_its_own(trace):
    """A clean pass inside the denoising, a stage without a track, or the warm-up in the trace."""
    rows = trace.to_json({})["traceEvents"]
    found = {name: [(row["name"], row["args"]["block"]) for row in slices]
             for name, slices in tracks(rows, "stages").items()}
    assert list(found) == list(TRACKS.values())
    assert found["denoise"] == [("denoise", block) for block in (3, 3, 4, 4, 5, 5, 6, 6)]
    assert found["clean pass"] == [("clean_pass", block) for block in (3, 4, 5, 6)]
    assert found["VAE decode"] == [("decode", block) for block in (3, 4, 5, 6)]
    assert found["text encoder"] == [("text_encode", 6)] and found["recache"] == [("recache", 6)]
    assert [name for name, _ in found["blocks"]] == [
        *(f"block {block}: steady state" for block in (3, 4, 5)), "block 6: prompt switch"]
    ready = [row for row in rows if row["ph"] == "i" and row["name"] == "chunk_ready"]
    assert [row["args"]["block"] for row in ready] == [3, 4, 5, 6]


def test_slices_of_a_track_are_apart_or_nested(trace):
    """Perfetto drops slices that overlap without being nested."""
    rows = trace.to_json({})["traceEvents"]
    for process in ("stages", "kernels"):
        for slices in tracks(rows, process).values():
            open_until: list[float] = []
            for row in sorted(slices, key=lambda row: (row["ts"], -row["dur"])):
                while open_until and open_until[-1] <= row["ts"] + 0.01:
                    open_until.pop()
                assert not open_until or row["ts"] + row["dur"] <= open_until[-1] + 0.01
                open_until.append(row["ts"] + row["dur"])


def test_kernels_lie_in_the_stage_that_ran_them(trace):
    """Two clocks that disagree: kernels a second off, where nobody can tell which stage they belong to."""
    spans = defaultdict(list)
    for event in trace.stages():
        spans[event.name].append((event.start_ms, event.start_ms + event.duration_ms))

    def inside(stage: str, kernel) -> bool:
        return any(begin - 1 <= kernel.start_ms and kernel.start_ms + kernel.duration_ms <= end + 1
                   for begin, end in spans[stage])

    enlarged = [kernel for kernel in trace.kernels if kernel.name.startswith("aten::upsample")]
    attention = [kernel for kernel in trace.kernels if kernel.name == "aten::scaled_dot_product_attention"]
    assert enlarged and all(inside("decode", kernel) for kernel in enlarged)
    assert attention and all(any(inside(stage, kernel) for stage in spans) for kernel in attention)
    steady = trace.steady_kernels()
    assert 0 < len(steady) < len(trace.kernels)


def test_file_is_gzipped_json(trace, tmp_path):
    """A file that Perfetto cannot open; one that changes from write to write."""
    trace.write(tmp_path / "trace.json.gz", {"commit": "abc"})
    content = (tmp_path / "trace.json.gz").read_bytes()
    read = json.loads(gzip.decompress(content))
    assert read["otherData"] == {"commit": "abc"} and read == trace.to_json({"commit": "abc"})
    assert all(row["ph"] in "XiM" and row.get("dur", 0) >= 0 for row in read["traceEvents"])
    trace.write(tmp_path / "trace.json.gz", {"commit": "abc"})
    assert (tmp_path / "trace.json.gz").read_bytes() == content


def test_the_session_is_as_before(session, trace):
    """Later streams that are traced, too, or a session that still holds the traced video."""
    assert type(session.pipeline.sampler).__name__ == "Sampler" and not session.host_frames
    assert next(session.stream("a fox", 1)).block == 0
    session.reset()


def test_late_clean_passes_and_decoding_in_parallel_are_traced():
    """A clean pass that runs in the next block, or a decoder in another thread, lost or counted twice."""
    with micro_model():
        pipeline = micro_pipeline(use_static_kv=True, use_early_decode=True, use_async_vae=True, **KEYS)
        session = StreamingSession(pipeline, timeline=Timeline("cpu"))
        trace = record(session, ["a fox"], first_block=3, blocks=2)
    assert trace.shown == (3, 4) and trace.switch_block is None
    blocks = {name: [event.block for event in trace.stages() if event.name == name] for name in TRACKS}
    assert blocks["denoise"] == [3, 3, 4, 4] and blocks["decode"] == [3, 4]
    assert blocks["clean_pass"] == [3, 4] and not blocks["recache"]


def test_what_cannot_be_traced_is_refused(session):
    """A trace of the warm-up that is called steady; an error about the inside of a class."""
    with pytest.raises(UserError, match="window fills in 2 blocks"):
        record(session, ["a"], first_block=1)
    with pytest.raises(UserError, match="absolute rotary positions end after 341"):
        record(session, ["a"], first_block=340)
    with pytest.raises(UserError, match="records no timeline; make it with"):
        record(StreamingSession(session.pipeline), ["a"], first_block=3)
