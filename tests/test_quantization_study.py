"""The study of 8-bit formats: what it measures, and how the runner starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from micro import micro_config, micro_model

from longlive_opt.config import LINEAR_LAYERS
from longlive_opt.errors import UserError
from longlive_opt.measurement.quantization_study import (
    KV_FORMATS,
    Combination,
    QuantizationStudy,
    combinations,
)
from longlive_opt.report.charts.quantization import error_against_time
from longlive_opt.runner import __main__ as runner
from longlive_opt.runner.plan import Layout, plan_quantization

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """All kinds of combinations on the micro model."""
    with micro_model():
        config = micro_config(model_dtype="bfloat16", height=16, width=32, prompts=["a", "b"])
        study = QuantizationStudy(config, 6, None, tmp_path_factory.mktemp("study"))
        study.combinations = [
            *map(Combination, KV_FORMATS), Combination("bf16", "int8", LINEAR_LAYERS),
            Combination("bf16", "fp8", LINEAR_LAYERS), Combination("bf16", "int8", LINEAR_LAYERS[1:]),
            Combination("fp8_fp8", "fp8", ("down",))]
        study.build()
        study.measure()
        yield study


def row(study: QuantizationStudy, cache: str, form: str | None = None, layers: tuple[str, ...] = ()) -> dict:
    wanted = (cache, form, layers)
    return next(row for row in study.rows if (row["cache"], row["form"], row["layers"]) == wanted)


def test_errors_are_in_the_order_of_the_formats(study):
    """A combination that silently measures another one, or a truth that is the pipeline's own stream."""
    plain, int8 = row(study, "bf16"), row(study, "bf16", "int8", LINEAR_LAYERS)
    fp8 = row(study, "bf16", "fp8", LINEAR_LAYERS)
    assert 0.5 < plain["ratio"] < 1.5
    assert plain["ratio"] < int8["ratio"] < fp8["ratio"]
    assert row(study, "int8_bf16")["ratio"] < row(study, "fp8_fp8")["ratio"]
    assert all(len(found["errors"]) == 6 and min(found["errors"]) > 0 for found in study.rows)


def test_bytes_are_counted_and_no_weight_is_released(study):
    """A combination that leaves the next one without weights; memory of 8 bit that is not less."""
    assert not any(weight.is_meta for weight in study.pipeline.dit.parameters())
    plain, int8 = row(study, "bf16"), row(study, "bf16", "int8", LINEAR_LAYERS)
    assert int8["linear_bytes"] < 0.65 * plain["linear_bytes"]
    assert plain["linear_bytes"] > row(study, "bf16", "int8", LINEAR_LAYERS[1:])["linear_bytes"]
    assert row(study, "fp8_fp8")["cache_bytes"] < 0.7 * plain["cache_bytes"]


def test_tables_chart_and_file_show_every_combination(study):
    """A row that is lost on the way to the report."""
    count = len(study.combinations)
    assert len(study.table()) == count and study.table()["ms per pass"].gt(0).all()
    assert error_against_time(study.rows).alt.count("ratio") == count + 1
    calls = set(study.calls_table()["call"])
    assert {"qkv, as they are", "down, int8", "feed-forward, e4m3", "K and V e4m3"} <= calls
    assert "ms per video frame" in study.conclusion()
    saved = json.loads(study.save().read_text(encoding="utf-8"))
    assert len(saved["rows"]) == count and len(saved["reference_errors"]) == 6


def test_every_combination_is_named_once():
    """Two combinations under one name, or a layer that is never left out."""
    every, fewer = combinations(True), combinations(False)
    names = [(combination.cache, combination.linears) for combination in every]
    assert len(set(names)) == len(names) == 4 * 11 and set(fewer) < set(every)
    assert {"int8, not up", "e4m3, up alone", "int8"} <= {combination.linears for combination in fewer}


def test_too_short_a_stream_is_refused():
    """A study whose window never turns."""
    with micro_model(), pytest.raises(UserError, match="blocks: 5 are too few .* write 6 or more"):
        QuantizationStudy(micro_config(), 5, None, ROOT)


def test_the_runner_plans_it():
    """A key of the profile that its notebook does not take, a setting that is lost, a campaign so named."""
    layout = Layout(ROOT)
    job = plan_quantization(layout, ROOT / "params/profiles/h100.yaml", {"blocks": 8})
    assert job.parameters["model"] == "longlive-1.3b" and job.parameters["blocks"] == 8
    assert "video_crf" not in job.parameters and job.parameters["output_dir"] == "outputs/quantization"
    with pytest.raises(UserError, match="measure_blocks"):
        plan_quantization(layout, None, {"measure_blocks": 4})
    with pytest.raises(UserError, match="holds the study"):
        layout.campaign("quantization")


def test_the_command_runs_one_job_and_exports_its_report(monkeypatch):
    """A command that nobody can call, or whose result only its notebook shows."""
    ran, exported = [], []
    monkeypatch.setattr(runner, "run_jobs", lambda root, jobs: ran.extend(jobs) or {})
    monkeypatch.setattr(runner, "export_report",
                        lambda root, folder, *_, **__: exported.append(folder) or True)
    monkeypatch.setattr(runner, "check_machine", lambda *_: None)
    assert runner.main(["quantization", "--set", "blocks=7"], ROOT) == 0
    assert [(job.label, job.parameters["blocks"]) for job in ran] == [("quantization", 7)]
    assert exported == [ROOT / "outputs/quantization"]
