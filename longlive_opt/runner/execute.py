"""Execute each notebook in its own kernel, leave its folder in a reliable state, and export the reports once
the verdicts are known.

A run is finished when papermill reached the end AND the notebook's last cell wrote a result.json with status
"ok". The executed notebook alone proves nothing, because after a killed kernel its metadata marks every cell
as completed. papermill is imported when the first notebook starts.
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NotAvailable, UserError
from ..files import atomic_path, printable, without_places
from ..measurement.result import (
    ASIDE,
    GIVEN,
    MEASURED_FILE,
    REFERENCE_FILE,
    WORKING,
    plain_json,
    read_result,
)
from ..models.weight_files import WeightFiles
from ..report.html_export import MAX_BYTES, export_html

log = logging.getLogger(__name__)

STDERR_LINES = 40
SUMMARY = "summary"
# What a run leaves in its folder. Anything else there is somebody's and is never deleted.
OWN_FILES = {"notebook.ipynb", "report.html", "failed.json", "result.json", "video.mp4", "frames.png",
             "side_by_side.mp4", MEASURED_FILE, REFERENCE_FILE, ".ipynb_checkpoints"}
OWN_SUFFIXES = {".png", ".csv", ".html", ".ipynb", ".json"}  # of summary, training and quantization
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)")
_TEMPORARY = re.compile(r"\.\w[^/]*\.\d+\.tmp(\.\w+)?")
_OUT_OF_MEMORY = ("out of memory", "alloc_cpu", "DefaultCPUAllocator", "Cannot allocate memory")


@dataclass(frozen=True)
class Job:
    """One notebook to execute with `parameters`; `folder` receives its output.

    `known` is the part of the result that is known before the run (`decision.planned`). `weights` are the
    files that the run will read.
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
        """`parameters` together with the configuration keys that keep the notebook's defaults."""
        return {**(self.known or {}).get("parameters", {}), **self.parameters}


class RunFailed(Exception):
    """A notebook did not finish. `report` is the content of failed.json."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(report["meaning"])
        self.report = report


class NoResult(Exception):
    """The notebook reached its end without a finished result."""


def finished_result(folder: Path) -> dict[str, Any] | None:
    """The finished result in `folder`, or None if there is none.

    Raises:
        UserError: there is one that cannot be used (`results.read_result`).
    """
    path = folder / "result.json"
    return read_result(path) if path.exists() else None


def is_damaged(folder: Path) -> bool:
    """Whether `folder` has a result that cannot be used."""
    try:
        finished_result(folder)
    except UserError:
        return True
    return False


@contextlib.contextmanager
def locked(jobs: Sequence[Job]) -> Iterator[None]:
    """Lock the folders of `jobs`. The system releases a lock when its process ends, so no lock is ever stale.

    Raises:
        UserError: another process is running one of the jobs.
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
                                "campaign; wait for it or use another --campaign") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        for job in jobs:
            _finish_move(job.folder)
        yield


def _finish_move(folder: Path) -> None:
    """Finish, or undo, what a killed `--overwrite` began: see `_move`."""
    new, replaced = (folder.with_name(folder.name + suffix) for suffix in WORKING)
    if not folder.exists():
        for found in (new, replaced):
            if (found / "result.json").exists() and not is_damaged(found):
                log.warning("[%s] an interrupted --overwrite was completed from %s", folder.name, found.name)
                found.rename(folder)
                break
    for left in (new, replaced):
        if left.exists():
            shutil.rmtree(left)


def run_jobs(root: Path, jobs: Sequence[Job]) -> dict[str, str]:
    """Run `jobs` in order and return the labels of the failed ones with short reasons.

    A failure does not stop the other jobs. A job that this machine cannot run is logged and recorded, but
    does not count as a failure.
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
            failed[job.label] = short_reason(error.report)
            log.error("[%s] FAILED: %s (%s)", job.label, error.report["meaning"], error.report["hint"])
            continue
        log.info("[%s] finished in %.1f s", job.label, time.perf_counter() - started)
    return failed


def short_reason(report: Mapping[str, Any]) -> str:
    """The first sentence of a failure."""
    return re.split(r"[.;]\s|\n", report["meaning"])[0].rstrip(".")


def export_reports(root: Path, folder: Path, cards: Mapping[str, str]) -> dict[str, str]:
    """Export the HTML reports of the finished runs in the campaign's `folder` and of its summary.

    A report is exported if it is missing, older than its notebook, or shows another card than `cards` has for
    its label. A run without its notebook, as in a clone, keeps its report.

    Returns:
        The labels of the runs whose report could not be exported, with short reasons.
    """
    failed = {}
    for notebook in sorted(folder.glob("*/notebook.ipynb")):
        label, report = notebook.parent.name, notebook.with_name("report.html")
        if label.endswith((*WORKING, *ASIDE)) or (notebook.parent / "failed.json").exists() or is_damaged(
                notebook.parent):
            continue
        result = finished_result(notebook.parent)
        if result is None and label != SUMMARY:
            continue
        card = cards.get(label, "")
        current = report.exists() and report.stat().st_mtime >= notebook.stat().st_mtime
        if current and card in report.read_text(encoding="utf-8"):
            continue
        title = f"{(result or {}).get('title', label.capitalize())} ({folder.name})"
        # Readers of a run's report may want to check its code, readers of the summary do not.
        runs = [result] if result is not None else \
            list(filter(None, map(finished_result, sorted(folder.glob("*")))))
        hide_code = label == SUMMARY
        if not export_report(root, notebook.parent, title, hide_code=hide_code, card=card, runs=runs):
            failed[label] = "no report"
    return failed


def export_report(root: Path, folder: Path, title: str, *, hide_code: bool, card: str = "",
                  runs: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Export the HTML report of a finished run. A failure is logged and leaves the result unchanged.

    Args:
        runs: the results that the report shows; its foot says where they come from.
    """
    from ..report.conclusion import provenance_html

    report = folder / "report.html"
    try:
        export_html(folder / "notebook.ipynb", report, title=title, hide_code=hide_code, card=card,
                    foot=provenance_html(runs) if runs else "")
    except Exception as error:
        log.error("[%s] the run is finished, but its report is not: %s", folder.name, error)
        return False
    log.info("[%s] report: %s", folder.name, report.relative_to(root))
    if (size := report.stat().st_size) > MAX_BYTES:
        log.warning("[%s] the report has %.1f MB, more than %.0f; a smaller video_width or a larger "
                    "video_crf makes it smaller", folder.name, size / 1e6, MAX_BYTES / 1e6)
    return True


def run_job(root: Path, job: Job) -> None:
    """Execute `job` and leave in its folder either a finished run or failed.json.

    An earlier finished run stays until its successor is finished. The successor runs in <label>.new and moves
    into place at the end. If it fails, it is kept as <label>.failed next to the finished run.

    Raises:
        RunFailed: the notebook raised, its kernel died, or it ended without a result.
        KeyboardInterrupt: after the kernel has ended.
    """
    started = time.time()
    stderr: deque[str] = deque(maxlen=STDERR_LINES)
    folder, failed = job.folder, job.folder.with_name(f"{job.label}.failed")
    replaces = is_empty = False
    try:
        replaces = not is_damaged(folder) and finished_result(folder) is not None
        if replaces:
            folder = folder.with_name(job.label + WORKING[0])
        _make_empty(folder, OWN_FILES if job.needs_result else OWN_SUFFIXES)
        is_empty = True
        _execute(root, job, folder, stderr)
        if job.needs_result:
            _check_result(folder)
    except (Exception, KeyboardInterrupt) as error:
        report = _failure(root, job, folder, error, stderr, started)
        # A result from before the failure must not count as finished.
        if is_empty:
            (folder / "result.json").unlink(missing_ok=True)
        write_failure(folder, report)
        if replaces and is_empty:
            move_folder(folder, failed)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RunFailed(report) from error
    if replaces:
        move_folder(folder, job.folder)
    shutil.rmtree(failed, ignore_errors=True)


def _make_empty(folder: Path, own: Collection[str]) -> None:
    """Make an empty folder for a run. A folder with a damaged result, or with files other than `own`, names
    or suffixes, is moved aside.
    """
    if folder.exists():
        foreign = [path.name for path in sorted(folder.iterdir()) if not {path.name, path.suffix} & {*own}
                   and not _TEMPORARY.fullmatch(path.name)]
        if is_damaged(folder) or foreign:
            aside = folder.with_name(folder.name + ASIDE[0])
            number = 2
            while aside.exists():
                aside, number = folder.with_name(f"{folder.name}.{number}{ASIDE[0]}"), number + 1
            folder.rename(aside)
            log.warning("[%s] the folder held %s; it was moved to %s", folder.name,
                        foreign[0] if foreign else "a damaged result", aside.name)
        else:
            shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _execute(root: Path, job: Job, folder: Path, stderr: deque[str]) -> None:
    """Run the notebook in a new kernel, log its output, and keep its stderr in `stderr`."""
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
        # papermill records its paths in the notebook, so they are relative. The log level hides a warning at
        # every start of the kernel and a traceback at an interrupt.
        installed = not job.notebook.is_relative_to(root)  # without a clone: among the package's data
        notebook = job.notebook if installed else job.notebook.relative_to(root)
        with contextlib.chdir(root):
            papermill.execute_notebook(notebook, output / "notebook.ipynb", parameters,
                                       cwd=".", kernel_name="python3", language="python",
                                       progress_bar=False, log_output=True,
                                       stdout_file=_Lines(job.label), stderr_file=_Lines(job.label, stderr),
                                       extra_arguments=["--log-level=50"])
    finally:
        papermill_log.removeHandler(cells)


class _Cells(logging.Handler):
    """Logs which cell starts, from papermill's log. Rich output only appears in the report."""

    def __init__(self, label: str) -> None:
        super().__init__(logging.INFO)
        self.label = label

    def emit(self, record: logging.LogRecord) -> None:
        cell = re.fullmatch(r"Executing Cell (\d+)-+", record.getMessage())
        if cell:
            log.info("[%s] cell %s", self.label, cell.group(1))


class _Lines:
    """Writes a stream of a notebook to the log, line by line with a label, and also to `keep`."""

    def __init__(self, label: str, keep: deque[str] | None = None) -> None:
        self.label = label
        self.keep = keep

    def write(self, text: str) -> None:
        for line in filter(str.strip, printable(_ANSI.sub("", text)).splitlines()):
            log.info("[%s]   %s", self.label, line)
            if self.keep is not None:
                self.keep.append(line)

    def flush(self) -> None:
        """Nothing is buffered."""


def _check_result(folder: Path) -> None:
    """The folder was empty before the run, so a result in it is the run's."""
    if not (folder / "result.json").exists():
        raise NoResult("no result.json was written")
    try:
        finished_result(folder)
    except UserError as error:
        raise NoResult(f"result.json is not a finished result: {error}") from error


def _failure(root: Path, job: Job, folder: Path, error: BaseException, stderr: Sequence[str],
             started: float) -> dict[str, Any]:
    """The content of failed.json: the kind of failure, its meaning, a hint, and the last lines of stderr."""
    kind = type(error).__name__
    name, message = getattr(error, "ename", kind), getattr(error, "evalue", str(error))
    meaning, hint = f"{name}: {message}", "see stderr_tail in failed.json"
    if kind == "KeyboardInterrupt":
        meaning, hint = "interrupted", "run the same command again; finished presets are skipped"
    elif kind == "DeadKernelError":
        meaning = "the kernel's process ended abruptly: killed (out of memory?) or crashed in native code"
        hint = "look at the system's log (dmesg); use a smaller profile or fewer blocks"
    elif name == "OutOfMemoryError" or "CUDA out of memory" in message:
        hint = "the GPU's memory is full: end other processes on it or use a smaller profile"
    elif name == "MemoryError" or any(words in message for words in _OUT_OF_MEMORY):
        hint = "the memory is full: end other processes, or use a smaller profile, picture or video"
    elif "No space left on device" in message or "Disk quota exceeded" in message:
        hint = f"free space on the disk of outputs/{job.folder.parent.name}, then run the same command again"
    elif kind == "PapermillExecutionError":
        hint = "the cell that failed is marked in the executed notebook.ipynb"
        if (folder / MEASURED_FILE).exists():
            hint += f"; what was measured before is in {MEASURED_FILE}"
    elif kind == "NoResult":
        meaning, hint = message, "the notebook's last cell has to write it; see the executed notebook.ipynb"
    elif kind == "NoSuchKernel":
        hint = "the environment is incomplete: make install"
    traceback = "\n".join(getattr(error, "traceback", ())).splitlines()
    tail = [_ANSI.sub("", line) for line in [*stderr, *traceback][-STDERR_LINES:]]
    status = "not available" if name == NotAvailable.__name__ else "failed"
    if status == "not available":
        meaning, hint = message, "run it on a machine that meets its requirements"
    return {"status": status, "label": job.label, "notebook": job.notebook.name, "kind": kind,
            "meaning": _publishable(root, meaning.strip()), "hint": hint,
            "stderr_tail": [_publishable(root, line) for line in tail], "parameters": job.configuration,
            "started_utc": _utc(started), "failed_utc": _utc(time.time())}


def _publishable(root: Path, text: str) -> str:
    """`text` without control characters and without the paths of this machine."""
    return without_places(printable(_ANSI.sub("", text)), root)


def write_failure(folder: Path, report: Mapping[str, Any]) -> None:
    """Write failed.json, whole or not at all, without the paths of this machine: failures are published.
    Never raises, because the campaign has to continue.
    """
    try:
        published = {key: value if key in GIVEN else plain_json(value, without_places)
                     for key, value in report.items()}
        text = json.dumps(published, indent=1, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps({key: ascii(value) for key, value in report.items()}, indent=1)
    try:
        with atomic_path(folder / "failed.json") as temporary:
            temporary.write_text(printable(text), encoding="utf-8")
    except UserError as error:
        log.error("%s: failed.json is not there: %s", folder.name, error)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def move_folder(source: Path, target: Path) -> None:
    """Move folder `source` to `target`. The old content of `target` is deleted last; a process that is killed
    in between leaves it as <target>.replaced (`_finish_move`).
    """
    replaced = target.with_name(target.name + WORKING[1])
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    source.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
