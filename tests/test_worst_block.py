"""Claims about what is said of the slowest block, on hand-made events."""

from typing import Any

from example_results import example_result

from longlive_opt.measurement import worst_block
from longlive_opt.report.conclusion import conclusion_html
from longlive_opt.report.log.notes import interruptions
from longlive_opt.streaming.timeline import GARBAGE, Event

SLOW = 7


def result_of(denoise_ms: float, launched_ms: float, *more: Event, **keys: Any) -> dict[str, Any]:
    """Twenty blocks of 300 ms, 200 of them denoising, which was launched in 100 ms and takes longer in block
    7.
    """
    events, now = [], 0.0
    for block in range(20):
        denoise, launched = (denoise_ms, launched_ms) if block == SLOW else (200.0, 100.0)
        for name, launch, run in (("denoise", launched, denoise), ("decode", 5.0, 100.0)):
            events += [Event(name, now, launch, block, "host"), Event(name, now, run, block, "cuda")]
        now += denoise + 100
        events.append(Event("chunk_ready", now, 0.0, block, "host"))
    result = example_result()
    return result | {"events": [event.to_row() for event in (*events, *more)],
                     "sizes": result["sizes"] | {"warmup_blocks": 5}, **keys}


def test_a_late_host_is_told_from_a_slow_gpu():
    """Would catch: a worst case of 925 ms against 584 that is put down to the GPU, which stood still."""
    assert worst_block.explain(result_of(500.0, 499.0)) == (
        "Slowest block: 7, 600.0 ms against 300.0 in the median: denoise +300.0 ms (launched for 499.0 ms "
        "instead of 100.0: the GPU waited for the host), decode +0.0 ms.")
    assert "the GPU waited" not in worst_block.explain(result_of(500.0, 110.0))


def test_a_block_like_the_others_is_not_explained():
    """Would catch: a reason for noise. What happens while the window fills is no steady state either."""
    assert worst_block.explain(result_of(225.0, 100.0)) == ""
    assert worst_block.explain(result_of(500.0, 499.0) | {"sizes": {"warmup_blocks": 9}}) == ""


def test_garbage_collection_counts_for_the_block_that_it_held_up():
    """Would catch: a collection in another block as the reason; none, where nobody looked."""
    start = 300.0 * SLOW
    pauses = [Event(GARBAGE, at, 250.0, None, "host") for at in (start + 10, start - 40)]
    watched = result_of(500.0, 499.0, *pauses, interruptions={"garbage_collections": 2})
    assert worst_block.explain(watched).endswith("; garbage collection 250.0 ms of it.")
    assert "garbage" not in worst_block.explain(result_of(500.0, 499.0))


def test_a_run_without_a_gpu_is_on_the_hosts_clock():
    """Would catch: every stage of a CPU called launching."""
    result = result_of(500.0, 499.0)
    result["events"] = [row for row in result["events"] if row[4] == "host"]
    assert "denoise +399.0 ms, decode +0.0 ms." in worst_block.explain(result)


def test_the_report_says_what_interrupted_the_streams():
    """Would catch: a collection of 272 ms that only the events know; silence taken for none."""
    found = {"garbage_collections": 1, "garbage_ms_max": 272.3, "allocator_retries": 3}
    assert interruptions({"interruptions": found}) == (
        "Interruptions: garbage collections 1 (the longest 272.3 ms), allocator retries 3.")
    assert interruptions({"interruptions": {"garbage_collections": 0, "garbage_ms_max": 0.0}}) == (
        "Interruptions: garbage collections 0.")
    assert interruptions({}) == ""
    assert "Slowest block: 7" in conclusion_html(result_of(500.0, 499.0), None)
