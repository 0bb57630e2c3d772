"""VAE offload: the VAE's history waits in host memory and visits the GPU stage by stage.

Idea: every causal convolution of the decoder remembers two frames, 1.9 GB at 480x832, and needs them once a
call. Here they lie in page-locked host memory; a stage's part comes over when that stage runs and goes back
behind it, on the stream that decodes.

Seam: `make_vae_decoder`. Costs: 3.8 GB over the bus for each VAE call, some 80 ms at 50 GB/s, in which the
stream waits; so decode a whole block in one call if memory allows. Bit-exact: the same kernels on the same
numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..models.vae import StreamingDecoder
from ..pipeline import Pipeline
from .room import Level, Room


@dataclass(frozen=True)
class VAEOffload(Room):
    name: ClassVar[str] = "vae_offload"
    level: ClassVar[Level] = "exact"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        make_inner = pipeline.make_vae_decoder

        def make_decoder() -> StreamingDecoder:
            decoder = make_inner()
            decoder.keep_history_on_host()
            return decoder

        pipeline = dataclasses.replace(pipeline, make_vae_decoder=make_decoder)
        anyway = "" if pipeline.device.type == "cuda" else ", where it is on this device anyway"
        return self.report(pipeline, f"the history of the VAE's convolutions waits in host memory{anyway}")
