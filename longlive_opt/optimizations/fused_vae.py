"""Fused VAE: the decoder's stages on our own convolution kernels for Hopper, with one kernel per norm.

Idea: for a causal convolution, cuDNN needs the two frames of history and the input in one tensor, a copy of
1.1 GB at 480x832, and another kernel has to read its result to add the residual. `kernels.conv3d` reads the
history in place and adds bias and residual before the result is rounded. Its upsampling convolution reads the
small image and sums the weights of taps that read the same pixel, so 4 multiplications replace 9. RMS norm
and SiLU are one pass, which also writes the new history. (A norm in the convolution's epilogue would save
memory traffic, but three warpgroups would have to synchronize, and the exponentials would delay the tensor
core.)

A residual block is norm + SiLU | convolution | norm + SiLU | convolution + input. Convolutions with too few
tiles for the multiprocessors, those at the latents' own size, stay on cuDNN. The first convolution and the
attention block are unchanged.

Replaces: `make_vae_decoder`. Needs a Hopper GPU and bf16. By default it also sets a whole block of latents
per call, channels last and cuDNN's search (`vae_switches`). With `use_torch_compile`, the transformer is
compiled and the VAE is not. On the CPU each kernel is plain PyTorch. Costs: packed weights, about the size of
the decoder's own. Equal within rounding: norm, SiLU and residual keep float32 where eager PyTorch rounds
between operations; the summed weights of upsampling are rounded to bf16 again.

Measured on an H200 at 480x832 with random weights: the decode stage takes 61 to 64 ms per block in the runs
of outputs/h200_two, where the compiled decoder of outputs/h200_long takes 97.
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
    WanVAE,
)
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization

LEAST_FILLED = 0.7
"""Least useful share of whole waves of tiles. With less, cuDNN is faster, as for 384 channels at 3 x 60 x
104, a share of 0.55.
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
            pipeline, make_vae_decoder=FusedDecoders(stages, vae, height, width, latents))
        kernels = "Gluon kernels" if cuda else "plain PyTorch, one operator a kernel (CPU)"
        plans = [part.plan for stage in stages for part in stage.modules() if isinstance(part, Convolution)]
        packed = sum(plan.nbytes for plan in plans if plan is not None)
        return self.report(pipeline, f"{len(plans)} convolutions of the VAE's decoder and their norms on "
                                     f"{kernels}, {latents} latents per call", packed_weight_bytes=packed)


def check_device(device: torch.device) -> None:
    """Raise NotAvailable if the kernels cannot run on this device."""
    compilers.check_triton("use_fused_vae")
    try:
        from ..kernels import gluon_api  # noqa: F401
    except NotAvailable as error:
        raise NotAvailable(f"use_fused_vae: {error} Or switch use_fused_vae off.") from error
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise NotAvailable("use_fused_vae: its convolutions are written for Hopper (H100, H200), and this is "
                           f"{torch.cuda.get_device_name(device)}; switch use_fused_vae off.")


def check_network(decoder: Decoder, dtype: torch.dtype) -> None:
    """Raise UserError if the kernels do not support this decoder's dtype or channels."""
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
    """The decoder's stages, fused where there is a fused form.

    Args:
        planned: run convolutions by `conv3d.Plan`, else by PyTorch.
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

    def _keep(self, history: History) -> None:
        """As `StreamingDecoder._keep`, each part in the dtype that its stage returns."""
        dtypes = [getattr(stage, "history_dtype", None) or self.dtype
                  for stage in self._stages for _ in stage.history_channels]
        super()._keep(tuple(part.to(dtype) for part, dtype in zip(history, dtypes, strict=True)))


@dataclass(frozen=True)
class FusedDecoders:
    """Makes `FusedDecoder`s, `make_vae_decoder` of a pipeline, for latents of this size."""

    stages: Sequence[nn.Module]
    vae: WanVAE
    height: int
    width: int
    latents: int

    def __call__(self) -> FusedDecoder:
        return FusedDecoder(self.stages, self.vae, 1, self.height, self.width, self.latents)


class Convolution(nn.Module):
    """A convolution plus an optional other tensor, by plan or, if that would leave multiprocessors idle, by
    PyTorch.
    """

    def __init__(self, layer: nn.Conv2d | nn.Conv3d, plan: conv3d.Plan | None,
                 shortcut: nn.Module | None = None):
        """Args: shortcut: applied to the tensor that is added."""
        super().__init__()
        # In a tuple, so that the VAE's layers are not registered twice.
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
        return layer.convolve(x)


def filled(plan: conv3d.Plan, x: Tensor) -> float:
    """Useful share of the multiprocessors' time when x is computed in waves of one tile each."""
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
        units = self.units = (self.unit(norm1), self.unit(norm2))
        shortcut = stage.shortcut if isinstance(stage.shortcut, nn.Conv3d) else None
        plans: list[conv3d.Plan | None] = [None, None]
        if planned:
            added = {"residual": True} if shortcut is None else {
                "shortcut": shortcut.weight.flatten(1), "shortcut_bias": shortcut.bias}
            plans = [conv3d.causal_plan(conv1.weight, conv1.bias, unit=units[0]),
                     conv3d.causal_plan(conv2.weight, conv2.bias, unit=units[1], **added)]
        self.first = self.convolution(conv1, plans[0], units[0])
        self.second = self.convolution(conv2, plans[1], units[1], stage.shortcut)

    def unit(self, norm: RMSNorm) -> float | None:
        """What results of `norm` are multiplied by before they are rounded to 8 bit; None: they are not."""
        return None

    def convolution(self, layer: nn.Conv3d, plan: conv3d.Plan | None, unit: float | None,
                    shortcut: nn.Module | None = None) -> Convolution:
        """The convolution of results of `unit`'s norm."""
        return Convolution(layer, plan, shortcut)

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        x = _channels_last(x)
        y, history1 = _norm(self._norms[0], x, history[0], self.units[0])
        y = self.first(y, history[0])
        y, history2 = _norm(self._norms[1], y, history[1], self.units[1])
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
    """A convolution over time that makes two frames of each."""

    def _convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        halves = layer.convolve(x).chunk(2, dim=1)
        return torch.cat([half[:, :, t:t + 1] for t in range(x.shape[2] - 2) for half in halves], dim=2)


class Enlarging(Convolution):
    """A convolution of each frame, upsampled to twice its height and width."""

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
            y = self._conv[0].convolve(torch.cat([history[0], y], 2))
        else:
            y = conv3d.convolve_head(self.plan, y, history[0])
        return y, (new_history,)


def _channels_last(x: Tensor) -> Tensor:
    """x, copied only if PyTorch left a single frame in another layout."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def _norm(norm: RMSNorm, x: Tensor, past: Tensor, unit: float | None = None) -> tuple[Tensor, Tensor]:
    return conv3d.norm_silu(x, norm.gamma.view(-1), past, 1.0 if unit is None else unit)
