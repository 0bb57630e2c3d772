"""Sizes of the networks: LongLive-1.3B, and the tiny model of the same architecture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Mapping

from ..errors import UserError

VAE_SPATIAL_STRIDE = 8
VAE_TEMPORAL_STRIDE = 4
WINDOW_FRAMES = 12
ROPE_POSITIONS = 1024
FETCH_COMMAND = "python -m longlive_opt.fetch"
WAN_FOLDER = "Wan2.1-T2V-1.3B"


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the causal video diffusion transformer (defaults: LongLive-1.3B, i.e. Wan2.1-T2V-1.3B)."""

    dim: int = 1536
    num_heads: int = 12
    num_layers: int = 30
    ffn_dim: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the Wan 2.1 VAE; `temporal_downsample` is in encoder order, the decoder reverses it."""

    dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the UMT5 text encoder (defaults: UMT5-XXL)."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512


@dataclass(frozen=True)
class ModelConfig:
    """One complete model: transformer, VAE, text encoder and the picture size in pixels."""

    name: str
    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    height: int = 480
    width: int = 832
    fps: int = 16

    @property
    def latent_height(self) -> int:
        return self.height // VAE_SPATIAL_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // VAE_SPATIAL_STRIDE

    @property
    def tokens_per_frame(self) -> int:
        """Transformer tokens in one latent frame (1560 at 480x832)."""
        _, patch_height, patch_width = self.dit.patch_size
        return (self.latent_height // patch_height) * (self.latent_width // patch_width)

    @property
    def window_tokens(self) -> int:
        """Keys of LongLive's attention window of 12 latent frames (18,720 at 480x832), whatever window a run
        has.
        """
        return WINDOW_FRAMES * self.tokens_per_frame

    def with_size(self, height: int | None, width: int | None) -> ModelConfig:
        """The same model at another picture size in pixels; both must be positive multiples of 16."""
        height = self.height if height is None else height
        width = self.width if width is None else width
        multiple = VAE_SPATIAL_STRIDE * self.dit.patch_size[1]
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % multiple:
                raise UserError(f"{name}: {value} is not a positive multiple of {multiple} pixels; "
                                f"try {max(multiple, round(value / multiple) * multiple)}.")
        return dataclasses.replace(self, height=height, width=width)


def _tiny() -> ModelConfig:
    text = TextEncoderConfig(vocab_size=384, dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=2,
                             text_len=128)
    dit = DiTConfig(dim=256, num_heads=4, num_layers=6, ffn_dim=768, freq_dim=128, text_dim=text.dim,
                    text_len=text.text_len)
    return ModelConfig("tiny", dit, VAEConfig(dim=16), text, height=128, width=128)


MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {"longlive-1.3b": ModelConfig("longlive-1.3b"), "tiny": _tiny()}
)
