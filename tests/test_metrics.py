"""Claims about the figures, on hand-made events whose answers can be worked out on paper."""

import numpy as np
import pytest
from example_results import example_events, example_result

from longlive_opt.errors import UserError
from longlive_opt.measurement import metrics
from longlive_opt.measurement.result import is_na
from longlive_opt.streaming.timeline import Event


def stream(intervals, switches=(), stages=None, clock="cuda"):
    """Blocks that take `intervals` ms; `stages` is {block: {name: ms}} on `clock`, 1 ms on the host's."""
    events, now = [], 0.0
    for block, interval in enumerate(intervals):
        if block in switches:
            events.append(Event("switch_request", now, 0.0, block, "host"))
        events.append(Event("block_start", now, 0.0, block, "host"))
        for name, milliseconds in (stages or {}).get(block, {}).items():
            events.append(Event(name, now, 1.0, block, "host"))
            if clock == "cuda":
                events.append(Event(name, now, milliseconds, block, "cuda"))
        now += interval
        events.append(Event("chunk_ready", now, 0.0, block, "host"))
    return events


def test_percentile_is_numpys():
    """Would catch: another percentile definition than the one the report states."""
    values = list(np.random.default_rng(0).random(37))
    for q in (0, 12.5, 50, 95, 99, 100):
        assert metrics.percentile(values, q) == pytest.approx(np.percentile(values, q))
    assert metrics.percentile([3.0], 99) == 3.0


def test_p99_is_printed_from_299_samples_up_only():
    """Would catch: a p99 of 100 samples, which is just the maximum under a better name."""
    few, enough = metrics.distribution([1.0] * 298), metrics.distribution([1.0] * 299)
    assert is_na(few["p99"]) and "n too small for p99 (n=298 < 299)" in few["p99"]["reason"]
    assert few["max"] == 1.0 and enough["p99"] == 1.0


def test_warm_up_and_switch_blocks_are_no_steady_state():
    """Would catch: compilation in block 0 or the recache of a switch counted as steady-state latency."""
    events = stream([5000, 900, 240, 240, 1200, 252, 228], switches=[4])
    latency = metrics.latency_metrics(events, first_measured_block=2)
    assert latency["ss_blocks"] == [2, 3, 5, 6]
    assert latency["ss_block_ms"] == [240, 240, 252, 228]
    assert latency["ss_ms_per_frame"]["mean"] == pytest.approx(20.0)
    assert latency["ss_ms_per_frame"]["max"] == pytest.approx(21.0)
    assert latency["ss_with_switches"]["max"] == pytest.approx(100.0)
    assert latency["ss_with_switches"]["n"] == 5
    assert latency["ps_ms_all"] == [1200] and latency["ps_blocks"] == [4]
    assert latency["first_frame_ms"] == 5000
    assert latency["ss_over_target"]["share"] == 0.0


def test_a_switch_during_warm_up_does_not_count():
    """Would catch: the warm-up switch, which compiles the recache, inside the switch latencies."""
    latency = metrics.latency_metrics(stream([10, 90, 10, 30, 10], switches=[1, 3]), first_measured_block=2)
    assert latency["ps_ms_all"] == [30] and latency["ss_blocks"] == [2, 4]


def test_early_frames_end_a_switch_and_not_its_block():
    """Would catch: a switch latency that ignores the frames handed out first, a block interval that ends with
    them, or a breakdown that counts the decoding of frames that came later.
    """
    events = stream([240, 240, 300, 240], switches=[2])
    events += [Event("decode", 480 + 180, 25.0, 2, "host"), Event("decode", 480 + 205, 45.0, 2, "host"),
               Event("first_frames", 480 + 206, 0.0, 2, "host"), Event("first_frames", 90, 0.0, 0, "host")]
    latency = metrics.latency_metrics(events, first_measured_block=1)
    assert latency["ps_ms_all"] == [206] and latency["first_frame_ms"] == 90
    assert latency["ps_breakdown_ms"]["decode"] == 25 and latency["ps_breakdown_ms"]["other"] == 181
    assert latency["ss_blocks"] == [1, 3] and latency["ss_with_switches"]["max"] == 25


def test_switch_stream_can_be_separate():
    """Would catch: switches that eat up the 299 samples of p99, SS samples from the switch stream."""
    latency = metrics.latency_metrics(stream([10, 12, 12, 12]), first_measured_block=1,
                                      switch_events=stream([10, 50, 11, 70], switches=[1, 3]))
    assert latency["ss_block_ms"] == [12, 12, 12] and latency["ps_ms_all"] == [50, 70]
    assert latency["ss_with_switches"] == {"n": 3, "mean": pytest.approx(131 / 36),
                                           "max": pytest.approx(70 / 12)}


def test_no_switch_is_na_not_zero():
    """Would catch: "0 ms switch latency" in a table of a run that never switched."""
    latency = metrics.latency_metrics(stream([10, 10, 10]), first_measured_block=1)
    assert latency["ps_ms"]["n"] == 0 and latency["ps_ms_all"] == []
    assert all(is_na(latency["ps_ms"][key]) for key in ("mean", "p50", "p99", "max"))
    assert all(map(is_na, latency["ps_breakdown_ms"].values()))


def test_breakdown_uses_the_device_clock_and_names_the_rest():
    """Would catch: launch times on the host clock reported as stage times."""
    stages = {2: {"text_encode": 20.0, "recache": 300.0, "denoise": 400.0, "decode": 250.0}}
    latency = metrics.latency_metrics(stream([700, 700, 1000, 700], [2], stages), first_measured_block=1)
    assert latency["ps_breakdown_ms"] == stages[2] | {"other": pytest.approx(30.0)}


def test_spans_of_one_stage_add_up_within_a_block():
    """Would catch: a stage that ran twice in a block counted as two blocks."""
    events = stream([10, 10, 10], stages={1: {"decode": 3.0}, 2: {"decode": 5.0}})
    events.append(Event("decode", 15.0, 4.0, 1, "cuda"))
    stage = metrics.latency_metrics(events, first_measured_block=1)["stages_ms"]["decode"]
    assert stage["mean"] == 6.0 and stage["n"] == 2 and stage["max"] == 7.0 and stage["clock"] == "cuda"


def test_stages_on_a_cpu_are_on_the_host_clock():
    """Would catch: an empty stage table on CPU runs."""
    events = stream([10, 10, 10], stages={1: {"denoise": 0}, 2: {"denoise": 0}}, clock="host")
    latency = metrics.latency_metrics(events, first_measured_block=1)
    assert latency["stages_ms"]["denoise"]["clock"] == "host"
    assert latency["clock_disagreement"]["available"] is False
    assert latency["clock_disagreement"]["flag"] is None


@pytest.mark.parametrize(("denoise", "flag", "word"), [
    (97.0, False, "agree within 5%"), (80.0, True, "host work"), (130.0, True, "overlap")])
def test_clocks_that_disagree_are_flagged_with_a_sentence(denoise, flag, word):
    """Would catch: 20 % of the viewer's time missing from the stage bars without a word."""
    events = stream([100] * 4, stages={block: {"denoise": denoise} for block in range(4)})
    agreement = metrics.clock_agreement(events, first_measured_block=1)
    assert agreement["flag"] is flag and word in agreement["sentence"]
    assert agreement["share"] == pytest.approx((100 - denoise) / 100)


def test_spans_inside_a_stage_do_not_count_twice_for_the_clocks():
    """Would catch: a nested span, such as one denoising step, that makes the stages exceed the interval."""
    events = stream([100] * 3, stages={block: {"denoise": 99.0, "denoise_step": 25.0} for block in range(3)})
    assert metrics.clock_agreement(events, first_measured_block=1)["flag"] is False


def test_fps_is_wall_clock_with_switches():
    """Would catch: throughput computed from steady blocks only, which no viewer ever gets; warm-up in it; the
    consumer's time before the first measured block in it; a decode that overlaps it left out."""
    events = stream([9999, 500, 700, 500], [2])
    assert metrics.wall_clock_fps(events, first_measured_block=1) == pytest.approx(36 / 1.7)
    late = [Event(e.name, e.start_ms + (40 if (e.name, e.block) == ("block_start", 1) else 0), 0.0, e.block,
                  e.clock) for e in events]
    assert metrics.wall_clock_fps(late, first_measured_block=1) == pytest.approx(36 / 1.66)
    early = [Event(e.name, e.start_ms - (300 if e.name == "block_start" else 0), 0.0, e.block, e.clock)
             for e in events]
    assert metrics.wall_clock_fps(early, first_measured_block=1) == pytest.approx(36 / 1.7)
    measured = metrics.measurements(stream([500] * 4), first_measured_block=1, switch_events=events)
    assert (measured["fps"], measured["fps_with_switches"]) == (pytest.approx(24), pytest.approx(36 / 1.7))
    alone = metrics.measurements(stream([500] * 4), first_measured_block=1)
    assert is_na(alone["fps_with_switches"])
    assert metrics.measurements(events, first_measured_block=1)["fps_with_switches"] == \
        pytest.approx(36 / 1.7)


def test_a_request_at_a_random_moment_waits_half_a_block_longer():
    """Would catch: the best case, a request at the block's edge, sold as what a user waits."""
    latency = metrics.latency_metrics(stream([240, 240, 400, 300, 500], [2, 4]), first_measured_block=1)
    assert latency["ps_ms"]["mean"] == 450 and latency["ps_before_ms_all"] == [240, 300]
    assert latency["ps_random_ms"] == {"n": 2, "mean": pytest.approx(450 + 135), "p95": pytest.approx(770)}
    none = metrics.latency_metrics(stream([10, 10, 10]), first_measured_block=1)
    assert is_na(none["ps_random_ms"]["mean"]) and is_na(none["ps_random_ms"]["p95"])


def test_quantile_of_random_moments_is_that_of_many_draws():
    """Would catch: a p95 of means, or of the sums of two p95."""
    rng = np.random.default_rng(0)
    latencies, before = rng.uniform(300, 900, 20), rng.uniform(200, 500, 20)
    drawn = (latencies + before * rng.random((200_000, 20))).ravel()
    found = metrics.at_random_moments(list(latencies), list(before))
    assert found["mean"] == pytest.approx(drawn.mean(), rel=1e-3)
    assert found["p95"] == pytest.approx(np.percentile(drawn, 95), rel=1e-3)


def test_random_moments_are_told_apart_by_prompt():
    """Would catch: hits and misses of the prompt cache in one mean."""
    split = metrics.random_moments_by_group([100.0, 500.0, 120.0], [40.0, 40.0, 40.0], ["hit", "miss", "hit"])
    assert {group: (found["n"], found["mean"]) for group, found in split.items()} == {
        "hit": (2, 130.0), "miss": (1, 520.0)}
    assert metrics.random_moments_by_group([1.0], [2.0], []) == {}


def test_the_copy_to_the_host_is_a_stage_where_there_is_one():
    """Would catch: 0.6 ms per block that no stage shows, or a stage of 0 ms on a machine without a device."""
    stages = {block: {"decode": 50.0, "copy_to_host": 0.5} for block in range(4)}
    latency = metrics.latency_metrics(stream([60] * 4, [2], stages), first_measured_block=1)
    assert latency["stages_ms"]["copy_to_host"]["mean"] == 0.5
    assert latency["ps_breakdown_ms"]["copy_to_host"] == 0.5
    assert latency["clock_disagreement"]["cuda_block_ms"] == pytest.approx(50.5)


def test_two_streams_in_one_timeline_are_refused():
    """Would catch: a forgotten clear(): block 3 of the second video minus block 2 of the first."""
    with pytest.raises(ValueError, match="one timeline holds one stream"):
        metrics.latency_metrics(stream([10, 10]) + stream([10, 10]), first_measured_block=1)


def test_too_short_a_stream_says_what_to_raise():
    """Would catch: a division by zero in a run whose blocks are all warm-up or all switches."""
    with pytest.raises(UserError, match="measure_blocks"):
        metrics.latency_metrics(stream([10, 10]), first_measured_block=5)
    with pytest.raises(UserError, match="num_switches"):
        metrics.latency_metrics(stream([10, 10], switches=[1]), first_measured_block=1)


def test_quick_runs_say_so():
    """Would catch: 8 blocks on a laptop that read like a benchmark."""
    few = metrics.measurements(example_events(blocks=20, switch_at=[12]), first_measured_block=8)["sizes"]
    assert few["quick"] and few["note"].startswith("quick run: 11 steady-state blocks, 1 prompt switches")
    assert (few["blocks_measured"], few["switches"], few["warmup_blocks"]) == (11, 1, 8)
    assert not example_result()["sizes"]["quick"]


def test_a_separate_switch_stream_has_its_own_playback():
    """Would catch: a playback without one stall beside a switch latency of a second."""
    view = metrics.measurements(stream([400] * 9), first_measured_block=1,
                                switch_events=stream([400, 900] * 4, range(1, 8, 2)))["playback"]
    assert view["stalls_at_zero_buffer"] == 0 and view["switch_stream"]["stalls_at_zero_buffer"] == 4


def test_grouped_splits_by_outcome_and_notices_a_missing_one():
    """Hits and misses of a prompt cache in one mean, or shifted by one request."""
    split = metrics.grouped([1.0, 5.0, 3.0], ["hit", "miss", "hit"])
    assert {group: (times["n"], times["mean"]) for group, times in split.items()} == {
        "hit": (2, 2.0),
        "miss": (1, 5.0),
    }
    assert metrics.grouped([1.0, 2.0], []) == {}
    with pytest.raises(ValueError):
        metrics.grouped([1.0, 2.0], ["hit"])
