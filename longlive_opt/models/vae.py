"""The Wan 2.1 VAE (variational autoencoder): latents to frames (streaming), and frames to latents. Source:
SPEC section 7.

The network is functional. Every causal convolution looks two frames back. These frames, its *history*, are
inputs and outputs of fixed shape and strides, so a step can be compiled or captured in a CUDA graph
unchanged. Encoder and decoder are lists of *stages* with one signature,

    stage(x [B, C, T, H, W], history, first) -> (y, new_history)

where `history` is a flat tuple of [B, C, 2, H, W] tensors, one per causal convolution
(`stage.history_channels`). A new history is zeros, which equals the causal padding. `first` marks the first
call of a stream. The temporal resamplers skip that call, so its one latent makes one frame; every later
latent makes four.

Only `StreamingDecoder` has state:

    decoder = StreamingDecoder(vae, batch=1, latent_height=60, latent_width=104)
    for latents in blocks:                     # [1, 3, 16, 60, 104], normalised
        for frames in decoder.push(latents):   # [1, 9, 3, 480, 832], then [1, 12, 3, 480, 832]; in [0, 1]
            show(frames)
    decoder.reset()                            # the next push starts a new video
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Callable, Protocol, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .specs import VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE, VAEConfig

History = tuple[Tensor, ...]

HISTORY_FRAMES = 2
IMAGE_CHANNELS = 3
ONEDNN = torch.backends.mkldnn.is_available()
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


def _fold_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]; a view in channels-last layout."""
    return x.transpose(1, 2).flatten(0, 1)


def _unfold_frames(x: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W], always a view."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _last_frames(x: Tensor, history: History) -> History:
    """The new history: a copy (a slice would keep all of x alive) with the old one's strides."""
    return (torch.empty_like(history[0]).copy_(x[:, :, -HISTORY_FRAMES:]),)


class RMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels; `space_dims` counts the axes after them."""

    def __init__(self, channels: int, space_dims: int = 3):
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * space_dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1, eps=1e-12) * self.scale * self.gamma


class CausalConv3d(nn.Conv3d):
    """A stage: convolution over two past frames and the current one in time, zero padded in space."""

    def __init__(self, in_channels: int, out_channels: int, space_kernel: int = 3):
        super().__init__(in_channels, out_channels, (HISTORY_FRAMES + 1, space_kernel, space_kernel),
                         padding=(0, space_kernel // 2, space_kernel // 2))
        self.history_channels = (in_channels,)

    def forward(self, x: Tensor, history: History, first: bool = False) -> tuple[Tensor, History]:
        x = torch.cat([*history, x], dim=2)
        return self.convolve(x), _last_frames(x, history)

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution alone, of x [B, C, T + 2, H, W] -> [B, O, T, H, W]."""
        if x.device.type == "cpu" and ONEDNN and not torch.is_grad_enabled():
            return _convolve_on_cpu(x, self.weight, self.bias, self.padding[1])
        return super().forward(x)


@torch.library.custom_op("longlive::convolve_on_cpu", mutates_args=())
def _convolve_on_cpu(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """As `F.conv3d` with `padding` pixels around each image, by oneDNN and with sums in float32.

    Without AVX-512, PyTorch chooses its own loops instead, which are several times slower in float32 and far
    slower in bfloat16.
    """
    inputs = (t.float() for t in (x, weight, bias))
    y = torch.mkldnn_convolution(*inputs, [0, padding, padding], [1] * 3, [1] * 3, 1)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)


@_convolve_on_cpu.register_fake
def _convolve_on_cpu_fake(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    batch, _, frames, height, width = x.shape
    taps, rows, columns = weight.shape[2:]
    size = (batch, len(weight), frames - taps + 1, height + 2 * padding - rows + 1,
            width + 2 * padding - columns + 1)
    return x.new_empty(size).to(memory_format=torch.channels_last_3d)


class ResidualBlock(nn.Module):
    """A stage: norm, SiLU, convolution, twice, plus a shortcut. Keys are those of the checkpoint."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.residual = nn.ModuleDict({
            "0": RMSNorm(in_channels), "2": CausalConv3d(in_channels, out_channels),
            "3": RMSNorm(out_channels), "6": CausalConv3d(out_channels, out_channels),
        })
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)
        self.history_channels = (in_channels, out_channels)

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        norm1, conv1, norm2, conv2 = self.residual.values()
        y, history1 = conv1(F.silu(norm1(x)), history[:1])
        y, history2 = conv2(F.silu(norm2(y)), history[1:])
        return y + self.shortcut(x), history1 + history2


class AttentionBlock(nn.Module):
    """A stage without history: single-head attention among the positions of each frame, plus its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, space_dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.history_channels = ()

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        frames = _fold_frames(x)
        # The fused attention kernels need contiguous channels.
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=-1))  # [B*T, 1 head, H*W, C]
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        y = self.proj(y.transpose(1, 2).reshape(frames.shape))
        return x + _unfold_frames(y, len(x)), ()


class Upsample(nn.Module):
    """A stage: doubles height and width and halves the channels; with `temporal`, also doubles the frames."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        # Upstream enlarges in float32; nearest neighbours copy values, so every dtype gives the same result.
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"),
                                      nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, space_kernel=1) if temporal else None
        self.history_channels = (channels,) if temporal else ()

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        # The first latent stays one frame and leaves the history at zeros, so later frames never see it here.
        if self.time_conv is not None and not first:
            y, history = self.time_conv(x, history)
            halves = y.chunk(2, dim=1)
            # Frame t becomes frames 2t and 2t+1. Unlike `stack`, `cat` keeps the memory layout.
            x = torch.cat([half[:, :, t:t + 1] for t in range(x.shape[2]) for half in halves], dim=2)
        return _unfold_frames(self.resample(_fold_frames(x)), len(x)), history


class Downsample(nn.Module):
    """A stage: halves height and width; with `temporal`, also the frames. History has the output's size."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        self.history_channels = (channels,) if temporal else ()

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        x = _unfold_frames(self.resample(_fold_frames(x)), len(x))
        if self.time_conv is None:
            return x, ()
        frames = torch.cat([*history, x], dim=2)
        # A stride of two needs one past frame; the history keeps two only for the common shape.
        y = x if first else self.time_conv(frames[:, :, HISTORY_FRAMES - 1:])
        return y, _last_frames(frames, history)


class Head(nn.Sequential):
    """A stage: norm, SiLU, convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(RMSNorm(in_channels), nn.SiLU(), CausalConv3d(in_channels, out_channels))
        self.history_channels = (in_channels,)

    def forward(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        norm, silu, conv = self
        return conv(silu(norm(x)), history)


class StageHistory(Protocol):
    """The history during one call: each stage in turn takes its part and returns a new one."""

    def take(self, count: int) -> History:
        """Return the next `count` tensors on the device that runs the stages."""

    def put(self, updated: History) -> None:
        """Store the new tensors of the stage that took last."""

    def whole(self) -> History:
        """Return the new history after all stages."""


class HeldHistory:
    """A `StageHistory` on the device that runs the stages. It releases each part that is taken, so that the
    old and the new history need not both be in memory.
    """

    def __init__(self, parts: list[Tensor]):
        """Args: parts: the history; this empties the list."""
        self._old = parts
        self._new: History = ()

    def take(self, count: int) -> History:
        taken, self._old[:count] = tuple(self._old[:count]), []
        return taken

    def put(self, updated: History) -> None:
        self._new += updated

    def whole(self) -> History:
        return self._new


class _Stages(nn.Module):
    """Base of encoder and decoder: runs the stages in order, each with its part of the flat history."""

    def stages(self) -> list[nn.Module]:
        """The stages in order; each can be compiled separately."""
        raise NotImplementedError

    def init_history(self, batch: int, height: int, width: int, device: torch.device, dtype: torch.dtype,
                     memory_format: torch.memory_format) -> History:
        """Zero history for inputs of `height` x `width`: one [batch, C, 2, H, W] per causal convolution."""
        history = []
        for stage in self.stages():
            if isinstance(stage, Downsample):
                height, width = height // 2, width // 2
            for channels in stage.history_channels:
                shape = (batch, channels, HISTORY_FRAMES, height, width)
                zeros = torch.zeros(shape, device=device, dtype=dtype)
                history.append(zeros.contiguous(memory_format=memory_format))
            if isinstance(stage, Upsample):
                height, width = height * 2, width * 2
        return tuple(history)

    def forward(self, x: Tensor, history: History | list[Tensor] | StageHistory, first: bool,
                stages: Sequence[nn.Module] = ()) -> tuple[Tensor, History]:
        """Run all stages, or their replacements in `stages`. A history given as a list is emptied."""
        if isinstance(history, (list, tuple)):
            history = HeldHistory(history if isinstance(history, list) else list(history))
        for stage in stages or self.stages():
            x, updated = stage(x, history.take(len(stage.history_channels)), first)
            history.put(updated)
            del updated  # the history decides whether it stays in memory
        return x, history.whole()


class Encoder(_Stages):
    """Frames [B, 3, T, H, W] -> mean and log variance [B, 2*z, T/4, H/8, W/8]; first call: one frame."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.dim * config.dim_mult[0]
        self.conv1 = CausalConv3d(IMAGE_CHANNELS, channels)
        self.downsamples = nn.ModuleList()
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(channels, config.dim * mult))
                channels = config.dim * mult
            if level < len(config.temporal_downsample):
                self.downsamples.append(Downsample(channels, config.temporal_downsample[level]))
        self.middle = nn.ModuleList([
            ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)])
        self.head = Head(channels, 2 * config.z_dim)

    def stages(self) -> list[nn.Module]:
        return [self.conv1, *self.downsamples, *self.middle, self.head]


class Decoder(_Stages):
    """Latents [B, z, T, h, w] -> frames [B, 3, 4T, 8h, 8w], or [B, 3, 1, 8h, 8w] for the first latent."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.dim * config.dim_mult[-1]
        self.conv1 = CausalConv3d(config.z_dim, channels)
        self.middle = nn.ModuleList([
            ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)])
        self.upsamples = nn.ModuleList()
        temporal_upsample = config.temporal_downsample[::-1]
        for level, mult in enumerate(reversed(config.dim_mult)):
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(channels, config.dim * mult))
                channels = config.dim * mult
            if level < len(temporal_upsample):
                self.upsamples.append(Upsample(channels, temporal_upsample[level]))
                channels //= 2
        self.head = Head(channels, IMAGE_CHANNELS)

    def stages(self) -> list[nn.Module]:
        return [self.conv1, *self.middle, *self.upsamples, self.head]


def latent_statistics(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of the latents, [16, 1, 1, 1] each, rounded to `dtype` as in a run with that dtype."""
    mean, std = (torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1, 1)
                 for values in (LATENT_MEAN, LATENT_STD))
    return mean, 1 / std


class WanVAE(nn.Module):
    """The whole VAE under the names of `Wan2.1_VAE.pth`: 126,892,531 parameters for the default config."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        levels, halvings = len(config.dim_mult), sum(config.temporal_downsample)
        if (len(config.temporal_downsample) != levels - 1 or config.z_dim != len(LATENT_MEAN)
                or (2**(levels - 1), 2**halvings) != (VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE)):
            raise ValueError(f"VAEConfig: the latent space has {len(LATENT_MEAN)} channels and strides "
                             f"{VAE_SPATIAL_STRIDE} (space), {VAE_TEMPORAL_STRIDE} (time); got {config}.")
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.memory_format = torch.contiguous_format

    def use_channels_last(self) -> WanVAE:
        """Make weights, histories and activations channels last, as cuDNN prefers; call it after loading."""
        return self.use_layout(channels_last=True)

    def use_layout(self, *, channels_last: bool) -> WanVAE:
        """Make weights, histories and activations channels last, or else channels first. Call it after
        loading and before making a decoder.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                last = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
                layout = last if channels_last else torch.contiguous_format
                module.weight.data = module.weight.data.contiguous(memory_format=layout)
        self.memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
        return self

    def init_history(self, batch: int, latent_height: int, latent_width: int, device: torch.device,
                     dtype: torch.dtype) -> History:
        """Zero history for a new stream of `decode`: a flat tuple of [batch, C, 2, H, W]."""
        return self.decoder.init_history(batch, latent_height, latent_width, device, dtype,
                                         self.memory_format)

    def decode(self, z: Tensor, history: History | list[Tensor] | StageHistory, first: bool,
               stages: Sequence[nn.Module] = ()) -> tuple[Tensor, History]:
        """Decode one step of a stream. Has no hidden state and never reads from the device, so it can be
        compiled and captured in a graph.

        z: unscaled latents [B, 16, T, h, w]; history: from `init_history` or the previous step (a list is
        emptied); first: whether z is the first latent of the stream; stages: replacements for the decoder's
        own. Returns raw pixels [B, 3, 4T (first: 1), 8h, 8w], about [-1, 1], and the new history. Raises
        ValueError if first and T > 1.
        """
        if first and z.shape[2] != 1:
            raise ValueError(f"z: the first latent of a stream is decoded alone, got shape {tuple(z.shape)}.")
        z = self.conv2(z.contiguous(memory_format=self.memory_format))
        return self.decoder(z, history, first, stages)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode a video [B, 3, T, H, W] in [-1, 1] to normalised latents [B, 1 + (T-1)//4, 16, H/8, W/8].

        Reads 1 frame, then 4 at a time; like upstream, drops leftover frames at the end. Raises UserError if
        the video is empty, does not have 3 channels, or has sides not divisible by 8.
        """
        shape = tuple(video.shape)
        if len(shape) != 5 or shape[1] != IMAGE_CHANNELS or shape[2] == 0:
            raise UserError(f"video: expected [B, {IMAGE_CHANNELS}, T >= 1, H, W], got {shape}.")
        batch, _, frames, height, width = shape
        if height % VAE_SPATIAL_STRIDE or width % VAE_SPATIAL_STRIDE:
            raise UserError(f"video: height and width must be multiples of {VAE_SPATIAL_STRIDE} pixels, "
                            f"got {shape}; crop or resize it.")
        video = video.contiguous(memory_format=self.memory_format)
        history = self.encoder.init_history(batch, height, width, video.device, video.dtype,
                                            self.memory_format)
        parts, start = [], 0
        for stop in range(1, frames + 1, VAE_TEMPORAL_STRIDE):
            y, history = self.encoder(video[:, :, start:stop], history, first=start == 0)
            parts.append(y)
            start = stop
        mu, _ = self.conv1(torch.cat(parts, dim=2)).chunk(2, dim=1)
        mean, inverse_std = latent_statistics(mu.device, mu.dtype)
        return ((mu - mean) * inverse_std).transpose(1, 2)


class StreamingDecoder:
    """Decodes blocks of latents to frames at once and keeps the history; one video at a time.

    Makes one decoder call per `chunk_latents` latents (1: as upstream). Larger chunks give the same frames,
    up to rounding, with fewer and larger kernels. The first latent of a video is always decoded alone.
    """

    def __init__(self, vae: WanVAE, batch: int, latent_height: int, latent_width: int,
                 chunk_latents: int = 1):
        if chunk_latents < 1:
            raise UserError(f"chunk_latents: {chunk_latents} latents per call is impossible; use 1 or more.")
        weight = next(vae.decoder.parameters())  # of the convolution that reads the latents
        self.vae = vae
        self.shape = (batch, weight.shape[1], latent_height, latent_width)
        self.device, self.dtype = weight.device, weight.dtype
        self.chunk_latents = chunk_latents
        self.mean, self.inverse_std = latent_statistics(self.device, self.dtype)
        self._pass: Callable[[list[Tensor]], StageHistory] = HeldHistory
        self._within: Callable[[], AbstractContextManager[None]] = nullcontext
        self.history_on_host = False
        self.reset()

    def reset(self) -> None:
        """Forget the video; the next push starts a new one."""
        self._history: History | None = None
        self.first = True

    @property
    def history(self) -> History:
        """The convolutions' history, made at its first use."""
        if self._history is None:
            batch, _, height, width = self.shape
            device = torch.device("cpu") if self.history_on_host else self.device
            self._keep(self.vae.init_history(batch, height, width, device, self.dtype))
        return self._history

    def keep_history_on_host(self, passing: Callable[[list[Tensor]], StageHistory]) -> None:
        """Keep the history in host memory from now on (page-locked if there is a GPU), and forget the video.

        Args:
            passing: makes the `StageHistory` of one call.
        """
        self._pass, self.history_on_host = passing, True
        self.reset()

    def decode_within(self, setting: Callable[[], AbstractContextManager[None]]) -> None:
        """Run every later call of the network inside its own context.

        Args:
            setting: makes the context.
        """
        self._within = setting

    def continue_from(self, other: StreamingDecoder) -> None:
        """Continue from the state of `other`, which does not change."""
        if other.history_on_host and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # its history may still be on its way to the host
        self._keep(tuple(h.clone() for h in other.history))
        self.first = other.first

    def _keep(self, history: History) -> None:
        pinned = self.history_on_host and self.device.type == "cuda"
        self._history = tuple(h.pin_memory() for h in history) if pinned else history

    @torch.no_grad()
    def push(self, latents: Tensor) -> list[Tensor]:
        """Decode normalised latents [B, F, 16, h, w]; the list holds one tensor: frames [B, T, 3, 8h, 8w].

        Frames are float32 in [0, 1]; T is 4F, or 4F - 3 at the start of a video. Raises ValueError for a
        wrong shape, dtype or device, and RuntimeError after a push that failed halfway.
        """
        batch, channels, height, width = self.shape
        count = latents.shape[1] if latents.dim() == 5 else 0
        if count == 0 or tuple(latents.shape) != (batch, count, channels, height, width):
            raise ValueError(f"latents: expected [{batch}, F >= 1, {channels}, {height}, {width}], "
                             f"got {list(latents.shape)}.")
        if (latents.dtype, latents.device) != (self.dtype, self.device):
            raise ValueError(f"latents: {latents.dtype} on {latents.device}, but the VAE is {self.dtype} on "
                             f"{self.device}; cast or move one of them.")
        if self._history == ():
            raise RuntimeError("decoder: the last push failed and lost the history; call reset().")
        z = latents.transpose(1, 2) / self.inverse_std + self.mean
        frames, start = [], 0
        while start < count:
            stop = start + (1 if self.first else self.chunk_latents)
            history, self._history = self._pass(list(self.history)), ()
            with self._within():
                pixels, self._history = self.decode(z[:, :, start:stop], history, self.first)
            frames.append(pixels_to_frames(pixels))
            self.first, start = False, stop
        return [torch.cat(frames, dim=1)]

    def decode(self, z: Tensor, history: StageHistory, first: bool) -> tuple[Tensor, History]:
        """Call `WanVAE.decode`; subclasses replace it with something faster."""
        return self.vae.decode(z, history, first)

    def flush(self) -> list[Tensor]:
        """Return no frames: `push` never holds any back."""
        return []


def decode_chunked(vae: WanVAE, latents: Tensor, chunk: int) -> Tensor:
    """Decode [B, F, 16, h, w] to frames [B, T, 3, 8h, 8w], forgetting the past after every `chunk` latents.

    This reproduces upstream's infinity script: each chunk restarts with a single frame, so 3 latents give 9.
    Raises UserError if chunk < 1, ValueError for a wrong shape, dtype or device.
    """
    if chunk < 1:
        raise UserError(f"chunk: {chunk} latents is impossible; use 1 or more.")
    if latents.dim() != 5:
        raise ValueError(f"latents: expected [B, F, C, h, w], got {list(latents.shape)}.")
    batch, _, _, height, width = latents.shape
    decoder = StreamingDecoder(vae, batch, height, width)
    parts = []
    for part in latents.split(chunk, dim=1):
        parts += decoder.push(part)
        decoder.reset()
    return torch.cat(parts, dim=1)


def pixels_to_frames(pixels: Tensor) -> Tensor:
    """Convert raw decoder output [B, 3, T, H, W] to frames [B, T, 3, H, W], float32 in [0, 1]."""
    return (pixels.transpose(1, 2).float().clamp(-1, 1) * 0.5 + 0.5).clamp(0, 1)


def frames_to_uint8(frames: Tensor) -> Tensor:
    """Convert frames in [0, 1] to uint8, truncated (not rounded) as upstream writes them; any shape."""
    return (frames * 255).to(torch.uint8)
