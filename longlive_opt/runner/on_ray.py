"""Run the jobs of a campaign on a Ray cluster: one job per GPU, or per slot of a CPU machine.

    python -m longlive_opt.runner run --campaign NAME --ray             # this machine
    python -m longlive_opt.runner run --campaign NAME --ray auto        # the cluster that this machine is in
    python -m longlive_opt.runner run --campaign NAME --ray HOST:6379   # another one

The driver is the process that types this. A campaign's baseline runs first, because its others compare
themselves with its frames. The others start when it is there, as far as there are GPUs, next to those of
other campaigns (`--seeds`, `--prompt-files`). Ray copies the project (without
results, weights and environments) to every host and the baseline's results to every job. Each job brings back
its folder, and the driver puts it where a run without Ray leaves it. Hosts need the same environment, and
weights at the path that `weights` names. Weights inside the project, as those of the tiny model, are copied
too, and so are prompt files.

A job whose worker or host is lost runs again, at most `RETRIES` times. A job that fails is recorded as failed
and not repeated. Jobs that shared a host are marked in their results (`environment.co_scheduled`,
`neighbours`), since they compete for CPUs, memory bandwidth and power, and decisions treat them with caution.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import BASELINE
from ..errors import NotAvailable, UserError
from ..measurement.environment import git_state
from ..measurement.result import REFERENCE_FILE, write_result
from .execute import Job, RunFailed, move_folder, run_job, short_reason, write_failure

log = logging.getLogger(__name__)

RETRIES = 2
LOCAL = "local"
"""`--ray` without an address: a cluster of this machine, for the time of the campaign."""
_LEFT_HERE = ("outputs", ".git", ".venv", ".bootstrap", "wheelhouse", "checkpoints", "**/__pycache__")
_OF_BASELINE = ("result.json", REFERENCE_FILE)


def run_jobs_on_ray(root: Path, jobs: Sequence[Job], address: str) -> dict[Path, str]:
    """Run the jobs of one or more campaigns on the cluster at `address`.

    Returns:
        The folders of the failed jobs with short reasons.

    Raises:
        NotAvailable: Ray is not installed.
        UserError: there is no cluster, it is too small for a job, or would lack a job's prompt file.
    """
    if address != LOCAL:
        _check_prompt_files(root, jobs)
    try:
        import ray
    except ImportError as error:
        raise NotAvailable("--ray: Ray is not installed here; run pip install 'longlive_opt[ray]', or leave "
                           "--ray out.") from error
    with _connected(ray, root, address):
        _check_resources(ray.cluster_resources(), jobs)
        failed, spans = _run_all(ray, root, jobs)
    mark_neighbours(root, spans)
    return failed


@contextlib.contextmanager
def _connected(ray: Any, root: Path, address: str) -> Iterator[None]:
    """Connect to a cluster, with a copy of the project for every job."""
    commit, dirty, _ = git_state(root, os.environ)
    variables = {"LONGLIVE_OPT_GIT_COMMIT": commit or "", "LONGLIVE_OPT_GIT_DIRTY": str(int(bool(dirty)))}
    environment = {"working_dir": str(root), "excludes": list(_LEFT_HERE), "env_vars": variables}
    own = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False, **own)
    except Exception as error:  # Ray raises this very class if its processes do not start
        why = (str(error).splitlines() or [""])[0]
        raise UserError(f"--ray: there is no Ray cluster at {address!r} ({why}); start one with 'ray start "
                        "--head', or leave the address out for this machine.") from error
    try:
        yield
    finally:
        ray.shutdown()


def needs(job: Job) -> dict[str, float]:
    """What Ray reserves for a job: its GPUs, or one CPU per process."""
    gpus = int(job.configuration.get("gpus", 1))
    on_cpu = job.configuration.get("device", "cpu") == "cpu"
    return {"num_cpus": gpus, "num_gpus": 0} if on_cpu else {"num_cpus": 1, "num_gpus": gpus}


def _check_resources(found: Mapping[str, float], jobs: Sequence[Job]) -> None:
    """Refuse a job for which Ray would wait for ever."""
    for job in jobs:
        for kind, asked in needs(job).items():
            there = found.get({"num_cpus": "CPU", "num_gpus": "GPU"}[kind], 0)
            if asked > there:
                raise UserError(f"--ray: {job.label} needs {asked:.0f} {kind[4:-1].upper()}s, and the "
                                f"cluster has {there:.0f}; leave the preset out or add hosts.")


def _check_prompt_files(root: Path, jobs: Sequence[Job]) -> None:
    """Refuse a prompt file that other hosts would not have."""
    for given in filter(None, (job.configuration.get("prompts_file") for job in jobs)):
        path = (root / given).resolve()
        inside = path.is_relative_to(root.resolve()) and not Path(given).is_absolute()
        if not inside or given.startswith("~") or path.relative_to(root.resolve()).parts[0] in _LEFT_HERE:
            raise UserError(f"--ray: prompts_file {given} is not copied to other hosts; move it into the "
                            f"project, outside of {', '.join(_LEFT_HERE[:-1])}, and name its relative path.")


def _run_all(ray: Any, root: Path, jobs: Sequence[Job]) -> tuple[dict[Path, str], list[dict[str, Any]]]:
    """Run each campaign's baseline, then its other jobs, at the same time as those of other campaigns, and
    keep what they bring. Return the failed ones with short reasons, and the spans of the others.
    """
    task = ray.remote(max_retries=RETRIES, retry_exceptions=False)(run_here)
    pending: dict[Any, Job] = {}
    failed: dict[Path, str] = {}
    spans: list[dict[str, Any]] = []

    def start(started: Iterable[Job], baseline: bytes) -> None:
        shared = ray.put(baseline)
        for job in started:
            options = task.options(**needs(job), name=_name(job))
            pending[options.remote(relative(job, root), shared)] = job

    waiting: dict[Path, list[Job]] = {}
    for job in jobs:
        waiting.setdefault(job.folder.parent, []).append(job)
    for campaign, its in waiting.items():
        first = [job for job in its if job.label == BASELINE]
        waiting[campaign] = [job for job in its if job not in first] if first else []
        start(first or its, b"" if first else packed(campaign / BASELINE, _OF_BASELINE))
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        job = pending.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayError as error:
            outcome = {"report": lost(job, error), "archive": b""}
        report = outcome["report"]
        keep(job, outcome["archive"], report)
        if job.label == BASELINE and (its := waiting[job.folder.parent]):
            start(its, packed(job.folder, _OF_BASELINE))
        if report is None:
            spans.append(outcome["span"])
            log.info("[%s] finished on %s in %.1f s", _name(job), outcome["span"]["node"],
                     outcome["span"]["end_s"] - outcome["span"]["start_s"])
        elif report["status"] == "not available":
            log.warning("[%s] n/a: %s", _name(job), report["meaning"])
        else:
            failed[job.folder] = short_reason(report)
            log.error("[%s] FAILED: %s (%s)", _name(job), report["meaning"], report["hint"])
    return failed, spans


def _name(job: Job) -> str:
    """The job among those of several campaigns."""
    return f"{job.folder.parent.name}/{job.label}"


def run_here(job: Job, baseline: bytes) -> dict[str, Any]:
    """Run a job in Ray's copy of the project, which is the working folder.

    Args:
        job: with relative paths.
        baseline: the results of the campaign's baseline, packed; empty if there are none.

    Returns:
        `archive`, the job's folder, packed; `report`, the content of failed.json or None; `span` {folder,
        node, start_s, end_s}, with the folder relative to the project.
    """
    import ray

    root, name = Path.cwd(), job.folder.as_posix()
    job = dataclasses.replace(job, folder=root / job.folder, notebook=root / job.notebook)
    if baseline and job.label != BASELINE:
        _put_baseline(job.folder.with_name(BASELINE), baseline)
    start, report = time.time(), None
    try:
        run_job(root, job)
    except RunFailed as error:
        report = error.report
    failed = job.folder.with_name(f"{job.label}.failed")
    folder = failed if report is not None and failed.exists() else job.folder
    span = {"folder": name, "node": ray.get_runtime_context().get_node_id()[:8], "start_s": start,
            "end_s": time.time()}
    return {"archive": packed(folder), "report": report, "span": span}


def _put_baseline(folder: Path, archive: bytes) -> None:
    """Unpack the baseline's results, unless another job of this host has done it."""
    own = folder.with_name(f"{BASELINE}.{os.getpid()}")
    unpack(archive, own)
    try:
        own.rename(folder)
    except OSError:
        shutil.rmtree(own)


def relative(job: Job, root: Path) -> Job:
    """The job with paths below `root` relative to it."""
    notebook = job.notebook.relative_to(root) if job.notebook.is_relative_to(root) else job.notebook
    return dataclasses.replace(job, folder=job.folder.relative_to(root), notebook=notebook)


def packed(folder: Path, names: Sequence[str] = ()) -> bytes:
    """A folder as an archive, or only its files `names`; empty if there is nothing."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()
             and (not names or path.relative_to(folder).as_posix() in names)] if folder.is_dir() else []
    if not paths:
        return b""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in paths:
            archive.write(path, path.relative_to(folder).as_posix())
    return stream.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    """Write an archive's files to a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if archive:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            files.extractall(folder)


def keep(job: Job, archive: bytes, report: Mapping[str, Any] | None) -> None:
    """Leave in the job's folder what `run_job` would leave there."""
    failed = job.folder.with_name(f"{job.label}.failed")
    new = job.folder.with_name(f"{job.label}.new")
    unpack(archive, new)
    if report is None:
        move_folder(new, job.folder)
        shutil.rmtree(failed, ignore_errors=True)
        return
    write_failure(new, report)
    move_folder(new, failed if (job.folder / "result.json").exists() else job.folder)


def lost(job: Job, error: Exception) -> dict[str, Any]:
    """The content of failed.json for a job whose workers were lost."""
    return {"status": "failed", "label": job.label, "notebook": job.notebook.name,
            "kind": type(error).__name__,
            "meaning": f"its worker or host was lost {RETRIES + 1} times",
            "hint": "look at the hosts' memory and logs; run the same command again to continue",
            "stderr_tail": str(error).splitlines()[-20:], "parameters": job.configuration}


def mark_neighbours(root: Path, spans: Sequence[Mapping[str, Any]]) -> None:
    """Mark the results of jobs that ran at the same time on one host. A neighbour of another campaign is
    named with its campaign.
    """
    for span in spans:
        folder = root / span["folder"]
        others = [root / other["folder"] for other in spans
                  if other is not span and other["node"] == span["node"]
                  and other["start_s"] < span["end_s"] and span["start_s"] < other["end_s"]]
        neighbours = sorted(other.name if other.parent == folder.parent
                            else f"{other.parent.name}/{other.name}" for other in others)
        path = folder / "result.json"
        if neighbours and path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            result["environment"] |= {"co_scheduled": True, "neighbours": neighbours}
            write_result(path, result)
