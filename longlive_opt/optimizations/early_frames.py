"""Early frames: decode the first latent of a new prompt before the others, and hand out its frames at once.

Idea: a block has three latents, and its frames are handed out together when all of them are decoded. After a
prompt switch somebody waits for them. The decoder is causal, so the first latent is decoded alone and its
four frames are handed out while the other two are decoded. The same goes for the first block of a video.

Replaces: `make_decoder`. Costs: two smaller calls of the decoder instead of a large one, so a switch block as
a whole takes longer. The steady state does not change. Equal within rounding: a call with fewer latents may
choose other kernels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..streaming.decoder import InlineDecoder
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization


@dataclass(frozen=True)
class EarlyFrames(Optimization):
    name: ClassVar[str] = "early_frames"
    exactness: ClassVar[Exactness] = "rounding"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        pipeline = dataclasses.replace(pipeline, make_decoder=partial(InlineDecoder, first_alone=True))
        return self.report(pipeline, "of a new prompt's first block, the frames of the first latent are "
                                     "handed out before the others are decoded")
