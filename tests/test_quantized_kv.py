"""The 8-bit ring cache: against an attention that quantises what it reads, in the model, compiled and
captured.

What it shares with the ring in the model's dtype is tested in test_optimizations.py, its kernels in
test_kernels.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from functools import partial
from typing import Any, Iterator

import pytest
import torch
from micro import micro_config, micro_model, micro_pipeline
from test_optimizations import Traces, geometry, random_passes, video, without_pixels
from test_session import same_video
from torch import Tensor

from longlive_opt import config
from longlive_opt.kernels.attention8 import Tile, attention8
from longlive_opt.kernels.quantize import allocate_kv, write_kv
from longlive_opt.models.attention import make_attention
from longlive_opt.optimizations import build_pipeline, optimizations_of
from longlive_opt.optimizations.quantized_kv_cache import (
    QuantizedKVCache,
    choose_tile,
    dequantized_attention,
    kernel_name,
)
from longlive_opt.optimizations.ring_cache import RingKVCache
from longlive_opt.optimizations.static_kv_cache import StaticKVCache
from longlive_opt.optimizations.torch_compile import CompiledForward
from longlive_opt.prompts import PromptSchedule
from longlive_opt.streaming.kv_cache import CacheGeometry
from longlive_opt.streaming.pipeline import Pipeline
from longlive_opt.streaming.session import StreamingSession

CPU = torch.device("cpu")
SMALL = {"height": 16, "width": 32}  # two tokens a frame
MODES = ["int8_fp8", "fp8_fp8"]
TILE = Tile(block_n=16)  # several tiles even in a small window
# Relative RMS error of a block's latents against float32 on the demanding random weights, of the worst block:
# 7.6e-3, 7.4e-3, 10.5e-3, 8.5e-3.
LATENT_TOLERANCE = {("int8", "fused"): 0.009, ("int8", "dequantize"): 0.009,
                    ("fp8", "fused"): 0.013, ("fp8", "dequantize"): 0.010}


@contextlib.contextmanager
def models() -> Iterator[None]:
    """The micro model, and the tiny one with heads of 128 as `wide`."""
    tiny = config.MODELS["tiny"]
    model = dataclasses.replace(tiny, name="wide", dit=dataclasses.replace(tiny.dit, num_heads=2))
    with micro_model(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "MODELS", {**config.MODELS, "wide": model})
        yield


@pytest.fixture(autouse=True, scope="module")
def known_models():
    with models():
        yield


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def quantising_attention(mode: str):
    """An attention that quantises the keys and values that it is given, then does what the kernel does."""
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens, heads, dim = k.shape
        stored = allocate_kv(mode, batch, tokens, heads, dim, k.device)
        write_kv(stored, k, v, torch.zeros(1, dtype=torch.int32), tokens)
        return attention8(q, stored, tokens, TILE)

    return attention


def ring(mode: str, shape: CacheGeometry, device: torch.device = CPU, tile: Tile = TILE) -> QuantizedKVCache:
    dtype = torch.float32 if device == CPU else torch.bfloat16
    return QuantizedKVCache(shape, mode, partial(attention8, tile=tile), 1, device, dtype)


def run_pass(cache: RingKVCache, start: int, frames: int, recache_sink: bool, q: Tensor, k: Tensor, v: Tensor,
             store: bool = False) -> Tensor | None:
    cache.begin(start, frames, recache_sink=recache_sink)
    result = cache.layers[0].store(k, v) if store else cache.layers[0].attend(q, k, v)
    cache.end()
    return result


def tensors(cache: QuantizedKVCache) -> list[Tensor]:
    return [part for layer in cache.layers for part in (*layer.memory, layer.raw_sink)]


@pytest.mark.parametrize("relative_rope", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window, sink, block", [(12, 3, 3), (7, 2, 3), (7, 1, 4), (6, 0, 1), (9, 6, 3)])
def test_ring_equals_attention_that_quantises_what_it_reads(window, sink, block, mode, relative_rope):
    """A token quantised twice or under another's scale, a sink that is turned in 8 bit, a tile too many: to
    the bit, through growth, wrap-around, recaches that spare and that replace the sink, and a reset.
    """
    shape = geometry(window, sink, relative_rope)
    found, wanted = ring(mode, shape), StaticKVCache(shape, quantising_attention(mode), 1, CPU, torch.float32)
    generator = torch.Generator().manual_seed(window)
    for turns in (3, 1):
        for start, frames, recache_sink, steps in random_passes(window, block, seed=window, turns=turns):
            for _ in range(steps):
                qkv = torch.randn(3, 1, 2 * frames, 2, 12, generator=generator)
                outs = [run_pass(cache, start, frames, recache_sink, *qkv) for cache in (found, wanted)]
                assert torch.equal(*outs), (start, frames, recache_sink)
        found.reset()
        wanted.reset()


@pytest.mark.parametrize("relative_rope", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("mode", MODES)
def test_store_leaves_what_attend_leaves(mode, relative_rope):
    """The clean pass of the last block: keys that were written before they were rotated, a forgotten sink."""
    attended, stored = (ring(mode, geometry(7, 2, relative_rope)) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for start, frames, recache_sink, steps in random_passes(7, 2, seed=1):
        for step in range(steps):
            qkv = torch.randn(3, 1, 2 * frames, 2, 12, generator=generator)
            run_pass(attended, start, frames, recache_sink, *qkv)
            run_pass(stored, start, frames, recache_sink, *qkv, store=step == steps - 1)
        for a, b in zip(tensors(attended), tensors(stored), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window, sink, block, relative_rope", [
    (12, 3, 3, False), (12, 3, 3, True), (7, 2, 3, True), (6, 0, 2, False)])
def test_passes_of_one_signature_replay_one_another(mode, window, sink, block, relative_rope):
    """What a captured graph must not hold: a slot, a position or a scale of the pass that was captured."""
    eager, traced = (ring(mode, geometry(window, sink, relative_rope)) for _ in range(2))
    generator, traces, kinds = torch.Generator().manual_seed(0), Traces(), []
    for _ in range(2):
        for start, frames, recache_sink, steps in random_passes(window, block, seed=5, turns=4):
            for _ in range(steps):
                qkv = torch.randn(3, 1, 2 * frames, 2, 12, generator=generator)
                expected = run_pass(eager, start, frames, recache_sink, *qkv)
                traced.begin(start, frames, recache_sink=recache_sink)
                assert torch.equal(traces.run(traced, *qkv), expected), (start, frames, recache_sink)
                traced.end()
        kinds.append(len(traces.traces))
        eager.reset()
        traced.reset()
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("mode, share", [("int8_fp8", 0.517), ("fp8_fp8", 0.501)])
def test_cache_takes_half_the_memory_at_full_size(mode, share):
    """Scales per element, V kept in two copies, rows padded to a tile."""
    shape, meta = CacheGeometry(30, 12, 128, 30, 52, 12, 3), torch.device("meta")
    quantized = QuantizedKVCache(shape, mode, attention8, 1, meta, torch.bfloat16)
    static = StaticKVCache(shape, make_attention("cpu"), 1, meta, torch.bfloat16)
    assert static.nbytes == 2 * 30 * 18720 * 1536 * 2
    assert 0.5 < quantized.nbytes / static.nbytes < share


# In the model.


@pytest.fixture(scope="module", params=[{}, {"global_sink": False}, {"relative_rope": True}], ids=str)
def stream(request) -> tuple[dict[str, Any], list[Tensor]]:
    """Keys of a preset, and the reference's latents."""
    return request.param, latents_of(micro_pipeline(**request.param))


def latents_of(pipeline: Pipeline) -> list[Tensor]:
    """The blocks of a video with a switch while the window fills, and one when it has turned."""
    block = pipeline.config.block_frames
    schedule = PromptSchedule(("a", "b", "c"), (2 * block, 8 * block))
    return [chunk.latents for chunk in StreamingSession(without_pixels(pipeline)).play(schedule, 12)]


@pytest.mark.parametrize("quantization, read_path", LATENT_TOLERANCE)
def test_video_stays_within_its_named_tolerance(stream, quantization, read_path):
    """A format that loses more than it promises, or an error that grows from block to block."""
    keys, reference = stream
    found = latents_of(micro_pipeline(use_quantized_kv=True, kv_quantization=quantization,
                                      kv_read_path=read_path, **keys))
    assert 1e-4 < max(map(relative_error, found, reference)) < LATENT_TOLERANCE[quantization, read_path]


def test_reset_starts_the_same_video_in_the_same_memory():
    """A slot of the last video that is attended in the next, memory that is made anew."""
    pipeline = without_pixels(micro_pipeline(use_quantized_kv=True, relative_rope=True))
    session = StreamingSession(pipeline)
    addresses = [part.data_ptr() for part in tensors(session.cache)]
    first = list(session.play(PromptSchedule(("a", "b"), (15,)), 8))
    session.reset()
    assert same_video(first, list(session.play(PromptSchedule(("a", "b"), (15,)), 8)))
    assert addresses == [part.data_ptr() for part in tensors(session.cache)]


def test_reset_forgets_a_nan():
    """One NaN in a stream makes every later stream NaN, for the scales of an empty sink that is attended."""
    keys = {"use_quantized_kv": True, "sink_size": 6, "block_frames": 2, "local_attn_size": 10}
    session = StreamingSession(without_pixels(micro_pipeline(**keys)))
    first = list(session.stream("a", 2))
    for part in tensors(session.cache):
        if part.is_floating_point():
            part.fill_(float("nan"))
    session.reset()
    assert same_video(first, list(session.stream("a", 2)))


@pytest.mark.parametrize("keys", [
    {}, {"kv_quantization": "fp8", "kv_read_path": "dequantize", "relative_rope": True}], ids=str)
def test_blocks_compile_whole_and_never_again_in_the_steady_state(cheap_compile, keys):
    """A graph break or a recompilation for each ring position; a write that functionalisation drops."""
    eager, compiled = (micro_pipeline(use_quantized_kv=True, **SMALL, **keys) for _ in range(2))
    forward = CompiledForward(compiled.dit, {})
    compiled = dataclasses.replace(compiled, sampler=compiled.sampler.with_forward(forward))
    session = StreamingSession(without_pixels(compiled))
    list(session.play(PromptSchedule(("a", "b"), (18,)), 8))  # fills, rolls, recaches: all is compiled
    session.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = list(session.play(PromptSchedule(("a", "b", "c"), (21, 30)), 12))
    expected = StreamingSession(without_pixels(eager)).play(PromptSchedule(("a", "b", "c"), (21, 30)), 12)
    assert same_video(found, list(expected))


# The optimization.


def test_room_says_what_it_did():
    """int8 that is not all int8 and does not say so; a flag that was set and had no effect."""
    pipeline = micro_pipeline(use_quantized_kv=True, use_static_kv=True, **SMALL)
    optimization, = pipeline.optimizations
    assert (optimization["name"], optimization["exactness"]) == ("quantized_kv", "lossy")
    assert optimization["knobs"] == {"quantization": "int8", "read_path": "fused"}
    assert optimization["report"]["done"].startswith("K int8, V e4m3; attention: ")
    assert "emulating" in optimization["report"]["kernel"]
    assert optimization["report"]["done"].endswith("not applied, because this ring replaces it")
    assert pipeline.sampler.trim_recache
    keys = {"kv_quantization": "fp8", "kv_read_path": "dequantize", **SMALL}
    optimization, = micro_pipeline(use_quantized_kv=True, **keys).optimizations
    report = dict(optimization["report"])
    assert report.pop("e4m3").summary() == {}
    assert report == {"done": "K e4m3, V e4m3; attention: cpu, after a cast to float32",
                      "formats": "K e4m3, V e4m3", "kernel": "cpu, after a cast to float32"}


def test_kernel_is_the_fastest_that_fits():
    """The hand-scheduled kernel missed at full size for want of 16-byte rows, or taken where heads are
    smaller."""
    full, tiny = CacheGeometry(1, 12, 128, 30, 52, 12, 3), CacheGeometry(1, 4, 64, 8, 8, 12, 3)
    odd = dataclasses.replace(full, rows=15, columns=15, window=7)
    for mode in MODES:
        assert choose_tile(full, mode, CPU).gluon and choose_tile(odd, mode, CPU).gluon
        assert not choose_tile(tiny, mode, CPU).gluon
        for shape in (full, odd, tiny):
            meta = QuantizedKVCache(shape, mode, attention8, 1, torch.device("meta"), torch.bfloat16)
            assert meta.layers[0].stored.k.shape[1] % 16 == 0
    assert kernel_name(choose_tile(full, "int8_fp8", CPU), torch.device("cuda")) == (
        "Gluon, tiles of 128 x 128, 4 stages")


def test_bf16_cast_before_attention_reads_the_same_numbers():
    """K and V cast under each other's scale, or V in the order of the 8-bit product."""
    shape, generator = geometry(6, 2), torch.Generator().manual_seed(0)
    read = partial(dequantized_attention, make_attention("cpu"))
    cast = QuantizedKVCache(shape, "int8_fp8", read, 1, CPU, torch.bfloat16)
    exact = StaticKVCache(shape, make_attention("cpu"), 1, CPU, torch.bfloat16)
    for start in range(0, 12, 2):
        qkv = torch.randn(3, 1, 4, 2, 12, generator=generator).bfloat16()
        found, wanted = (run_pass(cache, start, 2, False, *qkv) for cache in (cast, exact))
        assert found.dtype == torch.bfloat16 and relative_error(found, wanted) < 0.05


def test_report_counts_what_e4m3_cannot_hold():
    """A head that saturates or vanishes with official weights shows as a dB or two, and nothing says why."""
    pipeline = micro_pipeline(use_quantized_kv=True, kv_quantization="fp8", **SMALL)
    codes = pipeline.optimizations[0]["report"]["e4m3"]
    assert codes.summary() == {}
    cache = pipeline.make_cache()
    cache.begin(0, 3)
    tokens, heads, dim = 6, *cache.layers[0].stored.k.shape[2:]
    for number, layer in enumerate(cache.layers):
        k, v = torch.ones(2, 1, tokens, heads, dim)
        if number == 1:
            k[0, 2, 1, :2] = torch.tensor([1000.0, -math.inf])  # an infinity is NaN, not 448
            v[0, :, 0, 0] = 2.0**-7
            v[0, 0, 0, 1] = 0
        layer.write(k, v)
    cache.end()
    found, one = codes.summary(), 100 / (tokens * dim)
    parts = 2 * len(cache.layers) * heads
    assert found["saturated_percent"] == pytest.approx(one / parts)
    assert found["nan_percent"] == pytest.approx(one / parts)
    assert found["below_normal_percent"] == pytest.approx((tokens + 1) * one / parts)
    assert found["worst_saturated"] == f"K of layer 1, head 1: {one:.2f} %"
    assert found["worst_below_normal"] == f"V of layer 1, head 0: {(tokens + 1) * one:.2f} %"
    cache.reset()  # as the fidelity protocol does, before the result is put together
    assert codes.summary() == found
    del cache, layer
    gc.collect()
    assert codes.summary() == found
    int8 = micro_pipeline(use_quantized_kv=True, **SMALL)
    cache = int8.make_cache()
    cache.begin(0, 3)
    cache.end()
    assert set(int8.optimizations[0]["report"]["e4m3"].summary()["worst_saturated"][:1]) == {"V"}


# On a GPU. Heads of 128 take the Gluon kernel, heads of 64 the Triton kernel.


def gpu_pipeline(**keys: Any) -> Pipeline:
    return build_pipeline(micro_config(**{
        "model": "wide", "device": "cuda", "model_dtype": "bfloat16", "height": 64, "width": 64,
        "warmup_blocks": 5, "use_quantized_kv": True, **keys}))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mode", MODES)
def test_gpu_ring_equals_its_emulation(mode, head_dim):
    """The write and the attention kernel together: a slot, a scale or a column that they see differently."""
    shape, cuda = CacheGeometry(1, 2, head_dim, 3, 7, 7, 2, relative_rope=True), torch.device("cuda")
    tile = choose_tile(shape, mode, cuda)
    assert tile.gluon == (head_dim == 128)
    found, wanted = ring(mode, shape, cuda, tile), QuantizedKVCache(
        shape, mode, partial(attention8, tile=tile), 1, CPU, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for start, frames, recache_sink, steps in random_passes(7, 2, seed=1):
        for _ in range(steps):
            qkv = torch.randn(3, 1, 21 * frames, 2, head_dim, generator=generator).bfloat16()
            expected = run_pass(wanted, start, frames, recache_sink, *qkv)
            result = run_pass(found, start, frames, recache_sink, *qkv.cuda())
            assert relative_error(result.cpu(), expected) < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["wide", "tiny"])
@pytest.mark.parametrize("keys", [
    {}, {"kv_quantization": "fp8"}, {"relative_rope": True}, {"kv_quantization": "fp8", "global_sink": False},
    {"kv_read_path": "dequantize"}], ids=str)
def test_gpu_replay_equals_eager_bit_for_bit(model, keys):
    """A descriptor, slot or scale that was captured instead of read."""
    eager = gpu_pipeline(model=model, **keys)
    graphed = gpu_pipeline(model=model, use_cuda_graphs=True, **keys)
    assert same_video(video(eager), video(graphed))
    stats = graphed.optimizations[-1]["report"]["stats"]
    assert stats.replayed > stats.captured == stats.eager


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_compiled_blocks_use_the_same_cache(quantization, mode):
    """The operators inside a compiled region: a cache that is copied, a write that is dropped."""
    torch._dynamo.reset()
    eager = gpu_pipeline(kv_quantization=quantization)
    compiled = gpu_pipeline(kv_quantization=quantization, use_torch_compile=True, compile_mode=mode)
    videos = [list(StreamingSession(without_pixels(p)).play(PromptSchedule(("a", "b"), (18,)), 9))
              for p in (eager, compiled)]
    assert relative_error(videos[1][0].latents, videos[0][0].latents) < 0.05
    assert all(chunk.latents.isfinite().all() for chunk in videos[1])
    torch._dynamo.reset()


@pytest.mark.gpu
def test_gpu_room_names_its_kernel():
    """A kernel chosen in silence."""
    assert gpu_pipeline().optimizations[0]["report"]["kernel"].startswith("Gluon")
    assert gpu_pipeline(model="tiny").optimizations[0]["report"]["kernel"].startswith("Triton")
    assert [optimization.name
            for optimization in optimizations_of(micro_config(use_quantized_kv=True))] == ["quantized_kv"]
