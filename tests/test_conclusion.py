"""Claims about the last words of an experiment: nothing compared that must not be, no verdict too early."""

import html

import pytest
from example_results import example_result

from longlive_opt.measurement.result import na
from longlive_opt.report.conclusion import ablated, conclusion_html, measured, scope


@pytest.fixture(scope="module")
def baseline():
    return example_result()


def test_hypothesis_stands_beside_what_was_measured(baseline):
    """Would catch: a hypothesis that nobody can hold against a figure, or HTML that a preset breaks."""
    result = dict(example_result("speed", 0.5), hypothesis="366 ms a block, <40 ms a frame")
    table = measured(result, baseline)
    assert table.loc["block interval, SS mean, ms", "this run"].startswith("36")
    assert table.loc["denoise, ms per block", "change"].startswith("-50.")
    assert table.loc["KV cache, GB", "difference"] == "+0.00"
    assert table.loc["PSNR, dB"].tolist() == ["43.6", "", "", ""]
    assert table.loc["error ratio, free-running", "this run"] == "1.30"
    exact = measured(example_result("speed", exact=True), None)
    assert exact.loc["error ratio, teacher-forced", "this run"] == "1.00"
    old = result | {"quality": result["quality"] | {"protocol": "one block", "identical": True}}
    assert measured(old, baseline).loc["PSNR, dB", "this run"] == "identical"
    text = conclusion_html(result, baseline)
    assert "366 ms a block, &lt;40 ms a frame" in text
    assert result["latency"]["clock_disagreement"]["sentence"] in text
    assert html.escape(result["decision"]["rule"]) in text


def test_runs_of_two_lengths_are_compared_over_the_shorter(baseline):
    """Would catch: a maximum over 300 blocks beside one over 20, and a change that the log does not know."""
    short = example_result("speed", 0.5, steady=20, switches=2)
    theirs = max(baseline["latency"]["ss_block_ms"][:20]) / 12
    assert measured(short, baseline).loc["SS max, ms per frame", "baseline"] == f"{theirs:.2f}"
    assert "the first of each run" in conclusion_html(short, baseline)


def test_baseline_is_compared_with_its_prediction_only(baseline):
    """Would catch: the baseline beside itself, 0 % everywhere; its repetition does stand beside it."""
    assert list(measured(baseline, None)) == ["this run"]
    text = conclusion_html(baseline, baseline)
    assert "Rule" not in text and "difference" not in text
    repeated = conclusion_html(example_result(run=2), baseline)
    assert "difference" in repeated and "identical" not in repeated


def test_a_notebook_gives_no_verdict(baseline):
    """Would catch: 'undecided' at the end of a report that opens with 'keep'."""
    for result in (example_result("speed", 0.5), example_result("static_kv", 1.1)):
        text = conclusion_html(result, baseline)
        assert "The campaign's summary decides" in html.unescape(text) and "decisions.json" in text
        assert result["decision"]["rationale"] not in text and "Verdict:" not in text


def test_runs_of_two_machines_are_not_set_side_by_side(baseline):
    """Would catch: a tiny model that is 20 times as fast as LongLive."""
    other = example_result("speed", 0.5, gpu=None)
    assert list(measured(other, baseline)) == ["this run"]
    assert measured(other, baseline).loc["peak memory, GB", "this run"] == "n/a"
    text = conclusion_html(other, baseline)
    assert "Not compared with the baseline: environment.gpu is None against" in text


def test_scope_says_what_the_figures_cannot_tell(baseline):
    """Would catch: seconds on a laptop read as those of the hypothesis."""
    assert scope(baseline) == ""
    crowded = dict(baseline, environment={"gpu": "NVIDIA H100", "co_scheduled": True})
    assert scope(crowded) == "Something else ran on the machine in the meantime: not fit for comparison."
    quick = example_result(steady=2, switches=1)
    assert scope(quick).startswith("Quick run: 2 steady-state blocks")
    tiny = dict(baseline, model={"name": "tiny"}, environment={"gpu": None, "cpu": "Example CPU"})
    assert scope(tiny) == ("These are the tiny model's latencies on this machine (Example CPU). The presets' "
                           "hypotheses are about LongLive-1.3B on an H100.")


def test_variations_in_the_unit_of_the_hypothesis():
    """Would catch: a table that one has to multiply by 12; one that could not run must not break it."""
    result = example_result("ablation", 0.5)
    shorter = {"changed": {"local_attn_size": 9}, "sizes": {"frames_per_block": 12},
               "latency": {"ss_ms_per_frame": {"mean": 25.0}}}
    failed = {"changed": {"local_attn_size": 2}, "failure": na("too small", "take more")}
    table = ablated(result | {"ablations": [shorter, failed]})
    assert table.loc["local_attn_size: 9", "block interval, SS mean, ms"] == "300.0"
    assert table.loc["local_attn_size: 9", "difference"].startswith("-6")
    assert table.loc["local_attn_size: 2"].tolist() == ["n/a", ""]
