"""Train a tiny LongLive: python -m longlive_opt.tiny.training --out weights/tiny --device cuda

Stages, in order: vae, teacher (the text encoder first), student, export. check evaluates the exported
weights. bench times a few steps of each stage. plan prints what --minutes buy at the times of the bench, or
at --ms. Every stage continues from its newest checkpoint in OUT/training, so repeat a command that was
interrupted. --call-minutes limits the duration of a call. --pack copies the files that another machine needs
to continue or to export.

Exit status: 0 done, 1 an error (printed in one line), 3 not finished because the call's minutes are over.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Sequence

from ...errors import UserError
from ...models.specs import MODELS
from .bench import BENCH_NAME, BUDGET_COLUMNS, CASES, budget, table, times_of, times_of_bench
from .trainer import QUICK, Settings, Training

logger = logging.getLogger("longlive_opt.tiny.training")

STAGES = ("vae", "teacher", "student", "export", "check", "bench", "plan", "all")
CONTINUE = 3
WORKERS = 6


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    parser = _parser()
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file; name a folder")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("longlive_opt").setLevel(logging.INFO)
    try:
        deadline = None if args.call_minutes is None else started + 60 * args.call_minutes
        return _run(args, deadline)
    except UserError as error:
        logger.error("error: %s", error)
        return 1


def _run(args: argparse.Namespace, deadline: float | None) -> int:
    from ..evaluate import VARIANTS, Sizes, check_weights

    settings = QUICK if args.quick else Settings()
    settings = settings.with_budget(
        _numbers("minutes", args.minutes, float), _numbers("steps", args.steps, int)
    )
    settings = settings.adjusted(args.rate_scale, args.refresh_every)
    if args.stage == "check":
        sizes = Sizes(2, 1, 0, 1, 0) if args.quick else Sizes()
        variants = VARIANTS if args.variants is None else args.variants
        keys = {"denoising_steps": _numbers("denoising-steps", args.denoising_steps, int)}
        check_weights(args.out, args.device, args.model, seed=args.seed, sizes=sizes,
                      variants=("no_recache",) if args.quick else tuple(variants),
                      processes=0 if args.quick else os.cpu_count() or 1,
                      **{key: value for key, value in keys.items() if value})
        return 0
    if args.stage == "plan":
        times = times_of(args.ms) if args.ms else _measured(args.out / "training" / BENCH_NAME)
        print(table(budget(settings, times), BUDGET_COLUMNS))
        return 0
    cuda = args.device.startswith("cuda")
    compiler = "inductor" if (cuda and not args.quick if args.compile is None else args.compile) else None
    workers = args.workers
    if workers is None:
        workers = min(WORKERS, max(1, (os.cpu_count() or 1) - 2)) if cuda else 0
    graphs = cuda if args.graphs is None else args.graphs
    with Training(args.out, MODELS[args.model], args.device, args.seed, settings, compiler, deadline,
                  workers, graphs) as training:
        return _train(args, training)


def _train(args: argparse.Namespace, training: Training) -> int:
    if args.stage == "bench":
        training.bench(args.only or CASES, 1 if args.quick else 6)
        return 0
    complete = all(training.run(stage) for stage in STAGES[:3] if args.stage in (stage, "all"))
    if complete and args.stage in ("export", "all"):
        sizes = training.export(args.export_from)
        logger.info("exported %s: %.1f MB", args.out, sum(sizes.values()) / 1e6)
    if args.pack:
        logger.info("packed %s: %.1f MB", args.pack, training.pack(args.pack) / 1e6)
    if not complete:
        logger.info("to be continued: run the command again")
    return 0 if complete else CONTINUE


def _measured(path: Path) -> dict[str, float]:
    """The times written by `--stage bench`."""
    try:
        return times_of_bench(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run --stage bench there, or give "
                        "--ms.") from error


def _numbers(name: str, text: str | None, kind: type) -> list | None:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{name}: {text!r} is not a list of numbers; write for example 4,10,8.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m longlive_opt.tiny.training", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, checkpoints and logs")
    parser.add_argument("--stage", choices=STAGES, default="all", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--model", choices=[name for name, spec in MODELS.items() if not spec.full_size],
                        default="tiny", help="default: %(default)s")
    parser.add_argument("--minutes", help="of training: vae,teacher,student (default: 3.5,13,7)")
    parser.add_argument("--steps", help="vae,teacher,student; with --minutes, the first limit ends a stage")
    parser.add_argument("--call-minutes", type=float, help="save and end this call after so many minutes")
    parser.add_argument(
        "--pack", type=Path, metavar="DIR", help="at the end, copy the files that another machine needs"
    )
    parser.add_argument("--refresh-every", type=int, metavar="STEPS",
                        help="steps of teacher and student per chunk of new clips")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="multiplies all learning rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps at 32x32, as a test")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile element-wise functions (default: on CUDA, without --quick)")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction,
                        help="replay the steps of teacher and student as CUDA graphs (default: on CUDA)")
    parser.add_argument("--workers", type=int, metavar="N",
                        help=f"processes that plan the data (default: {WORKERS} on CUDA, none on the CPU)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"for bench: {', '.join(CASES)}")
    parser.add_argument("--ms", help="for plan: vae_crop=60,teacher=100,teacher_chunk=500 and so on")
    parser.add_argument("--export-from", choices=("student", "teacher"), default="student",
                        help="stage whose transformer to export (default: %(default)s)")
    parser.add_argument("--denoising-steps", help="for check, for example 1000,750,500,250")
    parser.add_argument("--variants", nargs="*", help="for check (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
