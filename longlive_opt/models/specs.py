"""Every model of the family: its sizes, window, sink, denoising steps, and the files that hold its weights.

Each model is one row of `MODELS`. The config reads its window, sink and steps here, `weight_files` the
locations of its files, and `fetch` their sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import UserError

VAE_SPATIAL_STRIDE = 8
VAE_TEMPORAL_STRIDE = 4
ROPE_POSITIONS = 1024
MOST_LORA_ALPHA = 1e6
FETCH_COMMAND = "python -m longlive_opt.fetch"
WAN_FOLDER = "Wan2.1-T2V-1.3B"
WAN_REPO = "Wan-AI/Wan2.1-T2V-1.3B"


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
class Source:
    """One file, or one folder (path ending in "/"), in a repository of a model hub.

    Args:
        part: the part of a checkpoint, `dit`, `vae` or `text`, or `tiny_vae`.
        target: its path in a weights folder.
        approx_bytes: its recorded size, shown when the hub cannot be reached; None means unknown.
    """

    part: str
    repo: str
    path: str
    target: str
    approx_bytes: int | None = None


@dataclass(frozen=True)
class TinyVAESpec:
    """A decoder with the structure of TAEHV (`taehv`) for Wan 2.1's latents.

    Args:
        title: its name in reports.
        unscaled: whether it reads latents with the VAE's mean and standard deviation, as the Wan VAE does,
            instead of the normalised ones that the transformer makes.
        source: where it is published.
    """

    name: str
    title: str
    unscaled: bool
    source: Source


WAN_VAE = "wan"
TINY_VAES: Mapping[str, TinyVAESpec] = MappingProxyType({spec.name: spec for spec in (
    TinyVAESpec("taew2_1", "TAEHV (taew2_1)", False, Source(
        "tiny_vae", "lightx2v/Autoencoders", "taew2_1.pth", "taew2_1.pth")),
    TinyVAESpec("lighttaew2_1", "LightTAE (lighttaew2_1)", True, Source(
        "tiny_vae", "lightx2v/Autoencoders", "lighttaew2_1.pth", "lighttaew2_1.pth", 45_301_802)),
)})
"""Every tiny VAE that a preset can choose by its key `vae`."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a weights folder that hold a model.

    Args:
        files: path in the folder by part: `dit`, `vae`, `text`, `tokenizer`, and `lora` if an adapter is
            merged.
        containers: keys that may hold the transformer's tensors in its torch file, in order of preference;
            None means the file itself.
        sources: where the files are published; empty for weights that come with the project.
    """

    files: Mapping[str, str]
    containers: tuple[str | None, ...] = ("generator", "model", None)
    sources: tuple[Source, ...] = ()


def _wan_checkpoint(own: Mapping[str, tuple[str, str, int | None]], repo: str,
                    containers: tuple[str | None, ...]) -> CheckpointFiles:
    """The files of a transformer in `repo` (part -> path there, path here, bytes) plus Wan 2.1's VAE and text
    encoder.
    """
    files = {
        "vae": f"{WAN_FOLDER}/Wan2.1_VAE.pth",
        "text": f"{WAN_FOLDER}/models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": f"{WAN_FOLDER}/google/umt5-xxl",
    }
    sources = [Source("dit", repo, path, place, size) for path, place, size in own.values()]
    sources += [
        Source("dit", WAN_REPO, "config.json", f"{WAN_FOLDER}/config.json", 249),
        Source("vae", WAN_REPO, "Wan2.1_VAE.pth", files["vae"], 507_609_880),
        Source("text", WAN_REPO, "models_t5_umt5-xxl-enc-bf16.pth", files["text"], 11_361_920_418),
        Source("text", WAN_REPO, "google/umt5-xxl/", f"{files['tokenizer']}/", 21_454_081),
    ]
    places = {part: place for part, (_, place, _) in own.items()}
    return CheckpointFiles({**places, **files}, containers, tuple(sources))


@dataclass(frozen=True)
class ModelSpec:
    """One complete model.

    Args:
        title: its name in reports.
        height, width: of the picture, in pixels.
        window, sink: of attention, in latent frames.
        steps: nominal timesteps of the denoising passes.
        full_size: whether speed and memory metrics are those of the published size.
    """

    name: str
    title: str
    checkpoint: CheckpointFiles
    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    height: int = 480
    width: int = 832
    fps: int = 16
    window: int = 12
    sink: int = 3
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    full_size: bool = True

    def sizes(self) -> dict[str, Any]:
        """Return everything except the checkpoint, for a result."""
        values = dataclasses.asdict(dataclasses.replace(self, checkpoint=CheckpointFiles({})))
        del values["checkpoint"]
        return values

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
        """Keys in the model's own attention window (LongLive-1.3B: 12 latent frames, 18,720 at 480x832),
        independent of the run's window.
        """
        return self.window * self.tokens_per_frame

    def with_size(self, height: int | None, width: int | None) -> ModelSpec:
        """The same model at another picture size in pixels; both must be positive multiples of 16."""
        height = self.height if height is None else height
        width = self.width if width is None else width
        multiple = VAE_SPATIAL_STRIDE * self.dit.patch_size[1]
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % multiple:
                raise UserError(f"{name}: {value} is not a positive multiple of {multiple} pixels; "
                                f"try {max(multiple, round(value / multiple) * multiple)}.")
        return dataclasses.replace(self, height=height, width=width)


def _tiny() -> ModelSpec:
    text = TextEncoderConfig(vocab_size=384, dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=2,
                             text_len=128)
    dit = DiTConfig(dim=256, num_heads=4, num_layers=6, ffn_dim=768, freq_dim=128, text_dim=text.dim,
                    text_len=text.text_len)
    files = {"dit": "longlive_base.safetensors", "vae": f"{WAN_FOLDER}/Wan2.1_VAE.safetensors",
             "text": f"{WAN_FOLDER}/models_t5_umt5-xxl-enc-bf16.safetensors",
             "tokenizer": f"{WAN_FOLDER}/google/umt5-xxl"}
    return ModelSpec("tiny", "tiny", CheckpointFiles(files), dit, VAEConfig(dim=16), text, height=128,
                     width=128, full_size=False)


LONGLIVE = "longlive-1.3b"
"""The model to which the presets' hypotheses and the target of 40 ms refer."""
MODELS: Mapping[str, ModelSpec] = MappingProxyType({spec.name: spec for spec in (
    ModelSpec(LONGLIVE, "LongLive-1.3B", _wan_checkpoint(
        {"dit": ("models/longlive_base.pt", "longlive_base.pt", 5_676_334_208),
         "lora": ("models/lora.pt", "lora.pt", 2_800_056_690)},
        "Efficient-Large-Model/LongLive-1.3B", ("generator", "model", None))),
    ModelSpec("self-forcing-1.3b", "Self-Forcing-1.3B", _wan_checkpoint(
        {"dit": ("checkpoints/self_forcing_dmd.pt", "self_forcing_dmd.pt", None)},
        "gdhe17/Self-Forcing", ("generator_ema",)), window=21, sink=0),
    ModelSpec("causal-forcing-1.3b", "Causal-Forcing-1.3B", _wan_checkpoint(
        {"dit": ("chunkwise/causal_forcing.pt", "causal_forcing.pt", None)},
        "zhuhz22/Causal-Forcing", ("generator", None)), window=21, sink=0),
    _tiny(),
)})
