"""Fused VAE: the decoder's stages as our own convolutions on Hopper, and one kernel for each norm.

Idea: cuDNN's convolution over time wants its two frames of history and its input as one tensor, which is a
copy of 1.1 GB at 480x832, reaches half of a matrix product's speed at 96 channels, and writes a result that
another kernel reads to add the residual. `kernels.conv3d` reads the history where it lies and adds bias and
residual before the result is rounded; an upsampling convolution reads the small picture, with weights that
are added up where taps fall on the same pixel: 4 products for 9. Norm and SiLU are one pass that also leaves
the new history behind. (By estimate a norm in the convolution's epilogue would save 4 ms of reads and writes
a block at most, and cost half of that: three warpgroups would wait for one another, and the tensor core for
the exponentials.)

A residual block is norm and SiLU | convolution | norm and SiLU | convolution + input. Where a convolution has
too few tiles for the multiprocessors, which is so at a latent's own size, cuDNN makes it. The first
convolution and attention stay as they are.

Component: `make_vae_decoder`. Needs a Hopper GPU and bf16; a block of latents a call, channels last and
cuDNN's search come with it (`vae_switches`). With `use_torch_compile` the transformer is compiled and the VAE
is not. On the CPU each kernel is plain PyTorch. Costs: the packed weights, about as much again as the
decoder's own. Equal within rounding: norm, SiLU and residual keep float32 where eager PyTorch rounds between
operations; the summed weights of upsampling are rounded once more. Against float32, at full size with random
weights, the error is 2.6e-3 of pixels in [0, 1], that of cuDNN's convolutions 3.8e-3, compiled 3.5e-3.

Measured on an H200, 480x832, random weights, median of 60 calls each: three latents a call in 68 to 69 ms (67
as a CUDA graph) where the compiled decoder takes 103; one latent a call 25 ms. A call's memory peaks at 5.4
instead of 10.5 GB, weights included. Both decoders run at the GPU's power limit, 690 W, with clocks of 1.5 to
1.6 GHz. Of the 68 ms, convolutions are 59, norms 5.4, attention 1.6, the last convolution 0.9. Calls of the
kernels cost 13 to 18 ms of the host, while the GPU is busy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NotAvailable, UserError
from ..kernels import compilers, conv3d
from ..models.vae import (
    Decoder,
    Head,
    History,
    ResidualBlock,
    RMSNorm,
    StageHistory,
    StreamingDecoder,
    Upsample,
)
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization

LEAST_FILLED = 0.7
"""Of the work that the multiprocessors do in whole rounds of tiles; below it cuDNN is faster: 0.25 against
0.31 ms on an H200 for 384 channels at 3 x 60 x 104, where 0.55 is filled.
"""


@dataclass(frozen=True)
class FusedVAE(Optimization):
    name: ClassVar[str] = "fused_vae"
    exactness: ClassVar[Exactness] = "rounding"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        config, vae, (_, height, width) = pipeline.config, pipeline.vae, pipeline.latent_shape
        cuda = pipeline.device.type == "cuda"
        if cuda:
            check_device(pipeline.device)
            check_network(vae.decoder, vae.conv2.weight.dtype)
        stages = fused_stages(vae.decoder, planned=cuda)
        latents = config.latents_per_vae_call
        pipeline = dataclasses.replace(
            pipeline, make_vae_decoder=lambda: FusedDecoder(stages, vae, 1, height, width, latents))
        kernels = "Gluon kernels" if cuda else "plain PyTorch, one operator a kernel (CPU)"
        plans = [part.plan for stage in stages for part in stage.modules() if isinstance(part, Convolution)]
        packed = sum(plan.weight.nbytes for plan in plans if plan is not None)
        return self.report(pipeline, f"{len(plans)} convolutions of the VAE's decoder and their norms on "
                                     f"{kernels}, {latents} latents per call", packed_weight_bytes=packed)


def check_device(device: torch.device) -> None:
    """Raise NotAvailable where the kernels cannot run."""
    compilers.check_triton("use_fused_vae")
    try:
        from ..kernels import gluon_api  # noqa: F401
    except NotAvailable as error:
        raise NotAvailable(f"use_fused_vae: {error} Or switch use_fused_vae off.") from error
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise NotAvailable("use_fused_vae: its convolutions are written for Hopper (H100, H200), and this is "
                           f"{torch.cuda.get_device_name(device)}; switch use_fused_vae off.")


def check_network(decoder: Decoder, dtype: torch.dtype) -> None:
    """Raise UserError for weights that the kernels do not take."""
    if dtype != torch.bfloat16:
        raise UserError(f"use_fused_vae: its convolutions are in bfloat16, and the model is in {dtype}; set "
                        "model_dtype to bfloat16 or switch use_fused_vae off.")
    for stage in decoder.stages():
        layers: list[nn.Conv2d | nn.Conv3d] = []
        if isinstance(stage, ResidualBlock):
            layers = [stage.residual["2"], stage.residual["6"]]
        elif isinstance(stage, Upsample):
            layers = [stage.resample[1]]
        for layer in layers:
            if not conv3d.supported(layer.in_channels, layer.out_channels):
                raise UserError(f"use_fused_vae: this VAE has a convolution from {layer.in_channels} to "
                                f"{layer.out_channels} channels, and the kernels make 96 or a multiple of "
                                "192 of 96 * 2^n; switch use_fused_vae off.")


def fused_stages(decoder: Decoder, planned: bool) -> list[nn.Module]:
    """What stands in for the decoder's stages; those that are not fused are its own.

    Args:
        planned: run convolutions as `conv3d.Plan`s, else as PyTorch does.
    """
    kinds = {ResidualBlock: FusedResidual, Upsample: FusedUpsample, Head: FusedHead}
    return [kinds[type(stage)](stage, planned) if type(stage) in kinds else stage
            for stage in decoder.stages()]


class FusedDecoder(StreamingDecoder):
    """A decoder with fused stages for all latents."""

    def __init__(self, stages: Sequence[nn.Module], *arguments: Any):
        super().__init__(*arguments)
        self._stages = stages

    def decode(self, z: Tensor, history: StageHistory, first: bool) -> tuple[Tensor, History]:
        return self.vae.decode(z, history, first, self._stages)


class Convolution(nn.Module):
    """A convolution with what is added to it, by plan or as PyTorch does it; which, its size decides."""

    def __init__(self, layer: nn.Conv2d | nn.Conv3d, plan: conv3d.Plan | None,
                 shortcut: nn.Module | None = None):
        """Args: shortcut: what becomes of the tensor that is added."""
        super().__init__()
        # In tuples, so that the VAE's own layers have no second owner.
        self._layers = (layer, shortcut)
        self.plan = plan

    def forward(self, x: Tensor, past: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        """As `conv3d.convolve`."""
        if self.plan is not None and (not x.is_cuda or filled(self.plan, x) >= LEAST_FILLED):
            return conv3d.convolve(self.plan, x, past, other)
        layer, shortcut = self._layers
        y = self._convolve(layer, x if past is None else torch.cat([past, x], 2))
        return _channels_last(y if shortcut is None else y + shortcut(other))

    def _convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        return nn.Conv3d.forward(layer, x)  # a causal one's own `forward` takes a history


def filled(plan: conv3d.Plan, x: Tensor) -> float:
    """Which part of the multiprocessors' time goes into x, if tiles are done in rounds of one each."""
    _, _, frames, height, width = x.shape
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    tiles = conv3d.tiles(plan, frames, height, width)
    needed = plan.blocks * frames * height * width / (plan.frames * conv3d.PIXELS)
    return needed / (-(-tiles // programs) * programs)


class FusedResidual(nn.Module):
    """A `ResidualBlock`; a stage."""

    def __init__(self, stage: ResidualBlock, planned: bool):
        super().__init__()
        norm1, conv1, norm2, conv2 = stage.residual.values()
        self.history_channels = stage.history_channels
        self._norms = (norm1, norm2)
        shortcut = stage.shortcut if isinstance(stage.shortcut, nn.Conv3d) else None
        plans: list[conv3d.Plan | None] = [None, None]
        if planned:
            added = {"residual": True} if shortcut is None else {
                "shortcut": shortcut.weight.flatten(1), "shortcut_bias": shortcut.bias}
            plans = [conv3d.causal_plan(conv1.weight, conv1.bias),
                     conv3d.causal_plan(conv2.weight, conv2.bias, **added)]
        self.first = Convolution(conv1, plans[0])
        self.second = Convolution(conv2, plans[1], stage.shortcut)

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        x = _channels_last(x)
        y, history1 = _norm(self._norms[0], x, history[0])
        y = self.first(y, history[0])
        y, history2 = _norm(self._norms[1], y, history[1])
        return self.second(y, history[1], x), (history1, history2)


class FusedUpsample(nn.Module):
    """An `Upsample`; a stage."""

    def __init__(self, stage: Upsample, planned: bool):
        super().__init__()
        self.history_channels = stage.history_channels
        time, picture = stage.time_conv, stage.resample[1]
        self.time = None if time is None else FrameDoubling(
            time, conv3d.frames_plan(time.weight, time.bias) if planned else None)
        self.picture = Enlarging(
            picture, conv3d.picture_plan(picture.weight, picture.bias) if planned else None)

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        x = _channels_last(x)
        # The first latent stays one frame and leaves the history at zeros, as in `Upsample`.
        if self.time is not None and not first:
            (past,) = history
            recent = x[:, :, -2:] if x.shape[2] > 1 else torch.cat([past[:, :, 1:], x], 2)
            history = (torch.empty_like(past).copy_(recent),)
            x = self.time(x, past)
        return self.picture(x), history


class FrameDoubling(Convolution):
    """A convolution over time with two frames of result for each of its input."""

    def _convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        halves = nn.Conv3d.forward(layer, x).chunk(2, dim=1)
        return torch.cat([half[:, :, t:t + 1] for t in range(x.shape[2] - 2) for half in halves], dim=2)


class Enlarging(Convolution):
    """A convolution of each frame at twice its height and width."""

    def _convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        frames = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="nearest")
        return layer(frames).unflatten(0, (len(x), -1)).transpose(1, 2)


class FusedHead(nn.Module):
    """A `Head`; a stage."""

    def __init__(self, stage: Head, planned: bool):
        super().__init__()
        self.history_channels = stage.history_channels
        norm, _, conv = stage
        self._norm, self._conv = (norm,), (conv,)
        self.plan = conv3d.head_plan(conv.weight, conv.bias) if planned else None

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        y, new_history = _norm(self._norm[0], x, history[0])
        if self.plan is None:
            y = nn.Conv3d.forward(self._conv[0], torch.cat([history[0], y], 2))
        else:
            y = conv3d.convolve_head(self.plan, y, history[0])
        return y, (new_history,)


def _channels_last(x: Tensor) -> Tensor:
    """x as it is, or where PyTorch left a single frame in another layout, a copy."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def _norm(norm: RMSNorm, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    return conv3d.norm_silu(x, norm.gamma.view(-1), past)
