"""Run presets as notebooks, one after the other: python -m longlive_opt.runner run --campaign NAME

A preset is params/<preset>.yaml with its notebook, notebooks/NN_<preset>.ipynb; a profile and `--set
key=value` go on top. Everything is checked before the first notebook starts. A run lives in
outputs/<campaign>/<label>/, where the label is the preset, or baseline.repeat2 for a repetition that shows
the noise. A finished run is skipped, so a campaign goes on where it stopped; if its parameters are not those
asked for, nothing at all is run: take `--overwrite` or another campaign. With `--overwrite` the old run stays
until the new one is done.

Exit status: 0 all finished, 1 something failed (failed.json says what), 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longlive_opt.batch import Job, export_report, finished_result, locked, run_jobs
from longlive_opt.config import BASELINE, RUN_KEYS, ExperimentConfig, check_baseline
from longlive_opt.errors import UserError
from longlive_opt.inputs import script_of
from longlive_opt.results import REFERENCE_FILE
from longlive_opt.weight_files import TINY_WEIGHTS, check_weights
from longlive_opt.yaml_file import load_yaml

log = logging.getLogger(__name__)

SUMMARY = "summary"
SUMMARY_NOTEBOOK = "99_summary.ipynb"
TRAINING = "training"
TRAINING_NOTEBOOK = "98_training.ipynb"
# As little as the config allows: it shows that everything runs; the figures mean nothing.
QUICK = {"measure_blocks": 2, "num_switches": 1}
MIN_FREE_BYTES = 2**30
# Words about a run: written anew, they leave what was measured as it is.
WORDS = ("title", "hypothesis")
# What a repetition measures at most: it tells the noise of means, and is no second campaign.
REPEAT_AT_MOST = {"measure_blocks": 40, "num_switches": 6}


@dataclass(frozen=True)
class Layout:
    """The folders of a project, all below `root`."""

    root: Path

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def params(self) -> Path:
        return self.root / "params"

    def campaign(self, name: str) -> Path:
        """The folder of campaign `name`.

        Raises:
            UserError: `name` cannot name a folder.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
            raise UserError(f"--campaign: {name!r} cannot name a folder; use letters, digits, '_', '-', '.'")
        if name == TRAINING:
            raise UserError(f"--campaign: outputs/{TRAINING} holds the report on training; choose another "
                            "name")
        return self.root / "outputs" / name

    def presets(self) -> dict[str, Path]:
        """Preset -> notebook, in the order of the notebooks' numbers, without those that run no preset."""
        others = (SUMMARY_NOTEBOOK, TRAINING_NOTEBOOK)
        paths = [path for path in sorted(self.notebooks.glob("*.ipynb")) if path.name not in others]
        return {path.stem.split("_", 1)[1]: path for path in paths if re.match(r"\d+_.", path.stem)}


def choose_presets(layout: Layout, asked: Sequence[str], skipped: Sequence[str] = ()) -> dict[str, Path]:
    """The notebooks of the presets `asked` for, in that order; "all" is every preset but those to be
    `skipped`.

    Raises:
        UserError: a preset is unknown, or lacks its notebook or its parameters.
    """
    known = layout.presets()
    chosen = [preset for preset in known if preset not in skipped] if list(asked) == ["all"] else asked
    if not chosen:
        raise UserError("notebooks/ has no NN_<preset>.ipynb to run")
    for preset in chosen:
        parameters = layout.params / f"{preset}.yaml"
        if preset not in known and parameters.is_file():
            raise UserError(f"preset {preset!r} has no notebook; add notebooks/NN_{preset}.ipynb")
        if preset not in known:
            close = difflib.get_close_matches(preset, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"preset {preset!r} is unknown; {hint}known: {', '.join(known) or 'none'}")
        if not parameters.is_file():
            raise UserError(f"notebooks/{known[preset].name} has no parameters; add params/{preset}.yaml")
    return {preset: known[preset] for preset in chosen}


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts -> values as YAML reads them.

    Raises:
        UserError: a text has no '=', or its value is no YAML.
    """
    parsed = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--set: {text!r} is not key=value")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {key}: {value!r} is not a YAML value; put quotes around text") from error
    return parsed


def declared_parameters(notebook: Path) -> set[str]:
    """The names assigned in the cell tagged `parameters`.

    Raises:
        UserError: the file is no notebook, or does not have exactly one such cell.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        nodes = ast.parse("".join(tagged[0]["source"])).body if len(tagged) == 1 else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise UserError(f"{notebook.name} is not a readable notebook ({error!r})") from error
    if len(tagged) != 1:
        raise UserError(f"{notebook.name}: {len(tagged)} cells are tagged 'parameters'; tag exactly one")
    targets = [target for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign))
               for target in getattr(node, "targets", None) or [node.target]]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _require_declared(notebook: Path, declared: set[str], names: Sequence[str]) -> None:
    """papermill only warns about an unknown parameter; here it is an error."""
    ignored = [name for name in names if name not in declared]
    if ignored:
        raise UserError(f"{notebook.name} would ignore {', '.join(ignored)}; name it in its parameters cell")


def plan(layout: Layout, campaign: str, presets: Sequence[str] = ("all",), profile: Path | None = None,
         settings: Mapping[str, Any] | None = None, repeats: int = 0,
         skipped: Sequence[str] = ()) -> list[Job]:
    """Check everything that is asked for and return the jobs in their order; touches no file.

    Repetitions of the baseline come last: with the first one they span the campaign, drift included. They
    measure no more than REPEAT_AT_MOST, and are left out where there is nothing that they repeat.

    Raises:
        UserError: the first thing that is wrong.
    """
    if repeats < 0:
        raise UserError(f"--repeat-baseline: {repeats} is no number of runs; write 0 or more")
    if skipped:
        choose_presets(layout, skipped)
    chosen = choose_presets(layout, presets, skipped)
    over = {**(load_yaml(profile) if profile else {}), **(settings or {})}
    jobs = [_plan_run(layout, campaign, preset, 1, chosen[preset], over) for preset in chosen]
    if repeats and BASELINE not in chosen and not finished_result(layout.campaign(campaign) / BASELINE):
        log.info("[%s] neither asked for nor finished, so it is not repeated", BASELINE)
    elif repeats:
        notebook = choose_presets(layout, [BASELINE])[BASELINE]
        asked = {**load_yaml(layout.params / f"{BASELINE}.yaml"), **over}
        over = {**over, **{key: most for key, most in REPEAT_AT_MOST.items() if asked.get(key, 0) > most}}
        jobs += [_plan_run(layout, campaign, BASELINE, 2 + i, notebook, over) for i in range(repeats)]
    return jobs


def _plan_run(layout: Layout, campaign: str, preset: str, number: int, notebook: Path,
              over: Mapping[str, Any]) -> Job:
    asked = {**load_yaml(layout.params / f"{preset}.yaml"), **over}
    try:
        config = ExperimentConfig.from_mapping(asked)
        check_baseline(config)
        script_of(config)
        check_weights(config)
    except UserError as error:
        raise UserError(f"preset {preset}: {error}") from error
    if config.name != preset:
        raise UserError(f"params/{preset}.yaml: name is {config.name!r}; it must be the file's, {preset!r}")
    label = preset if number == 1 else f"{preset}.repeat{number}"
    folder = layout.campaign(campaign) / label
    run = dict(zip(RUN_KEYS, (campaign, number, folder.relative_to(layout.root).as_posix())))
    declared = declared_parameters(notebook)
    _require_declared(notebook, declared, [*asked, *run])
    # Every value that the notebook declares, not only those asked for: its own defaults never count.
    values = {key: value for key, value in config.to_dict().items() if key in declared}
    return Job(label, notebook, folder, {**values, **run}, f"{config.title} ({campaign})")


def plan_summary(layout: Layout, campaign: str, log_path: Path | None = None) -> Job:
    """The summary of a campaign; the optimization log goes to `log_path` (default: into the campaign).

    Raises:
        UserError: the notebook does not declare its two parameters.
    """
    notebook, folder = layout.notebooks / SUMMARY_NOTEBOOK, layout.campaign(campaign)
    campaign_dir = folder.relative_to(layout.root)
    log_path = log_path or campaign_dir / "OPTIMIZATION_LOG.md"
    parameters = {"campaign_dir": campaign_dir.as_posix(), "log_path": log_path.as_posix()}
    _require_declared(notebook, declared_parameters(notebook), list(parameters))
    return Job(SUMMARY, notebook, folder / SUMMARY, parameters, f"Summary ({campaign})", needs_result=False)


def plan_training(layout: Layout, weights: str = TINY_WEIGHTS) -> Job:
    """The report on the training of the weights folder `weights`, seen from the project's folder.

    Raises:
        UserError: the notebook does not declare its parameter, or something else lies in its folder.
    """
    notebook, folder = layout.notebooks / TRAINING_NOTEBOOK, layout.root / "outputs" / TRAINING
    _require_declared(notebook, declared_parameters(notebook), ["weights_dir"])
    if any(folder.glob("*/result.json")):
        raise UserError(f"outputs/{TRAINING}: is a campaign, and would be replaced by the report; rename it")
    return Job(TRAINING, notebook, folder, {"weights_dir": weights}, "Training of the tiny model",
               needs_result=False)


def has_cuda() -> bool:
    """Whether a CUDA GPU can be used; asks nvidia-smi, and where that fails torch in a process of its own."""
    smi = shutil.which("nvidia-smi")
    if smi and b"GPU 0" in subprocess.run([smi, "-L"], capture_output=True).stdout:
        return True
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def check_machine(folder: Path, jobs: Sequence[Job], cuda: Callable[[], bool] = has_cuda) -> None:
    """Refuse what would fail hours later: no GPU, a folder that cannot be written, a full disk.

    Raises:
        UserError: naming the remedy.
    """
    on_gpu = [job for job in jobs if str(job.parameters.get("device", "")).startswith("cuda")]
    if on_gpu and not cuda():
        raise UserError(f"device: {on_gpu[0].parameters['device']} is asked for, but no CUDA GPU can be used "
                        "here; take --profile params/profiles/laptop.yaml")
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"outputs/{folder.name}: cannot write here ({error.strerror}); change its "
                        "permissions or clone the project elsewhere") from error
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise UserError(f"outputs/{folder.name}: {free / 1e9:.1f} GB free, a campaign needs "
                        f"{MIN_FREE_BYTES / 1e9:.1f} GB; free some space")


def is_finished(job: Job) -> bool:
    """Whether `job` was run before.

    Raises:
        UserError: it was, with other parameters; WORDS may differ.
    """
    result = finished_result(job.folder)
    if result is None:
        return False
    there, asked = result.get("parameters", {}), job.parameters
    keys = [key for key in asked
            if key in there and key not in (*RUN_KEYS, *WORDS) and there[key] != asked[key]]
    if keys:
        differences = "; ".join(f"{key}: {there[key]!r}, not {asked[key]!r}" for key in keys)
        raise UserError(f"{job.label} is finished with other parameters ({differences}); take --overwrite "
                        "or another --campaign")
    return True


def require_reference(folder: Path, jobs: Sequence[Job]) -> None:
    """Refuse to measure `jobs` beside a baseline of which only the figures are left, as in a clone.

    Raises:
        UserError: naming the remedies.
    """
    labels, baseline = [job.label for job in jobs], folder / BASELINE
    gone = finished_result(baseline) and not (baseline / REFERENCE_FILE).exists()
    if gone and labels and BASELINE not in labels:
        raise UserError(f"outputs/{folder.name}/{BASELINE} is finished, but {REFERENCE_FILE}, with which "
                        f"{', '.join(labels)} would be compared, is not there (git leaves it out); take "
                        f"another --campaign, or --overwrite with {BASELINE} among the presets")


def run_campaign(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `run`: presets, then the summary."""
    settings = {**(QUICK if arguments.quick else {}), **parse_settings(arguments.set)}
    campaign = layout.campaign(arguments.campaign)
    jobs = plan(layout, arguments.campaign, arguments.presets, arguments.profile, settings,
                arguments.repeat_baseline, arguments.skip)
    summary = plan_summary(layout, arguments.campaign, arguments.log)
    check_machine(campaign, jobs)
    with locked([*jobs, summary]):
        finished = [] if arguments.overwrite else [job for job in jobs if is_finished(job)]
        todo = [job for job in jobs if job not in finished]
        require_reference(campaign, todo)
        for job in finished:
            log.info("[%s] finished before, skipped (--overwrite runs it again)", job.label)
            if not (job.folder / "report.html").exists():
                export_report(layout.root, job)
        failed = run_jobs(layout.root, [*todo, summary])
    if failed:
        reasons = "; ".join(f"{label} ({reason})" for label, reason in failed.items())
        log.error("%d of %d failed: %s", len(failed), len(todo) + 1, reasons)
    return 1 if failed else 0


def run_summary(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `summary`."""
    summary = plan_summary(layout, arguments.campaign, arguments.log)
    if not any(layout.campaign(arguments.campaign).glob("*/result.json")):
        raise UserError(f"--campaign: {arguments.campaign!r} has no finished run; start one with 'run'")
    with locked([summary]):
        return 1 if run_jobs(layout.root, [summary]) else 0


def run_training(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `training`."""
    asked = arguments.weights
    if asked and not (layout.root / asked).is_dir():
        raise UserError(f"--weights: there is no folder {asked}; train one: "
                        f"python -m longlive_opt.training --out {asked} --device cuda")
    job = plan_training(layout, asked or TINY_WEIGHTS)
    with locked([job]):
        return 1 if run_jobs(layout.root, [job]) else 0


def list_presets(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `list`."""
    for preset, notebook in layout.presets().items():
        parameters = layout.params / f"{preset}.yaml"
        title = load_yaml(parameters).get("title", "") if parameters.is_file() else "(no parameters)"
        print(f"{preset:24} {notebook.name:32} {title}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m longlive_opt.runner", description="Run presets as notebooks.")
    commands = parser.add_subparsers(required=True, metavar="run | summary | training | list")
    run = commands.add_parser("run", help="run presets, then the summary")
    run.add_argument("--campaign", required=True, metavar="NAME", help="results go to outputs/NAME")
    run.add_argument("--profile", type=Path, metavar="FILE", help="goes over each preset's values")
    run.add_argument("--presets", nargs="+", default=["all"], metavar="NAME", help="all (default) or names")
    run.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="presets that all leaves out")
    run.add_argument("--repeat-baseline", type=int, default=0, metavar="N", help="more runs of the baseline")
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="over both")
    run.add_argument("--overwrite", action="store_true", help="run finished presets again")
    run.add_argument("--quick", action="store_true", help="as few blocks as possible: does everything run?")
    run.set_defaults(command=run_campaign)
    summary = commands.add_parser("summary", help="compare the finished runs of a campaign")
    summary.add_argument("--campaign", required=True, metavar="NAME", help="the results in outputs/NAME")
    summary.set_defaults(command=run_summary)
    for command in (run, summary):
        command.add_argument("--log", type=Path, metavar="FILE", help="where the optimization log goes, seen "
                             "from the project's folder (default: into the campaign)")
    training = commands.add_parser("training", help="the report on the training of the tiny model")
    training.add_argument("--weights", metavar="DIR", help="a folder of trained weights, seen from the "
                          f"project's folder (default: {TINY_WEIGHTS})")
    training.set_defaults(command=run_training)
    commands.add_parser("list", help="list the presets").set_defaults(command=list_presets)
    return parser


def keep_interrupts() -> None:
    """Raise an interrupt again that Python only prints, since it came within a destructor or the callback of
    a weak reference: the notebook would run on as if nobody had asked.
    """
    def again(swallowed: Any) -> None:
        if issubclass(swallowed.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            sys.__unraisablehook__(swallowed)

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = again


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Entry point; `root` is the project's folder (default: the one that holds this package)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        return arguments.command(Layout(root or Path(__file__).resolve().parent.parent), arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # A cell that was about to start leaves one behind.
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # A batch system ends a job with SIGTERM: then, too, the kernel has to go and failed.json has to stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_interrupts()
    sys.exit(main())
