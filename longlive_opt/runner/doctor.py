"""`longlive doctor`: what this machine has, which presets it can run, and why not the rest.

Each preset is tried: the tiny model with random weights on the device, every optimization applied to it.
Nothing is streamed, so a kernel that fails only when it runs is not noticed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..config import ExperimentConfig
from ..errors import UserError
from ..files import load_yaml, project_root
from ..kernels.compilers import check_cpp, check_triton
from ..live.opening import FETCHED
from ..measurement import environment
from ..measurement.quality import perceptual_metrics
from ..models.specs import LONGLIVE, MODELS
from ..models.weight_files import TINY_WEIGHTS, check_weights
from ..optimizations import build_pipeline
from ..streaming.pipeline import check_device
from .plan import Layout


def examine(layout: Layout, device: str) -> list[tuple[str, str]]:
    """(what, how it is) of machine, compilers, disk, weights and metrics."""
    found = environment.machine(device)
    rows = [(name, value) for name, value in found.items() if value]
    if device != "cpu":
        major, minor = torch.cuda.get_device_capability(device)
        rows.append(("compute capability", f"{major}.{minor}"))
    for name, check in (("C++ compiler", check_cpp), ("Triton", check_triton)):
        rows.append((name, _outcome(partial(check, "doctor"), "doctor: ")))
    free = shutil.disk_usage(layout.root).free / 1e9
    rows.append(("free disk", f"{free:.0f} GB"))
    for name, folder, model in (("tiny model's weights", TINY_WEIGHTS, "tiny"),
                                ("official weights", FETCHED, LONGLIVE)):
        check = partial(check_weights, folder, MODELS[model])
        rows.append((name, _outcome(check, "weights: ")))
    return rows + [(name, reason or "ready") for name, reason in perceptual_metrics().items()]


def try_presets(layout: Layout, device: str) -> list[tuple[str, str]]:
    """(preset, "ready" or why it cannot run here) of every preset, tried with the tiny model."""
    rows = []
    for preset in layout.presets():
        keys = load_yaml(layout.params / f"{preset}.yaml")
        keys |= {"model": "tiny", "weights": "random", "device": device, "gpu_memory_limit_gb": None}
        rows.append((preset, _outcome(lambda keys=keys: build_pipeline(ExperimentConfig.from_mapping(keys)))))
    return rows


def _outcome(check: Callable[[], object], prefix: str = "") -> str:
    """`ready`, or the reason for which `check` refuses."""
    try:
        check()
    except UserError as error:
        return f"no: {str(error).removeprefix(prefix)}"
    return "ready"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 for a device that is not there."""
    parser = argparse.ArgumentParser(prog="longlive doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda or cuda:N (default: %(default)s)")
    arguments = parser.parse_args(argv)
    layout = Layout(project_root())
    try:
        ExperimentConfig.from_mapping({"device": arguments.device})
        check_device(arguments.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for title, rows in (("This machine", examine(layout, arguments.device)),
                        (f"Presets, tried with the tiny model on {arguments.device}",
                         try_presets(layout, arguments.device))):
        print(title)
        print("\n".join(f"  {name:22} {value}" for name, value in rows), end="\n\n")
    return 0
