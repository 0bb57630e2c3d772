"""Plan a campaign: presets, a profile and settings become jobs, or the one sentence that says why not.

What would fail later is refused here: a preset without its notebook, a parameter that no cell declares,
optimizations under the baseline's name, absent weights, no GPU, a full disk, a run that is finished with
other parameters. `plan*` and `is_finished` only read; `check_machine` makes the campaign's folder, to see
that it can. No torch and no papermill, so a command line answers at once.
"""

from __future__ import annotations

import ast
import difflib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longlive_opt.batch import Job, finished_result
from longlive_opt.config import BASELINE, RUN_KEYS, ExperimentConfig, check_baseline
from longlive_opt.errors import UserError
from longlive_opt.inputs import script_of
from longlive_opt.results import REFERENCE_FILE, run_label
from longlive_opt.weight_files import TINY_WEIGHTS, check_weights
from longlive_opt.yaml_file import load_yaml

log = logging.getLogger(__name__)

SUMMARY = "summary"
SUMMARY_NOTEBOOK = "99_summary.ipynb"
TRAINING = "training"
TRAINING_NOTEBOOK = "98_training.ipynb"
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
    label = run_label(preset, number)
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
