"""Tiny VAE: decode the latents by TAEHV, 9.84 million parameters, instead of the Wan VAE.

Idea: a block of 3 latent frames at 480x832 takes 1.6 TFLOP, where the Wan VAE takes 41. The latents stay what
they are; the frames lose fine detail. `models.taehv` says how it streams.

Replaces: `vae` and `make_vae_decoder`. By default it also sets a whole block of latents per call, channels
last and cuDNN's search (`vae_switches`). With `use_torch_compile`, its network is compiled as one. The config
refuses `use_fused_vae` (the Wan VAE's kernels) and `use_vae_offload` (67 MB of history at 480x832) with it.
Early decode and the asynchronous decoder work as with any decoder. Costs: fidelity of the frames. Lossy.

Weights: `taew2_1.pth` or `lighttaew2_1` (`longlive_opt.fetch --what tiny_vae`). They know Wan's latents, not
those of the project's tiny model. With random weights, as with the model's own, only time and memory count.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..models.specs import TINY_VAES
from ..models.taehv import TAEHVDecoder
from ..models.weight_files import known_sha256, tiny_vae_file
from ..models.weights import load_tiny_vae
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization


@dataclass(frozen=True)
class TinyVAE(Optimization):
    name: ClassVar[str] = "tiny_vae"
    exactness: ClassVar[Exactness] = "lossy"

    vae: str

    def apply(self, pipeline: Pipeline) -> Pipeline:
        config, spec, (_, height, width) = pipeline.config, TINY_VAES[self.vae], pipeline.latent_shape
        path = tiny_vae_file(self.vae, config.vae_weights, config.weights)
        vae, weights = load_tiny_vae(spec, path, pipeline.device, pipeline.dtype, config.seed)
        latents = config.latents_per_vae_call
        pipeline = dataclasses.replace(
            pipeline, vae=vae, make_vae_decoder=lambda: TAEHVDecoder(vae, 1, height, width, latents))
        drawn = f"random weights, seed {config.seed}" if path is None else path.name
        return self.report(pipeline, f"{spec.title} decodes the latents, {latents} per call; {drawn}",
                           weights=weights, sha256=None if path is None else known_sha256(path))
