"""`longlive export`: what arrives in MLflow and in a CSV file, and that nothing arrives twice."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from example_results import example_result

from longlive_opt.measurement.result import write_result
from longlive_opt.report import run_export


class MlflowException(Exception):
    """As in mlflow.exceptions."""


class FakeClient:
    """Keeps what it is told, as a tracking server would."""

    experiments: dict[str, str] = {}
    runs: dict[str, dict[str, Any]] = {}
    refuses = ""

    def __init__(self, tracking_uri: str):
        if tracking_uri == "http://nobody":
            raise MlflowException("no server\nat all")

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def search_runs(self, experiments: list[str], page_token: str | None = None) -> list[Any]:
        return [SimpleNamespace(data=SimpleNamespace(tags=run["tags"])) for run in self.runs.values()
                if run["experiment"] in experiments]

    def create_run(self, experiment: str, start_time: int, tags: dict[str, str], run_name: str) -> Any:
        name = f"run{len(self.runs)}"
        self.runs[name] = {"experiment": experiment, "name": run_name, "tags": tags, "params": {},
                           "metrics": {}, "files": [], "start": start_time}
        return SimpleNamespace(info=SimpleNamespace(run_id=name))

    def log_param(self, run: str, name: str, value: str) -> None:
        assert isinstance(value, str) and 0 < len(value) <= 500
        self.runs[run]["params"][name] = value

    def log_metric(self, run: str, name: str, value: float, timestamp: int) -> None:
        if name == self.refuses:
            raise MlflowException("disk full")
        self.runs[run]["metrics"][name] = value

    def log_artifact(self, run: str, path: str) -> None:
        self.runs[run]["files"].append(Path(path).name)

    def set_terminated(self, run: str, status: str, end_time: int) -> None:
        self.runs[run]["status"] = status

    def delete_run(self, run: str) -> None:
        del self.runs[run]


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for run in (example_result("baseline", 1.0, steady=12, switches=2),
                example_result("speed", 0.5, steady=12, switches=2, gpu=None)):
        place = folder / run["preset"]
        place.mkdir(parents=True)
        write_result(place / "result.json", run)
    (folder / "speed" / "report.html").write_text("a report")
    return folder


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    module = ModuleType("mlflow")
    client = type("Client", (FakeClient,), {"experiments": {}, "runs": {}})
    module.MlflowClient, module.exceptions = client, SimpleNamespace(MlflowException=MlflowException)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return client


def test_every_result_becomes_a_run(campaign: Path, mlflow: type[FakeClient],
                                    capsys: pytest.CaptureFixture) -> None:
    """A run without its machine or its parameters, a metric that is n/a as a number, the same run twice."""
    assert run_export.main([str(campaign), "--mlflow", "runs"]) == 0
    assert "2 runs written to the experiment mine, 0 already there" in capsys.readouterr().out
    runs = {run["name"]: run for run in mlflow.runs.values()}
    speed, baseline = runs["speed"], runs["baseline"]
    assert mlflow.experiments == {"mine": "0"} and speed["status"] == "FINISHED"
    assert speed["params"]["denoising_steps"] == "[1000, 750, 500, 250]" and speed["params"]["model"]
    assert speed["metrics"]["ss_max"] < baseline["metrics"]["ss_max"]
    assert "peak_allocated" in baseline["metrics"] and "peak_allocated" not in speed["metrics"]
    assert "clip_delta" not in baseline["metrics"] and baseline["metrics"]["kv_cache"] == 3.45
    assert baseline["tags"]["gpu"] == "NVIDIA H100 80GB HBM3" and "gpu" not in speed["tags"]
    assert baseline["tags"]["mlflow.source.git.commit"].startswith("0123456789abcdef")
    assert baseline["tags"]["verdict"] == "reference" and speed["tags"]["torch"] == "2.11.0+cu130"
    assert speed["files"] == ["report.html", "result.json"] and baseline["files"] == ["result.json"]
    assert speed["start"] == 1769860800000, "2026-01-31T12:00:00Z"
    assert run_export.main([str(campaign), "--mlflow", "runs"]) == 0
    assert "0 runs written to the experiment mine, 2 already there" in capsys.readouterr().out
    assert len(mlflow.runs) == 2


def test_half_a_run_is_not_left_behind(campaign: Path, mlflow: type[FakeClient],
                                       capsys: pytest.CaptureFixture) -> None:
    """A run that was cut off and counts as one that is there when the command is repeated."""
    mlflow.refuses = "fps"
    assert run_export.main([str(campaign), "--mlflow", "runs"]) == 2
    assert "--mlflow: runs refused (disk full)" in capsys.readouterr().err and mlflow.runs == {}


def test_wrong_input_is_one_sentence(campaign: Path, mlflow: type[FakeClient], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A traceback of a package that is not there, or of a server that does not run."""
    (tmp_path / "empty").mkdir()
    for arguments, says in (([str(campaign)], "nothing to write"),
                            ([str(tmp_path / "empty"), "--csv", "x.csv"], "no finished run"),
                            (["no_such", "--csv", "x.csv"], "no_such: neither a campaign in outputs/"),
                            ([str(campaign), "--mlflow", "http://nobody"], "refused (no server)")):
        assert run_export.main(arguments) == 2
        assert says in (error := capsys.readouterr().err) and "Traceback" not in error
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert run_export.main([str(campaign), "--mlflow", "runs"]) == 2
    assert "the package mlflow is not installed; pip install" in capsys.readouterr().err


def test_an_unusable_result_is_named(campaign: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A table that lacks a run without a word, or a script that goes on."""
    first = next(campaign.glob("*/result.json"))
    text = first.read_text()
    first.write_text(text[:len(text) // 2])
    assert run_export.main([str(campaign), "--csv", str(tmp_path / "a.csv")]) == 1
    assert f"not usable: {first.parent.name}/result.json" in capsys.readouterr().err
    first.write_text(text)


def test_csv_has_a_row_per_run(campaign: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A table that exists only where a notebook has written it."""
    path = tmp_path / "out" / "mine.csv"
    assert run_export.main([str(campaign), "--csv", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    rows = list(csv.DictReader(path.open()))
    assert [row["preset"] for row in rows] == ["baseline", "speed"]
    assert float(rows[1]["ss_max_ms"]) < float(rows[0]["ss_max_ms"]) and rows[0]["gpu"].startswith("NVIDIA")


def test_the_file_store_of_mlflow_takes_it(campaign: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A name, a length or a type that the real MLflow refuses; runs where it is installed."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # restored afterwards
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    store = str(tmp_path / "store")
    assert run_export.main([str(campaign), "--mlflow", store]) == 0
    assert run_export.main([str(campaign), "--mlflow", store]) == 0
    client = mlflow.MlflowClient(tracking_uri=store)
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {run.info.run_name for run in runs} == {"baseline", "speed"} and len(runs) == 2
    speed = next(run for run in runs if run.info.run_name == "speed")
    assert speed.data.metrics["ss_max"] > 0 and speed.data.params["seed"] == "0"
    assert {item.path for item in client.list_artifacts(speed.info.run_id)} == {"report.html", "result.json"}
