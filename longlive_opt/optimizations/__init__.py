"""All optimizations: the order in which they are applied, and which ones go together."""

from __future__ import annotations

import time

from ..config import ExperimentConfig
from ..models.weight_files import tiny_vae_file
from ..streaming.pipeline import Pipeline, build_reference
from .async_vae import AsyncVAE
from .attention_backend import GluonAttention
from .base import Optimization
from .cuda_graphs import CudaGraphs
from .early_decode import EarlyDecode
from .early_frames import EarlyFrames
from .fused_kernels import FusedKernels
from .fused_vae import FusedVAE
from .prompt_cache import PromptCache
from .quantized_kv_cache import QuantizedKV
from .quantized_linears import QuantizedLinears
from .static_kv_cache import StaticKV
from .text_offload import TextOffload
from .tiny_vae import TinyVAE
from .torch_compile import TorchCompile
from .vae_offload import VAEOffload
from .vae_switches import CudnnBenchmark, VAEChannelsLast, VAEChunk


def optimizations_of(config: ExperimentConfig) -> list[Optimization]:
    """Return the optimizations that a preset switches on, in order of application: caches, VAE calls, then
    what runs the passes (compiled code can be captured, captured code cannot be compiled), then what wraps
    whole stages.
    """
    switches = config.vae_switches
    table: list[tuple[bool, Optimization]] = [
        (config.attention_backend == GluonAttention.backend, GluonAttention()),
        (config.use_static_kv and not config.use_quantized_kv, StaticKV()),
        (config.use_quantized_kv, QuantizedKV(config.kv_quantization, config.kv_read_path)),
        (config.use_fused_kernels, FusedKernels()),
        (config.use_quantized_linears, QuantizedLinears(config.linear_quantization, config.linear_layers)),
        ("vae_channels_last" in switches, VAEChannelsLast(config.vae_is_channels_last)),
        ("vae_chunk_latents" in switches, VAEChunk(config.latents_per_vae_call)),
        (config.use_fused_vae, FusedVAE()),
        (config.has_tiny_vae, TinyVAE(config.vae)),
        (config.use_torch_compile, TorchCompile(config.compile_mode)),
        ("cudnn_benchmark" in switches, CudnnBenchmark()),
        (config.use_cuda_graphs, CudaGraphs()),
        (config.use_vae_offload, VAEOffload(config.vae_offload_ahead)),
        (config.use_text_offload, TextOffload()),
        (config.use_prompt_cache, PromptCache(config.prompt_cache_mb, config.prompt_cache_dir)),
        (config.use_early_decode, EarlyDecode()),
        (config.use_early_frames, EarlyFrames()),
        (config.use_async_vae, AsyncVAE()),
    ]
    return [optimization for wanted, optimization in table if wanted]


def build_pipeline(config: ExperimentConfig) -> Pipeline:
    """Load the model and apply every optimization of the preset.

    With a prompt cache on disk, the text encoder is loaded only when a prompt is not in the cache.

    Raises:
        UserError: weights or the device are missing, or an optimization cannot be applied here.
    """
    config.validate()
    if config.has_tiny_vae:  # refuse a missing file before minutes of loading
        tiny_vae_file(config.vae, config.vae_weights, config.weights)
    pipeline = build_reference(config)
    for optimization in optimizations_of(config):
        pipeline = optimization.apply(pipeline)
    if not (config.use_prompt_cache and config.prompt_cache_dir):
        started = time.perf_counter()
        pipeline.text_encoder.load()
        pipeline.setup_s["load"] += time.perf_counter() - started
    return pipeline
