"""TAEHV: a decoder of Wan 2.1's latents with 9.84 million parameters instead of the Wan VAE's 73 million.
Sources: the published structure (github.com/madebyollin/taehv, `taew2_1.pth`) and LightX2V's weights for it
(`lighttaew2_1`).

Every frame is decoded alone, except that a memory block also sees its own *input* of the frame before, zeros
at the start of a video. These last inputs, one [B, C, H, W] per memory block, are all the state of a stream.
Each call reads them and overwrites them in place, so that their addresses never change and a CUDA graph of a
call carries them on. Within a call, all frames run at once.

The network is causal: a latent makes four frames of which the last belongs to the latent itself. The first
latent of a video stands for one frame, so the first three frames are dropped.

The files also hold an encoder; it is not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specs import VAE_TEMPORAL_STRIDE, TinyVAESpec
from .vae import IMAGE_CHANNELS, History, StageHistory, StreamingDecoder

LATENT_CHANNELS = 16
WIDTHS = (256, 128, 64, 64)
"""Channels at 1, 2, 4 and 8 times the latents' height and width."""
FRAMES_GROWN = (1, 2, 2)
"""Frames made of one at each of the three enlargements."""
MEMORIES = 3
"""Memory blocks in front of each enlargement."""
TRIMMED = VAE_TEMPORAL_STRIDE - 1
_ENCODER_WIDTH = 64
_POOLED = (2, 2, 1)


class Clamp(nn.Module):
    """A soft limit of the latents to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Three convolutions of a frame and of the frame before it, plus the frame itself."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(2 * channels, channels), nn.ReLU(), _conv(channels, channels),
                                  nn.ReLU(), _conv(channels, channels))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: frames [T*B, C, H, W], those of one time next to each other; memory: [B, C, H, W], the last
        input, which this replaces by x's last frames in place.
        """
        batch = len(memory)
        past = memory if len(x) == batch else torch.cat([memory, x[:-batch]])
        y = F.relu(self.conv(torch.cat([x, past], dim=1)) + x)
        memory.copy_(x[-batch:])
        return y


class Grow(nn.Module):
    """Makes `times` frames of each by a 1x1 convolution."""

    def __init__(self, channels: int, times: int):
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(channels, channels * times, 1, bias=False)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """[T*B, C, H, W] -> [T*times*B, C, H, W]."""
        y = self.conv(x)
        if self.times == 1:
            return y
        # On the channels-last view, the reordering is one copy that keeps the layout.
        y = y.permute(0, 2, 3, 1).unflatten(-1, (self.times, -1)).unflatten(0, (-1, batch))
        return y.permute(0, 4, 1, 2, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


class TAEHV(nn.Module):
    """The decoder under the names of the published files."""

    def __init__(self, spec: TinyVAESpec):
        super().__init__()
        self.spec = spec
        layers: dict[str, nn.Module] = {"0": Clamp(), "1": _conv(LATENT_CHANNELS, WIDTHS[0]), "2": nn.ReLU()}
        for level, times in enumerate(FRAMES_GROWN):
            first, (channels, narrower) = 6 * level + 3, WIDTHS[level:level + 2]
            layers |= {str(first + block): MemBlock(channels) for block in range(MEMORIES)}
            # A 1x1 convolution gives the same before the enlargement, which copies pixels, at a quarter of
            # the work. So layer 7 comes before 6, 13 before 12 and 19 before 18.
            layers |= {str(first + 4): Grow(channels, times), str(first + 3): nn.Upsample(scale_factor=2),
                       str(first + 5): _conv(channels, narrower, bias=False)}
        layers |= {"21": nn.ReLU(), "22": _conv(WIDTHS[-1], IMAGE_CHANNELS)}
        self.decoder = nn.ModuleDict(layers)

    def use_channels_last(self) -> TAEHV:
        """Make the weights channels last, the only layout of memory and activations; call it after loading.
        """
        return self.to(memory_format=torch.channels_last)

    def init_history(self, batch: int, latent_height: int, latent_width: int, device: torch.device,
                     dtype: torch.dtype) -> History:
        """Zero memory for a new video: one [batch, C, H, W] per memory block."""
        shapes = ((batch, channels, latent_height << level, latent_width << level)
                  for level, channels in enumerate(WIDTHS[:-1]) for _ in range(MEMORIES))
        return tuple(torch.zeros(shape, device=device, dtype=dtype).contiguous(
            memory_format=torch.channels_last) for shape in shapes)

    def forward(self, z: Tensor, *memory: Tensor) -> Tensor:
        """Decode frames without state other than `memory`, which is replaced in place.

        z: latents [B, 16, T, h, w], unscaled if the spec says so. Returns pixels [B, 3, 4T, 8h, 8w], about
        0..1, not clamped.
        """
        batch, memories = len(z), iter(memory)
        x = z.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for layer in self.decoder.values():
            if isinstance(layer, MemBlock):
                x = layer(x, next(memories))
            elif isinstance(layer, Grow):
                x = layer(x, batch)
            else:
                x = layer(x)
        return x.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4)


class TAEHVDecoder(StreamingDecoder):
    """A `StreamingDecoder` whose memory stays at its addresses for as long as the decoder lives."""

    _memory: History | None = None

    def __init__(self, vae: TAEHV, *arguments: int):
        """Args: arguments: those of `StreamingDecoder`."""
        super().__init__(vae, *arguments)
        if not vae.spec.unscaled:
            self.mean, self.inverse_std = torch.zeros_like(self.mean), torch.ones_like(self.inverse_std)

    def reset(self) -> None:
        super().reset()
        if self._memory is not None:
            for memory in self._memory:
                memory.zero_()
            self._history = self._memory

    def _keep(self, history: History) -> None:
        if self._memory is None:
            self._memory = history
        elif history is not self._memory:
            for memory, new in zip(self._memory, history, strict=True):
                memory.copy_(new)
        self._history = self._memory

    def decode(self, z: Tensor, history: StageHistory, first: bool) -> tuple[Tensor, History]:
        memory = history.take(len(WIDTHS[:-1]) * MEMORIES)
        pixels = self.run(z, memory)
        history.put(memory)
        # In float32: bfloat16 has too few steps near -1 for dark colours.
        return 2 * pixels[:, :, TRIMMED if first else 0:].float() - 1, history.whole()

    def run(self, z: Tensor, memory: History) -> Tensor:
        """Call the network; subclasses replace it with something faster."""
        return self.vae(z, *memory)


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the encoder's tensors in the published files, by name."""
    width = _ENCODER_WIDTH
    return {f"encoder.{name}": shape for name, shape in _encoder_tensors(width, (width, width, 3, 3))}


def _encoder_tensors(width: int, square: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("0.weight", (width, IMAGE_CHANNELS, 3, 3)), ("0.bias", (width,)))
    for level, pooled in enumerate(_POOLED):
        first = 5 * level + 2
        yield from ((f"{first}.conv.weight", (width, pooled * width, 1, 1)), (f"{first + 1}.weight", square))
        for block in range(first + 2, first + 2 + MEMORIES):
            yield f"{block}.conv.0.weight", (width, 2 * width, 3, 3)
            yield from ((f"{block}.conv.{layer}.weight", square) for layer in (2, 4))
            yield from ((f"{block}.conv.{layer}.bias", (width,)) for layer in (0, 2, 4))
    yield from (("17.weight", (LATENT_CHANNELS, width, 3, 3)), ("17.bias", (LATENT_CHANNELS,)))
