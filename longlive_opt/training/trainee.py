"""Networks in training: float32 master weights, a working copy in the dtype of inference, their average.

The working copy is a plain module of `longlive_opt.models` in bfloat16 on CUDA, so that training computes and
rounds as inference does, and no autocast is involved. Gradients of it go to the float32 masters, AdamW
(arXiv:1711.05101) moves those, and the working copy is refreshed. The exponential average of the masters is
what is exported. Nothing here waits for the device.
"""

from __future__ import annotations

import copy
import logging
from typing import Mapping

import torch
from torch import Tensor, nn

from .checkpoints import EXACT, prefixed

logger = logging.getLogger(__name__)

WARMUP_STEPS = 100
FALL_FROM = 0.6  # share of the training after which the learning rate falls
BETAS = (0.9, 0.98)


class Trainee:
    """A set of named modules that are trained together. `work` holds the modules to compute with."""

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype, rate: float,
                 weight_decay: float = 0.01, average_decay: float = 0.999, clip_norm: float = 1.0):
        """Args: modules: float32, on their final device; `work` gets copies. rate: peak learning rate."""
        self.rate, self.average_decay, self.clip_norm = rate, average_decay, clip_norm
        master = nn.ModuleDict(dict(modules)).float().requires_grad_(True)
        self.work: nn.ModuleDict = copy.deepcopy(master).to(dtype)
        named = dict(master.named_parameters())
        self._names, self._master = list(named), list(named.values())
        self._work = [dict(self.work.named_parameters())[name] for name in self._names]
        self._average = [p.detach().clone() for p in self._master]
        decays = [p for p in self._master if p.ndim > 1]
        others = [p for p in self._master if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=rate, betas=BETAS, fused=self._master[0].is_cuda)
        self.steps = self._warm_since = 0

    @torch.no_grad()
    def update(self, progress: float) -> Tensor:
        """Use the gradients of the working copy; returns their norm. `progress` is 0..1 of the training."""
        for master, work in zip(self._master, self._work):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            if work.grad is None:
                work.grad = torch.zeros_like(work)
        torch._foreach_copy_([p.grad for p in self._master], [p.grad for p in self._work])
        norm = nn.utils.clip_grad_norm_(self._master, self.clip_norm, foreach=True)
        warm = min(1.0, (self.steps - self._warm_since + 1) / WARMUP_STEPS)
        fall = min(1.0, max(0.02, (1 - progress) / (1 - FALL_FROM)))
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate * warm * fall
        self._optimizer.step()
        self.steps += 1
        decay = min(self.average_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._average, self._master, 1 - decay)
        torch._foreach_copy_(self._work, self._master)
        for work in self._work:  # the next gradient is taken as it comes, not added to zeros
            work.grad = None
        return norm

    def is_finite(self) -> bool:
        """Whether all weights are numbers; waits for the device."""
        return bool(torch.stack([p.detach().sum() for p in self._master]).isfinite().all())

    def average(self) -> dict[str, Tensor]:
        """The averaged weights, float32, under `module.parameter`."""
        return dict(zip(self._names, self._average))

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps: `weights`, the `average` in bfloat16, and the `exact` rest."""
        exact = {f"average.{name}": t for name, t in self.average().items()}
        for name, master in zip(self._names, self._master):
            for key, value in self._optimizer.state.get(master, {}).items():
                exact[f"{key}.{name}"] = value
        return {"weights": dict(zip(self._names, self._master)),
                "average": {name: t.to(torch.bfloat16) for name, t in self.average().items()},
                EXACT: exact}

    @torch.no_grad()
    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Go on from a checkpoint's groups. Without `exact` the moments start anew and the rate warms up;
        without `weights` the average takes their place.
        """
        weights = groups.get("weights", groups["average"])
        for name, master, average in zip(self._names, self._master, self._average):
            master.copy_(weights[name])
            average.copy_(groups["average"][name])
        self.steps = steps
        if EXACT in groups:
            exact = groups[EXACT]
            averages = prefixed(exact, "average")
            keys = sorted({name.split(".")[0] for name in exact} - {"average"})
            for name, master, average in zip(self._names, self._master, self._average):
                average.copy_(averages[name])
                if keys:  # else nothing was trained yet
                    # AdamW keeps its step count on the CPU unless it is fused.
                    self._optimizer.state[master] = {
                        key: exact[f"{key}.{name}"].to(
                            "cpu" if key == "step" and not master.is_cuda else master.device, copy=True)
                        for key in keys}
        else:
            self._warm_since = steps
            logger.warning(
                "checkpoint without optimizer state: the moments start anew%s, the learning rate "
                "warms up over %d steps",
                "" if "weights" in groups else " from the averaged weights",
                WARMUP_STEPS,
            )
        torch._foreach_copy_(self._work, self._master)
