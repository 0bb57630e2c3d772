"""A pipeline: the five components that optimizations replace. The session cannot see which ones are replaced.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Callable, Protocol

import torch
from torch import Tensor

from ..config import ExperimentConfig
from ..errors import NotAvailable, UserError
from ..kernels.attention_bf16 import check_gpu
from ..kernels.torch_internals import expand_segments
from ..models.attention import make_attention, resolve_backend
from ..models.dit import CausalDiT, TextContext
from ..models.specs import ModelSpec
from ..models.taehv import TAEHV
from ..models.text import TextEncoder
from ..models.vae import StreamingDecoder, WanVAE
from ..models.weight_files import WeightFiles, check_weights
from ..models.weights import WeightsReport, load_dit, load_vae, open_text_encoder
from ..ranks.heads import Alone, Exchange
from .decoder import Decoder, Delivery, InlineDecoder
from .kv_cache import CacheGeometry, KVCache, RollingKVCache
from .preview import facts_html
from .sampler import EagerForward, Sampler, SamplingPlan
from .timeline import NullTimeline, Timeline


class Ranks(Protocol):
    """The other ranks of a pipeline on several GPUs."""

    def close(self) -> None:
        """End them; the pipeline cannot be used afterwards."""


@dataclass(frozen=True, repr=False)
class Pipeline:
    """Everything a session needs.

    The components are `encode_prompt` (with its `embed_text`), `sampler` (with its `forward`), `make_cache`,
    `make_vae_decoder` (the network calls that make frames) and `make_decoder` (when these calls run). The
    session cannot see which ones are replaced. The result includes `weights`, `setup_s` (seconds) and
    `optimizations`, the report of each optimization. `ranks` are the other ranks, None on one GPU. With
    `encode_ahead` a prompt is encoded while a block is made (`prompt_queue`).
    """

    config: ExperimentConfig
    model: ModelSpec
    device: torch.device
    dtype: torch.dtype
    attention_backend: str
    dit: CausalDiT
    vae: WanVAE | TAEHV
    text_encoder: TextEncoder
    embed_text: Callable[[Tensor], TextContext]
    encode_prompt: Callable[[str], TextContext]
    sampler: Sampler
    make_cache: Callable[[], KVCache]
    make_vae_decoder: Callable[[], StreamingDecoder]
    make_decoder: Callable[[StreamingDecoder, Timeline | NullTimeline, Delivery], Decoder]
    weights: dict[str, Any]
    setup_s: dict[str, float]
    optimizations: tuple[dict[str, Any], ...] = ()
    ranks: Ranks | None = None
    encode_ahead: bool = False

    def __repr__(self) -> str:
        size = f"{self.model.width}x{self.model.height}"
        dtype = str(self.dtype).removeprefix("torch.")
        done = ", ".join(one["name"] for one in self.optimizations) or "no optimization"
        return (f"Pipeline({self.model.name} {size}, {self.device}, {dtype}, "
                f"weights: {self.weights['kind']}, attention: {self.attention_backend}, {done})")

    def _repr_html_(self) -> str:
        """What runs on what, the memory of the weights, and what each optimization did."""
        sizes = f"transformer {_gigabytes(self.dit)}, VAE {_gigabytes(self.vae)}"
        rows = [("model", f"{self.model.name}, {self.model.width}x{self.model.height}"),
                ("device", f"{self.device}, {str(self.dtype).removeprefix('torch.')}, attention: "
                           f"{self.attention_backend}"),
                ("weights", f"{self.weights['kind']}; {sizes}")]
        rows += [(one["name"], f"{one['exactness']}: {one['report']['done']}") for one in self.optimizations]
        return facts_html("Pipeline" + ("" if self.optimizations else " without optimizations"), rows)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent frame."""
        return self.model.vae.z_dim, self.model.latent_height, self.model.latent_width


def _gigabytes(module: torch.nn.Module) -> str:
    return f"{sum(tensor.nbytes for tensor in module.state_dict().values()) / 1e9:.3g} GB"


def sampling_plan(config: ExperimentConfig) -> SamplingPlan:
    return SamplingPlan(
        config.denoising_steps,
        config.timestep_shift,
        config.context_noise,
        config.block_frames,
        config.local_attn_size,
        config.sink_size,
        config.global_sink,
    )


def cache_geometry(config: ExperimentConfig, model: ModelSpec) -> CacheGeometry:
    """The sizes of a cache on one rank, which holds its share of the heads."""
    _, patch_height, patch_width = model.dit.patch_size
    heads = model.dit.num_heads // config.head_groups
    return CacheGeometry(model.dit.num_layers, heads, model.dit.head_dim,
                         model.latent_height // patch_height, model.latent_width // patch_width,
                         config.local_attn_size, config.sink_size, config.relative_rope)


def check_device(name: str) -> torch.device:
    """Return the torch device `name`.

    Raises:
        UserError: CUDA is requested but not available.
    """
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise UserError(
                f"device: {name!r} was requested, but PyTorch {torch.__version__} sees {count} CUDA "
                "devices here; use device: cpu with model: tiny, or run on a machine with an NVIDIA GPU."
            )
    return device


def limit_memory(device: torch.device, limit_gb: float | None) -> None:
    """Limit PyTorch's allocator to `limit_gb` (1e9 bytes) of the GPU; None means no limit.

    Exceeding the limit raises `torch.OutOfMemoryError`. The limit does not include the CUDA context.

    Raises:
        NotAvailable: a limit is set, but the device is not a GPU.
        UserError: the GPU has less memory than the limit.
    """
    if device.type != "cuda":
        if limit_gb is not None:
            raise NotAvailable(f"gpu_memory_limit_gb: {limit_gb} limits a GPU's memory, but this run is on "
                               f"{device.type}.")
        return
    total_gb = torch.cuda.get_device_properties(device).total_memory / 1e9
    if limit_gb is not None and limit_gb > total_gb:
        raise UserError(f"gpu_memory_limit_gb: {limit_gb} is more than this GPU's {total_gb:.1f} GB; write "
                        "less, or null for no limit.")
    if limit_gb is not None:
        # Fixed segments leave gaps of up to a tenth of such a small memory.
        expand_segments()
    torch.cuda.set_per_process_memory_fraction(1.0 if limit_gb is None else limit_gb / total_gb,
                                              device.index or 0)


def prompt_encoder(encoder: TextEncoder,
                   embed_text: Callable[[Tensor], TextContext]) -> Callable[[str], TextContext]:
    """Make a function from a prompt to the transformer's text input, without a cache."""
    return lambda prompt: embed_text(encoder.encode([prompt]))


def build_reference(config: ExperimentConfig, exchange: Exchange = Alone()) -> Pipeline:
    """Load the three networks and assemble the reference pipeline, the baseline of every comparison.

    Args:
        exchange: that of a rank that denoises together with others.

    Raises:
        UserError: the config is invalid, the device does not exist, or weights are missing or do not fit.
    """
    started = time.perf_counter()
    config.validate()
    files = check_weights(config.weights, config.model_config())
    device = check_device(config.device)
    limit_memory(device, config.gpu_memory_limit_gb)
    model, dtype = config.model_config(), getattr(torch, config.model_dtype)
    backend = resolve_backend(config.attention_backend, device, dtype)
    if backend == "gluon" and device.type == "cuda":
        check_gpu(device, dtype, model.dit.head_dim)
    digests = files.sha256()
    (dit, dit_report), (vae, vae_report) = _load_networks(config, files, device, dtype)
    dit.exchange = exchange
    text_encoder = open_text_encoder(model.text, files, device, dtype, config.seed, digests.get("text"))
    return Pipeline(
        config=config,
        model=model,
        device=device,
        dtype=dtype,
        attention_backend=backend,
        text_encoder=text_encoder,
        **_components(config, model, backend, dit, vae, text_encoder),
        weights={
            "kind": files.kind,
            "seed": config.seed if files.kind == "random" else None,
            "sha256": digests,
            "dit": dit_report,
            "vae": vae_report,
            "text_encoder": text_encoder.report,
            "tokenizer": text_encoder.description,
        },
        setup_s={"load": time.perf_counter() - started},
        encode_ahead=device.type == "cuda",
    )


def float32_twin(pipeline: Pipeline) -> Pipeline:
    """Build the baseline in float32 from the files or seed of `pipeline`'s weights, without optimizations. It
    reuses the text encoder of `pipeline` and widens its output.

    Until it is released, it takes twice the memory of the bfloat16 transformer and VAE.
    """
    config = replace(pipeline.config, model_dtype="float32", attention_backend="auto", gpus=1)
    backend = resolve_backend(config.attention_backend, pipeline.device, torch.float32)
    files = check_weights(config.weights, config.model_config())
    (dit, _), (vae, _) = _load_networks(config, files, pipeline.device, torch.float32)
    return replace(pipeline, config=config, dtype=torch.float32, attention_backend=backend, optimizations=(),
                   ranks=None,
                   **_components(config, pipeline.model, backend, dit, vae, pipeline.text_encoder))


def _load_networks(
    config: ExperimentConfig, files: WeightFiles, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[CausalDiT, WeightsReport], tuple[WanVAE, WeightsReport]]:
    """Load transformer and VAE, each with its weights report."""
    model = config.model_config()
    dit = load_dit(model.dit, files, device, dtype, config.seed, config.lora_alpha,
                   window_tokens=model.window_tokens)
    vae, vae_report = load_vae(model.vae, files, device, dtype, config.seed)
    if device.type == "cpu":
        vae.use_channels_last()  # otherwise norms over the channels take half of the time
    return dit, (vae, vae_report)


def _components(config: ExperimentConfig, model: ModelSpec, backend: str, dit: CausalDiT, vae: WanVAE,
                text_encoder: TextEncoder) -> dict[str, Any]:
    """Return the networks and the reference parts around them, as fields of a pipeline."""
    attention, geometry = make_attention(backend), cache_geometry(config, model)
    for block in dit.blocks:
        block.attention = attention
    height, width = model.latent_height, model.latent_width
    return {
        "dit": dit,
        "vae": vae,
        "embed_text": dit.embed_text,
        "encode_prompt": prompt_encoder(text_encoder, dit.embed_text),
        "sampler": Sampler(sampling_plan(config), EagerForward(dit)),
        "make_cache": lambda: RollingKVCache(geometry, attention, 1, dit.device, dit.dtype),
        "make_vae_decoder": lambda: StreamingDecoder(vae, 1, height, width),
        "make_decoder": InlineDecoder,
    }
