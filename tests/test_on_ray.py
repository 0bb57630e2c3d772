"""A campaign on a Ray cluster. The last test starts a local one, and is skipped where Ray is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from example_results import example_result

from longlive_opt.errors import NotAvailable, UserError
from longlive_opt.runner import on_ray
from longlive_opt.runner.execute import Job


def job_in(root: Path, label: str = "static_kv", campaign: str = "c", **parameters: object) -> Job:
    folder = root / "outputs" / campaign / label
    return Job(label, root / "notebooks/02_static_kv.ipynb", folder, parameters, label)


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
    spans = [dict(zip(("folder", "node", "start_s", "end_s"), span)) for span in (
        ("c/baseline", "a", 0, 10), ("c/static_kv", "a", 10, 20), ("c/speed", "a", 15, 25),
        ("c/realtime", "b", 15, 25), ("c.seed1/baseline", "b", 0, 18))]
    folders = [span["folder"] for span in spans]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        result = example_result(folder.split("/")[1], steady=12, switches=2)
        (tmp_path / folder / "result.json").write_text(json.dumps(result))
    on_ray.mark_neighbours(tmp_path, spans)
    found = {folder: json.loads((tmp_path / folder / "result.json").read_text())["environment"]
             for folder in folders}
    assert found["c/static_kv"]["co_scheduled"] and found["c/static_kv"]["neighbours"] == ["speed"]
    assert found["c/speed"]["neighbours"] == ["static_kv"]
    assert not found["c/baseline"]["co_scheduled"]
    assert found["c/realtime"]["neighbours"] == ["c.seed1/baseline"]
    assert found["c.seed1/baseline"]["neighbours"] == ["c/realtime"]


def test_paths_are_those_of_the_copy(tmp_path: Path) -> None:
    """A job that writes into the driver's folder, which another host does not have."""
    job = on_ray.relative(job_in(tmp_path), tmp_path)
    assert (job.notebook, job.folder) == (Path("notebooks/02_static_kv.ipynb"), Path("outputs/c/static_kv"))


class PretendRay:
    """As much of Ray as `_run_all` uses. Jobs are done in the order in which they were started."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, made: Path) -> None:
        self.made, self.started = made, []

    def put(self, value: bytes) -> bytes:
        return value

    def remote(self, **retries: object) -> object:
        def start(job: Job, baseline: bytes) -> str:
            self.started.append((job.folder.as_posix().removeprefix("outputs/"), baseline))
            return self.started[-1][0]

        task = SimpleNamespace(remote=start)
        return lambda function: SimpleNamespace(options=lambda **options: task)

    def wait(self, pending: list[str], num_returns: int) -> tuple[list[str], list[str]]:
        return pending[:1], pending[1:]

    def get(self, name: str) -> dict:
        if name == "c.seed1/baseline":
            raise RuntimeError("the node died")
        span = {"folder": f"outputs/{name}", "node": "a", "start_s": 0, "end_s": 1}
        (self.made / "result.json").write_text(json.dumps({"status": "ok", "name": name}))
        return {"archive": on_ray.packed(self.made, ("result.json",)), "report": None, "span": span}


def test_each_campaign_starts_when_its_own_baseline_is_there(tmp_path: Path) -> None:
    """Seeds compared with another seed's baseline, one lost baseline that holds up all, or GPUs that wait
    for the slowest of the baselines.
    """
    (tmp_path / "made").mkdir()
    ray = PretendRay(tmp_path / "made")
    finish(tmp_path / "outputs/c.seed2/baseline", name="c.seed2/baseline")
    jobs = [job_in(tmp_path, label, campaign) for campaign, labels in (
        ("c.seed0", ("baseline", "static_kv")), ("c.seed1", ("baseline", "speed")), ("c.seed2", ("speed",)))
        for label in labels]
    failed, spans = on_ray._run_all(ray, tmp_path, jobs)
    order = [name for name, _ in ray.started]
    assert order == ["c.seed0/baseline", "c.seed1/baseline", "c.seed2/speed", "c.seed0/static_kv",
                     "c.seed1/speed"]
    baselines = dict(ray.started)
    for name, archive in baselines.items():
        if not archive:
            assert name in ("c.seed0/baseline", "c.seed1/baseline", "c.seed1/speed")
            continue
        on_ray.unpack(archive, tmp_path / "unpacked")
        there = json.loads((tmp_path / "unpacked" / "result.json").read_text())
        assert there["name"] == name.split("/")[0] + "/baseline"
    assert failed == {tmp_path / "outputs/c.seed1/baseline": "its worker or host was lost 3 times"}
    assert [span["folder"] for span in spans] == ["outputs/" + name for name in order if
                                                  name != "c.seed1/baseline"]


@pytest.mark.parametrize("given", ["/data/p.txt", "~/p.txt", "../p.txt", "outputs/p.txt"])
def test_a_prompt_file_that_stays_here_is_refused(tmp_path: Path, given: str) -> None:
    """Every job on another host fails for a file that only this one has."""
    on_ray._check_prompt_files(tmp_path, [job_in(tmp_path), job_in(tmp_path, prompts_file="prompts/p.txt")])
    with pytest.raises(UserError, match=rf"prompts_file {given} is not copied .* its relative path"):
        on_ray._check_prompt_files(tmp_path, [job_in(tmp_path, prompts_file=given)])


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
    assert json.loads((folder.parent / "baseline" / "result.json").read_text())["seed"] == seed
result = json.loads(pathlib.Path("complete.json").read_text()) | {"preset": name, "seed": seed}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_local_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job lost with its worker, a failure that stops the others, jobs before the baseline is there."""
    import nbformat

    root, markers = tmp_path / "project", tmp_path / "markers"
    (root / "notebooks").mkdir(parents=True)
    markers.mkdir()
    (root / "complete.json").write_text(json.dumps(example_result(steady=4, switches=1)))
    notebook = root / "notebooks" / "02_static_kv.ipynb"
    parameters = nbformat.v4.new_code_cell("name = output_dir = markers = ''\nseed = 0", metadata={
        "tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(CELL)], metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), notebook)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(
        [str(Path(__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    # Ray keeps a token in the home folder; a busy machine starts it slowly.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    monkeypatch.setattr(on_ray, "mark_neighbours", lambda root, spans: marked.extend(spans))
    marked: list[dict] = []
    asked = {"c.seed1": ("dies", "baseline", "fails", "works"), "c.seed2": ("works", "baseline")}
    jobs = [job_in(root, label, campaign, name=label, output_dir="x", seed=int(campaign[-1]),
                   markers=str(markers)) for campaign, labels in asked.items() for label in labels]
    failed = on_ray.run_jobs_on_ray(root, jobs, on_ray.LOCAL)
    fails = root / "outputs/c.seed1/fails"
    assert list(failed) == [fails] and "no such thing" in failed[fails]
    assert json.loads((fails / "failed.json").read_text())["status"] == "failed"
    finished = [job.folder for job in jobs if job.label != "fails"]
    for folder in finished:
        result = json.loads((folder / "result.json").read_text())
        assert (result["preset"], result["seed"]) == (folder.name, int(folder.parent.name[-1]))
        assert (folder / "notebook.ipynb").exists()
    spans = {root / span["folder"]: span for span in marked}
    assert spans.keys() == set(finished)
    assert all(spans[folder.with_name("baseline")]["end_s"] <= spans[folder]["start_s"]
               for folder in finished if folder.name != "baseline")
