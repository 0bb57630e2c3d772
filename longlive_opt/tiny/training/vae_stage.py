"""Stage 1: train the variational autoencoder (VAE) of Wan 2.1 (arXiv:2503.20314) on clips of Moving Shapes.

The loss is the L1 distance of pixels, of their spatial differences and of their temporal differences, plus a
small Kullback-Leibler (KL) term (arXiv:1312.6114) that keeps the latent space connected and scaled. The
spatial term is needed because L1 alone leaves edges and patterns grey (Mathieu et al., arXiv:1511.05440).
There is no adversarial loss, because Moving Shapes have no texture that a sharp average would miss. The first
phase uses crops in large batches. The second uses whole pictures and longer clips, so that attention and
borders have their final size and the causal history has some length.

Exported latents are normalised: `statistics` measures mean and standard deviation of each channel, and
`export.fold_statistics` folds them into conv1 and conv2.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...models.specs import VAEConfig
from ...models.vae import AttentionBlock, Downsample, ResidualBlock, Upsample, WanVAE, latent_statistics
from ..shapes.render import simulate
from ..shapes.scene import change_scene
from .attribute_head import sample_scenes
from .compiling import compilable
from .master_weights import MasterWeights
from .vae_clips import VideoRing, render_fast
from .vae_parallel import decode_clip, moments

FIRST_LOG_VARIANCE = -6.0
WEAK = 0.25


@dataclass(frozen=True)
class VAESettings:
    """Settings of the VAE. Clips have 1 + 4k video frames and start below frame `horizon` of longer videos.
    The second phase starts at the share `whole_from` of the training. Every `refresh_every` steps the stage
    makes one chunk of `ring_videos`.
    """

    rate: float = 6e-4
    crop: int = 64
    crop_batch: int = 32
    crop_frames: int = 17
    whole_batch: int = 8
    whole_frames: int = 33
    whole_from: float = 0.6
    kl_weight: float = 2e-4
    gradient_weight: float = 1.0
    temporal_weight: float = 0.25
    horizon: int = 48
    average_decay: float = 0.998
    ring_videos: int = 32
    ring_chunks: int = 16
    first_chunks: int = 4
    refresh_every: int = 16


@torch.no_grad()
def encode_video(vae: WanVAE, frames: Tensor) -> Tensor:
    """Normalised latents [B, 1 + k, 16, h, w] of frames [B, 1 + 4k, 3, H, W] in [0, 1], as by `WanVAE.encode`
    but in one call.
    """
    mean, _ = moments(vae, frames.transpose(1, 2) * 2 - 1)
    centre, inverse_std = latent_statistics(mean.device, mean.dtype)
    return ((mean - centre) * inverse_std).transpose(1, 2)


@torch.no_grad()
def init_vae_(vae: WanVAE) -> None:
    """Initialise the VAE. Activations keep their scale, and every residual branch starts at zero (Fixup,
    arXiv:1901.09321). The posterior starts narrow, because the decoder would otherwise learn to ignore it.

    The remaining chain of plain convolutions starts by passing on each place with a random mix of channels
    (arXiv:1806.05393) and weak taps around it. Fully random taps would blur the picture from layer to layer,
    and the network would have to sharpen it again.
    """
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.residual["6"].weight)
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, Downsample):
            _pass_on_(module.resample[1], (slice(2), slice(2)))  # the pixels of the coarser place
            if module.time_conv is not None:
                _pass_on_(module.time_conv, (slice(1, None), 0, 0))
        elif isinstance(module, Upsample):
            _pass_on_(module.resample[1], (1, 1))
            if module.time_conv is not None:
                _pass_on_(module.time_conv, (-1, 0, 0))
    for conv in (vae.encoder.conv1, vae.encoder.head[2], vae.decoder.conv1, vae.decoder.head[2]):
        _pass_on_(conv, (-1, 1, 1))
    z = vae.conv2.in_channels
    vae.conv1.weight[z:] *= 0.1
    vae.conv1.bias[z:].fill_(FIRST_LOG_VARIANCE)


def _pass_on_(conv: nn.Conv2d | nn.Conv3d, taps: tuple[int | slice, ...]) -> None:
    """Strong random weights at `taps` of the kernel, weak ones elsewhere."""
    conv.weight *= WEAK
    strong = conv.weight[(slice(None), slice(None), *taps)]
    strong += torch.randn_like(strong) * strong[0].numel() ** -0.5


class VAEStage:
    """Trains encoder and decoder together."""

    name = "vae"

    def __init__(self, config: VAEConfig, size: int, device: torch.device, dtype: torch.dtype, seed: int,
                 settings: VAESettings = VAESettings(), workers: Executor | None = None):
        """Args: size: of the whole picture in pixels; crops are at most as large. workers: processes that
        plan the videos ahead (see `workers`).
        """
        self.config, self.settings, self.size, self.seed = config, settings, size, seed
        self.device, self.dtype = device, dtype
        torch.manual_seed(seed)
        vae = WanVAE(config)
        init_vae_(vae)
        vae = vae.to(device)
        self.masters = MasterWeights({"vae": vae}, dtype, settings.rate, average_decay=settings.average_decay)
        self.vae: WanVAE = self.masters.work["vae"]
        if device.type == "cuda":
            self.vae.use_channels_last()
        self.generator = torch.Generator(device).manual_seed(seed)
        self.ring = VideoRing(seed, settings.ring_videos, settings.horizon + settings.whole_frames,
                              settings.ring_chunks, size, device, workers)

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        settings, ring = self.settings, self.ring
        while ring.produced < settings.first_chunks + step // settings.refresh_every:
            ring.refresh()
        if progress < settings.whole_from:
            sizes = settings.crop_batch, settings.crop_frames, min(settings.crop, self.size)
        else:
            sizes = settings.whole_batch, settings.whole_frames, self.size
        target = (ring.sample(*sizes, self.generator) / 127.5 - 1).to(self.dtype)
        mean, log_variance = moments(self.vae, target)
        noise = torch.randn(mean.shape, generator=self.generator, device=self.device, dtype=self.dtype)
        log_variance = log_variance.float().clamp(-20, 10)
        z = mean + noise * (0.5 * log_variance).exp().to(self.dtype)
        losses = reconstruction_losses(decode_clip(self.vae, z), target)
        losses["kl"] = 0.5 * (mean.float().square() + log_variance.exp() - 1 - log_variance).mean()
        loss = (losses["l1"] + settings.gradient_weight * losses["edges"]
                + settings.temporal_weight * losses["change"] + settings.kl_weight * losses["kl"])
        loss.backward()
        return {"loss": loss, **losses}

    def video(self, index: int, batch: int, frames: int, crop: int) -> Tensor:
        """Clips [batch, 3, frames, crop, crop] in [-1, 1] outside the ring. Every fourth has a change of
        scene.
        """
        rng = np.random.default_rng([self.seed, 2, index])
        start = int(rng.integers(self.settings.horizon))
        scenes = [[(0, scene)] for scene in sample_scenes(rng, batch)]
        for timeline in scenes[::4]:
            timeline.append((start + 1 + int(rng.integers(frames)), change_scene(rng, timeline[0][1])))
        tracks = simulate(scenes, start + frames, int(rng.integers(2**31)))
        pictures = render_fast(tracks, slice(start, start + frames), self.device, self.size)
        y, x = (8 * int(rng.integers((self.size - crop) // 8 + 1)) for _ in range(2))
        return (pictures[..., y:y + crop, x:x + crop].to(self.dtype) * 2 - 1).transpose(1, 2)

    def state(self) -> dict[str, Any]:
        return {"produced": self.ring.produced}

    def resume(self, state: dict[str, Any]) -> None:
        self.ring.refill(state["produced"])

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to do, because `resume` refills the ring."""

    def averaged(self) -> WanVAE:
        """The averaged VAE in float32, for inference."""
        vae = WanVAE(self.config).to(self.device)
        vae.load_state_dict({name.removeprefix("vae."): t for name, t in self.masters.average().items()})
        return vae.eval().requires_grad_(False)


@compilable()
def reconstruction_losses(made: Tensor, target: Tensor) -> dict[str, Tensor]:
    """L1 of pixels, of their differences to the right and lower neighbour, and of those to the next frame.
    Videos are [B, 3, T, H, W].
    """
    error = made.float() - target.float()
    return {"l1": error.abs().mean(),
            "edges": error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean(),
            "change": error.diff(dim=2).abs().mean()}


@torch.no_grad()
def statistics(vae: WanVAE, videos: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over videos (as in `moments`), float32 [z] each."""
    latents = torch.cat(
        [moments(vae, video)[0].float().transpose(0, 1).flatten(1) for video in videos], dim=1
    )
    return latents.mean(dim=1), latents.std(dim=1)
