"""Execute notebooks in kernels of their own, leave each run's folder in a state that can be trusted, and
export the reports once the verdicts are known.

A run is finished when papermill came to its end AND the notebook's last cell wrote a result.json with status
"ok". The executed notebook alone proves nothing: after a killed kernel its metadata says "completed" of every
cell. papermill is imported when the first notebook starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NotAvailable, UserError
from ..models.weight_files import WeightFiles
from ..report.html_export import export_html

log = logging.getLogger(__name__)

STDERR_LINES = 40
SUMMARY = "summary"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Job:
    """One notebook to execute: `parameters` go into it, `folder` receives everything that it makes.

    `known` is what is known of the run's result before it (`decision.planned`), and `weights` are the files
    that it will read.
    """

    label: str
    notebook: Path
    folder: Path
    parameters: Mapping[str, Any]
    title: str
    needs_result: bool = True
    known: Mapping[str, Any] | None = None
    weights: WeightFiles = WeightFiles()

    @property
    def configuration(self) -> dict[str, Any]:
        """`parameters`, and the keys of a run's configuration that its notebook has by default."""
        return {**(self.known or {}).get("parameters", {}), **self.parameters}


class RunFailed(Exception):
    """A notebook did not finish; `report` is what failed.json holds."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(report["meaning"])
        self.report = report


class NoResult(Exception):
    """The notebook came to its end, but not with a finished result."""


def finished_result(folder: Path) -> dict[str, Any] | None:
    """The finished result in `folder`, or None when it is missing, cut off or not "ok"."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("status") == "ok" else None


@contextlib.contextmanager
def locked(jobs: Sequence[Job]) -> Iterator[None]:
    """Hold the folders of `jobs`. The system drops a lock with its process, so none is ever stale.

    Raises:
        UserError: another process runs one of them.
    """
    with contextlib.ExitStack() as stack:
        for job in jobs:
            locks = job.folder.parent / ".locks"
            locks.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(locks / job.label, "a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(f"{job.label}: process {file.read().strip() or '?'} is running it in this "
                                "campaign; wait for it or take another --campaign") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def run_jobs(root: Path, jobs: Sequence[Job]) -> dict[str, str]:
    """Run `jobs` in their order and return the labels of those that failed, with the reason in short; one
    failure does not stop the rest. What this machine lacks the means for is told, recorded and no failure.
    """
    failed = {}
    for number, job in enumerate(jobs, 1):
        log.info("[%s] %d of %d: %s", job.label, number, len(jobs), job.notebook.name)
        started = time.perf_counter()
        try:
            run_job(root, job)
        except RunFailed as error:
            if error.report["status"] == "not available":
                log.warning("[%s] n/a: %s", job.label, error.report["meaning"])
                continue
            meaning = _printable(error.report["meaning"])
            failed[job.label] = re.split(r"[.;]\s|\n", meaning)[0].rstrip(".")
            log.error("[%s] FAILED: %s (%s)", job.label, meaning, error.report["hint"])
            continue
        log.info("[%s] finished in %.1f s", job.label, time.perf_counter() - started)
    return failed


def _printable(text: str) -> str:
    """`text` as any stream takes it: half of a surrogate pair becomes its code."""
    return text.encode("utf-8", "backslashreplace").decode()


def export_reports(root: Path, folder: Path, cards: Mapping[str, str]) -> dict[str, str]:
    """Export the HTML report of every finished run in the campaign's `folder`, and of its summary, where it
    is missing, older than its notebook, or opens with another card than that of `cards`, by label. A run
    whose notebook is gone, as in a clone, keeps its report.

    Returns:
        The labels of the runs whose report could not be made, with the reason in short.
    """
    failed = {}
    for notebook in sorted(folder.glob("*/notebook.ipynb")):
        label, report = notebook.parent.name, notebook.with_name("report.html")
        result = finished_result(notebook.parent)
        if label.endswith((".new", ".failed", ".old")) or (notebook.parent / "failed.json").exists() or (
                result is None and label != SUMMARY):
            continue
        card = cards.get(label, "")
        current = report.exists() and report.stat().st_mtime >= notebook.stat().st_mtime
        if current and card in report.read_text(encoding="utf-8"):
            continue
        title = f"{(result or {}).get('title', label.capitalize())} ({folder.name})"
        # The summary is read; a run is also checked, by its code.
        if not export_report(root, notebook.parent, title, hide_code=label == SUMMARY, card=card):
            failed[label] = "no report"
    return failed


def export_report(root: Path, folder: Path, title: str, *, hide_code: bool, card: str = "") -> bool:
    """Export the HTML report of a finished run; a failure is logged and leaves the result as it is."""
    report = folder / "report.html"
    try:
        export_html(folder / "notebook.ipynb", report, title=title, hide_code=hide_code, card=card)
    except Exception as error:
        log.error("[%s] the run is finished, but its report is not: %s", folder.name, error)
        return False
    log.info("[%s] report: %s", folder.name, report.relative_to(root))
    return True


def run_job(root: Path, job: Job) -> None:
    """Execute `job` and leave in its folder either a finished run or failed.json.

    A finished run that is there already stays until its successor is finished: that is made in <label>.new
    and moved into place at the end. If it fails, it is kept as <label>.failed beside the finished one.

    Raises:
        RunFailed: the notebook raised, its kernel died, or it ended without a result.
        KeyboardInterrupt: after the kernel was ended.
    """
    replaces = finished_result(job.folder) is not None
    folder = job.folder.with_name(f"{job.label}.new") if replaces else job.folder
    failed = job.folder.with_name(f"{job.label}.failed")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    stderr: deque[str] = deque(maxlen=STDERR_LINES)
    started = time.time()
    try:
        _execute(root, job, folder, stderr)
        if job.needs_result:
            _check_result(folder, started)
    except (Exception, KeyboardInterrupt) as error:
        report = _failure(job, error, stderr, started)
        # A result that came before the failure must not pass for a finished one.
        (folder / "result.json").unlink(missing_ok=True)
        _write_failure(folder, report)
        if replaces:
            _move(folder, failed)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RunFailed(report) from error
    if replaces:
        _move(folder, job.folder)
    shutil.rmtree(failed, ignore_errors=True)


def _execute(root: Path, job: Job, folder: Path, stderr: deque[str]) -> None:
    """Run the notebook in a new kernel; its output becomes log lines, and its stderr is kept in `stderr`."""
    import papermill

    output = folder.relative_to(root)
    parameters = dict(job.parameters)
    if "output_dir" in parameters:
        parameters["output_dir"] = output.as_posix()
    cells = _Cells(job.label)
    papermill_log = logging.getLogger("papermill")
    papermill_log.setLevel(logging.INFO)
    papermill_log.propagate = False
    papermill_log.addHandler(cells)
    try:
        # papermill records its paths in the notebook, so they are relative. The log level hides a warning
        # that the kernel prints at every start, and its traceback when it is interrupted.
        with contextlib.chdir(root):
            papermill.execute_notebook(job.notebook.relative_to(root), output / "notebook.ipynb", parameters,
                                       cwd=".", kernel_name="python3", progress_bar=False, log_output=True,
                                       stdout_file=_Lines(job.label), stderr_file=_Lines(job.label, stderr),
                                       extra_arguments=["--log-level=50"])
    finally:
        papermill_log.removeHandler(cells)


class _Cells(logging.Handler):
    """From papermill's log, the cell that starts. What the cells show as rich output is for the report."""

    def __init__(self, label: str) -> None:
        super().__init__(logging.INFO)
        self.label = label

    def emit(self, record: logging.LogRecord) -> None:
        cell = re.fullmatch(r"Executing Cell (\d+)-+", record.getMessage())
        if cell:
            log.info("[%s] cell %s", self.label, cell.group(1))


class _Lines:
    """A stream of a notebook as log lines with a label; they are kept in `keep`, too."""

    def __init__(self, label: str, keep: deque[str] | None = None) -> None:
        self.label = label
        self.keep = keep

    def write(self, text: str) -> None:
        for line in filter(str.strip, text.splitlines()):
            log.info("[%s]   %s", self.label, line)
            if self.keep is not None:
                self.keep.append(line)

    def flush(self) -> None:
        """Nothing is held back."""


def _check_result(folder: Path, started: float) -> None:
    path = folder / "result.json"
    if not path.exists():
        raise NoResult("no result.json was written")
    # One second of slack: some file systems store whole seconds.
    if path.stat().st_mtime < started - 1:
        raise NoResult("result.json is older than this run")
    if finished_result(folder) is None:
        raise NoResult("result.json is not a finished result with status 'ok'")


def _failure(job: Job, error: BaseException, stderr: Sequence[str], started: float) -> dict[str, Any]:
    """What failed.json holds: the kind of end, what it means, what to do, and the last lines of stderr."""
    kind = type(error).__name__
    name, message = getattr(error, "ename", kind), getattr(error, "evalue", str(error))
    meaning, hint = f"{name}: {message}", "see stderr_tail in failed.json"
    if kind == "KeyboardInterrupt":
        meaning, hint = "interrupted", "run the same command again; finished presets are skipped"
    elif kind == "DeadKernelError":
        meaning = "the kernel's process ended abruptly: killed (out of memory?) or crashed in native code"
        hint = "look at the system's log (dmesg); take a smaller profile or fewer blocks"
    elif name == "OutOfMemoryError" or "out of memory" in message:
        hint = "the GPU's memory is full: end other processes on it or take a smaller profile"
    elif kind == "PapermillExecutionError":
        hint = "the cell that failed is marked in the executed notebook.ipynb"
    elif kind == "NoResult":
        meaning, hint = message, "the notebook's last cell has to write it; see the executed notebook.ipynb"
    elif kind == "NoSuchKernel":
        hint = "the environment is incomplete: make install"
    traceback = "\n".join(getattr(error, "traceback", ())).splitlines()
    tail = [_ANSI.sub("", line) for line in [*stderr, *traceback][-STDERR_LINES:]]
    status = "not available" if name == NotAvailable.__name__ else "failed"
    if status == "not available":
        meaning, hint = message, "run it on a machine that has what it needs"
    return {"status": status, "label": job.label, "notebook": job.notebook.name, "kind": kind,
            "meaning": meaning.strip(), "hint": hint, "stderr_tail": tail, "parameters": job.configuration,
            "started_utc": _utc(started), "failed_utc": _utc(time.time())}


def _write_failure(folder: Path, report: Mapping[str, Any]) -> None:
    """Write failed.json; whatever the text and the disk, it does not raise: the campaign has to go on.

    Half a character, as a message may hold it, becomes the JSON escape that it came from.
    """
    try:
        text = json.dumps(report, indent=1, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps({key: ascii(value) for key, value in report.items()}, indent=1)
    try:
        (folder / "failed.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.error("%s: failed.json cannot be written: %s", folder.name, error.strerror or error)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _move(source: Path, target: Path) -> None:
    """Move folder `source` to `target`; what was there is deleted last."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
