"""Plan a campaign: turn presets, a profile and settings into jobs, or refuse them with one sentence.

The plan refuses everything that would fail later: a preset without its notebook, an unknown key,
optimizations under the baseline's name, absent weights, no GPU, a full disk, a run that is finished with
other parameters, prompts or weights, and a run that is not comparable with the campaign's baseline. `plan*`
and `is_finished` only read. `check_machine` makes the campaign's folder to test that it can. This module
imports neither torch nor papermill, so the command line answers at once.
"""

from __future__ import annotations

import ast
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

from ..config import (
    BASELINE,
    RUN_KEYS,
    STUDIES,
    ExperimentConfig,
    check_baseline,
    check_folder_name,
    several_suffix,
    unknown_preset,
)
from ..errors import UserError, short
from ..files import check_texts, load_yaml, parse_yaml, project_path, read_json, require_writable, whole_text
from ..measurement import decision
from ..measurement.result import REFERENCE_FILE, run_label
from ..models.weight_files import TINY_WEIGHTS, check_weights, safetensors_header, tiny_vae_file
from ..prompts import schedule_of
from ..report.log.steps import require_steps
from .execute import SUMMARY, Job, finished_result

log = logging.getLogger(__name__)

SUMMARY_NOTEBOOK = "99_summary.ipynb"
TRAINING = "training"
TRAINING_NOTEBOOK = "98_training.ipynb"
QUANTIZATION = "quantization"
QUANTIZATION_NOTEBOOK = "91_quantization.ipynb"
COMPARE_NOTEBOOK = "92_compare.ipynb"
OTHER_NOTEBOOKS = (SUMMARY_NOTEBOOK, TRAINING_NOTEBOOK, QUANTIZATION_NOTEBOOK, "20_live.ipynb",
                   "21_inside.ipynb", "90_roofline.ipynb", COMPARE_NOTEBOOK)
"""Notebooks that run no preset of a campaign."""
MIN_FREE_BYTES = 2**30
GPU_WAIT_S = 60
_DEFAULTS = ExperimentConfig().to_dict()
# Descriptions of a run. Changing them does not invalidate its measurements.
WORDS = ("title", "hypothesis")
# Upper limits for a repetition, which only has to measure the noise of means.
REPEAT_AT_MOST = {"measure_blocks": 40, "num_switches": 6}


@dataclass(frozen=True)
class Layout:
    """The folders of a project, all below `root`."""

    root: Path

    @property
    def notebooks(self) -> Path:
        return self._own_or_shipped("notebooks")

    @property
    def params(self) -> Path:
        return self._own_or_shipped("params")

    def _own_or_shipped(self, name: str) -> Path:
        folder = self.root / name
        return folder if folder.is_dir() else project_path(name)

    def campaign(self, name: str) -> Path:
        """The folder of campaign `name`.

        Raises:
            UserError: `name` cannot name a folder.
        """
        check_folder_name("--campaign", name)
        if name == TRAINING:
            raise UserError(f"--campaign: outputs/{TRAINING} holds the training report; choose another "
                            "name")
        if name == QUANTIZATION:
            raise UserError(f"--campaign: outputs/{QUANTIZATION} holds the study of 8-bit formats; choose "
                            "another name")
        folder = self.root / "outputs" / name
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--campaign: outputs/{name} is a file, and results need a folder; choose "
                            "another name or move it away")
        return folder

    def presets(self) -> dict[str, Path]:
        """Preset -> notebook, in the order of the notebooks' numbers, for all notebooks that run a preset. In
        the project these presets are `config.preset_files`.
        """
        paths = [path for path in sorted(self.notebooks.glob("*.ipynb")) if path.name not in OTHER_NOTEBOOKS]
        return {path.stem.split("_", 1)[1]: path for path in paths if re.match(r"\d+_.", path.stem)}


def choose_presets(layout: Layout, asked: Sequence[str], skipped: Sequence[str] = ()) -> dict[str, Path]:
    """The notebooks of the presets in `asked`, in that order. "all" means every preset except `skipped`.

    Raises:
        UserError: a preset is unknown, or lacks its notebook or its parameters.
    """
    known = layout.presets()
    chosen = [preset for preset in known if preset not in skipped] if list(asked) == ["all"] else asked
    if not chosen and known:
        raise UserError("--skip: it leaves out every preset; skip fewer, or name some with --presets")
    if not chosen:
        raise UserError("notebooks/ has no NN_<preset>.ipynb to run")
    for preset in chosen:
        parameters = layout.params / f"{preset}.yaml"
        if preset not in known and parameters.is_file():
            raise UserError(f"preset {preset!r} has no notebook; add notebooks/NN_{preset}.ipynb")
        if preset not in known:
            raise unknown_preset(preset, known)
        if not parameters.is_file():
            raise UserError(f"notebooks/{known[preset].name} has no parameters; add params/{preset}.yaml")
    return {preset: known[preset] for preset in chosen}


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts -> values as YAML reads them.

    Raises:
        UserError: a text has no '=', its value is not plain YAML, or contains what cannot be written; or a
            key is given twice.
    """
    parsed: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--set: {text!r} is not key=value")
        where = f"--set {key!a}"
        if key in parsed:
            raise UserError(f"{where}: it is given twice; leave one out")
        parsed[key] = check_texts(parse_yaml(whole_text(value, where), where), where)
    return parsed


def declared_parameters(notebook: Path) -> set[str]:
    """The names assigned in the cell tagged `parameters`.

    Raises:
        UserError: the file is not a notebook, or does not have exactly one such cell.
    """
    try:
        cells = read_json(notebook, "restore it from git")["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        nodes = ast.parse("".join(tagged[0]["source"])).body if len(tagged) == 1 else []
    except (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError,
            MemoryError) as error:
        raise UserError(f"{notebook.name} is not a readable notebook ({short(error)})") from error
    if len(tagged) != 1:
        raise UserError(f"{notebook.name}: {len(tagged)} cells are tagged 'parameters'; tag exactly one")
    targets = [target for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign))
               for target in getattr(node, "targets", None) or [node.target]]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _require_declared(notebook: Path, declared: set[str], names: Sequence[str]) -> None:
    """Refuse `names` that the notebook does not declare, since papermill would only warn about them."""
    ignored = [name for name in names if name not in declared]
    if ignored:
        raise UserError(f"{notebook.name} would ignore {', '.join(ignored)}; name it in its parameters cell")


def plan(layout: Layout, campaign: str, presets: Sequence[str] = ("all",), profile: Path | None = None,
         settings: Mapping[str, Any] | None = None, repeats: int | Mapping[str, int] = 0,
         skipped: Sequence[str] = (), gpus: Sequence[int] = ()) -> list[Job]:
    """Check the request and return the jobs in order. Writes no file.

    The baseline comes first, because the others are compared with it. `repeats` gives the number of
    additional runs by preset (a plain number applies to the baseline). Repetitions are spread over the
    campaign to show its drift, so the first runs of repeated presets precede the rest. A repetition measures
    at most REPEAT_AT_MOST, and is left out if its preset has no first run.

    `gpus`: more runs of every preset but the baseline and the studies, each on so many GPUs. A preset that
    cannot be shared is left out with a reason.

    Raises:
        UserError: the first problem found.
    """
    if isinstance(repeats, int):
        if repeats < 0:
            raise UserError(f"--repeat-baseline: {repeats} is not a number of runs; write 0 or more")
        repeats = {BASELINE: repeats}
    if skipped:
        choose_presets(layout, skipped)
    chosen = choose_presets(layout, presets, skipped)
    over = {**(load_yaml(profile) if profile else {}), **(settings or {})}
    first = {preset: _plan_run(layout, campaign, preset, 1, chosen[preset], over)
             for preset in sorted(chosen, key=lambda preset: preset != BASELINE)}
    for count in gpus:
        first |= _plan_several(layout, campaign, chosen, over, count)
    rounds = _plan_repeats(layout, campaign, {name: count for name, count in repeats.items() if count}, first,
                           over)
    _require_comparable(layout.campaign(campaign), [*first.values(), *sum(rounds, [])])
    return _interleaved(first, rounds, repeats)


def _plan_several(layout: Layout, campaign: str, notebooks: Mapping[str, Path], over: Mapping[str, Any],
                  count: int) -> dict[str, Job]:
    """The runs of presets on `count` GPUs, by name.

    Args:
        notebooks: by preset.
    """
    if count < 2:
        raise UserError(f"--gpus: {count} is not several; presets run on one GPU anyway, write 2 or more")
    jobs = {}
    for preset in notebooks:
        if preset in (BASELINE, *STUDIES):
            continue
        asked = {**load_yaml(layout.params / f"{preset}.yaml"), **over}
        try:
            ExperimentConfig.from_mapping({**asked, "gpus": count})
        except UserError as error:
            log.warning("[%s] not on %d GPUs: %s", preset, count, error)
            continue
        name, title = preset + several_suffix(count), asked.get("title", preset)
        unit = "processes" if asked.get("device", _DEFAULTS["device"]) == "cpu" else "GPUs"
        words = {"gpus": count, "name": name, "title": f"{title} on {count} {unit}",
                 "hypothesis": f"{title}, equal within rounding. Denoising and decoding take 1/{count} of "
                               "the time on one, and the exchanges between the ranks in addition."}
        jobs[name] = _plan_run(layout, campaign, preset, 1, notebooks[preset], {**over, **words}, name)
    return jobs


def _plan_repeats(layout: Layout, campaign: str, repeats: Mapping[str, int], first: Mapping[str, Job],
                  over: Mapping[str, Any]) -> list[list[Job]]:
    """The repetitions in rounds: the second runs, the third runs, and so on."""
    rounds: list[list[Job]] = [[] for _ in range(max(repeats.values(), default=0))]
    for preset, count in repeats.items():
        notebook = choose_presets(layout, [preset])[preset]
        if preset not in first and not finished_result(layout.campaign(campaign) / preset):
            log.info("[%s] neither requested nor finished, so it is not repeated", preset)
            continue
        asked = {**load_yaml(layout.params / f"{preset}.yaml"), **over}
        less = {key: most for key, most in REPEAT_AT_MOST.items() if asked.get(key, 0) > most}
        for index in range(count):
            rounds[index].append(_plan_run(layout, campaign, preset, 2 + index, notebook, {**over, **less}))
    return rounds


def _interleaved(first: Mapping[str, Job], rounds: Sequence[Sequence[Job]], repeats: Mapping[str, int]
                 ) -> list[Job]:
    """First runs of the repeated presets, then the other presets with the `rounds` spread evenly among them.
    The last round ends the campaign.
    """
    repeated = [job for preset, job in first.items() if repeats.get(preset)]
    others = [job for preset, job in first.items() if not repeats.get(preset)]
    if BASELINE in first and not repeats.get(BASELINE):
        repeated, others = [first[BASELINE], *repeated], others[1:]
    jobs = list(repeated)
    for index, jobs_again in enumerate(rounds):
        begin, end = (len(others) * (index + more) // len(rounds) for more in (0, 1))
        jobs += [*others[begin:end], *jobs_again]
    return jobs if rounds else [*repeated, *others]


def _require_comparable(folder: Path, jobs: Sequence[Job]) -> None:
    """Refuse jobs that are not comparable with the campaign's baseline, which is either among the jobs or
    finished in `folder`.

    Raises:
        UserError: naming the first difference.
    """
    asked = next((job for job in jobs if job.label == BASELINE), None)
    baseline = asked.known if asked else finished_result(folder / BASELINE)
    for job in jobs if baseline else ():
        if reason := decision.fidelity_reason(_known(job, baseline), baseline):
            raise UserError(f"preset {job.label}: it could not be compared with the campaign's baseline, "
                            f"since {reason}; run both with the same settings, or use another --campaign")


def _known(job: Job, other: Mapping[str, Any]) -> Mapping[str, Any]:
    """The known part of the result of `job`, with the SHA-256 of its weights if `other` states its own."""
    if not (other.get("weights") or {}).get("sha256"):
        return job.known
    return {**job.known, "weights": {**job.known["weights"], "sha256": job.weights.sha256()}}


def _plan_run(layout: Layout, campaign: str, preset: str, number: int, notebook: Path,
              over: Mapping[str, Any], name: str = "") -> Job:
    """One run of a preset.

    Args:
        name: of its results, if that is not the preset's.
    """
    asked = {**load_yaml(layout.params / f"{preset}.yaml"), **over}
    if preset == BASELINE and asked.pop("gpus", 1) != 1:
        log.info("[%s] on one GPU, since it is the reference", preset)
    try:
        config = ExperimentConfig.from_mapping(asked)
        check_baseline(config)
        config.check_places()
        schedule = schedule_of(config)
        weights = check_weights(config.weights, config.model_config())
        if config.has_tiny_vae:
            tiny_vae_file(config.vae, config.vae_weights, config.weights)
    except UserError as error:
        raise UserError(f"preset {preset}: {str(error).removeprefix('preset: ')}") from error
    if config.name != (name or preset):
        raise UserError(f"params/{preset}.yaml: name is {config.name!r}; it must be the file's, {preset!r}")
    label = run_label(config.name, number)
    folder = layout.campaign(campaign) / label
    run = dict(zip(RUN_KEYS, (campaign, number, folder.relative_to(layout.root).as_posix())))
    declared = declared_parameters(notebook)
    _require_declared(notebook, declared, list(RUN_KEYS))
    # Overwrite every value that the notebook's cell states. All other keys have the config's default in the
    # notebook, or what follows from other keys, so they are passed only if they were asked for and differ.
    values = {key: value for key, value in config.to_dict().items()
              if key in declared or key in asked and value != _DEFAULTS[key]}
    return Job(label, notebook, folder, {**values, **run}, f"{config.title} ({campaign})",
               known=decision.planned(config, schedule), weights=weights)


def plan_summary(layout: Layout, campaign: str, log_path: Path | None = None) -> Job:
    """The summary of a campaign. It writes the optimization log to `log_path` (default: into the campaign).

    Raises:
        UserError: the notebook does not declare its two parameters, or the log's steps cannot be read.
    """
    notebook, folder = layout.notebooks / SUMMARY_NOTEBOOK, layout.campaign(campaign)
    campaign_dir = folder.relative_to(layout.root)
    log_path = whole_text((log_path or campaign_dir / "OPTIMIZATION_LOG.md").as_posix(), "--log")
    require_writable(layout.root / project_path(log_path), "--log")
    require_steps(folder)
    parameters = {"campaign_dir": campaign_dir.as_posix(), "log_path": log_path}
    _require_declared(notebook, declared_parameters(notebook), list(parameters))
    return Job(SUMMARY, notebook, folder / SUMMARY, parameters, f"Summary ({campaign})", needs_result=False)


def plan_training(layout: Layout, weights: str = TINY_WEIGHTS) -> Job:
    """The training report of the folder `weights`, relative to the project's folder.

    Raises:
        UserError: the notebook does not declare its parameter, or its folder holds a campaign.
    """
    notebook, folder = layout.notebooks / TRAINING_NOTEBOOK, layout.root / "outputs" / TRAINING
    _require_declared(notebook, declared_parameters(notebook), ["weights_dir"])
    if any(folder.glob("*/result.json")):
        raise UserError(f"outputs/{TRAINING}: is a campaign, which the report would replace; rename it")
    return Job(TRAINING, notebook, folder, {"weights_dir": weights}, "Training of the tiny model",
               needs_result=False)


def plan_quantization(layout: Layout, profile: Path | None = None,
                      settings: Mapping[str, Any] | None = None) -> Job:
    """The study of 8-bit formats on the model and machine of a profile. It takes from the profile only what
    its notebook declares, and refuses a setting that the notebook does not declare.

    Raises:
        UserError: the profile cannot be read, a setting is unknown to the study, or the study's folder holds
            a campaign.
    """
    notebook, folder = layout.notebooks / QUANTIZATION_NOTEBOOK, layout.root / "outputs" / QUANTIZATION
    declared, settings = declared_parameters(notebook), settings or {}
    _require_declared(notebook, declared, ["output_dir", *settings])
    values = load_yaml(profile) if profile else {}
    if any(folder.glob("*/result.json")):
        raise UserError(f"outputs/{QUANTIZATION}: is a campaign, which the study would replace; rename it")
    parameters = {key: value for key, value in values.items() if key in declared} | dict(settings)
    return Job(QUANTIZATION, notebook, folder, parameters | {"output_dir": f"outputs/{QUANTIZATION}"},
               "8-bit formats", needs_result=False)


def has_cuda() -> bool:
    """Whether a CUDA GPU can be used. Asks nvidia-smi, and if that fails, torch in a separate process. A
    broken driver can make both hang.
    """
    smi = shutil.which("nvidia-smi")
    code = "import sys, torch; torch.cuda.is_available() and print('GPU 0')"
    for command in ([smi, "-L"] if smi else [], [sys.executable, "-c", code]):
        try:
            done = subprocess.run(command, capture_output=True, timeout=GPU_WAIT_S) if command else None
            if done and b"GPU 0" in done.stdout:
                return True
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("%s does not answer (%s)", Path(command[0]).name, type(error).__name__)
    return False


def check_machine(folder: Path, jobs: Sequence[Job], cuda: Callable[[], bool] = has_cuda) -> None:
    """Refuse what would otherwise fail hours later: no GPU, a folder without write access, a full disk.

    Raises:
        UserError: naming the remedy.
    """
    on_gpu = [job for job in jobs if str(job.parameters.get("device", "")).startswith("cuda")]
    if on_gpu and not cuda():
        raise UserError(f"device: {on_gpu[0].parameters['device']} is requested, but no CUDA GPU can be used "
                        "here; use --profile params/profiles/laptop.yaml")
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
    """Whether `job` is finished with the same parameters, prompts and weights.

    Raises:
        UserError: it is finished with other parameters (WORDS may differ), with other prompts or switch
            frames, which may come from a file, or with other weights in the same folder; or its result cannot
            be used.
    """
    try:
        result = finished_result(job.folder)
    except UserError as error:
        raise UserError(f"{job.label} has a result that cannot be used: {error}; or use --overwrite, which "
                        "moves its folder aside") from error
    if result is None:
        return False
    there, asked = result.get("parameters", {}), job.configuration
    # With a file of prompts, older results also list prompts that were not used.
    unused = ("prompts",) if asked.get("prompts_file") else ()
    keys = [key for key in asked
            if key in there and key not in (*RUN_KEYS, *WORDS, *unused) and there[key] != asked[key]]
    if keys:
        differences = "; ".join(f"{key}: {there[key]!r}, not {asked[key]!r}" for key in keys)
        raise UserError(f"{job.label} is finished with other parameters ({differences}); use --overwrite "
                        "or another --campaign")
    if other := job.known and _other_content(result, job):
        raise UserError(f"{job.label} is finished with other {other}; use --overwrite or another --campaign")
    return True


def _other_content(result: Mapping[str, Any], job: Job) -> str:
    """The content that differs from the finished `result` although the parameters are equal, or empty."""
    then, now = (decision.schedule_of_result(run) for run in (result, job.known))
    if then[0] is None:
        return "prompts, or the same ones: it is too old to record the content of its prompts_file"
    for name, were, are in zip(("prompts", "switch frames"), then, now):
        if were != are:
            return name
    digests = (result.get("weights") or {}).get("sha256")
    if not digests:
        return ""
    found = job.weights.sha256()
    changed = [part for part in sorted({*digests, *found}) if digests.get(part) != found.get(part)]
    return f"weights ({', '.join(changed)}: another SHA-256)" if changed else ""


def require_reference(folder: Path, jobs: Sequence[Job]) -> None:
    """Refuse `jobs` whose baseline is finished but lacks a whole reference file, as in a clone.

    Raises:
        UserError: naming the remedies; or the baseline's result cannot be used.
    """
    labels, baseline = [job.label for job in jobs], folder / BASELINE
    if not labels or BASELINE in labels or finished_result(baseline) is None:
        return
    reference = baseline / REFERENCE_FILE
    if not reference.exists() or not safetensors_header(reference):
        problem = "is damaged" if reference.exists() else "is missing (git leaves it out)"
        raise UserError(f"outputs/{folder.name}/{BASELINE} is finished, but {REFERENCE_FILE}, with which "
                        f"{', '.join(labels)} would be compared, {problem}; use another --campaign, or "
                        f"--overwrite with {BASELINE} among the presets")
