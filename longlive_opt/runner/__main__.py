"""Run presets as notebooks, one after the other: python -m longlive_opt.runner run --campaign NAME

A preset is params/<preset>.yaml with its notebook, notebooks/NN_<preset>.ipynb; a profile and `--set
key=value` go on top. Everything is checked before the first notebook starts. A run lives in
outputs/<campaign>/<label>/, where the label is the preset, or baseline.repeat2 for a repetition that shows
the noise; repetitions are spread over the campaign. A finished run is skipped, so a campaign goes on where it
stopped; if its parameters, prompts or weights are not those asked for, nothing at all is run: take
`--overwrite` or another campaign. With `--overwrite` the old run stays until the new one is done. At the end
the summary writes decisions.json, from which the log is made and with which every report opens.

Exit status: 0 all finished, 1 something failed (failed.json says what), 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import BASELINE
from ..errors import UserError
from ..files import load_yaml
from ..models.weight_files import TINY_WEIGHTS
from .execute import export_report, export_reports, locked, run_jobs
from .parameters import refresh
from .plan import (
    Layout,
    check_machine,
    is_finished,
    parse_settings,
    plan,
    plan_quantization,
    plan_summary,
    plan_training,
    require_reference,
)

log = logging.getLogger(__name__)

# As little as the config allows: it shows that everything runs; the figures mean nothing.
QUICK = {"measure_blocks": 2, "num_switches": 1}


def run_campaign(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `run`: presets, then the summary, then the reports."""
    settings = {**(QUICK if arguments.quick else {}), **parse_settings(arguments.set)}
    campaign = layout.campaign(arguments.campaign)
    jobs = plan(layout, arguments.campaign, arguments.presets, arguments.profile, settings,
                _repeats(arguments), arguments.skip)
    summary = plan_summary(layout, arguments.campaign, arguments.log)
    check_machine(campaign, jobs)
    with locked([*jobs, summary]):
        finished = [] if arguments.overwrite else [job for job in jobs if is_finished(job)]
        todo = [job for job in jobs if job not in finished]
        require_reference(campaign, todo)
        for job in finished:
            log.info("[%s] finished before, skipped (--overwrite runs it again)", job.label)
        failed = run_jobs(layout.root, [*todo, summary])
        failed |= _settle(layout, campaign, arguments.record_noise)
    if failed:
        reasons = "; ".join(f"{label} ({reason})" for label, reason in failed.items())
        log.error("%d of %d failed: %s", len(failed), len(todo) + 1, reasons)
    return 1 if failed else 0


def _repeats(arguments: argparse.Namespace) -> dict[str, int]:
    """preset -> how many more runs of it."""
    for option, count in (("--repeats", arguments.repeats), ("--repeat-baseline", arguments.repeat_baseline)):
        if count is not None and count < 0:
            raise UserError(f"{option}: {count} is no number of runs; write 0 or more")
    if BASELINE in arguments.repeat and arguments.repeat_baseline is not None:
        raise UserError(f"--repeat-baseline: --repeat names {BASELINE} as well; take one of the two")
    baseline = {} if arguments.repeat_baseline is None else {BASELINE: arguments.repeat_baseline}
    return baseline | dict.fromkeys(arguments.repeat, arguments.repeats)


def _settle(layout: Layout, campaign: Path, record_noise: bool) -> dict[str, str]:
    """After the summary: the reports, each with the campaign's verdict on top, and the record of noise.

    Returns:
        The labels of the runs whose report could not be made.
    """
    from .. import report

    if record_noise:
        log.info("noise: %d presets recorded in %s", report.record_noise(report.load(campaign)),
                 report.NOISE_FILE)
    return export_reports(layout.root, campaign, report.cards(campaign))


def run_summary(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `summary`."""
    summary = plan_summary(layout, arguments.campaign, arguments.log)
    campaign = layout.campaign(arguments.campaign)
    if not any(campaign.glob("*/result.json")):
        raise UserError(f"--campaign: {arguments.campaign!r} has no finished run; start one with 'run'")
    with locked([summary]):
        failed = run_jobs(layout.root, [summary])
        failed |= _settle(layout, campaign, arguments.record_noise)
    return 1 if failed else 0


def run_training(layout: Layout, arguments: argparse.Namespace) -> int:
    """The command `training`."""
    asked = arguments.weights
    if asked and not (layout.root / asked).is_dir():
        raise UserError(f"--weights: there is no folder {asked}; train one: "
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
        log.info("%s is written", path.relative_to(layout.root))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m longlive_opt.runner", description="Run presets as notebooks.")
    commands = parser.add_subparsers(required=True, metavar="run | summary | training | quantization | list "
                                     "| parameters")
    run = commands.add_parser("run", help="run presets, then the summary")
    run.add_argument("--campaign", required=True, metavar="NAME", help="results go to outputs/NAME")
    run.add_argument("--profile", type=Path, metavar="FILE", help="goes over each preset's values")
    run.add_argument("--presets", nargs="+", default=["all"], metavar="NAME", help="all (default) or names")
    run.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="presets that all leaves out")
    run.add_argument("--repeat", nargs="+", default=[], metavar="NAME", help="presets to run again, spread "
                     "over the campaign: their spread is the noise")
    run.add_argument("--repeats", type=int, default=2, metavar="N", help="more runs of each of them (2)")
    run.add_argument("--repeat-baseline", type=int, metavar="N", help="more runs of the baseline: the same "
                     "as --repeat baseline --repeats N")
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
        command.add_argument("--record-noise", action="store_true", help="add the spread of this campaign's "
                             "runs to outputs/noise.json")
    training = commands.add_parser("training", help="the report on the training of the tiny model")
    training.add_argument("--weights", metavar="DIR", help="a folder of trained weights, seen from the "
                          f"project's folder (default: {TINY_WEIGHTS})")
    training.set_defaults(command=run_training)
    quantization = commands.add_parser("quantization", help="the study of 8-bit formats: error against time")
    quantization.add_argument("--profile", type=Path, metavar="FILE", help="model and machine (default: the "
                              "tiny model on the CPU)")
    quantization.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                              help="over the profile")
    quantization.set_defaults(command=run_quantization)
    commands.add_parser("list", help="list the presets").set_defaults(command=list_presets)
    parameters = commands.add_parser("parameters", help="write what follows from keys, presets and profiles: "
                                     "params/README.md and the notebooks' parameters cells")
    parameters.set_defaults(command=refresh_parameters)
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
    for stream in (sys.stdout, sys.stderr):  # a name or a message that the terminal cannot show stops nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return arguments.command(Layout(root or Path(__file__).resolve().parents[2]), arguments)
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
