"""All optimizations: the order in which they are applied, and which ones go together."""

from __future__ import annotations

import time

from ..config import ExperimentConfig
from ..models.weight_files import tiny_vae_file
from ..ranks.heads import Alone, Exchange
from ..ranks.processes import Family
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
from .quantized_vae import QuantizedVAE
from .several_gpus import Leader, SeveralGPUs, start_ranks
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
        (config.use_quantized_vae, QuantizedVAE()),
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


def build_pipeline(config: ExperimentConfig, family: Family | None = None) -> Pipeline:
    """Load the model and apply every optimization of the preset.

    With a prompt cache on disk, the text encoder is loaded only when a prompt is not in the cache. With
    several GPUs, this process becomes rank 0 and starts the others. They end with the pipeline,
    `StreamingSession.close` or this process.

    Args:
        family: ranks to use instead of new ones, if there are several GPUs; they may have built another
        preset.

    Raises:
        UserError: weights or the device are missing, or an optimization cannot be applied here.
        RankFailed: another rank ended.
    """
    config.validate()
    if config.has_tiny_vae:  # refuse a missing file before minutes of loading
        tiny_vae_file(config.vae, config.vae_weights, config.weights)
    if config.gpus == 1:
        return _with_text(build_rank(config), config)
    leader = Leader.of(config, family or start_ranks(config))
    with leader.family.watched():
        pipeline = _with_text(build_rank(config, leader.team.exchange), config)
        started = time.perf_counter()
        leader.replies("ready")
        pipeline.setup_s["load"] += time.perf_counter() - started
    return SeveralGPUs(config.gpus, config.vae_ranks).lead(pipeline, leader)


def build_rank(config: ExperimentConfig, exchange: Exchange = Alone()) -> Pipeline:
    """The pipeline of one rank, with every optimization of the preset and without the weights of the text
    encoder.

    Args:
        exchange: that of a rank that denoises together with others.
    """
    pipeline = build_reference(config, exchange)
    for optimization in optimizations_of(config):
        pipeline = optimization.apply(pipeline)
    return pipeline


def _with_text(pipeline: Pipeline, config: ExperimentConfig) -> Pipeline:
    if not (config.use_prompt_cache and config.prompt_cache_dir):
        started = time.perf_counter()
        pipeline.text_encoder.load()
        pipeline.setup_s["load"] += time.perf_counter() - started
    return pipeline
