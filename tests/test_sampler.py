"""The few-step loop over one block, the recache, and where the noise comes from."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from longlive_opt.models.attention import make_attention
from longlive_opt.models.dit import CausalDiT, TextContext
from longlive_opt.models.specs import DiTConfig
from longlive_opt.streaming.kv_cache import CacheGeometry, RollingKVCache
from longlive_opt.streaming.sampler import (
    EagerForward,
    FlowSchedule,
    Sampler,
    SamplingPlan,
    StreamNoise,
    block_noise_shapes,
)

CPU = torch.device("cpu")
CONFIG = DiTConfig(dim=24, num_heads=2, num_layers=2, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4)
SHAPE = (16, 2, 4)
STEPS = [1000.0, 937.5, 833.3333129882812, 625.0]


pytestmark = pytest.mark.usefixtures("one_thread")


class FakeCache:
    """Notes the passes that it is asked to plan."""

    def __init__(self):
        self.passes: list[tuple[int, int, bool]] = []
        self.open = False

    def begin(self, start: int, frames: int, *, recache_sink: bool = False) -> None:
        assert not self.open
        self.open = True
        self.passes.append((start, frames, recache_sink))

    def end(self) -> None:
        assert self.open
        self.open = False


class FakeForward:
    """Notes its calls; the flow is a known function of latents and timestep."""

    def __init__(self):
        self.calls: list[tuple[float, bool, object]] = []
        self.seen: list[Tensor] = []

    def __call__(self, latents, timestep, text, cache, *, keys_only=False):
        assert cache.open
        self.calls.append((timestep, keys_only, text))
        self.seen.append(latents)
        return latents * 0.25 + timestep / 1000


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_dit() -> CausalDiT:
    generator = torch.Generator().manual_seed(0)
    dit = CausalDiT(CONFIG).requires_grad_(False)
    for name, parameter in dit.named_parameters():
        scale = 0.1 if parameter.ndim == 1 or "modulation" in name else parameter[0].numel()**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("norm" in name))
    return dit


def make_cache(window: int = 12, sink: int = 3) -> RollingKVCache:
    geometry = CacheGeometry(CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim, SHAPE[1] // 2,
                             SHAPE[2] // 2, window, sink)
    return RollingKVCache(geometry, make_attention("cpu"), 1, CPU, torch.float32)


def test_block_is_four_noisy_passes_and_a_clean_one():
    """The trace of LongLive's block: the same frames five times, the clean pass on the result."""
    cache, forward = FakeCache(), FakeForward()
    sampler = Sampler(SamplingPlan(), forward)
    noise, step_noise = draw(1, 3, *SHAPE), draw(3, 1, 3, *SHAPE, seed=1)
    latents = sampler.denoise_block(cache, "text", 6, noise, step_noise)
    assert cache.passes == [(6, 3, False)] * 5 and not cache.open
    assert [(t, keys_only) for t, keys_only, _ in forward.calls] == [*((t, False) for t in STEPS), (0, True)]
    assert all(text == "text" for *_, text in forward.calls)
    assert torch.equal(forward.seen[0], noise) and torch.equal(forward.seen[4], latents)


def test_noise_of_the_next_timestep_is_added_back():
    """Sigma of this step instead of the next, step noise used twice or left over, x0 of the wrong input."""
    forward, schedule = FakeForward(), FlowSchedule(5.0)
    noise, step_noise = draw(2, 3, *SHAPE), draw(3, 2, 3, *SHAPE, seed=1)
    estimates = Sampler(SamplingPlan(), forward).denoise(FakeCache(), None, 0, noise, step_noise)
    noisy = noise
    for i, t in enumerate(STEPS):
        assert torch.equal(forward.seen[i], noisy)
        x0 = schedule.x0_from_flow(noisy * 0.25 + t / 1000, noisy, t)
        assert torch.equal(estimates[i], x0)
        if i < 3:
            sigma = schedule.sigma(STEPS[i + 1])
            torch.testing.assert_close((1 - sigma) * x0 + sigma * step_noise[i], forward.seen[i + 1])
            noisy = forward.seen[i + 1]
    assert len(estimates) == 4


@pytest.mark.parametrize("steps", [(1000,), (800, 200)])
def test_any_number_of_steps(steps):
    """One step needs no step noise at all."""
    forward = FakeForward()
    plan = SamplingPlan(denoising_steps=steps, context_noise=7, block_frames=2)
    noise_shape, step_shape = block_noise_shapes(plan, SHAPE, 1)
    assert noise_shape == (1, 2, *SHAPE) and step_shape == (len(steps) - 1, 1, 2, *SHAPE)
    Sampler(plan, forward).denoise_block(FakeCache(), None, 0, draw(*noise_shape), torch.zeros(step_shape))
    assert [t for t, *_ in forward.calls] == [*FlowSchedule(5.0).warped_steps(steps), 7]


@pytest.mark.parametrize("trim, global_sink, start, expected", [
    (False, True, 6, (0, 6, False)), (False, True, 12, (0, 12, False)), (False, True, 15, (3, 12, False)),
    (False, False, 15, (3, 12, True)), (False, False, 6, (0, 6, True)),
    (True, True, 6, (0, 6, False)), (True, True, 12, (0, 12, False)), (True, True, 15, (6, 9, False)),
    (True, False, 15, (3, 12, True)),
])
def test_recache_is_one_pass_at_the_context_timestep(trim, global_sink, start, expected):
    """SPEC 5: min(W, s) frames in one pass; trimming may leave out only what a protected sink drops."""
    cache, forward = FakeCache(), FakeForward()
    sampler = Sampler(SamplingPlan(global_sink=global_sink), forward, trim_recache=trim)
    latents = draw(1, min(12, start), *SHAPE)
    assert sampler.recache(cache, "new", start, latents) is None
    assert cache.passes == [expected]
    assert forward.calls == [(0, True, "new")]
    assert torch.equal(forward.seen[0], latents[:, -expected[1]:])


@pytest.mark.parametrize("window, sink, start", [(12, 3, 15), (12, 0, 15), (6, 3, 9), (7, 2, 12)])
@torch.no_grad()
def test_trimmed_recache_leaves_the_same_cache(window, sink, start):
    """Dropped frames are queries only: leaving them out may change nothing, in no layer."""
    dit = random_dit()
    old, new = dit.embed_text(draw(1, 3, 8)), dit.embed_text(draw(1, 4, 8, seed=1))
    latents = draw(1, start, *SHAPE, seed=2)
    caches = []
    for trim in (False, True):
        cache = make_cache(window, sink)
        sampler = Sampler(SamplingPlan(window=window, sink=sink), EagerForward(dit), trim_recache=trim)
        for s in range(0, start, 3):
            sampler.run_pass(cache, old, s, latents[:, s:s + 3], 0)
        before = cache.layers[1].key.clone()
        sampler.recache(cache, new, start, latents[:, -window:])
        assert not torch.equal(before, cache.layers[1].key)
        caches.append(cache)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert (a.key - b.key).abs().max() <= 2e-5 and (a.value - b.value).abs().max() <= 2e-5
    assert caches[0].pointers == caches[1].pointers == (start, window)


def test_variants_of_a_sampler_keep_everything_else():
    """An optimization that replaces `forward` and switches the trimming of another optimization off."""
    first, second = FakeForward(), FakeForward()
    sampler = Sampler(SamplingPlan(shift=3.0), first, True, True).with_forward(second)
    assert sampler == Sampler(SamplingPlan(shift=3.0), second, trim_recache=True, defer_clean_pass=True)
    assert Sampler(SamplingPlan(), first).with_forward(second) == Sampler(SamplingPlan(), second)


@torch.no_grad()
def test_eager_forward_gives_every_frame_the_timestep_and_transposes():
    """Frames and channels exchanged: [B, F, C, H, W] outside, [B, C, F, H, W] inside."""
    dit, latents = random_dit(), draw(1, 3, *SHAPE)
    text = dit.embed_text(draw(1, 3, 8))
    flows = []
    for call in (lambda cache: EagerForward(dit)(latents, 937.5, text, cache),
                 lambda cache: dit(latents.transpose(1, 2), torch.full((1, 3), 937.5), text, cache.layers)
                 .transpose(1, 2)):
        cache = make_cache()
        cache.begin(0, 3)
        flows.append(call(cache))
    assert flows[0].shape == latents.shape and torch.equal(*flows)


def test_block_is_sampled_without_gradients():
    """Activations of every pass of an endless stream kept alive."""
    dit = random_dit().requires_grad_(True)
    sampler = Sampler(SamplingPlan(denoising_steps=(1000, 500)), EagerForward(dit))
    with torch.no_grad():
        text: TextContext = dit.embed_text(draw(1, 3, 8))
    cache = make_cache()
    latents = sampler.denoise_block(cache, text, 0, draw(1, 3, *SHAPE), draw(1, 1, 3, *SHAPE))
    sampler.recache(cache, text, 3, latents)
    assert not latents.requires_grad and not cache.layers[1].key.requires_grad


def test_noise_is_one_seeded_stream_in_a_fixed_order():
    """Optimizations are compared frame by frame: noise may not depend on what else draws."""
    plan = SamplingPlan(denoising_steps=(1000, 500, 250), block_frames=2)
    source = StreamNoise(plan, SHAPE, 5, CPU, torch.float32)
    torch.manual_seed(99)
    blocks = [source.next_block() for _ in range(3)]
    generator = torch.Generator().manual_seed(5)
    for noise, step_noise in blocks:
        assert torch.equal(noise, torch.randn(1, 2, *SHAPE, generator=generator))
        assert torch.equal(step_noise, torch.randn(2, 1, 2, *SHAPE, generator=generator))
    source.reset()
    assert all(map(torch.equal, source.next_block(), blocks[0]))
    other = StreamNoise(plan, SHAPE, 6, CPU, torch.float32).next_block()
    assert not torch.equal(other[0], blocks[0][0])


@pytest.mark.parametrize("batch, dtype", list(product((1, 2), (torch.float32, torch.bfloat16))))
def test_noise_has_the_shape_and_dtype_of_the_run(batch, dtype):
    """bf16 runs draw bf16 noise, as LongLive does."""
    plan = SamplingPlan()
    noise, step_noise = StreamNoise(plan, SHAPE, 0, CPU, dtype, batch).next_block()
    assert noise.dtype == step_noise.dtype == dtype
    assert (tuple(noise.shape), tuple(step_noise.shape)) == block_noise_shapes(plan, SHAPE, batch)
    assert 0.8 < step_noise.float().std() < 1.2
