"""The training loop of all stages, with a budget in steps or minutes, a log, checkpoints and resuming."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import UserError
from .checkpoints import generator_state, load_checkpoint, restore_generator, save_checkpoint
from .master_weights import MasterWeights

logger = logging.getLogger(__name__)

LOG_STEPS = 50
LOG_NAME = "log.jsonl"


class Stage(Protocol):
    """One stage of the training."""

    name: str
    masters: MasterWeights
    generator: torch.Generator

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        """Leave gradients on `masters.work` and return losses on the device, without waiting for them."""

    def state(self) -> dict[str, Any]:
        """The stage's further state as JSON-ready values, without the masters and the generator."""

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""

    def tensors(self) -> dict[str, Tensor]:
        """The stage's further tensors, for the exact part of a checkpoint."""

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the result of `tensors`."""


@dataclass(frozen=True)
class Budget:
    """The end of a stage: after `steps` steps or `minutes` minutes of training, whichever comes first.

    `deadline`, a value of `time.perf_counter`, ends this process's share of the stage but not the stage.
    """

    steps: int | None = None
    minutes: float | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise UserError(
                "budget: neither steps nor minutes are given; give one with --steps or --minutes."
            )

    def progress(self, step: int, seconds: float) -> float:
        shares = [step / self.steps] if self.steps else []
        shares += [seconds / (60 * self.minutes)] if self.minutes else []
        return min(1.0, max(shares, default=1.0))


def run_stage(stage: Stage, folder: Path, budget: Budget, save_seconds: float = 30.0,
              log_steps: int = LOG_STEPS) -> bool:
    """Train a stage to the end of its budget, from its newest checkpoint in `folder` if there is one.

    Appends to `log.jsonl` in `folder`. Returns whether the stage is complete.

    Raises:
        UserError: the loss is not a number (the last checkpoint stays), or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step, seconds = _resume(stage, folder)
    log = open(folder / LOG_NAME, "a", encoding="utf-8")
    last = saved = logged = time.perf_counter()
    sums: dict[str, Tensor] = {}
    summed = 0
    with log:
        while (progress := budget.progress(step, seconds)) < 1:
            if budget.deadline is not None and last > budget.deadline:
                break
            losses = stage.step(step, progress)
            losses["gradient"] = stage.masters.update(progress)
            step += 1
            summed += 1
            for key, value in losses.items():
                sums[key] = sums[key] + value.detach().float() if key in sums else value.detach().float()
            if step % log_steps == 0:
                row = {key: value.item() / summed for key, value in sums.items()}
                sums = {}
                if not all(value == value and abs(value) != float("inf") for value in row.values()):
                    raise UserError(
                        f"{stage.name}: the loss at step {step} is not a number: {row}; run the command "
                        "again with --rate-scale 0.5, it continues from the last checkpoint."
                    )
                now = time.perf_counter()
                row |= {"step": step, "progress": round(progress, 4),
                        "ms_per_step": 1e3 * (now - logged) / summed}
                logged, summed = now, 0
                rounded = {key: float(f"{value:.5g}") for key, value in row.items()}
                log.write(json.dumps({"stage": stage.name, **rounded}) + "\n")
                log.flush()
                logger.info("%s %s", stage.name, " ".join(f"{k}={v:.4g}" for k, v in row.items()))
            now = time.perf_counter()
            seconds += now - last
            last = now
            if now - saved > save_seconds:
                _save(stage, folder, step, seconds)
                saved = time.perf_counter()
    complete = budget.progress(step, seconds) >= 1
    _save(stage, folder, step, seconds, complete)
    logger.info("%s: %d steps in %.0f s of training%s", stage.name, step, seconds,
                "" if complete else ", to be continued")
    return complete


def _save(stage: Stage, folder: Path, step: int, seconds: float, complete: bool = False) -> None:
    if not stage.masters.is_finite():
        raise UserError(f"{stage.name}: a weight is not a number at step {step}; run the command again with "
                        "--rate-scale 0.5, it continues from the last checkpoint.")
    groups = stage.masters.groups()
    groups["exact"] |= {f"stage.{name}": tensor for name, tensor in stage.tensors().items()}
    save_checkpoint(folder, stage.name, step, groups, {
        "seconds": seconds, "complete": complete, "generator": generator_state(stage.generator),
        "stage": stage.state()})


def _resume(stage: Stage, folder: Path) -> tuple[int, float]:
    found = load_checkpoint(folder, stage.name)
    if found is None:
        return 0, 0.0
    groups, state = found
    exact = groups.get("exact", {})
    own = {name: exact.pop(name) for name in [n for n in exact if n.startswith("stage.")]}
    stage.masters.restore(groups, state["step"])
    if own:
        stage.restore_tensors({name.removeprefix("stage."): tensor for name, tensor in own.items()})
    restore_generator(stage.generator, state["generator"])
    stage.resume(state["stage"])
    logger.info("%s: resumed at step %d", stage.name, state["step"])
    return state["step"], state["seconds"]
