"""Early decode: hand a block of latents to the VAE before its clean pass, not after it.

Idea: the clean pass leaves a block's clean keys and values in the cache for the blocks to come; its own
frames do not need it. So they are decoded first, and the pass comes at the beginning of the next block. If
that block begins with a prompt switch, the recache writes those keys and values anew under the new prompt,
and the pass is left out: a window holds its sink and a block, so a recache reaches all of the last block, and
what it leaves alone, a protected sink past the window, is older.

Component: `sampler`. Costs: nothing. It does not change the steady state, since the passes are the same, one
block interval apart; the first frames and those after a prompt switch come one pass earlier. Bit-exact: what
is left out would have been overwritten unread.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization


@dataclass(frozen=True)
class EarlyDecode(Optimization):
    name: ClassVar[str] = "early_decode"
    exactness: ClassVar[Exactness] = "bitwise"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        sampler = dataclasses.replace(pipeline.sampler, defer_clean_pass=True)
        return self.report(dataclasses.replace(pipeline, sampler=sampler),
                           "blocks are decoded before their clean pass, which a recache makes needless")
