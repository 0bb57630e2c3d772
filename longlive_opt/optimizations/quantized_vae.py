"""Quantized VAE: the decoder's largest convolutions in 8 bit (e4m3), on the kernels of the fused VAE.

Idea: Hopper multiplies e4m3 at up to twice the rate of bf16. The norm kernel writes e4m3 itself, and these
convolutions' history is e4m3 too, which halves what they read. Activations need no scale from the data: RMS
norm bounds them by sqrt(channels) * the largest |gamma|, so one power of two per norm, known beforehand, lets
none overflow. Weights have one power of two per output channel. Residual and shortcut stay in bf16. They are
added after the 8-bit products, whose sums keep some 14 bits on Hopper, so the residual stream is rounded as
before.

In 8 bit: both convolutions of every residual block after the first enlargement, 91 % of the decoder's
multiplications at full size. Still in bf16: the first convolution, the residual blocks at the latents' own
size (cuDNN computes them, and they are small), what enlarges pictures or doubles frames (its input is the
residual stream, which has no bound), and the head. Which layers are in 8 bit depends on neither the size nor
the number of latents of a call, so a history always fits the next call.

Replaces: the stages of `make_vae_decoder`, which must be those of `use_fused_vae`, on one GPU or in bands on
several. On the CPU it is emulated: the same rounding, slower than without.

Costs: precision of the frames. e4m3 keeps three bits of mantissa, an error of about 2.6 % RMS (root mean
square) of a value, so 3.7 % of a convolution's result. Latents do not change. It saves memory: half of these
layers' packed weights and history, 0.8 of 1.9 GB at 480x832.

Measured on an H200 at 480x832 with random weights: the decode stage takes 46 instead of 61 ms per block
(outputs/h200_two, fp8_vae and record).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..kernels import conv3d
from ..models.vae import Decoder, RMSNorm, Upsample
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization
from .fused_vae import Convolution, FusedDecoders, FusedResidual


@dataclass(frozen=True)
class QuantizedVAE(Optimization):
    name: ClassVar[str] = "quantized_vae"
    exactness: ClassVar[Exactness] = "lossy"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        made, decoder = pipeline.make_vae_decoder, pipeline.vae.decoder
        assert isinstance(made, FusedDecoders)
        cuda = pipeline.device.type == "cuda"
        stages = quantized_stages(made.stages, decoder, planned=cuda)
        pipeline = dataclasses.replace(
            pipeline, make_vae_decoder=dataclasses.replace(made, stages=stages))
        layers = [part for stage in stages for part in stage.modules() if isinstance(part, Convolution)]
        eight_bit = [layer for layer in layers if isinstance(layer, Convolution8)]
        packed = sum(layer.plan.nbytes for layer in eight_bit if layer.plan is not None)
        kernels = "Gluon kernels" if cuda else "emulated in PyTorch (CPU)"
        done = (f"{len(eight_bit)} convolutions of the VAE's decoder in e4m3, one scale per output channel; "
                f"not in 8 bit: {len(layers) - len(eight_bit)} (blocks at the latents' size, enlargements), "
                f"the first and the last; {kernels}")
        return self.report(pipeline, done, quantized_weight_bytes=packed)


def quantized_stages(fused: Sequence[nn.Module], decoder: Decoder, planned: bool) -> list[nn.Module]:
    """The fused stages of `decoder`, with the residual blocks after the first enlargement in 8 bit.

    Args:
        planned: run convolutions by `conv3d.Plan`, else by PyTorch on rounded numbers.
    """
    plain = decoder.stages()
    start = next(i for i, stage in enumerate(plain) if isinstance(stage, Upsample))
    return [QuantizedResidual(plain[i], planned) if i > start and isinstance(stage, FusedResidual) else stage
            for i, stage in enumerate(fused)]


class Convolution8(Convolution):
    """A convolution of e4m3 by plan or, on the CPU, by PyTorch with rounded weights."""

    def __init__(self, layer: nn.Conv3d, plan: conv3d.Plan | None, unit: float,
                 shortcut: nn.Module | None = None):
        """Args: unit: what its input was multiplied by."""
        if plan is None:
            layer = copy.deepcopy(layer)
            layer.weight.data = conv3d.rounded_weight(layer.weight.data) / unit
        super().__init__(layer, plan, shortcut)
        self._dtype = layer.weight.dtype

    def forward(self, x: Tensor, past: Tensor, other: Tensor | None = None) -> Tensor:
        if self.plan is not None:
            return conv3d.convolve(self.plan, x, past, other)
        return super().forward(x.to(self._dtype), past.to(self._dtype), other)


class QuantizedResidual(FusedResidual):
    """A `ResidualBlock` in 8 bit; a stage."""

    history_dtype = conv3d.E4M3

    def unit(self, norm: RMSNorm) -> float:
        return conv3d.norm_unit(norm.gamma)

    def convolution(self, layer: nn.Conv3d, plan: conv3d.Plan | None, unit: float | None,
                    shortcut: nn.Module | None = None) -> Convolution:
        assert unit is not None
        return Convolution8(layer, plan, unit, shortcut)
