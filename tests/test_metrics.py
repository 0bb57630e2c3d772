"""Claims about the figures, on hand-made events whose answers can be worked out on paper."""

import copy

import numpy as np
import pytest
from example_results import example_events, example_result

from longlive_opt import metrics
from longlive_opt.errors import UserError
from longlive_opt.results import is_na, lookup
from longlive_opt.timeline import Event


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
    """Would catch: throughput computed from steady blocks only, which no viewer ever gets."""
    assert metrics.wall_clock_fps(stream([9999, 500, 700, 500], [2]), first_measured_block=1) == \
        pytest.approx(36 / 1.7)


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


def test_playback_by_hand():
    """Would catch: a buffer that ignores frames already shown, or a stall counted twice."""
    # 10 frames a chunk at 25 FPS last 400 ms. Due at 0, 400, 800, 1200; ready at 0, 300, 1000, 1150.
    view = metrics.playback([50, 350, 1050, 1200], [10] * 4, 25.0)
    assert view["startup_buffer_ms"] == pytest.approx(200)
    assert view["stalls_at_zero_buffer"] == 1 and view["stall_ms_at_zero_buffer"] == pytest.approx(200)
    assert view["deadline_miss_share"] == pytest.approx(1 / 3)
    assert view["sustained"] and view["deadline_ms"] == 400


def test_the_first_chunk_is_shorter_than_the_others():
    """Would catch: 12 frames assumed for the first chunk of 9, hiding a stall after it."""
    # 9 frames at 16 FPS last 562.5 ms, 12 last 750.
    view = metrics.playback([0, 700, 1400], [9, 12, 12], 16.0)
    assert view["startup_buffer_ms"] == pytest.approx(137.5) and view["stalls_at_zero_buffer"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_buffer_never_stalls_and_nothing_smaller_does(seed):
    """Would catch: any slip in the simulation, by brute force over every frame."""
    rng = np.random.default_rng(seed)
    ready = np.cumsum(rng.uniform(200, 700, 40))
    frames = rng.integers(1, 14, 40)
    view = metrics.playback(list(ready), [int(n) for n in frames], 25.0)
    arrival = np.repeat(ready, frames)
    due = ready[0] + np.arange(len(arrival)) * 40.0
    assert (arrival <= due + view["startup_buffer_ms"] + 1e-6).all()
    assert view["startup_buffer_ms"] == 0 or (arrival > due + view["startup_buffer_ms"] - 1e-3).any()
    assert view["stall_ms_at_zero_buffer"] == pytest.approx(view["startup_buffer_ms"])


def test_a_slow_stream_says_that_its_buffer_is_only_for_this_length():
    """Would catch: a start-up buffer sold as a property of the preset where production never catches up."""
    view = metrics.playback([0, 500, 1000], [12] * 3, 25.0)
    assert not view["sustained"] and "longer stream" in view["note"]


@pytest.mark.parametrize(("ready", "frames", "fps"), [([0, 1], [12], 25), ([], [], 25), ([0, 1], [12, 0], 25),
                                                      ([5, 1], [12, 12], 25), ([0, 1], [12, 12], 0)])
def test_playback_refuses_nonsense(ready, frames, fps):
    """Would catch: chunks out of order or lengths that zip() would cut silently."""
    with pytest.raises(UserError, match="playback"):
        metrics.playback(ready, frames, fps)


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


def test_aa_noise_is_relative_and_needs_one_preset():
    """Would catch: noise in ms compared with a gain in percent, or two presets taken for a pair."""
    a, b = example_result(run=1), example_result(run=2)
    noise = metrics.aa_noise(a, b)
    means = [r["latency"]["ss_ms_per_frame"]["mean"] for r in (a, b)]
    assert noise["ss_mean"] == pytest.approx(abs(means[0] - means[1]) / means[0])
    assert noise["peak_allocated"] == 0 and noise["preset"] == "baseline"
    with pytest.raises(UserError, match="static_kv"):
        metrics.aa_noise(a, example_result("static_kv"))
    with pytest.raises(UserError, match="environment.gpu"):
        metrics.aa_noise(a, example_result(gpu="another"))


def test_runs_are_compared_over_equally_many_blocks():
    """Would catch: a stream that drifts while the GPU gets warm making a short run look better or worse than
    it is, and the maximum of 300 samples held against that of 30."""
    long, short = example_result(steady=300), example_result("static_kv", 0.9, steady=30, switches=4)
    for row in long["events"]:
        if row[3] > 38:  # from here on, twice as slow
            row[1], row[2] = 2 * row[1], 2 * row[2]
    long |= metrics.measurements(list(map(Event.from_row, long["events"])), first_measured_block=8,
                                 switch_events=list(map(Event.from_row, long["switch_events"])))
    a, b = metrics.matched(long, short)
    assert b is short and metrics.matched(short, long)[0] is short
    assert a["sizes"]["blocks_measured"] == 30 and a["sizes"]["switches"] == 4
    begin = example_result(steady=30, switches=4)
    for path in ("latency.ss_ms_per_frame.max", "latency.stages_ms.denoise.mean", "fps"):
        assert lookup(a, path) == pytest.approx(lookup(begin, path), rel=1e-5)
    assert a["latency"]["ps_ms_all"] == pytest.approx(long["latency"]["ps_ms_all"][:4], abs=1e-2)
    gain = metrics.decide(short, long, NOISE, LOSSY)["rationale"]
    assert "gain 9" in gain or "gain 10" in gain
    noise = metrics.aa_noise(example_result(), example_result(run=2, steady=30, switches=4))
    assert (noise["blocks"], noise["switches"]) == (30, 4)


def test_the_campaign_finds_its_pair():
    """Would catch: noise taken from two different presets, or a campaign without a pair that invents some."""
    small = {"steady": 30, "switches": 2}
    baseline, other = example_result(**small), example_result("static_kv", 0.8, **small)
    assert metrics.campaign_noise([baseline, other]) is None
    noise = metrics.campaign_noise([baseline, other, example_result("static_kv", 0.8, run=2, **small)])
    assert noise["preset"] == "static_kv" and 0 < noise["ss_mean"] < 0.02


NOISE = {"ss_mean": 0.004, "ps_mean": 0.03, "peak_allocated": 0.0}
EXACT = {"level": "exact"}
LOSSY = {"level": "lossy", "min_psnr_db": 30.0}


def decide(scale, gate, exact=False, noise=NOISE, change=None):
    result = example_result("variant", scale, exact=exact, steady=30, switches=2)
    for key, value in (change or {}).items():
        result[key] = value
    return metrics.decide(result, example_result(steady=30, switches=2), noise, gate)


def test_gain_above_noise_with_equal_frames_is_kept():
    """Would catch: a rule that does not keep the obvious."""
    decision = decide(0.8, EXACT, exact=True)
    assert decision["keep"] is True and "gain 20" in decision["rationale"]
    assert "A/A noise" in decision["rule"] and "bit-identical" in decision["rule"]


@pytest.mark.parametrize(("scale", "noise"), [(0.985, NOISE), (1.2, NOISE), (1.2, NOISE | {"ss_mean": 0.15})])
def test_no_gain_above_the_floor_or_loss_is_dropped(scale, noise):
    """Would catch: 1.5 % kept because the two baseline runs agreed by luck, or a slowdown kept."""
    assert decide(scale, EXACT, exact=True, noise=noise)["keep"] is False


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_a_change_within_a_large_noise_is_undecided(scale):
    """Would catch: a preset dropped, or said to lose, because the machine was busy with something else."""
    decision = decide(scale, EXACT, exact=True, noise=NOISE | {"ss_mean": 0.15})
    assert decision["keep"] is None and "within the noise" in decision["rationale"]


def test_an_exact_room_whose_frames_differ_is_dropped():
    """Would catch: a replay that reuses a stale slot and is praised for its speed."""
    decision = decide(0.5, EXACT, exact=False)
    assert decision["keep"] is False and "frames differ" in decision["rationale"]


def test_lossy_rooms_pass_or_fail_their_gate():
    """Would catch: a limit read the wrong way round (LPIPS falls, PSNR rises with fidelity)."""
    assert decide(0.5, LOSSY)["keep"] is True
    failed = decide(0.5, LOSSY | {"min_psnr_db": 50.0})
    assert failed["keep"] is False and "psnr_db" in failed["rationale"]
    quality = copy.deepcopy(example_result("variant", steady=30, switches=2)["quality"])
    quality["lpips"] = {"mean": 0.2}
    assert decide(0.5, {"level": "lossy", "max_lpips": 0.1}, change={"quality": quality})["keep"] is False
    assert decide(0.5, {"level": "lossy", "max_lpips": 0.3}, change={"quality": quality})["keep"] is True


def test_what_was_not_measured_is_undecided():
    """Would catch: an unavailable LPIPS or a missing A/A pair counted as passed."""
    lpips = decide(0.5, {"level": "lossy", "max_lpips": 0.1})
    assert lpips["keep"] is None and "lpips is n/a" in lpips["rationale"]
    assert decide(0.5, {"level": "lossy", "max_lpips": 0.1, "min_ssim": 0.999})["keep"] is False
    assert decide(0.5, EXACT, exact=True, noise=None)["keep"] is None
    result = example_result("variant", 0.5, steady=30, switches=2)
    assert metrics.decide(result, None, NOISE, EXACT)["keep"] is None
    other = metrics.decide(result, example_result(gpu="another", steady=30, switches=2), NOISE, EXACT)
    assert other["keep"] is None and "environment.gpu" in other["rationale"]


def test_black_frames_fail_whatever_they_score():
    """Would catch: a broken decoder's black clip against a black reference, identical and fast."""
    quality = example_result("variant", exact=True, steady=30, switches=2)["quality"]
    quality["flags"] = ["24 of 24 variant frames are constant (black or empty output)"]
    decision = decide(0.5, EXACT, change={"quality": quality})
    assert decision["keep"] is False and "constant" in decision["rationale"]


def test_the_baseline_is_the_reference():
    """Would catch: the baseline dropped for not beating itself."""
    decision = example_result(steady=30, switches=2)["decision"]
    assert decision["keep"] is None and decision["rule"] == "reference"


def test_other_objectives():
    """Would catch: a memory preset judged by its latency."""
    assert decide(0.5, EXACT | {"objective": "memory"}, exact=True)["keep"] is True
    assert "peak allocated" in decide(0.5, EXACT | {"objective": "memory"}, exact=True)["rationale"]
    assert decide(1.1, EXACT | {"objective": "switch"}, exact=True)["keep"] is False
    on_cpu = {"gpu": None, "steady": 30, "switches": 2}
    decision = metrics.decide(example_result("variant", 0.5, **on_cpu), example_result(**on_cpu), NOISE,
                              EXACT | {"objective": "memory"})
    assert decision["keep"] is None and "no CUDA device" in decision["rationale"]


@pytest.mark.parametrize("gate", [{}, {"level": "lossy"}, EXACT | {"min_ssim": 0.9}, EXACT | {"min_snr": 3},
                                  EXACT | {"objective": "beauty"}])
def test_a_gate_that_gates_nothing_is_refused(gate):
    """Would catch: a misspelt limit that lets everything pass."""
    with pytest.raises(UserError, match="quality gate"):
        decide(0.5, gate)


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
