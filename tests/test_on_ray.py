"""A campaign on a Ray cluster. The last test starts a local one, and is skipped where Ray is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from example_results import example_result

from longlive_opt.errors import NotAvailable, UserError
from longlive_opt.runner import on_ray
from longlive_opt.runner.execute import Job


def job_in(root: Path, label: str = "static_kv", **parameters: object) -> Job:
    return Job(label, root / "notebooks/02_static_kv.ipynb", root / "outputs/c" / label, parameters, label)


def finish(folder: Path, **more: object) -> None:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"status": "ok", **more}))
    (folder / "summary").mkdir()
    (folder / "summary" / "a.png").write_bytes(b"\x89")


def test_without_ray_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError of a package that most users do not need."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NotAvailable, match=r"pip install 'longlive_opt\[ray\]', or leave --ray out"):
        on_ray.run_jobs_on_ray(tmp_path, [job_in(tmp_path)], "auto")


def test_a_job_reserves_what_it_uses(tmp_path: Path) -> None:
    """Two jobs on one GPU, a job that waits for ever, or one that needs more GPUs than it reserves."""
    assert on_ray.needs(job_in(tmp_path, device="cuda", gpus=2)) == {"num_cpus": 1, "num_gpus": 2}
    assert on_ray.needs(job_in(tmp_path)) == {"num_cpus": 1, "num_gpus": 0}
    with pytest.raises(UserError, match="static_kv needs 1 GPUs, and the cluster has 0; leave"):
        on_ray._check_resources({"CPU": 8.0}, [job_in(tmp_path, device="cuda")])


def test_a_folder_arrives_as_it_left(tmp_path: Path) -> None:
    """A file in a folder below that is lost, stale files that stay, the baseline's video sent to all jobs."""
    finish(tmp_path / "here")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "stale").touch()
    on_ray.unpack(on_ray.packed(tmp_path / "here"), tmp_path / "there")
    names = sorted(path.name for path in (tmp_path / "there").rglob("*"))
    assert names == ["a.png", "result.json", "summary"]
    on_ray.unpack(on_ray.packed(tmp_path / "here", ("result.json",)), tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["result.json"]
    assert on_ray.packed(tmp_path / "absent") == b""


def test_what_comes_back_lies_where_a_run_here_leaves_it(tmp_path: Path) -> None:
    """A failure that replaces a finished run, a lost worker that leaves nothing, a folder half written."""
    job = job_in(tmp_path)
    report = on_ray.lost(job, RuntimeError("the node died"))
    on_ray.keep(job, b"", report)
    assert "was lost 3 times" in json.loads((job.folder / "failed.json").read_text())["meaning"]
    finish(tmp_path / "made", run=1)
    on_ray.keep(job, on_ray.packed(tmp_path / "made"), None)
    assert json.loads((job.folder / "result.json").read_text())["run"] == 1
    assert not (job.folder / "failed.json").exists()
    on_ray.keep(job, b"", report)
    failed = job.folder.with_name("static_kv.failed")
    assert (job.folder / "result.json").exists() and (failed / "failed.json").exists()
    assert sorted(path.name for path in job.folder.parent.iterdir()) == ["static_kv", "static_kv.failed"]


def test_jobs_that_shared_a_host_are_marked(tmp_path: Path) -> None:
    """A latency that another job has slowed down, taken for the preset's own."""
    spans = [{"label": label, "node": node, "start_s": start, "end_s": end} for label, node, start, end in (
        ("baseline", "a", 0, 10), ("static_kv", "a", 10, 20), ("speed", "a", 15, 25),
        ("realtime", "b", 15, 25))]
    folders = {span["label"]: tmp_path / span["label"] for span in spans}
    for label, folder in folders.items():
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(example_result(label, steady=12, switches=2)))
    on_ray.mark_neighbours(folders, spans)
    found = {label: json.loads((folder / "result.json").read_text())["environment"]
             for label, folder in folders.items()}
    assert found["static_kv"]["co_scheduled"] and found["static_kv"]["neighbours"] == ["speed"]
    assert found["speed"]["neighbours"] == ["static_kv"]
    assert not found["baseline"]["co_scheduled"] and not found["realtime"]["co_scheduled"]


def test_paths_are_those_of_the_copy(tmp_path: Path) -> None:
    """A job that writes into the driver's folder, which another host does not have."""
    job = on_ray.relative(job_in(tmp_path), tmp_path)
    assert (job.notebook, job.folder) == (Path("notebooks/02_static_kv.ipynb"), Path("outputs/c/static_kv"))


CELL = """\
import json, os, pathlib
folder = pathlib.Path(output_dir)
marker = pathlib.Path(markers) / name
first = not marker.exists()
marker.touch()
if name == "dies" and first:
    os.kill(int(os.environ["JPY_PARENT_PID"]), 9)
if name == "fails":
    raise ValueError("no such thing")
if name != "baseline":
    assert json.loads((folder.parent / "baseline" / "result.json").read_text())["status"] == "ok"
(folder / "result.json").write_text(json.dumps({"status": "ok", "name": name, "environment": {}}))
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_local_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job lost with its worker, a failure that stops the others, jobs before the baseline is there."""
    import nbformat

    root, markers = tmp_path / "project", tmp_path / "markers"
    (root / "notebooks").mkdir(parents=True)
    markers.mkdir()
    notebook = root / "notebooks" / "02_static_kv.ipynb"
    parameters = nbformat.v4.new_code_cell("name = output_dir = markers = ''", metadata={
        "tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(CELL)], metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), notebook)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(
        [str(Path(__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    # Ray keeps a token in the home folder; a busy machine starts it slowly.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    monkeypatch.setattr(on_ray, "mark_neighbours", lambda folders, spans: marked.extend(spans))
    marked: list[dict] = []
    jobs = [job_in(root, label, name=label, output_dir="x", markers=str(markers))
            for label in ("dies", "baseline", "fails", "works")]
    failed = on_ray.run_jobs_on_ray(root, jobs, on_ray.LOCAL)
    assert list(failed) == ["fails"] and "no such thing" in failed["fails"]
    for label in ("baseline", "dies", "works"):
        folder = root / "outputs" / "c" / label
        assert json.loads((folder / "result.json").read_text())["name"] == label
        assert (folder / "notebook.ipynb").exists()
    assert json.loads((root / "outputs/c/fails/failed.json").read_text())["status"] == "failed"
    assert marked[0]["label"] == "baseline"
    assert {span["label"] for span in marked} == {"baseline", "dies", "works"}
    assert all(marked[0]["end_s"] <= span["start_s"] for span in marked[1:])
