"""Early decode: pass a block of latents to the VAE before its clean pass instead of after it.

Idea: the clean pass stores a block's clean keys and values for later blocks; the block's own frames do not
need it. So the frames are decoded first, and the clean pass runs at the start of the next block. If that
block begins with a prompt switch, the clean pass is skipped, because the recache rewrites those keys and
values under the new prompt. A window holds its sink and a block, so a recache covers all of the last block.
It only leaves alone a protected sink past the window, which is older.

Replaces: `sampler`. Costs: nothing. The steady state does not change, since the same passes run one block
interval apart. The first frames, and those after a prompt switch, come one pass earlier. Bit-exact: the
skipped values would have been overwritten unread.
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
                           "blocks are decoded before their clean pass, which a recache makes unnecessary")
