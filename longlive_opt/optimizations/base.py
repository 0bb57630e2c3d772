"""Base class of optimizations: each one replaces components of a pipeline and reports what it did."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from ..streaming.pipeline import Pipeline

Exactness = Literal["bitwise", "rounding", "lossy"]
"""`bitwise`: the same kernels on the same numbers, bit for bit. `rounding`: the same arithmetic in another
order or kernel, equal within bf16 rounding. `lossy`: an approximation that the preset's quality gate
evaluates.
"""


@runtime_checkable
class Stats(Protocol):
    """Counts of an optimization while the pipeline runs, read at the end."""

    def summary(self) -> dict[str, Any]:
        """Return plain numbers for the result."""


@dataclasses.dataclass(frozen=True)
class Optimization:
    """Base class of all optimizations. Fields are settings; class attributes say what it combines with."""

    name: ClassVar[str]
    exactness: ClassVar[Exactness]

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """Return the pipeline with this optimization applied to its components.

        Raises:
            UserError: it cannot be applied here; the message says why. Nothing is replaced silently.
        """
        raise NotImplementedError

    def report(self, pipeline: Pipeline, done: str, **facts: Any) -> Pipeline:
        """Add what this optimization did to the pipeline's report. A fact that is a `Stats` is read when the
        result is assembled. The fact `stats` is also read before and after the measured streams, so it must
        be cheap.
        """
        entry = {"name": self.name, "applied": True, "exactness": self.exactness,
                 "knobs": dataclasses.asdict(self),
                 "report": {"done": done, **facts}}
        return dataclasses.replace(pipeline, optimizations=(*pipeline.optimizations, entry))
