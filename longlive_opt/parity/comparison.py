"""The errors of one case, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

LIMIT = 1e-4
TARGET = 2e-5

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One compared case: the largest absolute error, its tensor, and the number of compared tensors."""

    name: str
    error: float
    worst: str
    tensors: int

    @property
    def passed(self) -> bool:
        return self.error <= LIMIT

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAIL"
        note = " (above the target of 2e-05)" if self.passed and self.error > TARGET else ""
        return (f"{verdict:4} {self.name:38} max error {self.error:.1e} at {self.worst}, {self.tensors} "
                f"tensors{note}")


class Comparison:
    """Collects the errors of one case."""

    def __init__(self, name: str):
        self.name = name
        self.errors: dict[str, float] = {}

    def add(self, what: str, ours: Tensor, recorded: Tensor) -> None:
        """Compare two tensors; a different shape or a NaN counts as an infinite error."""
        if tuple(ours.shape) != tuple(recorded.shape):
            self.errors[f"{what} (shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)})"] = float(
                "inf"
            )
            return
        error = (ours.double() - recorded.double()).abs().max().item() if recorded.numel() else 0.0
        self.errors[what] = error if error == error else float("inf")

    def case(self) -> Case:
        if not self.errors:
            return Case(self.name, float("inf"), "nothing to compare", 0)
        worst = max(self.errors, key=lambda what: self.errors[what])
        return Case(self.name, self.errors[worst], worst, len(self.errors))


def below(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, with the prefix removed."""
    return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}
