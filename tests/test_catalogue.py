"""Claims about the catalogue of metrics: one row is all that a new metric needs, and every row is real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from example_results import example_result, on_several

from longlive_opt import report
from longlive_opt.measurement import catalogue, decision, metrics
from longlive_opt.measurement.catalogue import (
    METRICS,
    PLACES,
    Metric,
    glossary,
    metric_of,
    shown_for,
    shown_in,
)
from longlive_opt.measurement.result import _SCHEMA, lookup, na
from longlive_opt.report.conclusion import card_html, definitions_html, measured
from longlive_opt.report.tables import ablations_table, headline_table, numbers_table, summary_table

TEMPLATE = (Path(report.__file__).parent / "log" / "template.md").read_text(encoding="utf-8")
# Numbers of the schema that are no metric: settings, and what a verdict rests on.
NO_METRICS = {"playback.fps", "latency.ss_over_target.target_ms", "environment.other_cpu_cores"}
# Recorded, and part of a sentence or a chart only.
NOT_SHOWN = {"latency.ss_with_switches.max", "latency.ps_ms.p99", "model.sizes.height", "model.sizes.width"}
ADHERENCE = {"adherence_before": 0.9, "adherence_after": 0.8, "delay_blocks": 1.5, "never": 0,
             "permanence": 1.0,
         "drift": {"change": 0.0}, "switches": 2}


def section_of(text: str, heading: str) -> str:
    return text.partition(heading)[2].partition("<details>")[0]


def complete() -> dict:
    """An example result with every optional section."""
    result = example_result(steady=12, switches=2)
    result["memory_gb"] |= {"device_used": 12.0, "peak_resident": 2.0}
    result["latency"]["stages_ms"]["copy_to_host"] = {"mean": 0.1}
    result["quality"]["decoder"] = {"name": "taew2_1", "reference": "wan", "psnr_db": {"mean": 30.0}}
    return result | {"adherence": ADHERENCE, "ranks": on_several(result, 2)["ranks"]}


def test_every_row_is_a_number_of_a_result() -> None:
    """A path with a slip of the pen, which would be n/a in every table and never fail."""
    result = complete()
    for metric in METRICS:
        assert metric.is_recorded(result), metric.path
        assert metric.value(result) is not None or "reason" in str(
            lookup(result, metric.path) or lookup(result, metric.path.rpartition(".")[0])), metric.path


@pytest.mark.parametrize("field", ["key", "label", "path", "csv_column", "heading"])
def test_names_are_used_once(field: str) -> None:
    """Two columns of one name, of which a table keeps one."""
    names = [getattr(metric, field) for metric in METRICS]
    assert sorted(set(names)) == sorted(names)


def test_rows_are_complete() -> None:
    """A place that no table reads, a direction that no arrow can show, a metric without a meaning."""
    for metric in METRICS:
        assert metric.shown_in and set(metric.shown_in.split()) <= PLACES.keys(), metric.key
        assert metric.better in ("lower", "higher", "") and len(metric.definition) > 30, metric.key
    for place in PLACES:
        assert shown_in(place), place
    assert not [text for text in glossary().values() if "{" in text]


def test_definitions_name_mark_and_clock() -> None:
    """A latency of which nobody knows where it begins, or whose clock it is."""
    for key in ("ss_mean", "ps_mean", "first_frame", "fps"):
        text = metric_of(key).definition
        assert "`chunk_ready`" in text and "ost clock" in text and "tream" in text, key
    assert "`switch_request`" in metric_of("ps_mean").definition


def test_every_number_of_the_schema_has_a_row() -> None:
    """A number that is measured, stored and never shown."""
    numbers = {path.removesuffix("?") for kind in ("number", "number?", "metric")
               for path in _SCHEMA[kind].split()}
    assert numbers - {metric.path for metric in METRICS} == NO_METRICS | NOT_SHOWN
    stages = {f"latency.stages_ms.{name}.mean" for name in complete()["latency"]["stages_ms"]}
    assert stages <= {metric.path for metric in METRICS}
    assert set(metrics.STAGES) >= {path.split(".")[2] for path in stages}


def test_the_template_asks_for_metrics_only() -> None:
    """A blank of the log that no metric fills, or a row for a blank that is not there."""
    cells = re.findall(r"(?m)^\| ([^|]+?) \| ___", TEMPLATE)
    rows = {*cells, *re.findall(r"(?m)^- ([A-Z][A-Za-z ]+): ___", TEMPLATE)}
    presets = {"Baseline", "Quality", "Balanced", "Speed"}
    assert rows - presets == {metric.template for metric in METRICS if metric.template}


def test_one_row_brings_a_metric_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second home of paths or labels: then a new metric is in some tables and not in others."""
    toy = Metric("toy", "toy score", "bits", "toy.score", "higher", 1, " ".join(PLACES),
                 "How toy-like it is.")
    monkeypatch.setattr(catalogue, "METRICS", (*METRICS, toy))
    runs = [example_result(preset, scale, run=run, steady=12, switches=2) | {"toy": {"score": score}}
            for preset, scale, run, score in (("baseline", 1.0, 1, 5.0), ("baseline", 1.0, 2, 5.5),
                                              ("speed", 0.5, 1, 7.25))]
    baseline, _, speed = runs
    assert report.summary_table(runs)["toy"].tolist() == [5.0, 5.5, 7.25]
    header, *_, last = report.to_csv(runs, tmp_path / "summary.csv").read_text().splitlines()
    assert last.split(",")[header.split(",").index("toy")] == "7.25"
    assert report.numbers_table(runs)["toy score, bits"].tolist() == ["5.0", "5.5", "7.2"]
    assert headline_table(speed).loc["toy score, bits", "value"] == 7.2
    assert measured(speed, baseline).loc["toy score, bits"].tolist() == ["7.2", "5.0", "+2.2", "+45.0 %"]
    assert ablations_table(speed).loc["as is", "toy score, bits"] == 7.25
    assert report.noise_table(runs).loc[0, "toy score"] == pytest.approx(9.52)
    assert decision.aa_noise(*runs[:2])["values"]["toy"] == [5.0, 5.5]
    text = report.render_log(runs)
    assert "| toy score, bits | 5.0 | 7.2 | +45.0% |" in text and "**toy score**: How toy-like it is." in text
    assert "toy score 7.2 bits (+45.0%)" in section_of(text, "### Experiment 6")
    entry = {"verdict": "keep", "rationale": "why", "rule": "r"}
    assert "toy score<br><b>7.2 bits</b><br>+45.0%" in card_html(speed, baseline, entry, "c")
    assert "toy score" in definitions_html() and glossary()["toy score"] == toy.definition


def test_a_cpu_run_shows_its_own_memory() -> None:
    """Would catch: n/a as the memory of every run on a laptop, or an empty column next to the right one."""
    on_gpu, on_cpu = example_result("baseline"), example_result("baseline", gpu=None)
    on_cpu["memory_gb"]["peak_resident"] = 1.25
    for place in ("headline", "summary", "comparison", "card", "ablation"):
        gpu, cpu, both = ([metric.key for metric in shown_for(place, *runs)]
                          for runs in ((on_gpu,), (on_cpu,), (on_gpu, on_cpu)))
        assert "peak_allocated" in gpu and "peak_resident" not in gpu and gpu == both
        assert "peak_resident" in cpu and "peak_allocated" not in cpu and len(cpu) == len(gpu)
    assert numbers_table([on_cpu])["peak resident memory, GB"].tolist() == ["1.25"]
    assert summary_table([on_cpu])["peak_resident_gb"].tolist() == [1.25]
    assert "peak_resident_gb" not in summary_table([on_gpu]).columns
    del on_cpu["memory_gb"]["peak_resident"]  # a result from before
    assert "peak_allocated" in [metric.key for metric in shown_for("card", on_cpu)]


def test_jitter_is_above_the_median_and_never_understated():
    """Would catch: a calm stream made of a few samples whose slowest is left out."""
    jitter = metric_of("ss_jitter")

    def of(**values):
        return jitter.value({"latency": {"ss_ms_per_frame": {"p50": 20.0, "max": 22.0, **values}}})

    assert of(p99=20.5) == pytest.approx(2.5)
    assert of(p99=na("n too small", "measure more")) == pytest.approx(10.0)
    assert of(p50=na("gone", "run it")) is None and jitter.value({"latency": {}}) is None
