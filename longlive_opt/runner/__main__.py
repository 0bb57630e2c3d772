"""Run presets as notebooks, one after the other: python -m longlive_opt.runner run --campaign NAME

A preset is params/<preset>.yaml with its notebook, notebooks/NN_<preset>.ipynb. A profile and `--set
key=value` override its values; without --profile the one that fits this machine is taken. Everything is
checked before the first notebook starts. A run writes to outputs/<campaign>/<label>/. The label is the
preset, or for example baseline.repeat2 for a repetition that measures the noise. Repetitions are spread over
the campaign.

A finished run is skipped, so a campaign continues where it stopped. If a finished run has other parameters,
prompts or weights than requested, the command runs nothing; use `--overwrite` or another campaign. With
`--overwrite` the old run stays until the new one is done. At the end the summary writes decisions.json, which
holds the verdicts for the log and the reports.

`--seeds` and `--prompt-files` make one campaign per combination, such as outputs/NAME.prompts.seed1: two runs
are only compared if their prompts and seed are equal, so each combination needs its own baseline, noise and
verdicts. `--ray` runs all of them on one cluster.

Exit status: 0 all finished, 1 something failed (see failed.json), 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import BASELINE, check_folder_name
from ..errors import UserError
from ..files import load_yaml, project_path, project_root
from ..measurement.environment import fitting_profile
from ..measurement.result import read_result
from ..models.weight_files import TINY_WEIGHTS
from .execute import Job, export_report, export_reports, locked, run_jobs
from .parameters import refresh
from .plan import (
    Layout,
    check_machine,
    has_cuda,
    is_finished,
    parse_settings,
    plan,
    plan_quantization,
    plan_summary,
    plan_training,
    require_reference,
)

log = logging.getLogger(__name__)

# The smallest run that the config allows. It shows that everything runs; its numbers mean nothing.
QUICK = {"measure_blocks": 2, "num_switches": 1}


@dataclass(frozen=True)
class Campaign:
    """The checked jobs of one campaign, and its summary."""

    folder: Path
    jobs: list[Job]
    summary: Job


def run_campaigns(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `run`: of each campaign run presets, then the summary, then export the reports."""
    settings = {**(QUICK if arguments.quick else {}), **parse_settings(arguments.set)}
    asked = conditions(arguments.campaign, arguments.seeds, arguments.prompt_files, settings)
    if len(asked) > 1 and arguments.log:
        raise UserError(f"--log: each of {len(asked)} campaigns would write {arguments.log}; leave it out, "
                        "and each writes its own")
    profile, repeats = _profile(layout, arguments.profile), _repeats(arguments)
    campaigns = [Campaign(layout.campaign(name),
                          plan(layout, name, arguments.presets, profile, {**settings, **keys}, repeats,
                               arguments.skip, arguments.gpus),
                          plan_summary(layout, name, arguments.log)) for name, keys in asked.items()]
    for campaign in campaigns:
        # The driver of a cluster needs no GPU. What the cluster has is checked there.
        check_machine(campaign.folder, campaign.jobs, (lambda: True) if arguments.ray else has_cuda)
    with locked([job for campaign in campaigns for job in (*campaign.jobs, campaign.summary)]):
        todo = [_unfinished(campaign, arguments.overwrite) for campaign in campaigns]
        failed = _run(layout, campaigns, todo, arguments)
    if failed:
        reasons = "; ".join(f"{label} ({reason})" for label, reason in failed.items())
        log.error("%d of %d failed: %s", len(failed), sum(map(len, todo)) + len(campaigns), reasons)
    return 1 if failed else 0


def conditions(campaign: str, seeds: Sequence[int], prompt_files: Sequence[Path], settings: Mapping[str, Any]
               ) -> dict[str, dict[str, Any]]:
    """The keys that each campaign sets, by its name: `campaign` itself, or one for each combination of the
    seeds and prompt files, named after both.

    Raises:
        UserError: a seed or file is given twice, `settings` have the same key, a file is absent, or its name
            cannot be part of a folder's.
    """
    for option, values, keys in (("--seeds", seeds, ("seed",)),
                                 ("--prompt-files", prompt_files, ("prompts_file", "prompts"))):
        if both := [key for key in keys if values and key in settings]:
            raise UserError(f"{option}: --set gives {both[0]}, too; leave one of the two out")
        if len(values) != len(set(values)):
            raise UserError(f"{option}: one of {', '.join(map(str, values))} is there twice; leave it out")
    found: dict[str, dict[str, Any]] = {} if prompt_files else {campaign: {}}
    for given in prompt_files:
        path, name = project_path(given), f"{campaign}.{given.stem}"
        if not path.is_file():
            raise UserError(f"--prompt-files: {given} is no file; name a .txt or .jsonl file")
        check_folder_name(f"--prompt-files: {given}", name)
        if name in found:
            raise UserError(f"--prompt-files: two files are called {given.stem}, and each names a folder; "
                            "rename one")
        # Relative, so that it is found in a copy of the project.
        root, path = project_root().resolve(), path.resolve()
        own = path.relative_to(root) if path.is_relative_to(root) else path
        found[name] = {"prompts_file": own.as_posix()}
    if seeds:
        found = {f"{name}.seed{seed}": {**keys, "seed": seed} for name, keys in found.items()
                 for seed in seeds}
    return found


def _unfinished(campaign: Campaign, overwrite: bool) -> list[Job]:
    """The jobs that are to run."""
    finished = [] if overwrite else [job for job in campaign.jobs if is_finished(job)]
    todo = [job for job in campaign.jobs if job not in finished]
    require_reference(campaign.folder, todo)
    for job in finished:
        log.info("[%s] already finished, skipped (--overwrite runs it again)", job.label)
    return todo


def _run(layout: Layout, campaigns: Sequence[Campaign], todo: Sequence[list[Job]],
         arguments: argparse.Namespace) -> dict[str, str]:
    """Run `todo`, the jobs of each campaign, and return the labels of the failed ones with short reasons."""
    on_cluster: dict[Path, str] = {}
    if arguments.ray and any(todo):
        from .on_ray import run_jobs_on_ray

        on_cluster = run_jobs_on_ray(layout.root, [job for jobs in todo for job in jobs], arguments.ray)
    failed = {}
    for campaign, jobs in zip(campaigns, todo):
        if len(campaigns) > 1:
            log.info("campaign %s", campaign.folder.name)
        here = {job.label: on_cluster[job.folder] for job in jobs if job.folder in on_cluster}
        here |= run_jobs(layout.root, [*([] if arguments.ray else jobs), campaign.summary])
        here |= _settle(layout, campaign.folder, arguments.record_noise)
        failed |= {f"{campaign.folder.name}/{label}" if len(campaigns) > 1 else label: reason
                   for label, reason in here.items()}
    return failed


def _profile(layout: Layout, asked: Path | None) -> Path | None:
    """The profile that was asked for, else the one that fits this machine, which is said; None if the project
    has no such profile.
    """
    if asked is not None:
        named = layout.params / "profiles" / f"{asked}.yaml"
        return named if not asked.exists() and named.is_file() else asked
    name, words = fitting_profile()
    path = layout.params / "profiles" / f"{name}.yaml"
    if not path.is_file():
        return None
    log.info("%s (--profile takes another)", words)
    return path


def _repeats(arguments: argparse.Namespace) -> dict[str, int]:
    """preset -> its number of additional runs."""
    for option, count in (("--repeats", arguments.repeats), ("--repeat-baseline", arguments.repeat_baseline)):
        if count is not None and count < 0:
            raise UserError(f"{option}: {count} is not a number of runs; write 0 or more")
    if BASELINE in arguments.repeat and arguments.repeat_baseline is not None:
        raise UserError(f"--repeat-baseline: --repeat also names {BASELINE}; use only one of the two")
    baseline = {} if arguments.repeat_baseline is None else {BASELINE: arguments.repeat_baseline}
    return baseline | dict.fromkeys(arguments.repeat, arguments.repeats)


def _settle(layout: Layout, campaign: Path, record_noise: bool) -> dict[str, str]:
    """After the summary, export the reports with their verdicts and, if requested, record the noise.

    Returns:
        The labels of the runs whose report could not be exported, with the reasons.
    """
    from .. import report

    loaded = report.load(campaign)
    if record_noise:
        log.info("noise: %d presets recorded in %s", report.record_noise(loaded), report.NOISE_FILE)
    failed = export_reports(layout.root, campaign, report.cards(campaign))
    report.write_index(loaded)
    return failed


def run_summary(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `summary`."""
    summary = plan_summary(layout, arguments.campaign, arguments.log)
    campaign = layout.campaign(arguments.campaign)
    if not any(campaign.glob("*/result.json")):
        raise UserError(f"--campaign: {arguments.campaign!r} has no finished run; start one with 'run'")
    for path in sorted(campaign.glob("*/result.json")):
        read_result(path)  # the reports need all; better now than after the summary
    with locked([summary]):
        failed = run_jobs(layout.root, [summary])
        failed |= _settle(layout, campaign, arguments.record_noise)
    return 1 if failed else 0


def run_training(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `training`."""
    asked = arguments.weights
    if asked and not (layout.root / asked).is_dir():
        raise UserError(f"--weights: the folder {asked} does not exist; train a model: "
                        f"python -m longlive_opt.tiny.training --out {asked} --device cuda")
    job = plan_training(layout, asked or TINY_WEIGHTS)
    with locked([job]):
        done = not run_jobs(layout.root, [job])
        return 0 if done and export_report(layout.root, job.folder, job.title, hide_code=True) else 1


def run_quantization(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `quantization`."""
    job = plan_quantization(layout, arguments.profile, parse_settings(arguments.set))
    check_machine(job.folder, [job])
    with locked([job]):
        done = not run_jobs(layout.root, [job])
        return 0 if done and export_report(layout.root, job.folder, job.title, hide_code=True) else 1


def list_presets(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `list`."""
    for preset, notebook in layout.presets().items():
        parameters = layout.params / f"{preset}.yaml"
        title = load_yaml(parameters).get("title", "") if parameters.is_file() else "(no parameters)"
        print(f"{preset:24} {notebook.name:32} {title}")
    return 0


def refresh_parameters(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `parameters`."""
    for path in refresh(layout):
        log.info("wrote %s", path.relative_to(layout.root))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m longlive_opt.runner", description="Run presets as notebooks.")
    commands = parser.add_subparsers(required=True, metavar="run | summary | training | quantization | list "
                                     "| parameters")
    run = commands.add_parser("run", help="run presets, then the summary")
    run.add_argument("--campaign", required=True, metavar="NAME", help="results go to outputs/NAME")
    run.add_argument("--profile", type=Path, metavar="FILE", help="overrides each preset's values (default: "
                     "the one in params/profiles that fits this machine)")
    run.add_argument("--presets", nargs="+", default=["all"], metavar="NAME", help="all (default) or names")
    run.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="presets to exclude from all")
    run.add_argument("--repeat", nargs="+", default=[], metavar="NAME", help="presets to run again, at "
                     "intervals over the campaign, to measure the noise")
    run.add_argument("--repeats", type=int, default=2, metavar="N", help="additional runs of each (2)")
    run.add_argument("--repeat-baseline", type=int, metavar="N", help="additional runs of the baseline, as "
                     "with --repeat baseline --repeats N")
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                     help="overrides preset and profile")
    run.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="a campaign per seed, "
                     "outputs/NAME.seedN, each with its own baseline")
    run.add_argument("--prompt-files", nargs="+", type=Path, default=[], metavar="FILE", help="a campaign "
                     "per file, outputs/NAME.FILE, each with its own baseline (a run takes the file's first "
                     "video)")
    run.add_argument("--gpus", nargs="+", type=int, default=[], metavar="N", help="run each preset but the "
                     "baseline on N GPUs as well")
    run.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help="run presets, seeds and "
                     "prompt files side by side on a Ray cluster, one run per GPU: auto, or HOST:PORT "
                     "(default: this machine)")
    run.add_argument("--overwrite", action="store_true", help="run finished presets again")
    run.add_argument("--quick", action="store_true", help="measure as few blocks as possible, as a test")
    run.set_defaults(command=run_campaigns)
    summary = commands.add_parser("summary", help="compare the finished runs of a campaign")
    summary.add_argument("--campaign", required=True, metavar="NAME", help="the results in outputs/NAME")
    summary.set_defaults(command=run_summary)
    for command in (run, summary):
        command.add_argument("--log", type=Path, metavar="FILE", help="where to write the optimization log, "
                             "relative to the project's folder (default: into the campaign)")
        command.add_argument("--record-noise", action="store_true", help="add this campaign's runs to "
                             "outputs/noise.json")
    training = commands.add_parser("training", help="the report on the training of the tiny model")
    training.add_argument("--weights", metavar="DIR", help="a folder of trained weights, relative to the "
                          f"project's folder (default: {TINY_WEIGHTS})")
    training.set_defaults(command=run_training)
    quantization = commands.add_parser("quantization", help="the study of 8-bit formats: error against time")
    quantization.add_argument("--profile", type=Path, metavar="FILE", help="model and machine (default: the "
                              "tiny model on the CPU)")
    quantization.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                              help="overrides the profile")
    quantization.set_defaults(command=run_quantization)
    commands.add_parser("list", help="list the presets").set_defaults(command=list_presets)
    parameters = commands.add_parser("parameters", help="write params/README.md and the notebooks' "
                                     "parameters cells from keys, presets and profiles")
    parameters.set_defaults(command=refresh_parameters)
    return parser


def keep_interrupts() -> None:
    """Raise an interrupt again if Python swallowed it in a destructor or in the callback of a weak reference.

    Python only prints such an interrupt, and the notebook would continue.
    """
    def again(swallowed: Any) -> None:
        if issubclass(swallowed.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            sys.__unraisablehook__(swallowed)

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = again


class _Terminal(logging.StreamHandler):
    """Writes the log; a reader that went away (`| head`) ends the log and not the campaign."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        else:
            super().handleError(record)


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Entry point. `root` is the project's folder (default: the folder that holds this package)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Terminal(sys.stdout)])
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show must not stop a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return arguments.command(Layout(root or project_root()), arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space on the disk of outputs/" if full else "check its permissions"
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; {remedy}, then run the same "
              "command again; finished presets are skipped", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # The interrupted cell leaves an unawaited coroutine behind.
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # A batch system ends a job with SIGTERM. Then the kernel must also end and failed.json must be written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_interrupts()
    sys.exit(main())
