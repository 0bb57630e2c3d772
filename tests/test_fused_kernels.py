"""The fused forward against the plain one: the same numbers in fewer steps, into every kind of ring.

Its kernels are tested in test_kernels.py, its combinations with other optimizations in test_optimizations.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from micro import micro_config, micro_pipeline
from test_optimizations import video, without_pixels
from test_quantized_kv import gpu_pipeline as quantized_gpu_pipeline
from test_quantized_kv import latents_of, models, relative_error
from test_session import same_video
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from longlive_opt.errors import UserError
from longlive_opt.models.dit import TextContext
from longlive_opt.optimizations import optimizations_of
from longlive_opt.optimizations.cuda_graphs import GraphedForward
from longlive_opt.optimizations.fused_kernels import FusedForward, check_triton, gelu_linear
from longlive_opt.optimizations.ring_cache import RingKVCache
from longlive_opt.optimizations.torch_compile import CompiledDecoder
from longlive_opt.prompts import PromptSchedule
from longlive_opt.streaming.kv_cache import KVCache
from longlive_opt.streaming.pipeline import Pipeline
from longlive_opt.streaming.sampler import EagerForward, Forward
from longlive_opt.streaming.session import StreamingSession

STATIC, INT8, FP8 = ({"use_static_kv": True}, {"use_quantized_kv": True},
                     {"use_quantized_kv": True, "kv_quantization": "fp8"})
CACHES = [STATIC, INT8, FP8]
LINEARS = {"use_quantized_linears": True}
PASSES = [*CACHES, {**STATIC, **LINEARS}, {**INT8, **LINEARS}]
SIZES = [{}, {"global_sink": False}, {"relative_rope": True}, {"relative_rope": True, "global_sink": False},
         {"local_attn_size": 7, "sink_size": 2, "block_frames": 3, "relative_rope": True},
         {"local_attn_size": 10, "sink_size": 1, "block_frames": 6},
         {"local_attn_size": 9, "sink_size": 6, "relative_rope": True},
         {"local_attn_size": 6, "sink_size": 0, "block_frames": 2, "relative_rope": True}]
SMALL = {"height": 16, "width": 32}
# Relative RMS in float32: of a video, and of a pass over an 8-bit cache, where the last bit of a number may
# decide about a step of 8 bit.
TOLERANCE, TOLERANCE_8_BIT = 1e-6, 5e-4


@pytest.fixture(autouse=True, scope="module")
def known_models():
    with models():
        yield


def unfused(pipeline: Pipeline) -> Pipeline:
    """The same pipeline, weights and cache with the plain forward."""
    forward = EagerForward(pipeline.dit)
    return dataclasses.replace(pipeline, sampler=pipeline.sampler.with_forward(forward))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_video_equals_the_reference(size):
    """Modulation of the wrong block, frame or timestep, a gate in the wrong place, a sink that is not
    turned: over growth, wrap-around and switches, against the reference's own cache.
    """
    fused = micro_pipeline(use_fused_kernels=True, **STATIC, **size)
    assert isinstance(fused.sampler.forward, FusedForward)
    assert max(map(relative_error, latents_of(fused), latents_of(micro_pipeline(**size)))) < TOLERANCE


@pytest.mark.parametrize("cache", [INT8, FP8], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_passes_equal_the_plain_forward_on_an_8_bit_cache(size, cache):
    """Keys quantised before they are rotated, a frame that is dropped and stored, a sink that is not
    turned."""
    fused = micro_pipeline(use_fused_kernels=True, **cache, **size, **SMALL)
    assert max(map(relative_error, flows_of(fused), flows_of(unfused(fused)))) < TOLERANCE_8_BIT


@torch.no_grad()
def flows_of(pipeline: Pipeline) -> list[Tensor]:
    """What passes over given latents predict, so that differences do not add up: growth, recaches,
    wrap-around."""
    sampler, cache, texts = pipeline.sampler, pipeline.make_cache(), map(pipeline.encode_prompt, "abc")
    generator, block = torch.Generator().manual_seed(0), sampler.plan.block_frames
    video, flows, text = torch.randn(1, 12 * block, 16, 2, 4, generator=generator), [], next(texts)
    for start in range(0, 12 * block, block):
        if start in (2 * block, 8 * block):
            text = next(texts)
            sampler.recache(cache, text, start, video[:, max(0, start - sampler.plan.window):start])
        latents = video[:, start:start + block]
        for timestep in (*sampler.timesteps[:2], 0):
            flows.append(sampler.run_pass(cache, text, start, latents, timestep))
    return flows


def test_bfloat16_rounds_where_the_plain_forward_rounds():
    """A sum kept in float32, or rounded twice: no error, but another model than the one that is compared."""
    keys = {"model": "tiny", "weights": "random", "model_dtype": "bfloat16", "height": 64, "width": 64,
            **STATIC}
    fused = micro_pipeline(use_fused_kernels=True, **keys)
    exact = micro_pipeline(**{**keys, "model_dtype": "float32"})
    exact.dit.load_state_dict(fused.dit.state_dict())
    truth = one_block(exact)
    errors = [relative_error(one_block(pipeline), truth) for pipeline in (fused, unfused(fused))]
    assert abs(errors[0] - errors[1]) < 0.1 * errors[1] < 0.002


def one_block(pipeline: Pipeline) -> Tensor:
    """The first block from fixed noise and a fixed prompt, float32."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = pipeline.latent_shape
    noise = torch.randn(4, 1, 3, channels, height, width, generator=generator).to(pipeline.dtype)
    prompt = torch.randn(1, 8, pipeline.model.dit.text_dim, generator=generator).to(pipeline.dtype)
    with torch.no_grad():
        text = pipeline.dit.embed_text(prompt)
        return pipeline.sampler.denoise_block(pipeline.make_cache(), text, 0, noise[0], noise[1:]).float()


@pytest.mark.parametrize("relative_rope", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("cache", PASSES, ids=str)
@torch.no_grad()
def test_keys_only_leaves_the_same_cache(cache, relative_rope):
    """A clean pass that stops a block too early, or before the sink is turned."""
    pipeline = micro_pipeline(use_fused_kernels=True, relative_rope=relative_rope, **cache, **SMALL)
    full, keys_only = pipeline.make_cache(), pipeline.make_cache()
    text, forward = pipeline.encode_prompt("a"), pipeline.sampler.forward
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 27, 3):
        latents = torch.randn(1, 3, 16, 2, 4, generator=generator)
        for ring, only in ((full, False), (keys_only, True)):
            ring.begin(start, 3)
            forward(latents, 0, text, ring, keys_only=only)
            ring.end()
        for a, b in zip(parts(full), parts(keys_only), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def parts(cache: RingKVCache) -> list[Tensor]:
    return [part for layer in cache.layers for part in (*layer.memory, layer.raw_sink) if part is not None]


def test_weights_are_joined_and_not_copied():
    """Two copies of every q, k and v weight: 0.4 GB at full size."""
    plain, fused = micro_pipeline(**STATIC), micro_pipeline(use_fused_kernels=True, **STATIC)

    def held(pipeline: Pipeline) -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in pipeline.dit.parameters()}
        return sum(storage.nbytes() for storage in storages.values())

    assert held(fused) == held(plain)
    attention = fused.dit.blocks[1].self_attn
    joined = fused.sampler.forward._blocks[1].products.weight
    assert {p.untyped_storage().data_ptr() for p in (attention.q.weight, attention.v.weight, joined)} == {
        joined.untyped_storage().data_ptr()}
    assert fused.optimizations[-1]["report"]["joined_weight_bytes"] == 2 * (3 * 48 * 48 + 3 * 48) * 4


def test_room_comes_before_what_wraps_passes():
    """A compiled or captured forward that the fused one then replaces."""
    flags = {"use_cuda_graphs": True, "use_torch_compile": True, "use_fused_kernels": True}
    assert [optimization.name for optimization in optimizations_of(micro_config(**flags, **INT8))] == [
        "quantized_kv", "fused_kernels", "vae_chunk", "torch_compile", "cuda_graphs"]
    with pytest.raises(UserError, match="heads of 2\\^n channels, but this model has 24"):
        check_triton(24)


def test_compile_leaves_the_transformer_alone():
    """Blocks compiled beside the fused ones: minutes for code that never runs, or code that runs instead."""
    pipeline = micro_pipeline(use_fused_kernels=True, use_torch_compile=True, compile_mode="max-autotune",
                              **INT8)
    assert isinstance(pipeline.sampler.forward, FusedForward)
    assert not any(module._compiled_call_impl for module in pipeline.dit.modules())
    assert isinstance(pipeline.make_vae_decoder(), CompiledDecoder)
    assert "transformer" not in pipeline.optimizations[-1]["report"]["done"]


class Replayed:
    """What CUDA graphs do, on the CPU: a kind of pass runs once plainly, is traced, and replayed from then
    on."""

    def __init__(self, inner: Forward):
        self.inner, self.traces, self.replays = inner, {}, 0

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        key = (cache.signature, tuple(latents.shape), timestep, keys_only)
        if key in self.traces:
            self.replays += 1
            return self.traces[key](latents)

        def run(latents: Tensor) -> Tensor:
            return self.inner(latents, timestep, text, cache, keys_only=keys_only)

        flow = run(latents)
        self.traces[key] = make_fx(run)(latents)
        return flow


@pytest.mark.parametrize("keys", [STATIC, {**STATIC, "relative_rope": True}, {**INT8, "relative_rope": True},
                                  {**FP8, "local_attn_size": 7, "sink_size": 2},
                                  {**STATIC, "relative_rope": True, **LINEARS}, {**FP8, **LINEARS}], ids=str)
def test_a_pass_can_be_captured_and_replayed(keys):
    """A slot, a rotation or a vector of the timestep that lies elsewhere in the next pass."""
    pipeline = without_pixels(micro_pipeline(use_fused_kernels=True, denoising_steps=[1000], **keys, **SMALL))
    replayed = Replayed(pipeline.sampler.forward)
    captured = dataclasses.replace(pipeline, sampler=pipeline.sampler.with_forward(replayed))
    # One prompt throughout: graphs find the prompt at a fixed address, which is their business.
    schedule = PromptSchedule(("a", "a", "a"), (6, 21))
    assert same_video(*(list(StreamingSession(p).play(schedule, 12)) for p in (pipeline, captured)))
    assert replayed.replays > len(replayed.traces)


def test_gelu_on_the_cpu_is_the_tanh_form():
    """The operator with GELU in its epilogue has the exact form on the CPU: 5e-4 off."""
    linear, x = torch.nn.Linear(4, 512), torch.randn(8, 4)
    expected = torch.nn.functional.gelu(linear(x), approximate="tanh")
    assert torch.equal(gelu_linear(x, linear), expected)


# On a GPU.


def gpu_pipeline(**keys: Any) -> Pipeline:
    return quantized_gpu_pipeline(**{"use_quantized_kv": False, "use_fused_kernels": True, **keys})


@torch.no_grad()
def gpu_flows(pipeline: Pipeline) -> list[Tensor]:
    """Flows of passes over given latents, so that differences do not add up: growth, a recache, turns."""
    sampler, cache, block = pipeline.sampler, pipeline.make_cache(), pipeline.sampler.plan.block_frames
    generator, texts = torch.Generator().manual_seed(0), [pipeline.encode_prompt(text) for text in "ab"]
    shape = (1, 8 * block, *pipeline.latent_shape)
    video = torch.randn(shape, generator=generator).to("cuda", pipeline.dtype)
    flows, text = [], texts[0]
    for start in range(0, 8 * block, block):
        if start == 6 * block:
            text = texts[1]
            sampler.recache(cache, text, start, video[:, max(0, start - sampler.plan.window):start])
        for timestep in (sampler.timesteps[0], 0):
            flow = sampler.run_pass(cache, text, start, video[:, start:start + block], timestep)
            flows.append(flow.float().cpu())
    return flows


GPU_CASES = [STATIC, INT8, FP8, {**STATIC, "relative_rope": True}, {**INT8, "relative_rope": True},
             {**FP8, "global_sink": False}, {**INT8, "kv_read_path": "dequantize"},
             {**STATIC, **LINEARS}, {**FP8, "relative_rope": True, **LINEARS}]


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["wide", "tiny"])
@pytest.mark.parametrize("keys", GPU_CASES, ids=str)
def test_gpu_kernels_equal_the_plain_forward(model, keys):
    """A kernel at a size that its own tests do not have; GELU in the wrong form; a slot, a rotation or a sink
    that is wrong once the ring has turned, or after a switch."""
    fused, plain = (gpu_pipeline(model=model, **{**keys, **flags})
                    for flags in ({}, {"use_quantized_linears": False}))
    found, expected = gpu_flows(fused), gpu_flows(unfused(plain))
    assert max(map(relative_error, found, expected)) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("keys", GPU_CASES, ids=str)
def test_gpu_replay_equals_eager_bit_for_bit(keys):
    """A table, a slot or a descriptor that moves; growth, switches, wrap-around, a return, a reset."""
    eager, graphed = gpu_pipeline(**keys), gpu_pipeline(use_cuda_graphs=True, **keys)
    assert same_video(video(eager), video(graphed))
    stats = graphed.optimizations[-1]["report"]["stats"]
    assert stats.replayed > stats.captured == stats.eager


@pytest.mark.gpu
@pytest.mark.parametrize("cache", PASSES, ids=str)
@torch.no_grad()
def test_gpu_next_video_is_captured_while_a_flow_of_the_last_is_held(cache):
    """The memory of graphs that are gone, captured into again: PyTorch's allocator refuses that."""
    pipeline = gpu_pipeline(use_cuda_graphs=True, **cache)
    text, sampler = pipeline.encode_prompt("a"), pipeline.sampler
    latents = torch.randn(1, 3, *pipeline.latent_shape, device="cuda", dtype=torch.bfloat16)
    videos = []
    for _ in range(2):
        ring = pipeline.make_cache()
        videos.append([sampler.run_pass(ring, text, 0, latents, sampler.timesteps[0]) for _ in range(2)])
    assert all(map(torch.equal, *videos)) and pipeline.sampler.forward.stats.replayed == 2


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("cache", PASSES, ids=str)
def test_gpu_composes_with_compile(cache, graphs):
    """Two optimizations that both capture, a compiled block under the fused one, a fused forward that is
    lost.
    """
    torch._dynamo.reset()
    fused = gpu_pipeline(**cache)
    both = gpu_pipeline(use_torch_compile=True, compile_mode="reduce-overhead", use_cuda_graphs=graphs,
                        **cache)
    forward = both.sampler.forward
    assert isinstance(forward, GraphedForward) and isinstance(forward.inner, FusedForward)
    assert all(map(torch.equal, latents_of(both), latents_of(fused)))
    assert len(list(StreamingSession(both).stream("a", 2))) == 2
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", PASSES, ids=str)
@torch.no_grad()
def test_gpu_steady_state_neither_waits_nor_allocates_nor_captures(cache):
    """A pass that asks the device for a number, a graph for each block, memory that grows."""
    pipeline = gpu_pipeline(relative_rope=True, **cache)
    ring, text, sampler = pipeline.make_cache(), pipeline.encode_prompt("a"), pipeline.sampler
    latents = torch.randn(1, 3, *pipeline.latent_shape, device="cuda", dtype=torch.bfloat16)
    allocated = []
    try:
        for start in range(0, 45, 3):
            torch.cuda.set_sync_debug_mode("error" if start >= 30 else "default")
            for timestep in (*sampler.timesteps, 0):
                sampler.run_pass(ring, text, start, latents, timestep, keys_only=timestep == 0)
            allocated.append(torch.cuda.memory_allocated())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(set(allocated[6:])) == 1

    captured = gpu_pipeline(relative_rope=True, use_cuda_graphs=True, **cache)
    stats = captured.optimizations[-1]["report"]["stats"]
    counts = [stats.captured for _ in StreamingSession(without_pixels(captured)).stream("a", 20)]
    assert counts[8] == counts[19]
