"""How the VAE is called: memory layout, latents per call, and cuDNN's choice of kernels.

These are three optimizations, each independent of the compiler, which switches all three on by default.

- `VAEChannelsLast`. Idea: cuDNN's bf16 convolutions read and write channels last and convert any other
  layout. Replaces: the layout of `vae`'s weights, history and activations. On the CPU this is the reference's
  layout, because norms over the channels take half of the time otherwise.
- `VAEChunk`. Idea: several latents per call make fewer and larger kernels, and read weights and history less
  often. Replaces: `make_vae_decoder`. Costs: the activations of all of them in memory at once. The first
  latent of a video is always decoded alone.
- `CudnnBenchmark`. Idea: let cuDNN time its kernels for each shape and use the fastest. On an H100 its
  heuristic chooses a kernel of an older generation for the 96-channel convolutions. Replaces:
  `make_vae_decoder`, whose calls run with the flag. Costs: the search, once per shape, during set-up. Two
  runs may differ by rounding, because another kernel may have been the fastest.

The flag is set only around the VAE's calls, so nothing else in the process sees it. PyTorch remembers the
kernel of each shape per thread and looks there before it reads the flag (`run_single_conv` in Conv_v8.cpp).
So pipelines with and without the flag can only be compared in separate threads or processes, as
`Experiment.ablate` runs them.

All three are equal within rounding: the same sums in another order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import NotAvailable
from ..models.vae import StreamingDecoder
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization


@dataclass(frozen=True)
class VAEChannelsLast(Optimization):
    name: ClassVar[str] = "vae_channels_last"
    exactness: ClassVar[Exactness] = "rounding"

    on: bool = True

    def apply(self, pipeline: Pipeline) -> Pipeline:
        pipeline.vae.use_layout(channels_last=self.on)
        place = "last" if self.on else "first"
        return self.report(pipeline, f"channels {place} in the VAE's weights, history and activations")


@dataclass(frozen=True)
class VAEChunk(Optimization):
    name: ClassVar[str] = "vae_chunk"
    exactness: ClassVar[Exactness] = "rounding"

    latents: int = 3

    def apply(self, pipeline: Pipeline) -> Pipeline:
        vae, (_, height, width) = pipeline.vae, pipeline.latent_shape
        pipeline = dataclasses.replace(
            pipeline, make_vae_decoder=lambda: StreamingDecoder(vae, 1, height, width, self.latents))
        return self.report(pipeline, f"{self.latents} latents per VAE call")


@dataclass(frozen=True)
class CudnnBenchmark(Optimization):
    name: ClassVar[str] = "cudnn_benchmark"
    exactness: ClassVar[Exactness] = "rounding"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        make_inner, device = pipeline.make_vae_decoder, pipeline.device
        if device.type != "cuda":
            raise NotAvailable("cudnn_benchmark: cuDNN runs on NVIDIA GPUs, but this run is on "
                               f"{device.type}; leave cudnn_benchmark out.")

        def make_decoder() -> StreamingDecoder:
            decoder = make_inner()
            decoder.decode_within(timed_convolutions)
            return decoder

        return self.report(dataclasses.replace(pipeline, make_vae_decoder=make_decoder),
                           "cuDNN times its kernels for each of the VAE's convolutions and uses the fastest")


@contextlib.contextmanager
def timed_convolutions() -> Iterator[None]:
    """Let cuDNN time its kernels for every shape that occurs while the body runs."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
