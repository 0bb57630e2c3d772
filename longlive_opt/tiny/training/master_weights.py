"""Train networks with float32 master weights, a working copy in the dtype of inference, and an average.

The working copy is a plain module of `longlive_opt.models`, in bfloat16 on CUDA, so that training computes
and rounds as inference does, without autocast. Its gradients are copied to the float32 masters, AdamW
(arXiv:1711.05101) updates the masters, and the working copy is refreshed. The export uses the exponential
average of the masters. An update does not wait for the device.

Muon (https://kellerjordan.github.io/posts/muon/) can update the matrices of a transformer's blocks instead.
Its steps are orthogonalised momentum, scaled to the size of AdamW's steps (arXiv:2502.16982).
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
FALL_FROM = 0.6  # share of the training after which the learning rate decreases
BETAS = (0.9, 0.98)


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and name.startswith("dit.blocks.")


class MasterWeights:
    """Named modules that are trained together. `work` holds the modules to compute with."""

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype, rate: float,
                 weight_decay: float = 0.01, average_decay: float = 0.999, clip_norm: float = 1.0,
                 muon_rate: float | None = None):
        """Args: modules: float32, on their final device; `work` gets copies. rate: peak learning rate.
            muon_rate: learning rate of the block matrices of module dit; None leaves them to AdamW.
        """
        self.average_decay, self.clip_norm = average_decay, clip_norm
        master = nn.ModuleDict(dict(modules)).float().requires_grad_(True)
        self.work: nn.ModuleDict = copy.deepcopy(master).to(dtype)
        named = dict(master.named_parameters())
        self._names, self._master = list(named), list(named.values())
        self._work = [dict(self.work.named_parameters())[name] for name in self._names]
        self._average = [p.detach().clone() for p in self._master]
        matrices = [p for name, p in named.items() if _is_block_matrix(name, p)] if muon_rate else []
        rest = [p for name, p in named.items() if not (muon_rate and _is_block_matrix(name, p))]
        decays = [p for p in rest if p.ndim > 1]
        others = [p for p in rest if p.ndim <= 1]
        self._optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
            [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=rate, betas=BETAS, fused=self._master[0].is_cuda)]
        if matrices:
            self._optimizers.append(torch.optim.Muon(matrices, lr=muon_rate, weight_decay=weight_decay,
                                                     adjust_lr_fn="match_rms_adamw"))
        self._rates = [optimizer.defaults["lr"] for optimizer in self._optimizers]
        self.steps = self._warm_since = 0

    @torch.no_grad()
    def update(self, progress: float) -> Tensor:
        """Apply the gradients of the working copy and return their norm. `progress` in the training is 0..1.
        """
        for master, work in zip(self._master, self._work):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            if work.grad is None:
                work.grad = torch.zeros_like(work)
        torch._foreach_copy_([p.grad for p in self._master], [p.grad for p in self._work])
        norm = nn.utils.clip_grad_norm_(self._master, self.clip_norm, foreach=True)
        warm = min(1.0, (self.steps - self._warm_since + 1) / WARMUP_STEPS)
        fall = min(1.0, max(0.02, (1 - progress) / (1 - FALL_FROM)))
        for optimizer, rate in zip(self._optimizers, self._rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * fall
            optimizer.step()
        self.steps += 1
        decay = min(self.average_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._average, self._master, 1 - decay)
        torch._foreach_copy_(self._work, self._master)
        for work in self._work:  # None instead of zeros saves adding the next gradient
            work.grad = None
        return norm

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of a parameter."""
        optimizer = next(o for o in self._optimizers
                         if any(p is master for group in o.param_groups for p in group["params"]))
        return optimizer.state[master]

    def is_finite(self) -> bool:
        """Whether all weights are finite. Waits for the device."""
        return bool(torch.stack([p.detach().sum() for p in self._master]).isfinite().all())

    def average(self) -> dict[str, Tensor]:
        """The averaged weights, float32, under `module.parameter`."""
        return dict(zip(self._names, self._average))

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The content of a checkpoint: `weights`, the `average` in bfloat16, and the `exact` rest."""
        exact = {f"average.{name}": t for name, t in self.average().items()}
        for name, master in zip(self._names, self._master):
            for key, value in self._moments(master).items():
                exact[f"{key}.{name}"] = value
        return {"weights": dict(zip(self._names, self._master)),
                "average": {name: t.to(torch.bfloat16) for name, t in self.average().items()},
                EXACT: exact}

    @torch.no_grad()
    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Continue from a checkpoint's groups. Without `exact` the moments are reset and the learning rate
        warms up. Without `weights` the average replaces them.
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
                # A checkpoint from before the first step has no moments.
                for key in (key for key in keys if f"{key}.{name}" in exact):
                    # AdamW keeps its step count on the CPU unless it is fused.
                    device = "cpu" if key == "step" and not master.is_cuda else master.device
                    self._moments(master)[key] = exact[f"{key}.{name}"].to(device, copy=True)
        else:
            self._warm_since = steps
            logger.warning(
                "checkpoint without optimizer state: the moments are reset%s, the learning rate "
                "warms up over %d steps",
                "" if "weights" in groups else ", the averaged weights replace the weights",
                WARMUP_STEPS,
            )
        torch._foreach_copy_(self._work, self._master)
