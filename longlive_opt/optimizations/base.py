"""What an optimization is: it replaces components of a pipeline and says what it did."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from ..streaming.pipeline import Pipeline

Exactness = Literal["bitwise", "rounding", "lossy"]
"""`bitwise`: the same kernels on the same numbers, bit for bit. `rounding`: the same arithmetic in another
order or kernel, equal within bf16 rounding. `lossy`: an approximation, evaluated by the preset's quality
gate.
"""


@runtime_checkable
class Stats(Protocol):
    """What an optimization counts while the pipeline runs; read at the end."""

    def summary(self) -> dict[str, Any]:
        """Plain numbers for the result."""


@dataclasses.dataclass(frozen=True)
class Optimization:
    """Base of all optimizations. Fields are knobs; class attributes say how it goes with others."""

    name: ClassVar[str]
    exactness: ClassVar[Exactness]

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """Return the pipeline with this optimization in its components.

        Raises:
            UserError: it cannot be applied here, and why; nothing is replaced silently.
        """
        raise NotImplementedError

    def report(self, pipeline: Pipeline, done: str, **facts: Any) -> Pipeline:
        """Add what this optimization did to the pipeline's report. A fact that is a `Stats` is read when the
        result is put together; one called `stats` also before and after the measured streams, so it must be
        cheap.
        """
        entry = {"name": self.name, "applied": True, "exactness": self.exactness,
                 "knobs": dataclasses.asdict(self),
                 "report": {"done": done, **facts}}
        return dataclasses.replace(pipeline, optimizations=(*pipeline.optimizations, entry))
