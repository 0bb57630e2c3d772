"""The runner: what it refuses before it starts, and what it leaves behind however a notebook ends.

A throw-away project with notebooks of two or three cells; each kernel costs a second, so one campaign serves
several tests.
"""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from example_results import example_result

from longlive_opt.config import ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.files import printable
from longlive_opt.measurement import decision
from longlive_opt.prompts import schedule_of
from longlive_opt.report.html_export import network_references
from longlive_opt.runner import __main__ as runner
from longlive_opt.runner import execute, on_ray, plan

PARAMETERS = """campaign: str = "x"
run: int = 1
output_dir: str = "x"
name: str = "x"
seed: int = 99
device: str = "cpu"
"""
FINISH = """import json, pathlib
result = json.loads(pathlib.Path("complete.json").read_text())
result |= {"preset": name, "run": run, "parameters": {"name": name, "seed": seed}}
pathlib.Path(output_dir, "result.json").write_text(json.dumps(result))"""
KILL = """import os, signal
os.kill(os.getpid(), signal.SIGKILL)"""
TELL_PID = """import os, pathlib
pathlib.Path(output_dir, "pid").write_text(str(os.getpid()))"""
ENDINGS = {
    "baseline": [FINISH],
    "raises": ["import sys\nprint('a warning', file=sys.stderr)", FINISH, "1 / 0"],
    "killed": [FINISH, KILL],
    "silent": ["pass"],
}


PLANNED = decision.planned(config := ExperimentConfig(seed=3), schedule_of(config))
COMPLETE = example_result(steady=4, switches=1) | {key: PLANNED[key] for key in PLANNED if key != "status"}
HEADER = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


def complete(**keys: object) -> str:
    """The text of a valid result with other top-level `keys`."""
    return json.dumps({**COMPLETE, **keys})


def write_reference(folder: Path) -> None:
    """The smallest safetensors file, as the baseline's."""
    (folder / plan.REFERENCE_FILE).write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + b"\0")


def write_notebook(path: Path, parameters: str, cells: list[str], tags: int = 1) -> None:
    """A notebook as the repository holds them: stripped, kernel python3, `tags` cells tagged parameters. The
    kernel's language is left out, as some editors do.
    """
    v4 = nbformat.v4
    code = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}) for _ in range(tags)]
    code += [v4.new_code_cell(source) for source in cells]
    kernel = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(v4.new_notebook(cells=code, metadata={"kernelspec": kernel}), path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A project in which every ending was met once, and the exit status of that campaign."""
    root = tmp_path_factory.mktemp("finished")
    make_project(root, ENDINGS)
    return root, runner.main(["run", "--campaign", "c"], root)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    make_project(tmp_path, {"baseline": [FINISH]})
    return tmp_path


def make_project(root: Path, endings: dict[str, list[str]]) -> None:
    (root / "notebooks").mkdir()
    (root / "params").mkdir()
    (root / "complete.json").write_text(complete())
    for number, (preset, cells) in enumerate(endings.items(), 1):
        write_notebook(root / "notebooks" / f"{number:02}_{preset}.ipynb", PARAMETERS, cells)
        content = {"name": preset, "seed": 3, "device": "cpu"}
        (root / "params" / f"{preset}.yaml").write_text(yaml.safe_dump(content))
    summary = 'campaign_dir: str = ""\nlog_path: str = ""'
    write_notebook(root / "notebooks" / "99_summary.ipynb", summary, ["print('<b>summary</b>')"])
    write_notebook(root / "notebooks" / "98_training.ipynb", 'weights_dir: str = "x"', ["weights_dir"])


def failure(root: Path, label: str) -> dict:
    return json.loads((root / "outputs/c" / label / "failed.json").read_text())


def error_of(root: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line on stderr with which the command line refuses `arguments`."""
    assert runner.main(["run", "--campaign", "c", *arguments], root) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---- endings


def test_success_leaves_result_notebook_and_offline_report(finished: tuple[Path, int]) -> None:
    """Parameters not injected (the notebook's seed is 99), absolute paths, a report that needs a network."""
    folder = finished[0] / "outputs/c/baseline"
    assert json.loads((folder / "result.json").read_text())["parameters"] == {"name": "baseline", "seed": 3}
    assert not (folder / "failed.json").exists()
    recorded = nbformat.read(folder / "notebook.ipynb", 4).metadata.papermill
    assert recorded.output_path == "outputs/c/baseline/notebook.ipynb"
    assert network_references((folder / "report.html").read_text()) == []


def test_failures_do_not_stop_the_campaign(finished: tuple[Path, int]) -> None:
    """Exit status 0 after failures, or presets and summary after a failed one never run."""
    root, status = finished
    assert status == 1
    assert (root / "outputs/c/summary/report.html").exists()


def test_exception_is_reported(finished: tuple[Path, int]) -> None:
    """A result written before the exception counts as finished, or stderr and traceback are lost."""
    root, _ = finished
    report = failure(root, "raises")
    assert report["meaning"] == "ZeroDivisionError: division by zero"
    assert report["stderr_tail"][0] == "a warning" and "1 / 0" in "\n".join(report["stderr_tail"])
    assert not (root / "outputs/c/raises/result.json").exists()


def test_killed_kernel_is_a_failure(finished: tuple[Path, int]) -> None:
    """After SIGKILL papermill's notebook says that every cell completed, and here a result is there, too."""
    root, _ = finished
    assert failure(root, "killed")["kind"] == "DeadKernelError"
    assert "out of memory?" in failure(root, "killed")["meaning"]
    assert not (root / "outputs/c/killed/result.json").exists()


def test_missing_result_is_a_failure(finished: tuple[Path, int]) -> None:
    """A notebook that skips its last act passes as finished."""
    assert failure(finished[0], "silent")["kind"] == "NoResult"


# A shell's job in the background is started with SIGINT ignored, and so are its children.
HEED_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " \
                  "runner.keep_interrupts()"


def test_interrupt_ends_the_kernel(tmp_path: Path) -> None:
    """After Ctrl-C: an orphaned kernel that holds the GPU, or a traceback instead of one line."""
    make_project(tmp_path, {"baseline": [TELL_PID, "import time; time.sleep(60)"]})
    code = "import sys, pathlib; from longlive_opt.runner import __main__ as runner; " \
           + HEED_INTERRUPTS + "; sys.exit(runner.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "run", "--campaign", "c"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    pid_file = tmp_path / "outputs/c/baseline/pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text() != "" or process.poll() is not None)
    kernel = int(pid_file.read_text())
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines() == ["interrupted; run the same command again to continue"]
    assert failure(tmp_path, "baseline")["kind"] == "KeyboardInterrupt"
    wait_until(lambda: not alive(kernel))


def test_swallowed_interrupt_comes_again() -> None:
    """Ctrl-C while a weak reference is cleaned up: Python prints it, and the campaign runs on."""
    code = "import signal, time, weakref; from longlive_opt.runner import __main__ as runner\n" \
           "class Gone: pass\n" \
           f"{HEED_INTERRUPTS}; gone = Gone()\n" \
           "reference = weakref.ref(gone, lambda _: signal.raise_signal(signal.SIGINT))\n" \
           "try:\n del gone; time.sleep(20)\n" \
           "except KeyboardInterrupt: print('interrupted')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def wait_until(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- finished runs


def pretend_finished(root: Path, seed: int = 3) -> Path:
    folder = root / "outputs/c/baseline"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(complete(parameters={"name": "baseline", "seed": seed}, mark="old"))
    (folder / "report.html").touch()
    write_reference(folder)
    return folder / "result.json"


def stub_kernel(monkeypatch: pytest.MonkeyPatch, act: object) -> list[str]:
    """Replace the execution of a notebook by `act(job, folder)`; returns the labels that were executed."""
    executed: list[str] = []

    def pretend(root: Path, job: execute.Job, folder: Path, stderr: object) -> None:
        executed.append(job.label)
        act(job, folder)

    monkeypatch.setattr(execute, "_execute", pretend)
    monkeypatch.setattr(execute, "export_html", lambda notebook, html, **options: html.touch())
    return executed


def write_new(job: execute.Job, folder: Path) -> None:
    if not job.needs_result:
        return
    (folder / "result.json").write_text(complete(
        preset=job.parameters["name"], run=job.parameters["run"], parameters=dict(job.parameters),
        mark="new"))


def write_run(job: execute.Job, folder: Path) -> None:
    write_new(job, folder)
    (folder / "notebook.ipynb").touch()


def test_reports_are_made_once_the_verdicts_are_there(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without the campaign's verdict, or with that of a former campaign; one exported at every call;
    one that is lost in a clone, where no notebook is.
    """
    stub_kernel(monkeypatch, write_run)
    exported: list[tuple[str, str]] = []

    def export(notebook: Path, html: Path, *, title: str, hide_code: bool, card: str, foot: str) -> None:
        assert "Commit " in foot and "torch " in foot
        exported.append((notebook.parent.name, card))
        html.write_text(f"<main>{card}")

    monkeypatch.setattr(execute, "export_html", export)
    shown = {"baseline": "reference"}
    monkeypatch.setattr("longlive_opt.report.cards", lambda folder: shown)
    assert runner.main(["run", "--campaign", "c"], project) == 0
    assert exported == [("baseline", "reference"), ("summary", "")]
    assert runner.main(["run", "--campaign", "c"], project) == 0, "the summary is new, the run is not"
    assert exported[2:] == [("summary", "")]
    shown["baseline"] = "changed"
    assert runner.main(["summary", "--campaign", "c"], project) == 0
    assert exported[3:] == [("baseline", "changed"), ("summary", "")]
    (project / "outputs/c/baseline/notebook.ipynb").unlink()
    shown["baseline"] = "changed again"
    assert runner.main(["summary", "--campaign", "c"], project) == 0
    assert exported[5:] == [("summary", "")]
    assert (project / "outputs/c/baseline/report.html").read_text() == "<main>changed"


def test_repetition_is_shorter_than_a_long_baseline(project: Path) -> None:
    """The noise of a mean needs no 300 blocks a second time; a short baseline is repeated as it is."""
    layout = plan.Layout(Path(__file__).parents[1])
    for key, asked, repeated in (("measure_blocks", 300, 40), ("measure_blocks", 8, 8),
                                 ("num_switches", 20, 6), ("num_switches", 2, 2)):
        jobs = plan.plan(layout, "c", ["baseline"], settings={key: asked}, repeats=1)
        assert [job.parameters[key] for job in jobs] == [asked, repeated]


def test_skipped_presets_are_left_out_of_all_and_of_nothing_else(project: Path) -> None:
    """A typo in --skip that runs what was to be left out, or --skip overriding what was asked for by name."""
    layout = plan.Layout(Path(__file__).parents[1])
    assert "ablation" in plan.choose_presets(layout, ["all"])
    assert "ablation" not in plan.choose_presets(layout, ["all"], ["ablation"])
    assert list(plan.choose_presets(layout, ["ablation"], ["ablation"])) == ["ablation"]
    with pytest.raises(UserError, match="did you mean 'ablation'"):
        plan.plan(layout, "c", skipped=["ablaton"])


def test_finished_run_is_skipped(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A campaign that was cut off starts again from the beginning, or overwrites what was measured."""
    result = pretend_finished(project)
    executed = stub_kernel(monkeypatch, write_new)
    assert runner.main(["run", "--campaign", "c", "--repeat-baseline", "2"], project) == 0
    assert executed == ["baseline.repeat2", "baseline.repeat3", "summary"]
    assert json.loads(result.read_text())["mark"] == "old"


def add_preset(project: Path, name: str, **values: object) -> None:
    shutil.copy(project / "notebooks/01_baseline.ipynb", project / f"notebooks/02_{name}.ipynb")
    (project / f"params/{name}.yaml").write_text(yaml.safe_dump({"name": name, "seed": 3, **values}))


def test_only_what_is_there_is_repeated(project: Path) -> None:
    """Run 2 that counts as the baseline, without the video with which the others are compared; a preset that
    runs before the baseline with which it is compared.
    """
    add_preset(project, "other")

    def labels(*presets: str, repeats: object = 1) -> list[str]:
        layout = plan.Layout(project)
        return [job.label for job in plan.plan(layout, "c", presets, repeats=repeats)]

    assert labels("other") == ["other"]
    assert labels("other", "baseline") == ["baseline", "other", "baseline.repeat2"]
    assert labels("other", "baseline", repeats={"other": 1}) == ["baseline", "other", "other.repeat2"]
    pretend_finished(project)
    assert labels("other") == ["other", "baseline.repeat2"]
    with pytest.raises(UserError, match="did you mean 'other'"):
        labels("other", repeats={"othr": 1})


def test_repetitions_are_spread_over_the_campaign() -> None:
    """Three runs in a row at the end, which show nothing of an hour's drift."""
    jobs = plan.plan(plan.Layout(Path(__file__).parents[1]), "c", ["all"],
                         repeats={"baseline": 2, "realtime": 2}, skipped=["ablation"])
    labels = [job.label for job in jobs]
    assert labels[:2] == ["baseline", "realtime"]
    assert labels[-2:] == ["baseline.repeat3", "realtime.repeat3"]
    middle = labels.index("baseline.repeat2")
    assert labels[middle + 1] == "realtime.repeat2" and 4 <= middle <= len(labels) - 5
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize(("arguments", "repeats"), [
    ([], {}), (["--repeat-baseline", "1"], {"baseline": 1}), (["--repeat", "a", "b"], {"a": 2, "b": 2}),
    (["--repeat", "baseline", "a", "--repeats", "3"], {"baseline": 3, "a": 3}),
    (["--repeat", "a", "--repeat-baseline", "1"], {"baseline": 1, "a": 2})])
def test_options_of_repetition(arguments: list[str], repeats: dict[str, int]) -> None:
    """The older option and the newer one that mean two things."""
    asked = runner._parser().parse_args(["run", "--campaign", "c", *arguments])
    assert runner._repeats(asked) == repeats


def test_baseline_without_its_video_is_told(project: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture) -> None:
    """In a clone a finished baseline is figures alone: hours of presets whose fidelity is n/a."""
    from longlive_opt.workbook import REFERENCE_FILE

    assert plan.REFERENCE_FILE == REFERENCE_FILE
    (pretend_finished(project).parent / REFERENCE_FILE).unlink()
    executed = stub_kernel(monkeypatch, write_new)
    message = error_of(project, capsys, "--repeat-baseline", "1")
    assert "baseline.repeat2 would be compared" in message and "another --campaign, or --overwrite" in message
    assert executed == []
    assert runner.main(["run", "--campaign", "c"], project) == 0 and executed == ["summary"]
    assert runner.main(["run", "--campaign", "c", "--repeat-baseline", "1", "--overwrite"], project) == 0
    assert executed == ["summary", "baseline", "baseline.repeat2", "summary"]
    (project / "outputs/c/baseline" / REFERENCE_FILE).write_bytes(b"cut off")
    shutil.rmtree(project / "outputs/c/baseline.repeat2")
    assert "is damaged; use another" in error_of(project, capsys, "--repeat-baseline", "1")


def test_other_parameters_are_refused(project: Path, capsys: pytest.CaptureFixture) -> None:
    """Results of two configurations mixed in one campaign under one name."""
    pretend_finished(project, seed=4)
    assert "seed: 4, not 3" in error_of(project, capsys)


def test_keys_that_the_notebook_does_not_state_are_passed_and_judged(project: Path,
                                                                     capsys: pytest.CaptureFixture) -> None:
    """A run finished with another window taken for the one that is asked for, since the notebook's cell does
    not name it; a failure that forgets the keys with the default's value.
    """
    finish(project, context_noise=1)
    job = job_of(project, context_noise=1)
    assert plan.is_finished(job) and job.parameters["context_noise"] == 1
    assert not {"sink_size", "prompts"} & job.parameters.keys(), "the notebook has the defaults of these"
    assert job.configuration["sink_size"] == 3
    with pytest.raises(UserError, match=r"parameters \(context_noise: 1, not 0\)"):
        plan.is_finished(job_of(project))
    write_notebook(project / "notebooks/01_baseline.ipynb", "name = 'x'", [FINISH])
    assert "would ignore campaign, run, output_dir" in error_of(project, capsys)


def test_other_words_are_no_other_parameters(project: Path) -> None:
    """A campaign of hours that cannot go on, since a sentence of its hypothesis was mended."""
    path = pretend_finished(project)
    result = json.loads(path.read_text())
    result["parameters"] |= {"title": "Old", "hypothesis": "1 ms"}
    path.write_text(json.dumps(result))
    asked = {"name": "baseline", "seed": 3, "title": "New", "hypothesis": "2 ms"}
    assert plan.is_finished(execute.Job("baseline", Path(), path.parent, asked, "New"))
    with pytest.raises(UserError, match=r"parameters \(seed: 3, not 4\)"):
        plan.is_finished(execute.Job("baseline", Path(), path.parent, asked | {"seed": 4}, "New"))


def job_of(project: Path, **settings: object) -> execute.Job:
    job, = plan.plan(plan.Layout(project), "c", settings=settings)
    return job


def finish(project: Path, **settings: object) -> None:
    """What a finished run of the baseline leaves, as far as the planner reads it."""
    job = job_of(project, **settings)
    known = {key: value for key, value in job.known.items() if key != "status"}
    known["weights"] = {"kind": "files", "sha256": job.weights.sha256()}
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "result.json").write_text(complete(**known, status="ok"))
    (job.folder / "report.html").touch()
    write_reference(job.folder)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A project whose notebooks declare every key."""
    make_project(tmp_path, {"baseline": [FINISH], "other": [FINISH]})
    defaults = "\n".join(f"{key} = {value!r}" for key, value in ExperimentConfig().to_dict().items())
    for name in ("01_baseline", "02_other"):
        write_notebook(tmp_path / f"notebooks/{name}.ipynb", f"{PARAMETERS}{defaults}", [FINISH])
    (tmp_path / "notebooks/02_other.ipynb").rename(tmp_path / "other.ipynb")
    return tmp_path


def test_finished_is_judged_by_the_prompts_in_a_file(whole: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture) -> None:
    """A prompt file that was edited: results of the old prompts under the name of the new ones."""
    prompts = whole / "p.jsonl"
    prompts.write_text('{"prompts": ["a", "b"], "switch_frame_indices": [9]}\n')
    finish(whole, prompts_file=str(prompts))
    executed = stub_kernel(monkeypatch, write_new)
    setting = f"prompts_file={prompts}"
    assert runner.main(["run", "--campaign", "c", "--set", setting], whole) == 0 and executed == ["summary"]
    prompts.write_text('{"prompts": ["a", "c"], "switch_frame_indices": [9]}\n')
    assert error_of(whole, capsys, "--set", setting) == (
        "error: baseline is finished with other prompts; use --overwrite or another --campaign")
    prompts.write_text('{"prompts": ["a", "b"], "switch_frame_indices": [6]}\n')
    assert "finished with other switch frames;" in error_of(whole, capsys, "--set", setting)
    assert executed == ["summary"]


def test_finished_is_judged_by_the_weights_in_a_folder(whole: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture) -> None:
    """Weights that were trained again in place: two models in one campaign under one name."""
    weights = tmp_path / "weights"
    shutil.copytree(plan.TINY_WEIGHTS, weights)
    finish(whole, weights=str(weights))
    assert plan.is_finished(job_of(whole, weights=str(weights)))
    changed = weights / "longlive_base.safetensors"
    assert changed.exists()
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert error_of(whole, capsys, "--set", f"weights={weights}") == (
        "error: baseline is finished with other weights (dit: another SHA-256); use --overwrite or another "
        "--campaign")


@pytest.mark.parametrize(("key", "value"), [
    ("video_latent_frames", 36), ("fidelity_blocks", 4), ("prompts", ["a", "b", "c"]), ("height", 64),
    ("seed", 4), ("local_attn_size", 9), ("denoising_steps", [1000, 500]), ("model_dtype", "float32")])
def test_what_could_not_be_compared_is_refused_before_it_runs(whole: Path, capsys: pytest.CaptureFixture,
                                                              monkeypatch: pytest.MonkeyPatch, key: str,
                                                              value: object) -> None:
    """An hour's measurement that ends with a comparison which was impossible from the start."""
    finish(whole)
    (whole / "other.ipynb").rename(whole / "notebooks/02_other.ipynb")
    executed = stub_kernel(monkeypatch, write_new)
    words = f"{key}={json.dumps(value)}"
    message = error_of(whole, capsys, "--presets", "other", "--set", words)
    assert message.startswith("error: preset other: it could not be compared with the campaign's baseline, ")
    assert key in message and "another --campaign" in message and executed == []
    assert runner.main(["run", "--campaign", "d", "--presets", "other", "--set", words], whole) == 0
    assert executed == ["other", "summary"], "where there is no baseline, nothing is in the way"
    content = yaml.safe_load((whole / "params/other.yaml").read_text())
    (whole / "params/other.yaml").write_text(yaml.safe_dump({**content, key: value}))
    assert "preset other: it could not" in error_of(whole, capsys, "--overwrite"), "a preset of its own"


@pytest.mark.parametrize("text", ["\ud83e", "\U0001f98a", "\x00", object()],
                         ids=["half", "fox", "null", "object"])
def test_a_failure_is_recorded_whatever_its_text(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                 text: object) -> None:
    """A prompt in a message that no file can hold: the second failure ends the campaign."""
    def fail(job: execute.Job, folder: Path) -> None:
        raise ValueError(text)

    executed = stub_kernel(monkeypatch, fail)
    assert runner.main(["run", "--campaign", "c"], project) == 1
    assert executed == ["baseline", "summary"], "the campaign went on"
    assert failure(project, "baseline")["meaning"] == printable(f"ValueError: {text}")


def test_failed_json_never_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk, or a value that JSON does not know, that ends the campaign."""
    execute.write_failure(tmp_path, {"meaning": "x", "parameters": {(1, 2): "a"}})
    assert "(1, 2)" in json.loads((tmp_path / "failed.json").read_text())["parameters"]
    (tmp_path / "file").touch()
    execute.write_failure(tmp_path / "file", {"meaning": "x"})
    assert "failed.json is not there: cannot write" in caplog.text


def test_overwrite_replaces_the_result(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leftovers of the old run among the new one's files, or a working folder that stays."""
    result = pretend_finished(project)
    (result.parent / "leftover.png").touch()
    stub_kernel(monkeypatch, write_new)
    assert runner.main(["run", "--campaign", "c", "--overwrite"], project) == 0
    assert json.loads(result.read_text())["mark"] == "new"
    assert not (result.parent / "leftover.png").exists()
    assert sorted(p.name for p in (project / "outputs/c").iterdir()) == [
        ".locks", "baseline", "index.html", "summary"]


def test_failed_overwrite_keeps_the_old_result(project: Path, monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture) -> None:
    """A measured result lost to a run that failed, or a failure that is told after it was mended."""
    result = pretend_finished(project)
    stub_kernel(monkeypatch, lambda job, folder: 1 / 0)
    assert runner.main(["run", "--campaign", "c", "--overwrite"], project) == 1
    assert json.loads(result.read_text())["mark"] == "old"
    assert failure(project, "baseline.failed")["kind"] == "ZeroDivisionError"
    assert caplog.messages[-1].startswith("2 of 2 failed: baseline (ZeroDivisionError: division by zero); su")
    stub_kernel(monkeypatch, write_new)
    assert runner.main(["run", "--campaign", "c", "--overwrite"], project) == 0
    assert not (project / "outputs/c/baseline.failed").exists()


def test_a_clock_that_steps_back_costs_no_measurement(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run thrown away because a file server's clock is behind, or ours was set during the run."""
    def late(job: execute.Job, folder: Path) -> None:
        write_new(job, folder)
        if job.needs_result:
            os.utime(folder / "result.json", (0, 0))

    stub_kernel(monkeypatch, late)
    assert runner.main(["run", "--campaign", "c"], project) == 0
    assert execute.finished_result(project / "outputs/c/baseline")["mark"] == "new"


DAMAGED = ['{"status": "ok"', "", '{"status": "ok"}', '{"schema_version": 99}', "null", "[" * 200_000,
           "9" * 5000,
           complete().replace('"parameters": {', '"parameters": null, "other": {')]


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:16] + str(len(text)))
def test_a_damaged_result_deletes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch, text: str,
                                          capsys: pytest.CaptureFixture) -> None:
    """A comma too many in result.json: video, report, notebook and the reader's notes deleted unasked; or a
    result that nobody can use, skipped as finished at every call.
    """
    result = pretend_finished(project)
    result.write_text(text)
    (result.parent / "notes.md").write_text("mine")
    executed = stub_kernel(monkeypatch, write_new)
    message = error_of(project, capsys)
    assert message.startswith("error: baseline has a result that cannot be used: ")
    assert "--overwrite" in message
    assert executed == [] and result.read_text() == text
    assert runner.main(["run", "--campaign", "c", "--overwrite"], project) == 0
    aside = project / "outputs/c/baseline.aside"
    assert (aside / "result.json").read_text() == text and (aside / "notes.md").read_text() == "mine"
    assert json.loads(result.read_text())["mark"] == "new"


def test_somebody_elses_files_are_moved_aside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes in the folder of a run that did not finish, deleted by the next try, or by the one after it."""
    folder = project / "outputs/c/baseline"
    stub_kernel(monkeypatch, write_new)
    for number, aside in enumerate(("baseline.aside", "baseline.2.aside"), 1):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        (folder / "notes.md").write_text(str(number))
        assert runner.main(["run", "--campaign", "c"], project) == 0
        assert (folder.with_name(aside) / "notes.md").read_text() == str(number)
        assert not (folder / "notes.md").exists()
    (folder / "result.json").unlink()
    (folder / "notebook.ipynb").touch()
    assert runner.main(["run", "--campaign", "c"], project) == 0
    assert not folder.with_name("baseline.3.aside").exists(), "what a killed run left is nobody's"


@pytest.mark.parametrize(("new", "old", "there", "mark"), [
    ("whole", "", True, "old"), ("half", "old", False, "old"), ("whole", "old", False, "whole"),
    ("", "old", False, "old"), ("", "before", True, "old")])
def test_a_killed_overwrite_is_finished_or_undone(project: Path, monkeypatch: pytest.MonkeyPatch, new: str,
                                                  old: str, there: bool, mark: str) -> None:
    """A result in <label>.new that the next summary takes for a repetition; a measured run that lies in a
    folder which nothing reads.
    """
    folder = pretend_finished(project).parent
    if old:
        shutil.copytree(folder, folder.with_name("baseline.replaced"))
    if new:
        shutil.copytree(folder, folder.with_name("baseline.new"))
        text = complete(parameters={"name": "baseline", "seed": 3}, mark="whole")
        (folder.with_name("baseline.new") / "result.json").write_text(text if new == "whole" else text[:99])
    if not there:
        shutil.rmtree(folder)
    executed = stub_kernel(monkeypatch, write_new)
    assert runner.main(["run", "--campaign", "c"], project) == 0 and executed == ["summary"]
    assert json.loads((folder / "result.json").read_text())["mark"] == mark
    assert {path.name for path in folder.parent.iterdir()} >= {"baseline"}
    assert not [path for path in folder.parent.iterdir() if path.name.endswith((".new", ".replaced"))]


def test_a_reader_that_goes_away_ends_no_campaign(tmp_path: Path) -> None:
    """`run ... | head -3`: dozens of tracebacks of logging on the terminal."""
    make_project(tmp_path, {"baseline": [FINISH]})
    code = "import sys, pathlib; from longlive_opt.runner import __main__ as runner; " \
           "sys.exit(runner.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "run", "--campaign", "c"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 0 and (tmp_path / "outputs/c/baseline/result.json").exists()


def test_what_a_run_prints_commands_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """A title or a message with escape sequences that rename the window or hide what follows."""
    with caplog.at_level("INFO"):
        execute._Lines("x").write("\x1b]0;pwn\x07\x1b[31mred\x1b[0m \x9b1m \x07\nnext\ud83e")
    assert caplog.messages == ["[x]   red \\x9b1m \\x07", "[x]   next\\ud83e"]


def test_a_failure_names_no_place_of_this_machine(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Home folder and environment of whoever measured, in a log that is published; a memory that is full
    without a remedy.
    """
    place = Path(execute.__file__).parents[2]

    def fail(job: execute.Job, folder: Path) -> None:
        raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] {project}/outputs/c {Path.home()}/data "
                           f"{sys.prefix}/lib/python3/site-packages/torch/x.py {place.name}")

    stub_kernel(monkeypatch, fail)
    assert runner.main(["run", "--campaign", "c"], project) == 1
    report = failure(project, "baseline")
    assert report["meaning"].endswith(f"] outputs/c ~/data torch/x.py {place.name}")
    assert "memory is full" in report["hint"]


def test_a_driver_that_hangs_is_no_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                       tmp_path: Path) -> None:
    """nvidia-smi of a broken driver never returns, and the runner waits with it without a word."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(plan, "GPU_WAIT_S", 0.2)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert plan.has_cuda() is False
    assert "nvidia-smi does not answer" in caplog.text


def test_full_disk_stops_one_run_and_names_the_remedy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`[Errno 28]` without a path or a remedy, half a failed.json, and presets that are not tried."""
    def fail(job: execute.Job, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    executed = stub_kernel(monkeypatch, fail)
    assert runner.main(["run", "--campaign", "c"], project) == 1
    assert executed == ["baseline", "summary"]
    assert failure(project, "baseline")["hint"].startswith("free space on the disk of outputs/c")


def test_failed_report_keeps_the_result(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of measuring thrown away because the HTML export failed."""
    stub_kernel(monkeypatch, write_run)
    monkeypatch.setattr(execute, "export_html", lambda *args, **kwargs: 1 / 0)
    assert runner.main(["run", "--campaign", "c"], project) == 1
    assert execute.finished_result(project / "outputs/c/baseline") is not None


def test_second_runner_is_refused(project: Path, capsys: pytest.CaptureFixture) -> None:
    """Two processes write into one folder, and time each other's work."""
    with execute.locked(plan.plan(plan.Layout(project), "c")):
        assert f"process {os.getpid()} is running it" in error_of(project, capsys)


# ---- the baseline


def test_optimizations_make_no_baseline(project: Path, capsys: pytest.CaptureFixture) -> None:
    """`--set use_static_kv=true` meant for one preset: the others are compared with an optimized baseline."""
    assert "preset baseline: use_static_kv: true" in error_of(project, capsys, "--set", "use_static_kv=true")
    assert not (project / "outputs").exists()
    layout, settings = plan.Layout(Path(__file__).parents[1]), {"use_prompt_cache": True}
    for presets in (["baseline"], ["static_kv", "baseline", "speed"], ["all"]):
        with pytest.raises(UserError, match="^preset baseline: use_prompt_cache: .* without the baseline"):
            plan.plan(layout, "c", presets, settings=settings)
    job, = plan.plan(layout, "c", ["static_kv"], settings=settings)
    assert job.parameters["use_prompt_cache"] is True


# ---- the training's report


def test_training_report_is_no_preset(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A campaign that runs the notebook on the training as a preset, or a summary without parameters."""
    layout = plan.Layout(project)
    assert list(layout.presets()) == ["baseline"]
    job = plan.plan_training(layout, "weights/other")
    assert job.parameters == {"weights_dir": "weights/other"} and not job.needs_result
    executed = stub_kernel(monkeypatch, lambda job, folder: (folder / "notebook.ipynb").touch())
    assert runner.main(["training"], project) == 0 and executed == ["training"]
    assert (project / "outputs/training/report.html").exists()
    (project / "weights").mkdir()
    assert runner.main(["training", "--weights", "weights"], project) == 0, "made again"


def test_training_report_replaces_no_campaign(project: Path, capsys: pytest.CaptureFixture) -> None:
    """Measured results deleted with the folder that the report is written into."""
    assert "outputs/training holds" in error_of(project, capsys, "--campaign", "training")
    (project / "outputs/training/baseline").mkdir(parents=True)
    (project / "outputs/training/baseline/result.json").touch()
    assert runner.main(["training"], project) == 2 and "is a campaign" in capsys.readouterr().err
    assert (project / "outputs/training/baseline/result.json").exists()


def test_absent_weights_are_named(project: Path, capsys: pytest.CaptureFixture) -> None:
    """A typo in --weights that ends in a report of sentences."""
    assert runner.main(["training", "--weights", "weights/tiyn"], project) == 2
    assert "longlive_opt.tiny.training --out weights/tiyn" in capsys.readouterr().err


# ---- refused before anything runs


@pytest.mark.parametrize(("content", "words"), [
    ("", "found nothing"),
    ("- a\n- b\n", "found list"),
    ("just text\n", "found str"),
    ("name: baseline\nseed: 1\nseed: 2\n", "occurs twice"),
    ("name: !!python/object/apply:os.getcwd []\n", "not plain YAML"),
    ("name: baseline\ntimestep_shift: 1e-3\n", "1.0e-3"),
    ("name: baseline\nsede: 1\n", "preset baseline: unknown key 'sede' (did you mean 'seed'"),
    ("name: baseline\nseed: 0123\n", "baseline.yaml line 2: YAML reads 0123 as 83: write 83 or 123, or "),
    ("name: other\n", "name is 'other'"),
])
def test_bad_presets_are_refused(project: Path, capsys: pytest.CaptureFixture,
                                 content: str, words: str) -> None:
    """papermill runs most of these: it warns about unknown names and injects '1e-3' as text."""
    (project / "params/baseline.yaml").write_text(content)
    assert words in error_of(project, capsys)
    assert not (project / "outputs").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--presets", "basline"], "did you mean 'baseline'? choose one of baseline."),
    (["--presets", "orphan"], "add notebooks/NN_orphan.ipynb"),
    (["--profile", "missing.yaml"], "No such file"),
    (["--set", "seed"], "not key=value"),
    (["--set", "seed=[1"], "not plain YAML"),
    (["--set", "seed=1.5"], "expected int"),
    (["--set", "attention_backend=cudnn"], "attention_backend: 'cudnn'"),
    (["--set", "use_fused_kernels=true"], "use_fused_kernels: its"),
    (["--set", "model=longlive-1.3b"], "model: 'longlive-1.3b'"),
    (["--campaign", "../escape"], "cannot name a folder"),
    (["--campaign", "c" * 101], "cannot name a folder"),
    (["--skip", "baseline"], "--skip: it leaves out every preset"),
    (["--log", "outputs"], "--log: "), (["--log", "params/baseline.yaml/x/log.md"], "cannot be written"),
    (["--set", "seed=0123"], "--set 'seed'"), (["--set", "title=!!int x"], "the tag"),
    (["--set", "prompts=" + "[" * 2000], "too many levels"), (["--set", "name=" + "n" * 300], "name: "),
    (["--set", 'prompts_file="a\\0"'], "a control character"), (["--set", "seed=" + "9" * 5000], "too long"),
    (["--set", "weights=~nobody-here/x"], "this is no path"),
    (["--set", 'title="\\e]0;x\\a"'], "a control character"),
    (["--repeat-baseline", "-1"], "--repeat-baseline: -1 is not a number of runs; write 0"),
    (["--repeats", "-1"], "--repeats: -1 is not a number of runs"),
    (["--repeat", "baseline", "--repeat-baseline", "1"], "use only one of the two"),
    (["--set", 'title="a \\ud83e"'], "--set 'title': 'a \\ud83e' holds"),
    (["--set", "title=a \udce4"], "--set 'title': 'a \\udce4' holds"),
])
def test_bad_arguments_are_refused(project: Path, capsys: pytest.CaptureFixture,
                                   arguments: list[str], words: str) -> None:
    """A mistake on the command line found an hour later, or told as a traceback."""
    (project / "params/orphan.yaml").write_text("name: orphan\n")
    assert words in error_of(project, capsys, *arguments)


@pytest.mark.parametrize("folder", ["Makefile", "Makefile/prompts"])
def test_a_prompt_cache_that_cannot_be_written_is_refused(project: Path, capsys: pytest.CaptureFixture,
                                                          folder: str) -> None:
    """Found after the model was loaded, once for every preset of a campaign."""
    write_notebook(project / "notebooks/02_cached.ipynb", PARAMETERS, [FINISH])
    text = f"name: cached\nuse_prompt_cache: true\nprompt_cache_dir: {folder}\n"
    (project / "params/cached.yaml").write_text(text)
    assert "preset cached: prompt_cache_dir: " in error_of(project, capsys, "--presets", "cached")
    assert not (project / "outputs").exists()


@pytest.mark.parametrize("tags", [0, 2])
def test_notebook_needs_one_parameters_cell(project: Path, capsys: pytest.CaptureFixture, tags: int) -> None:
    """Without the tag papermill injects on top, and the notebook's defaults overwrite what was asked for."""
    write_notebook(project / "notebooks/01_baseline.ipynb", PARAMETERS, [FINISH], tags)
    assert f"{tags} cells are tagged" in error_of(project, capsys)


def test_without_a_profile_the_one_that_fits_is_taken_and_said(
        project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """300 blocks of the large model on a laptop, without a word."""
    taken = []
    monkeypatch.setattr(runner, "plan", lambda *arguments: taken.append(arguments[3]) or [])
    monkeypatch.setattr(runner, "run_jobs", lambda *_: {})
    monkeypatch.setattr(runner, "_settle", lambda *_: {})
    monkeypatch.setattr(runner, "fitting_profile", lambda: ("pocket", "no GPU here: profile pocket"))
    own = project / "params" / "profiles" / "pocket.yaml"
    with caplog.at_level(logging.INFO):
        assert runner.main(["run", "--campaign", "a"], root=project) == 0
        assert taken == [None] and "pocket" not in caplog.text
        own.parent.mkdir(exist_ok=True)
        own.write_text("seed: 3\n")
        assert runner.main(["run", "--campaign", "a"], root=project) == 0
        assert "no GPU here: profile pocket (--profile takes another)" in caplog.text
        assert runner.main(["run", "--campaign", "a", "--profile", "x.yaml"], root=project) == 0
    assert taken == [None, own, Path("x.yaml")]


def test_order_of_precedence(project: Path) -> None:
    """A profile that hides --set, or a default of the notebook (seed 99) that hides everything."""
    layout = plan.Layout(project)
    profile = project / "profile.yaml"
    profile.write_text("seed: 5\n")
    assert plan.plan(layout, "c")[0].parameters["seed"] == 3
    assert plan.plan(layout, "c", profile=profile)[0].parameters["seed"] == 5
    assert plan.plan(layout, "c", profile=profile, settings={"seed": 6})[0].parameters["seed"] == 6
    (project / "params/baseline.yaml").write_text("name: baseline\n")
    assert plan.plan(layout, "c")[0].parameters["seed"] == 0


def test_seeds_and_prompt_files_are_campaigns_with_a_baseline_each(
        project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds in one folder, where the second would be refused, or compared with the first's baseline; a
    summary over different prompts.
    """
    add_preset(project, "other")
    for name, content in (("foxes.txt", "a fox\n"), ("boats.jsonl", '{"prompts": ["a boat"]}\n')):
        (project / name).write_text(content)
    executed = stub_kernel(monkeypatch, write_new)
    command = ["run", "--campaign", "c", "--seeds", "1", "2", "--prompt-files", str(project / "foxes.txt"),
               str(project / "boats.jsonl")]
    assert runner.main(command, project) == 0
    assert executed == ["baseline", "other", "summary"] * 4
    for file in ("foxes.txt", "boats.jsonl"):
        for seed in (1, 2):
            campaign = project / f"outputs/c.{Path(file).stem}.seed{seed}"
            assert (campaign / "index.html").exists()
            for label in ("baseline", "other"):
                parameters = json.loads((campaign / label / "result.json").read_text())["parameters"]
                assert parameters["seed"] == seed and parameters["campaign"] == campaign.name
                assert Path(parameters["prompts_file"]).name == file
    assert len(list((project / "outputs").iterdir())) == 4


@pytest.mark.parametrize(("arguments", "says"), [
    (("--seeds", "1", "2", "1"), "--seeds: one of 1, 2, 1 is there twice"),
    (("--seeds", "1", "--set", "seed=2"), "--seeds: --set gives seed, too"),
    (("--prompt-files", "{}/a.txt", "--set", "prompts=[x]"), "--prompt-files: --set gives prompts, too"),
    (("--prompt-files", "{}/b.txt"), "b.txt is no file; name a .txt or .jsonl file"),
    (("--prompt-files", "{}/a.txt", "{}/a.jsonl"), "two files are called a, and each names a folder"),
    (("--prompt-files", "{}/a b.txt"), "a b.txt: 'c.a b' cannot name a folder"),
    (("--seeds", "1", "2", "--log", "LOG.md"), "--log: each of 2 campaigns would write LOG.md"),
    (("--seeds", "1", "-2"), "seed: -2"),
])
def test_conditions_are_refused_before_anything_runs(project: Path, capsys: pytest.CaptureFixture,
                                                     arguments: tuple[str, ...], says: str) -> None:
    """One campaign that overwrites another's results, or a setting that is silently another."""
    for name in ("a.txt", "a.jsonl", "a b.txt"):
        (project / name).write_text('{"prompts": ["x"]}\n')
    assert says in error_of(project, capsys, *(text.format(project) for text in arguments))
    assert not list(project.glob("outputs/*"))


def test_the_driver_of_a_cluster_needs_no_gpu(project: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture) -> None:
    """A cluster's head without a GPU that refuses to start anything on the others."""
    asked = []

    def cluster(root: Path, jobs: list[execute.Job], address: str) -> dict[Path, str]:
        asked.append(([job.folder.parent.name for job in jobs], address))
        return {jobs[0].folder: "no luck"}

    monkeypatch.setattr(runner, "has_cuda", lambda: False)
    monkeypatch.setattr(on_ray, "run_jobs_on_ray", cluster)
    stub_kernel(monkeypatch, write_new)
    on_gpu = ("--set", "device=cuda", "--seeds", "1", "2")
    assert "no CUDA GPU can be used" in error_of(project, capsys, *on_gpu)
    assert runner.main(["run", "--campaign", "c", *on_gpu, "--ray", "auto"], project) == 1
    assert asked == [(["c.seed1", "c.seed2"], "auto")]


def test_no_gpu_is_noticed_before_anything_runs(project: Path) -> None:
    """A campaign that dies in its first kernel, after minutes, for want of a GPU."""
    jobs = plan.plan(plan.Layout(project), "c", settings={"device": "cuda"})
    with pytest.raises(UserError, match="laptop.yaml"):
        plan.check_machine(project / "outputs/c", jobs, cuda=lambda: False)
    plan.check_machine(project / "outputs/c", jobs, cuda=lambda: True)


def test_unwritable_folder_and_full_disk(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that cannot be written at the end of a run. (A file in the way: root may write anywhere.)"""
    (project / "outputs").touch()
    with pytest.raises(UserError, match="cannot write"):
        plan.check_machine(project / "outputs/c", [])
    monkeypatch.setattr(plan, "MIN_FREE_BYTES", 2**62)
    with pytest.raises(UserError, match="free some space"):
        plan.check_machine(project / "results", [])


def test_start_is_cheap() -> None:
    """`--help` and a refused preset wait seconds for torch or papermill to be imported."""
    code = "import sys, longlive_opt.runner; print({'torch', 'papermill', 'nbconvert'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_damaged_result_ends_a_summary_before_it_begins(project, capsys):
    """Twelve seconds of a summary, another run's report rewritten, and then the error."""
    folder = project / "outputs" / "house"
    for label, text in (("baseline", "{"), ("static_kv", "{}")):
        (folder / label).mkdir(parents=True)
        (folder / label / "result.json").write_text(text)
    assert runner.main(["summary", "--campaign", "house"], project) == 2
    assert "baseline/result.json: is not JSON" in capsys.readouterr().err
    assert not (folder / "summary").exists()


def test_a_campaign_that_is_a_file_is_named_as_such(project, capsys):
    """A complaint about --log, which nobody gave."""
    (project / "outputs").mkdir(exist_ok=True)
    (project / "outputs" / "afile").write_text("")
    assert runner.main(["run", "--campaign", "afile", "--presets", "baseline"], project) == 2
    assert "--campaign: outputs/afile is a file" in capsys.readouterr().err
