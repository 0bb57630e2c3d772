"""Claims about comparisons, noise and verdicts, on made-up results."""

import copy
from pathlib import Path

import pytest
from example_results import example_quality, example_result

from longlive_opt.config import ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.measurement import catalogue, decision, metrics
from longlive_opt.measurement.result import lookup, na, read_result
from longlive_opt.streaming.timeline import Event

ROOT = Path(decision.__file__).resolve().parents[2]
NOISE = {"ss_mean": 0.004, "ps_mean": 0.03, "peak_allocated": 0.0}
EXACT = {"exactness": "bitwise", "max_error_ratio": 1.1}
LOSSY = {"exactness": "lossy", "max_error_ratio": 1.6}


def test_aa_noise_is_relative_and_needs_one_preset():
    """Would catch: noise in ms compared with a gain in percent, two presets taken for a pair, or a third run
    that is left out.
    """
    a, b, c = (example_result(run=run, steady=30, switches=4) for run in (1, 2, 3))
    noise = decision.aa_noise(a, b, c)
    means = [r["latency"]["ss_ms_per_frame"]["mean"] for r in (a, b, c)]
    assert noise["ss_mean"] == pytest.approx((max(means) - min(means)) / (sum(means) / 3))
    assert noise["values"]["ss_max"] == [r["latency"]["ss_ms_per_frame"]["max"] for r in (a, b, c)]
    assert noise["peak_allocated"] == 0 and noise["preset"] == "baseline" and noise["runs"] == 3
    with pytest.raises(UserError, match="found 1 run"):
        decision.aa_noise(a)
    with pytest.raises(UserError, match="static_kv"):
        decision.aa_noise(a, example_result("static_kv"))
    with pytest.raises(UserError, match="environment.gpu"):
        decision.aa_noise(a, example_result(gpu="another"))


def test_runs_are_compared_over_equally_many_blocks():
    """Would catch: a stream that drifts while the GPU gets warm making a short run look better or worse than
    it is, and the maximum of 300 samples held against that of 30."""
    long, short = example_result(steady=300), example_result("static_kv", 0.9, steady=30, switches=4)
    for row in long["events"]:
        if row[3] > 38:  # from here on, twice as slow
            row[1], row[2] = 2 * row[1], 2 * row[2]
    long |= metrics.measurements(list(map(Event.from_row, long["events"])), first_measured_block=8,
                                 switch_events=list(map(Event.from_row, long["switch_events"])))
    a, b = decision.matched(long, short)
    assert b is short and decision.matched(short, long)[0] is short
    assert a["sizes"]["blocks_measured"] == 30 and a["sizes"]["switches"] == 4
    begin = example_result(steady=30, switches=4)
    for path in ("latency.ss_ms_per_frame.max", "latency.stages_ms.denoise.mean", "fps"):
        assert lookup(a, path) == pytest.approx(lookup(begin, path), rel=1e-5)
    assert a["latency"]["ps_ms_all"] == pytest.approx(long["latency"]["ps_ms_all"][:4], abs=1e-2)
    gain = decision.decide(short, long, NOISE, LOSSY)["rationale"]
    assert "gain 9" in gain or "gain 10" in gain
    noise = decision.aa_noise(example_result(), example_result(run=2, steady=30, switches=4))
    assert (noise["blocks"], noise["switches"]) == (30, 4)


def test_failed_runs_have_no_sizes_to_match():
    """A summary that ends in a traceback because the baseline failed as well."""
    failed = [{"preset": "baseline", "status": "failed"}, {"preset": "speed", "status": "failed"}]
    assert list(decision.matched(*failed)) == failed


def test_the_campaign_finds_its_pair():
    """Would catch: noise taken from two different presets, or a campaign without a pair that invents some."""
    small = {"steady": 30, "switches": 2}
    baseline, other = example_result(**small), example_result("static_kv", 0.8, **small)
    assert decision.campaign_noise([baseline, other]) == {}
    noise = decision.campaign_noise([baseline, other, example_result("static_kv", 0.8, run=2, **small)])
    assert list(noise) == ["static_kv"] and 0 < noise["static_kv"]["ss_mean"] < 0.02


def test_a_comparison_has_to_exceed_the_noise_of_both_its_sides():
    """Would catch: the quiet baseline's noise used for a compiled preset that was repeated and spreads more,
    or a preset's own small one used against a baseline that spreads more.
    """
    absent = na("no CUDA device", "run on a GPU")
    keys = [metric.key for metric in catalogue.shown_in("noise")]
    noise = {"baseline": dict.fromkeys(keys, 0.03) | {"peak_allocated": absent},
             "realtime": dict.fromkeys(keys, 0.01) | {"ss_mean": 0.05, "peak_allocated": 0.0}}
    found = decision.noise_of_preset("realtime", noise)
    assert (found["ss_mean"], found["ss_max"], found["peak_allocated"]) == (0.05, 0.03, 0.0)
    assert decision.noise_of_preset("speed", noise)["ss_mean"] == 0.03
    assert decision.noise_of_preset("speed", {}) is None


def changed(result, path, value):
    """A copy with the dotted `path` set to `value`."""
    copied = copy.deepcopy(result)
    *parents, last = path.split(".")
    holder = copied
    for key in parents:
        holder = holder[key]
    holder[last] = value
    return copied


@pytest.mark.parametrize(("path", "value", "named"), [
    ("prompt_schedule.prompts", ["a fox", "a wolf"], "prompts[1] is 'a wolf' against 'a whale'"),
    ("prompt_schedule.prompts", ["a fox"], "prompts is ['a fox'] against"),
    ("parameters.prompts", ["a fox"], "prompts is ['a fox'] against"),
    ("prompt_schedule.switch_frames", [6], "switch frames[0] is 6 against 9"),
    ("weights.sha256", {"dit": "b" * 64}, "weights.sha256 of dit is 'bbb"),
    ("weights.kind", "files", "weights.kind"), ("seed", 1, "seed is 1 against 0"),
    ("parameters.seed", 1, "seed is 1"), ("parameters.local_attn_size", 9, "local_attn_size is 9 against 12"),
    ("parameters.sink_size", 0, "sink_size"), ("parameters.model_dtype", "float32", "model_dtype"),
    ("parameters.denoising_steps", [1000, 500], "denoising_steps"), ("parameters.height", 240, "height"),
    ("parameters.timestep_shift", 3.0, "timestep_shift"), ("parameters.context_noise", 5, "context_noise"),
    ("parameters.block_frames", 2, "block_frames"), ("parameters.global_sink", False, "global_sink"),
    ("parameters.relative_rope", True, "relative_rope"), ("environment.torch", "2.12", "environment.torch"),
    ("environment.gpu", "another", "environment.gpu"), ("model.name", "tiny", "model.name")])
def test_what_a_figure_depends_on_forbids_the_comparison(path, value, named):
    """Would catch: PSNR of two different videos shown as what an optimization costs, and a preset with a
    smaller window praised for its speed.
    """
    small = {"steady": 30, "switches": 2}
    baseline = example_result(**small) | {"weights": {"kind": "random", "sha256": {"dit": "a" * 64}}}
    preset = example_result("speed", 0.5, **small) | {"weights": {"kind": "random",
                                                                  "sha256": {"dit": "a" * 64}}}
    assert decision.unfair(preset, baseline) == ""
    other = changed(preset, path, value)
    assert decision.unfair(other, baseline).startswith(named)
    verdict = decision.decide(other, baseline, NOISE, EXACT)
    assert verdict["keep"] is None and verdict["rationale"].startswith("undecided: not comparable with the ")
    assert named in verdict["rationale"] and decision.compared(other, baseline) is None


@pytest.mark.parametrize("path", ["parameters.use_static_kv", "parameters.compile_mode",
                                  "parameters.measure_blocks", "environment.git_commit", "environment.cpu"])
def test_what_an_optimization_may_change_forbids_nothing(path):
    """Would catch: a rule under which no two runs may be compared."""
    small = {"steady": 30, "switches": 2}
    other = changed(example_result("speed", **small), path, "x")
    assert decision.unfair(other, example_result(**small)) == ""
    on_cpu = changed(example_result("speed", gpu=None, **small), "environment.cpu", "x")
    assert "environment.cpu" in decision.unfair(on_cpu, example_result(gpu=None, **small))


def test_prompts_of_older_results_follow_from_their_parameters():
    """Would catch: the committed campaigns unreadable, or two of their prompt lists taken for equal."""
    small = {"steady": 30, "switches": 2}
    old, new = example_result("speed", **small), example_result(**small)
    del old["prompt_schedule"]
    old["parameters"] |= {"prompts": ["a fox", "a whale"], "video_latent_frames": 18}
    assert decision.schedule_of_result(old) == (["a fox", "a whale"], [9]) == decision.schedule_of_result(new)
    old["parameters"]["prompts"] = ["a fox", "a wolf"]
    assert "prompts[1]" in decision.unfair(old, new)
    old["parameters"]["prompts_file"] = "p.txt"  # whose content nobody recorded
    assert "prompts is None against" in decision.unfair(old, new)


def test_fidelity_needs_videos_of_one_length_and_latency_does_not():
    """Would catch: latencies thrown away with a PSNR that cannot be given."""
    small = {"steady": 30, "switches": 2}
    longer = changed(example_result("speed", 0.5, **small), "parameters.video_latent_frames", 36)
    assert decision.unfair(longer, example_result(**small)) == ""
    assert decision.fidelity_reason(longer, example_result(**small)) == "video_latent_frames is 36 against 18"
    measured = longer["quality"] | {"free_running": {"psnr_db": 3}}
    quality = decision.without_fidelity(measured, "x is 1 against 2")
    assert quality["identical"] is None and "free_running" not in quality and quality["reference"] is None
    assert all("not comparable with the baseline, x is 1 against 2" in quality[name]["reason"]
               for name in ("psnr_db", "ssim", "ms_ssim", "lpips", "clip_delta"))
    verdict = decision.decide(longer | {"quality": quality}, example_result(**small), NOISE, LOSSY)
    assert verdict["rationale"].startswith("undecided: not comparable with the baseline, video_latent_frames")


def test_a_study_gets_no_verdict():
    """Would catch: an ablation recommended as the preset to take."""
    small = {"steady": 30, "switches": 2}
    for study in (example_result("ablation", 0.5, **small),
                  example_result("speed", 0.5, **small) | {"ablations": [{"changed": {"sink_size": 0}}]}):
        verdict = decision.decide(study, example_result(**small), NOISE, LOSSY)
        assert verdict["keep"] is None and verdict["rule"] == "study"


def decide(scale, gate, exact=False, noise=NOISE, change=None):
    result = example_result("variant", scale, exact=exact, steady=30, switches=2)
    for key, value in (change or {}).items():
        result[key] = value
    return decision.decide(result, example_result(steady=30, switches=2), noise, gate)


def test_gain_above_noise_with_equal_frames_is_kept():
    """Would catch: a rule that does not keep the obvious."""
    verdict = decide(0.8, EXACT, exact=True)
    assert verdict["keep"] is True and "gain 20" in verdict["rationale"]
    assert "A/A noise" in verdict["rule"] and "the same bits" in verdict["rule"]


@pytest.mark.parametrize(("scale", "noise"), [
    (0.985, NOISE), (0.985, NOISE | {"ss_mean": 0.018}), (1.2, NOISE), (1.2, NOISE | {"ss_mean": 0.15})])
def test_no_gain_above_the_floor_or_loss_is_dropped(scale, noise):
    """Would catch: 1.5 % kept because the two baseline runs agreed by luck, or a slowdown kept."""
    assert decide(scale, EXACT, exact=True, noise=noise)["keep"] is False


def test_a_shortened_run_keeps_its_own_settings():
    """Would catch: the warm-up, block size, viewer or target of the H100 presets taken for everybody's."""
    def odd(last: int) -> dict:
        run = example_result(steady=30, switches=4)
        events, switches = (list(map(Event.from_row, run[key])) for key in ("events", "switch_events"))
        return run | metrics.measurements([event for event in events if event.block <= last],
                                          first_measured_block=6, frames_per_block=9, playback_fps=20.0,
                                          switch_events=switches, target_ms=50.0)

    long, short = odd(37), odd(15)
    found, _ = decision.matched(long, short)
    assert found["sizes"] == short["sizes"] and found["playback"] == short["playback"]
    assert found["latency"]["ss_over_target"] == short["latency"]["ss_over_target"]
    assert lookup(found, "latency.ss_ms_per_frame.max") == pytest.approx(
        lookup(short, "latency.ss_ms_per_frame.max"))


def test_a_run_that_was_not_alone_is_undecided():
    """Would catch: a verdict on a run, or against a baseline, during which something else ran."""
    for crowded in (0, 1):
        runs = [example_result("variant", 0.5, steady=30, switches=2), example_result(steady=30, switches=2)]
        runs[crowded]["environment"] |= {"co_scheduled": True}
        found = decision.decide(*runs, NOISE, LOSSY)
        assert found["keep"] is None and f"during {runs[crowded]['preset']};" in found["rationale"]


def test_a_run_keeps_its_switches_where_the_other_has_none():
    """Would catch: a measured prompt-switch latency that is called not measured."""
    run, none = example_result("variant", steady=30, switches=4), example_result(steady=12, switches=4)
    none |= metrics.measurements(list(map(Event.from_row, none["events"])), first_measured_block=8)
    ours, reference = decision.matched(run, none)
    assert ours["sizes"]["switches"] == 4 and ours["latency"]["ps_ms"]["mean"] == pytest.approx(
        run["latency"]["ps_ms"]["mean"], rel=1e-5)
    assert reference is none


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_a_change_within_a_large_noise_is_undecided(scale):
    """Would catch: a preset dropped, or said to lose, because the machine was busy with something else."""
    verdict = decide(scale, EXACT, exact=True, noise=NOISE | {"ss_mean": 0.15})
    assert verdict["keep"] is None and "within the noise" in verdict["rationale"]


def with_ratio(ratio, **changes):
    return {"quality": example_quality("variant", ratio=ratio) | changes}


@pytest.mark.parametrize("gate, ratio, kept", [
    (EXACT, 1.05, True), (EXACT, 1.2, False), (LOSSY, 1.5, True), (LOSSY, 1.7, False),
    ({"exactness": "rounding", "max_error_ratio": 1.1}, 0.9, True),
    ({"exactness": "rounding", "max_error_ratio": 1.1}, 1.11, False)])
def test_the_gate_is_the_error_ratio(gate, ratio, kept):
    """Would catch: a stale slot praised for its speed, or rounding in another order dropped for its bits."""
    verdict = decide(0.5, gate, change=with_ratio(ratio))
    assert verdict["keep"] is kept and f"error ratio {ratio:.3g}" in verdict["rationale"]
    assert "mildest null row 5 (no recache at the switch)" in verdict["rationale"]


@pytest.mark.parametrize("noise", [None, NOISE | {"ss_mean": 0.6}], ids=["no noise", "noisy machine"])
def test_what_fails_its_gate_is_dropped_before_anything_else_is_asked(noise):
    """Would catch: a preset that breaks the picture left undecided, and so not ruled out."""
    assert decide(0.5, LOSSY, noise=noise, change=with_ratio(11.0))["keep"] is False
    assert decide(0.99, LOSSY, noise=noise)["keep"] is None


def test_halving_the_time_needs_no_second_baseline():
    """Would catch: no recommendation from a campaign of one run per preset, whatever the gain."""
    kept = decide(0.5, LOSSY, noise=None)
    assert kept["keep"] is True and "threshold 25.0%" in kept["rationale"]
    assert decide(1.5, LOSSY, noise=None)["keep"] is False


def test_the_worse_of_both_protocols_and_the_worst_block_count():
    """Would catch: errors that add up, or one broken block, hidden by the better figure or the mean."""
    quality = example_quality("variant", ratio=1.3)
    worse = decide(0.5, LOSSY, change={"quality": quality | {"worst_ratio": 1.9}})
    assert worse["keep"] is False and "1.9" in worse["rationale"]
    for part in (quality, quality["free_running"]):
        broken = copy.deepcopy(part["error_ratio"]) | {"worst": 5.5, "worst_block": 7}
        kept, part["error_ratio"] = part["error_ratio"], broken
        verdict = decide(0.5, LOSSY, change={"quality": quality})
        assert verdict["keep"] is False and "block 7" in verdict["rationale"]
        part["error_ratio"] = kept


def test_a_gate_that_passes_a_null_row_decides_nothing():
    """Would catch: a limit that keeps a stream without recache, as 30 dB did."""
    verdict = decide(0.5, LOSSY | {"max_error_ratio": 5.0})
    assert verdict["keep"] is None and "would pass a stream with no recache" in verdict["rationale"]
    baseline = example_result(steady=30, switches=2)
    assert decision.mildest_null(baseline) == (5.0, "no recache at the switch")
    del baseline["quality"]["nulls"]
    variant = example_result("variant", 0.5, steady=30, switches=2)
    verdict = decision.decide(variant, baseline, NOISE, LOSSY)
    assert verdict["keep"] is None and "no null rows" in verdict["rationale"]
    assert decision.mildest_null(baseline) is None and decision.mildest_null(None) is None


def test_results_from_before_the_protocol_can_be_read():
    """Would catch: a committed campaign that ends the summary, or is kept by a gate known to be blind."""
    old = {"identical": False, "flags": [], "psnr_db": {"mean": 40.0}, "protocol": "one block"}
    gate = {"exactness": "lossy", "min_psnr_db": 30.0, "min_ssim": 0.9, "objective": "latency"}
    verdict = decide(0.5, gate, change={"quality": old})
    assert verdict["keep"] is None and "older" in verdict["rationale"]
    assert decide(0.5, {"exactness": "bitwise"},
                  change={"quality": old | {"identical": True}})["keep"] is True
    for path in sorted((ROOT / "outputs").glob("h100*/*/result.json")):
        result = read_result(path)
        if found := lookup(result, "decision.gate"):
            decision.decide(result, read_result(path.parents[1] / "baseline" / "result.json"), NOISE, found)


def test_what_was_not_measured_is_undecided():
    """Would catch: a missing truth or a missing A/A pair counted as passed."""
    missing = na("the campaign has no truth", "run the baseline first")
    absent = decide(0.5, LOSSY, change={"quality": {"identical": None, "flags": [], "psnr_db": missing}})
    assert absent["keep"] is None and "no truth" in absent["rationale"]
    no_error = na("the baseline runs in float32", "use bf16")
    undivided = decide(0.5, LOSSY, change=with_ratio(1.3, worst_ratio=no_error))
    assert undivided["keep"] is None and "float32" in undivided["rationale"]
    alone = decide(0.8, EXACT, exact=True, noise=None)
    assert alone["keep"] is None and "run the baseline twice" in alone["rationale"]
    assert "25%, since nothing was run twice" in alone["rule"]
    assert decide(1.2, EXACT, exact=True, noise=None)["keep"] is None
    result = example_result("variant", 0.5, steady=30, switches=2)
    assert decision.decide(result, None, NOISE, EXACT)["keep"] is None
    other = decision.decide(result, example_result(gpu="another", steady=30, switches=2), NOISE, EXACT)
    assert other["keep"] is None and "environment.gpu" in other["rationale"]


def test_black_frames_fail_whatever_they_score():
    """Would catch: a broken decoder's black clip against a black reference, identical and fast."""
    quality = example_result("variant", exact=True, steady=30, switches=2)["quality"]
    quality["flags"] = ["24 of 24 variant frames are constant (black or empty output)"]
    verdict = decide(0.5, EXACT, change={"quality": quality})
    assert verdict["keep"] is False and "constant" in verdict["rationale"]


def test_the_baseline_is_the_reference():
    """Would catch: the baseline dropped for not beating itself."""
    verdict = example_result(steady=30, switches=2)["decision"]
    assert verdict["keep"] is None and verdict["rule"] == "reference"


def test_other_objectives():
    """Would catch: a memory preset evaluated by its latency."""
    assert decide(0.5, EXACT | {"objective": "memory"}, exact=True)["keep"] is True
    assert "peak memory" in decide(0.5, EXACT | {"objective": "memory"}, exact=True)["rationale"]
    assert decide(1.1, EXACT | {"objective": "switch"}, exact=True)["keep"] is False
    on_cpu = {"gpu": None, "steady": 30, "switches": 2}
    verdict = decision.decide(example_result("variant", 0.5, exact=True, **on_cpu),
                              example_result(**on_cpu), NOISE, EXACT | {"objective": "memory"})
    assert verdict["keep"] is None and "no CUDA device" in verdict["rationale"]


@pytest.mark.parametrize("gate", [{}, {"exactness": "lossy"}, EXACT | {"max_error_ratio": 0},
                                  EXACT | {"min_snr": 3}, {"exactness": "rough", "max_error_ratio": 1},
                                  EXACT | {"objective": "beauty"}])
def test_a_gate_that_gates_nothing_is_refused(gate):
    """Would catch: a misspelt limit that lets everything pass."""
    with pytest.raises(UserError, match="quality gate"):
        decide(0.5, gate)


def test_the_gate_of_a_preset_is_that_of_its_loosest_part():
    """Would catch: one exact optimization that makes a lossy preset look exact, or a stated limit ignored."""
    optimizations = [{"exactness": exactness} for exactness in ("bitwise", "lossy", "rounding")]
    assert decision.gate_of(ExperimentConfig(), optimizations) == {
        "exactness": "lossy", "objective": "latency", "max_error_ratio": 1.1}
    assert decision.gate_of(ExperimentConfig(), optimizations[:1])["exactness"] == "bitwise"
    assert decision.gate_of(ExperimentConfig(), [])["exactness"] == "bitwise"
    assert decision.gate_of(ExperimentConfig(max_error_ratio=1.6), optimizations[2:]) == {
        "exactness": "rounding", "objective": "latency", "max_error_ratio": 1.6}
