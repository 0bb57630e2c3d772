"""Claims about the timeline. On the CPU the CUDA path is exercised through a stand-in for torch.cuda."""

import gc
import time
from types import SimpleNamespace

import pytest
import torch

from longlive_opt.streaming.timeline import GARBAGE, GARBAGE_MS, Event, NullTimeline, Timeline


def test_spans_and_marks_come_out_sorted_with_their_blocks():
    """Would catch: events in the order in which spans end, so that an outer span follows its parts."""
    timeline = Timeline("cpu")
    with timeline.span("outer", 3):
        with timeline.span("inner", 3):
            time.sleep(0.002)
        timeline.mark("chunk_ready", 3)
    events = timeline.resolve()
    assert [event.name for event in events] == ["outer", "inner", "chunk_ready"]
    assert {event.block for event in events} == {3} and {event.clock for event in events} == {"host"}
    outer, inner, mark = events
    assert outer.duration_ms >= inner.duration_ms >= 2.0 and mark.duration_ms == 0.0
    assert mark.start_ms >= inner.start_ms + inner.duration_ms


def test_resolve_is_idempotent_and_clear_restarts():
    """Would catch: events doubled by a second resolve, or old ones that survive clear()."""
    timeline = Timeline("cpu")
    timeline.mark("a", 0)
    assert timeline.resolve() == timeline.resolve() and len(timeline.resolve()) == 1
    timeline.clear()
    assert timeline.resolve() == []


def test_a_span_that_raises_leaves_no_event():
    """Would catch: a failed block that looks like a fast one."""
    timeline = Timeline("cpu")
    with pytest.raises(KeyError), timeline.span("denoise", 0):
        raise KeyError
    assert timeline.resolve() == []


def test_rows_survive_json():
    """Would catch: a field lost between the timeline and result.json."""
    event = Event("decode", 1.25, 0.5, None, "cuda")
    assert Event.from_row(event.to_row()) == event
    assert Event("x", 1.23456789, 0.0, 2, "host").to_row() == ["x", 1.235, 0.0, 2, "host"]


def test_garbage_collections_are_recorded_while_asked_for():
    """Would catch: a pause of the host that no event explains; a callback that outlives the stream."""
    timeline, callbacks = Timeline("cpu"), list(gc.callbacks)
    kept = [[] for _ in range(300_000)]
    with timeline.garbage():
        gc.collect()
        gc.collect(0)  # nothing young is left: too short to be a pause
    gc.collect()
    pause, = timeline.resolve()
    assert (pause.name, pause.block, pause.clock) == (GARBAGE, None, "host")
    assert pause.duration_ms >= GARBAGE_MS and len(kept) == 300_000
    with pytest.raises(KeyError), timeline.garbage():
        raise KeyError
    assert gc.callbacks == callbacks


def test_null_timeline_takes_the_same_calls():
    """Would catch: a session that works only when it is measured."""
    timeline = NullTimeline()
    with timeline.span("denoise", 1):
        timeline.mark("chunk_ready")
    timeline.clear()
    assert timeline.resolve() == []


class FakeCuda:
    """torch.cuda with a clock that advances by 1 ms per recorded event; it counts what is called."""

    def __init__(self):
        self.now, self.synchronised, self.made = 0, 0, 0

    def synchronize(self, device):
        self.synchronised += 1

    def current_stream(self, device):
        return None

    def Event(self, enable_timing):
        assert enable_timing
        self.made += 1
        event = SimpleNamespace(time=None)

        def record(stream):
            self.now += 1
            event.time = self.now

        event.record = record
        event.elapsed_time = lambda other: float(other.time - event.time)
        return event


def test_cuda_spans_yield_both_clocks_without_synchronising(monkeypatch):
    """Would catch: a synchronise per span (it would serialise what is measured), or a missing clock."""
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    timeline = Timeline("cuda")
    before = fake.synchronised
    for block in range(5):
        with timeline.span("denoise", block):
            timeline.mark("inside", block)
    assert fake.synchronised == before
    events = timeline.resolve()
    assert fake.synchronised == before + 1
    cuda = [event for event in events if event.clock == "cuda"]
    assert [event.block for event in cuda] == [0, 1, 2, 3, 4]
    assert {event.duration_ms for event in cuda} == {1.0}
    assert sum(event.clock == "host" and event.name == "denoise" for event in events) == 5
    assert timeline.resolve() == events and fake.synchronised == before + 1


def test_cuda_events_are_reused_after_resolve(monkeypatch):
    """Would catch: a soak run that creates CUDA events for ever."""
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    timeline = Timeline("cuda")
    for _ in range(3):
        with timeline.span("decode", 0):
            pass
        timeline.resolve()
        made = fake.made
    assert fake.made == made == 3  # the origin and one pair


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_clock_sees_the_kernel_that_the_host_clock_does_not():
    """Would catch: CUDA times taken on another stream than the work, or origins that drift apart."""
    timeline = Timeline("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    for block in range(2):
        with timeline.span("matmul", block):
            for _ in range(50):
                x @ x
        torch.cuda.synchronize()
        timeline.mark("done", block)
    events = timeline.resolve()
    host = next(e for e in events if e.clock == "host" and e.name == "matmul" and e.block == 1)
    cuda = next(e for e in events if e.clock == "cuda" and e.block == 1)
    done = next(e for e in events if e.name == "done" and e.block == 1)
    assert cuda.duration_ms > host.duration_ms
    assert host.start_ms - 1 < cuda.start_ms < cuda.start_ms + cuda.duration_ms < done.start_ms + 1
