"""Run the VAE on whole clips in one call, for training. It equals the streaming form with far fewer kernels.

`models.vae` streams: every causal convolution takes two frames of history and returns two, and the first
frame of a video, which the temporal resamplers skip, needs its own call. A clip from its first frame on needs
no history, only zeros before it. Here the frames of all clips form one batch of pictures, [T * B, C, H, W]
with channels last in memory, so that the previous frame is B pictures earlier. A causal convolution over
three frames becomes a convolution in the plane with three times the channels, which is fast in cuDNN even
with 16 channels. Norm, SiLU and this stacking are one compiled function. The modules and their weights are
those of inference.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.vae import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    Head,
    ResidualBlock,
    RMSNorm,
    Upsample,
    WanVAE,
)
from .compiling import compilable


def stack_past(x: Tensor, batch: int) -> Tensor:
    """[T * B, C, H, W] -> [T * B, 3C, H, W]: the two previous frames (or zeros) and the frame itself."""
    nothing = torch.zeros_like(x[:batch])
    before = torch.cat([nothing, x[:-batch]])
    return torch.cat([torch.cat([nothing, before[:-batch]]), before, x], dim=1)


@compilable()
def norm_silu_stack(x: Tensor, gamma: Tensor, scale: float, batch: int) -> Tensor:
    """Root-mean-square (RMS) norm over the channels of [T * B, C, H, W], then SiLU, then `stack_past`."""
    return stack_past(F.silu(F.normalize(x, dim=1, eps=1e-12) * scale * gamma), batch)


def norm_then_stack(norm: RMSNorm, x: Tensor, batch: int) -> Tensor:
    """`norm_silu_stack` with the weights of a norm of the VAE."""
    return norm_silu_stack(x, norm.gamma.flatten(1, 2), norm.scale, batch)


def convolve_stacked(conv: nn.Conv3d, stacked: Tensor) -> Tensor:
    """Apply a convolution over three frames to frames stacked as by `stack_past`."""
    weight = conv.weight.transpose(1, 2).flatten(1, 2)  # [O, 3C, h, w]
    return F.conv2d(stacked, weight, conv.bias, padding=conv.padding[1:])


def convolve_pictures(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Apply a convolution over single frames to [N, C, H, W]."""
    return F.conv2d(x, conv.weight.flatten(2, 3), conv.bias)


def run_stage(stage: nn.Module, x: Tensor, batch: int) -> Tensor:
    """One stage of encoder or decoder on whole clips [T * B, C, H, W]."""
    if isinstance(stage, CausalConv3d):
        return convolve_stacked(stage, stack_past(x, batch))
    if isinstance(stage, ResidualBlock):
        return _residual(stage, x, batch)
    if isinstance(stage, AttentionBlock):
        return stage(x[:, :, None], (), False)[0][:, :, 0]
    if isinstance(stage, Downsample):
        return _downsample(stage, x, batch)
    if isinstance(stage, Upsample):
        return _upsample(stage, x, batch)
    if isinstance(stage, Head):
        norm, _, conv = stage
        return convolve_stacked(conv, norm_then_stack(norm, x, batch))
    raise TypeError(f"not a stage of the VAE: {type(stage).__name__}")


def _residual(stage: ResidualBlock, x: Tensor, batch: int) -> Tensor:
    norm1, conv1, norm2, conv2 = stage.residual.values()
    y = convolve_stacked(conv1, norm_then_stack(norm1, x, batch))
    y = convolve_stacked(conv2, norm_then_stack(norm2, y, batch))
    shortcut = stage.shortcut
    return y + (convolve_pictures(shortcut, x) if isinstance(shortcut, nn.Conv3d) else x)


def _downsample(stage: Downsample, x: Tensor, batch: int) -> Tensor:
    x = stage.resample(x)
    if stage.time_conv is None or len(x) == batch:
        return x
    frames = x.permute(0, 2, 3, 1).unflatten(0, (-1, batch))  # channels last, which the copies keep
    stacked = torch.cat([frames[:-2:2], frames[1:-1:2], frames[2::2]], dim=-1).flatten(0, 1)
    stacked = stacked.permute(0, 3, 1, 2)
    return torch.cat([x[:batch], convolve_stacked(stage.time_conv, stacked)])


def _upsample(stage: Upsample, x: Tensor, batch: int) -> Tensor:
    if stage.time_conv is not None and len(x) > batch:
        y = convolve_stacked(stage.time_conv, stack_past(x[batch:], batch))
        # Each half of the channels becomes one frame. The channels stay last in memory.
        y = y.permute(0, 2, 3, 1).unflatten(-1, (2, -1)).unflatten(0, (-1, batch))
        y = y.permute(0, 4, 1, 2, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)
        x = torch.cat([x[:batch], y])
    return stage.resample(x)


def _run_stages(stages: Sequence[nn.Module], x: Tensor, batch: int) -> Tensor:
    for stage in stages:
        x = run_stage(stage, x, batch)
    return x


def _frames_first(x: Tensor, vae: WanVAE) -> Tensor:
    """[B, C, T, H, W] -> [T * B, C, H, W], with the channels last in memory if the VAE keeps them so."""
    frames = x.permute(2, 0, 1, 3, 4).flatten(0, 1)
    last = vae.memory_format is torch.channels_last_3d
    return frames.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _batch_first(x: Tensor, batch: int) -> Tensor:
    """[T * B, C, H, W] -> [B, C, T, H, W]"""
    return x.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4)


def moments(vae: WanVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance [B, z, F, h, w] of a video [B, 3, 1 + 4k, H, W] in [-1, 1], with gradients."""
    y = _run_stages(vae.encoder.stages(), _frames_first(video, vae), len(video))
    mean, log_variance = _batch_first(convolve_pictures(vae.conv1, y), len(video)).chunk(2, dim=1)
    return mean, log_variance


def decode_clip(vae: WanVAE, z: Tensor) -> Tensor:
    """Pixels [B, 3, 1 + 4k, H, W] of unscaled latents [B, z, 1 + k, h, w], with gradients."""
    x = convolve_pictures(vae.conv2, _frames_first(z, vae))
    return _batch_first(_run_stages(vae.decoder.stages(), x, len(z)), len(z))
