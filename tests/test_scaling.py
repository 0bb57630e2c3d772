"""Runs on several GPUs in the plan of a campaign and in the log."""

from __future__ import annotations

import logging

import pytest
from example_results import example_result, on_several

from longlive_opt import report
from longlive_opt.errors import UserError
from longlive_opt.files import project_path
from longlive_opt.report import charts
from longlive_opt.report.campaign import gpus_of, one_gpu_preset
from longlive_opt.report.log.scaling import HEADING
from longlive_opt.runner.plan import Layout, plan

LAYOUT = Layout(project_path(""))
LAPTOP = project_path("params/profiles/laptop.yaml")


def rows_of(text: str) -> list[list[str]]:
    section = text.partition(HEADING)[2]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
            if line.startswith("|")]


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    return [example_result(steady=40, switches=4), example_result("realtime", 0.4, steady=40, switches=4),
            on_several(example_result("realtime", 0.25, steady=40, switches=4), 2),
            on_several(example_result("exact", 0.3, steady=40, switches=4), 3, "own")]


def test_the_log_compares_every_run_with_its_preset_on_one_gpu(runs: list[dict]) -> None:
    """Efficiency against another preset, or of the total instead of per GPU; a run without its row."""
    heading, _, one, two, own = rows_of(report.render_log(runs))
    assert [row[:2] for row in (one, two, own)] == [["Realtime", "1"], ["Realtime on 2 GPUs", "2"],
                                                   ["Exact on 3 GPUs", "3"]]
    place = heading.index("Efficiency")
    means = [run["latency"]["ss_ms_per_frame"]["mean"] for run in runs[1:3]]
    assert one[place] == "100 %" and two[place] == f"{100 * means[0] / (2 * means[1]):.0f} %"
    assert own[place] == "n/a (no run on one GPU)"
    assert two[-2:] == ["11.25, 1.50, 2.75", "7.50, 6.50"] and one[-2] == "none"


def test_the_chart_has_a_line_per_preset_with_several_counts(runs: list[dict]) -> None:
    """A line through runs of different presets, or an empty chart in every campaign on one GPU."""
    chart = charts.campaign_figures(runs)["latency_by_gpus"]
    (axes,) = chart.axes
    worst, _, ideal = (line.get_ydata() for line in axes.lines[:3])
    assert [list(line.get_xdata()) for line in axes.lines[:3]] == [[1, 2]] * 3
    assert worst[0] == max(run / 12 for run in runs[1]["latency"]["ss_block_ms"])
    assert ideal[1] == pytest.approx(ideal[0] / 2) and "realtime" in chart.alt
    assert "latency_by_gpus" not in charts.campaign_figures(runs[:2])


def test_the_section_says_why_there_is_nothing(runs: list[dict]) -> None:
    """A log without the section, from which nobody learns that it exists; a template part that moved."""
    text = report.render_log(runs[:2])
    assert "- Several GPUs: n/a, no run of this campaign" in text.partition("## Notes & Observations")[2]
    assert HEADING not in text
    text = report.render_log(runs)
    assert text.index("## Notes & Observations") < text.index(HEADING) and "Several GPUs: n/a" not in text


def test_one_gpu_is_recommended(runs: list[dict]) -> None:
    """A recommendation for a machine that most readers do not have."""
    text = report.render_log(runs)
    assert "**Preset**: Realtime\n" in text
    assert "| Realtime on 2 GPUs |" in text.partition("## Summary Table")[2]


def test_names_on_several_gpus(runs: list[dict]) -> None:
    """A preset that is compared with itself, or with the baseline, because its name was not taken apart."""
    assert [gpus_of(run) for run in runs] == [1, 1, 2, 3]
    assert list(map(one_gpu_preset, runs)) == ["baseline", "realtime", "realtime", "exact"]


def test_every_preset_but_the_baseline_runs_on_several_gpus_as_well(caplog: pytest.LogCaptureFixture) -> None:
    """GPUS=2 that measures no run on one GPU beside them, or stops at a preset that cannot be shared."""
    with caplog.at_level(logging.WARNING):
        jobs = plan(LAYOUT, "several", ("static_kv", "balanced", "baseline", "ablation"), LAPTOP, gpus=(2, 4))
    assert [job.label for job in jobs] == ["baseline", "static_kv", "balanced", "ablation", "static_kv_2gpus",
                                           "static_kv_4gpus"]
    two = jobs[4].configuration
    assert (two["gpus"], two["name"], two["title"]) == (2, "static_kv_2gpus", "Static KV on 2 processes")
    assert two["use_static_kv"] and "gpus" not in jobs[1].parameters
    assert "[balanced] not on 2 GPUs: use_async_vae: with gpus: 2" in caplog.text
    with pytest.raises(UserError, match="--gpus: 1 is not several"):
        plan(LAYOUT, "several", ("static_kv",), LAPTOP, gpus=(1,))


def test_a_profile_leaves_the_baseline_on_one_gpu() -> None:
    """A key in a profile that refuses the one run to which all others are compared."""
    jobs = plan(LAYOUT, "several", ("baseline", "static_kv"), LAPTOP, {"gpus": 2})
    assert [job.configuration["gpus"] for job in jobs] == [1, 2]
