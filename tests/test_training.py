"""Training: the parallel forward against inference, data, stages, resuming, export and the command."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longlive_opt.config import ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.models.attention import make_attention
from longlive_opt.models.dit import CausalDiT, TextContext
from longlive_opt.models.specs import MODELS, DiTConfig, ModelSpec, TextEncoderConfig, VAEConfig
from longlive_opt.models.text import TextEncoder, UMT5Encoder, load_tokenizer
from longlive_opt.models.vae import LATENT_MEAN, LATENT_STD, StreamingDecoder, WanVAE
from longlive_opt.models.weight_files import resolve_weights
from longlive_opt.models.weights import load_dit, load_vae, open_text_encoder, random_init_
from longlive_opt.streaming.kv_cache import CacheGeometry, RollingKVCache
from longlive_opt.streaming.pipeline import build_reference
from longlive_opt.streaming.sampler import EagerForward, Sampler, SamplingPlan
from longlive_opt.streaming.session import StreamingSession
from longlive_opt.tiny import evaluate as check_module
from longlive_opt.tiny.evaluate import SWITCH_BLOCK, NoRecache, check_weights, evaluate_long, evaluate_switch
from longlive_opt.tiny.shapes.render import render, simulate, to_uint8
from longlive_opt.tiny.shapes.scene import ObjectSpec, SceneSpec, change_scene, sample_scene
from longlive_opt.tiny.training import __main__ as command
from longlive_opt.tiny.training import bench
from longlive_opt.tiny.training.attribute_head import CLASSES, scene_labels, text_features
from longlive_opt.tiny.training.bench import budget, times_of
from longlive_opt.tiny.training.block_attention import attend_blocks
from longlive_opt.tiny.training.checkpoints import checkpoints
from longlive_opt.tiny.training.clips import (
    CLIP_BLOCKS,
    OPENING,
    ClipMaker,
    ClipRing,
    Clips,
    Mix,
    first_video_frame,
    layouts,
    plan_chunk,
)
from longlive_opt.tiny.training.compiling import use_compiler
from longlive_opt.tiny.training.export import export_weights, fold_statistics
from longlive_opt.tiny.training.graphs import Recorder
from longlive_opt.tiny.training.loop import Budget, run_stage
from longlive_opt.tiny.training.student import StudentSettings, StudentStage, Task
from longlive_opt.tiny.training.teacher import ReadingStage, TeacherSettings, TeacherStage
from longlive_opt.tiny.training.teacher_forcing import (
    ClipLayout,
    Context,
    Denoiser,
    NoisyClips,
    encode_context,
    extend_context,
    predict_clips,
    window_past,
)
from longlive_opt.tiny.training.trainer import QUICK, Settings
from longlive_opt.tiny.training.vae_clips import VideoRing, plan_videos, render_fast, unpack_tracks
from longlive_opt.tiny.training.vae_parallel import decode_clip, moments
from longlive_opt.tiny.training.vae_stage import (
    VAESettings,
    VAEStage,
    encode_video,
    init_vae_,
    reconstruction_losses,
    statistics,
)
from longlive_opt.tiny.training.workers import Planner, start_workers

PLAN = SamplingPlan()
TEXT = TextEncoderConfig(
    vocab_size=384, dim=16, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1, text_len=128
)
DIT = DiTConfig(dim=48, num_heads=2, num_layers=3, ffn_dim=64, freq_dim=32, text_dim=TEXT.dim,
                text_len=TEXT.text_len)
SMALL = ModelSpec("small", "small", MODELS["tiny"].checkpoint, DIT, VAEConfig(dim=4, num_res_blocks=1), TEXT,
                  height=32, width=32, full_size=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread(one_thread):
    yield


@pytest.fixture(scope="module")
def dit() -> CausalDiT:
    module = CausalDiT(DIT)
    random_init_(module, 0, CPU, torch.float32)
    return module


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    module = WanVAE(SMALL.vae)
    random_init_(module, 0, CPU, torch.float32)
    return module


@pytest.fixture(scope="module")
def maker(vae) -> ClipMaker:
    return ClipMaker(vae, 128, 32, seed=3, mix=Mix(1, 1, 1, 1, 1), far=30)


def texts(dit: CausalDiT, count: int) -> list[TextContext]:
    """Different prompts for a batch of two."""
    prompts = torch.randn(count, 2, 20, TEXT.dim, generator=torch.Generator().manual_seed(1))
    return [dit.embed_text(prompt) for prompt in prompts]


def latents(blocks: int, seed: int) -> Tensor:
    return torch.randn(2, 3 * blocks, 16, 4, 4, generator=torch.Generator().manual_seed(seed))


def inference(dit: CausalDiT, plan: SamplingPlan = PLAN) -> tuple[Sampler, RollingKVCache]:
    geometry = CacheGeometry(DIT.num_layers, DIT.num_heads, DIT.head_dim, 2, 2, plan.window, plan.sink)
    cache = RollingKVCache(geometry, make_attention("cpu"), 2, CPU, torch.float32)
    return Sampler(plan, EagerForward(dit)), cache


def by_inference(dit: CausalDiT, plan: SamplingPlan, clean: Tensor, noisy: Tensor, steps: list[float],
                 prompts: list[TextContext]) -> Tensor:
    """Flow of every noisy block as a session would compute it, block b under prompts[b], recaching."""
    sampler, cache = inference(dit, plan)
    flows = []
    for block, (timestep, text) in enumerate(zip(steps, prompts)):
        start = 3 * block
        if block and text is not prompts[block - 1]:
            sampler.recache(cache, text, start, clean[:, :start][:, -plan.window:])
        part = slice(start, start + 3)
        flows.append(sampler.run_pass(cache, text, start, noisy[:, part], timestep))
        sampler.run_pass(cache, text, start, clean[:, part], plan.context_noise, keys_only=True)
    return torch.cat(flows, dim=1)


def in_parallel(dit: CausalDiT, layout: ClipLayout, clean: Tensor, noisy: Tensor, steps: list[float],
                positions: Tensor, sink_text: TextContext, text: TextContext) -> Tensor:
    """Flow of the noisy blocks from the layout's switch on: all in one pass, which is to equal two passes."""
    first, blocks = 3 * layout.recached, tuple(range(layout.recached, layout.blocks))
    noisy, places = noisy[:, first:], positions[:, first:]
    timesteps = torch.tensor(steps).repeat_interleave(3).expand(2, -1)[:, first:]
    batch = NoisyClips(clean, positions, noisy, timesteps, sink_text, text, layout, blocks)
    flow, = predict_clips(dit, [batch])
    with torch.no_grad():
        context = encode_context(dit, clean, positions, sink_text, text, layout, layout.blocks - 1)
        denoise = Denoiser(dit, [(places, text, context, layout, blocks)])
        denoise([torch.zeros_like(noisy)], [timesteps])  # must leave nothing behind
        apart, = denoise([noisy], [timesteps])
    torch.testing.assert_close(flow, apart, rtol=0, atol=2e-5)
    return flow


STEPS = [1000.0, 833.33, 20.0, 625.0, 937.5, 400.0, 1000.0, 312.5, 50.0, 700.0]


@torch.no_grad()
@pytest.mark.parametrize("window", [6, 9, 12, 15])
def test_parallel_forward_is_inference(dit, window):
    """From the first block past the wrap-around of the window, at a noise level of its own for every block.
    """
    plan = dataclasses.replace(PLAN, window=window)
    text, = texts(dit, 1)
    clean, noisy = latents(10, 2), latents(10, 3)
    expected = by_inference(dit, plan, clean, noisy, STEPS, [text] * 10)
    layout = ClipLayout(10, window_past(plan))
    found = in_parallel(dit, layout, clean, noisy, STEPS, torch.arange(30).expand(2, -1), text, text)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.1


@torch.no_grad()
def test_far_clip_is_inference_at_its_positions(dit):
    """A clip far from its sink: the cache holds the sink of the first block, then the video jumps."""
    text, = texts(dit, 1)
    clean, noisy = latents(7, 2), latents(7, 3)
    layout, place = ClipLayout(7, window_past(PLAN)), 966
    positions = torch.cat([torch.arange(3), torch.arange(place, place + 18)]).expand(2, -1)
    found = in_parallel(dit, layout, clean, noisy, STEPS[:7], positions, text, text)
    sampler, cache = inference(dit)
    for block, timestep in enumerate(STEPS[:7]):
        start, part = int(positions[0, 3 * block]), slice(3 * block, 3 * block + 3)
        if start == place:
            cache._end = place
        flow = sampler.run_pass(cache, text, start, noisy[:, part], timestep)
        torch.testing.assert_close(found[:, part], flow, rtol=0, atol=2e-5)
        sampler.run_pass(cache, text, start, clean[:, part], 0, keys_only=True)


@torch.no_grad()
@pytest.mark.parametrize("switch", [1, 2, 3, 4])
def test_early_switch_is_inference(dit, switch):
    """The recache at latent frames 3, 6, 9, 12 takes all frames, the sink too, in one bidirectional pass."""
    old, new = texts(dit, 2)
    clean, noisy = latents(7, 2), latents(7, 3)
    expected = by_inference(dit, PLAN, clean, noisy, STEPS[:7], [old] * switch + [new] * (7 - switch))
    layout = ClipLayout(7, window_past(PLAN), recached=switch, keeps_sink=False)
    assert layouts(window_past(PLAN)).get(f"early{switch}", layout) == layout
    found = in_parallel(dit, layout, clean, noisy, STEPS[:7], torch.arange(21).expand(2, -1), new, new)
    torch.testing.assert_close(found, expected[:, 3 * switch:], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("switch", [5, 6, 8])
def test_late_switch_is_inference(dit, switch):
    """With a full window the recache leaves the sink under the old prompt; the clip holds sink and last
    window.
    """
    old, new = texts(dit, 2)
    blocks = switch + 3
    clean, noisy = latents(blocks, 2), latents(blocks, 3)
    steps = (STEPS + STEPS)[:blocks]
    expected = by_inference(dit, PLAN, clean, noisy, steps, [old] * switch + [new] * 3)
    chosen = [0, *range(switch - 3, blocks)]
    frames = [3 * block + i for block in chosen for i in range(3)]
    found = in_parallel(dit, layouts(window_past(PLAN))["late"], clean[:, frames], noisy[:, frames],
                        [steps[block] for block in chosen], torch.tensor(frames).expand(2, -1), old, new)
    torch.testing.assert_close(found, expected[:, 3 * switch:], rtol=0, atol=2e-5)


def test_gradients_reach_the_past(dit):
    """The loss of a block trains what writes the keys of the blocks before it, and nothing after it."""
    text, = texts(dit, 1)
    clean, noisy = latents(4, 2).requires_grad_(), latents(4, 3).requires_grad_()
    flow = in_parallel(
        dit, ClipLayout(4, 2), clean, noisy, STEPS[:4], torch.arange(12).expand(2, -1), text, text
    )
    flow[:, 6:9].square().sum().backward()
    touched = [bool(clean.grad[:, 3 * b:3 * b + 3].any()) for b in range(4)]
    assert touched == [True, True, False, False]
    assert [bool(noisy.grad[:, 3 * b:3 * b + 3].any()) for b in range(4)] == [False, False, True, False]


@torch.no_grad()
def test_context_grows_block_by_block(dit):
    """A rollout that extends its context after every block holds what one pass over all blocks gives."""
    text, = texts(dit, 1)
    clean, positions = latents(6, 2), torch.arange(18).expand(2, -1)
    layout = ClipLayout(7, 2)
    whole = encode_context(dit, clean, positions, text, text, layout, 6)
    grown = Context.empty(len(dit.blocks))
    for block in range(6):
        part = slice(3 * block, 3 * block + 3)
        extend_context(dit, clean[:, part], positions[:, part], text, grown, layout)
    for a, b in zip((*whole.keys, *whole.values), (*grown.keys, *grown.values), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_window_must_be_whole_blocks():
    """A window that cuts a block would need masks; it is refused, not approximated."""
    for plan in (dataclasses.replace(PLAN, window=10), dataclasses.replace(PLAN, sink=0)):
        with pytest.raises(ValueError, match="whole blocks"):
            window_past(plan)


@torch.no_grad()
def test_vae_clips_are_streams(vae):
    """Training encodes and decodes a clip in two calls; inference frame by frame. The values are the same."""
    frames = torch.rand(2, 13, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    video = frames.transpose(1, 2) * 2 - 1
    encoded = encode_video(vae, frames)
    torch.testing.assert_close(encoded, vae.encode(video), rtol=0, atol=1e-5)
    z = moments(vae, video)[0]
    pixels = decode_clip(vae, z).clamp(-1, 1) * 0.5 + 0.5
    streamed, = StreamingDecoder(vae, 2, 2, 2).push(encoded)
    torch.testing.assert_close(pixels.transpose(1, 2), streamed, rtol=0, atol=1e-5)


@torch.no_grad()
def test_folded_latents_are_normal_and_decode_as_before(vae):
    """After the folding normalised latents have mean 0 and deviation 1, and pictures are unchanged."""
    folded = WanVAE(SMALL.vae)
    folded.load_state_dict(vae.state_dict())
    video = torch.rand(4, 3, 13, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    before = decode_clip(vae, moments(vae, video)[0])
    fold_statistics(folded, *statistics(vae, [video[:2], video[2:]]))
    encoded = folded.encode(video).transpose(1, 2).transpose(0, 1).flatten(1)
    torch.testing.assert_close(encoded.mean(1), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(encoded.std(1), torch.ones(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(decode_clip(folded, moments(folded, video)[0]), before, rtol=0, atol=1e-4)
    (_, was), (_, now) = moments(vae, video), moments(folded, video)
    gain = (now - was).mean(dim=(0, 2, 3, 4)) / 2
    torch.testing.assert_close(
        gain.exp(), torch.tensor(LATENT_STD) / statistics(vae, [video])[1], rtol=1e-3, atol=0
    )
    assert len(LATENT_MEAN) == len(gain)


def test_dead_latent_is_refused(vae):
    with pytest.raises(UserError, match="is constant"):
        fold_statistics(vae, torch.zeros(16), torch.cat([torch.ones(15), torch.zeros(1)]))


def test_clips_show_what_they_claim(maker):
    """Cut clips hold the sink of their own video, the latents of their position, both prompts; the loss
    counts only where a past like that of inference is there, and never before a prompt switch.
    """
    plan = plan_chunk(3, 2, maker.mix, 30)
    pools = maker.make(plan)
    assert set(pools) == {"plain", "late", "early2"}
    plain, late, early = (pools[name] for name in ("plain", "late", "early2"))
    start, far, after = (plain[i] for i in range(3))
    assert start.positions.tolist() == list(range(21))
    assert start.loss.tolist() == [1] * 7 and far.loss.tolist() == [1, 0, 0, 1, 1, 1, 1]
    assert after.loss.tolist() == [0, 0, 0, 1, 1, 1, 1] and late.loss[0].tolist() == [0] * 4 + [1] * 3
    assert early.loss[0].tolist() == [0] * 2 + [1] * 5
    for clip in (far, after, late[0]):
        assert clip.positions[:3].tolist() == [0, 1, 2] and clip.positions[3] % 3 == 0 < clip.positions[3] - 3
        assert (clip.positions[3:].diff() == 1).all()
    for clip, changed in ((start, False), (far, False), (after, True), (late[0], True), (early[0], False)):
        assert torch.equal(clip.ids, clip.sink_ids) != changed
    video = plan.pools["late"][0]
    switch, scene = video.timeline[-1]
    assert (
        switch == first_video_frame(int(late.positions[0, 12]))
        and scene_labels(scene) == late.labels[0].tolist()
    )
    assert all(position % 3 == 0 for v in plan.pools["plain"] for position in [v.position])
    again = maker.make(plan_chunk(3, 2, maker.mix, 30))
    assert all(torch.equal(again[name].latents, pools[name].latents) for name in pools)


def test_cut_latents_are_those_of_the_whole_video(maker, vae):
    """Frame for frame: a clip cut out at a position shows what the whole video, encoded from 0, shows there;
    only the encoder's memory is shorter.
    """
    from longlive_opt.tiny.training import clips

    plan = plan_chunk(3, 2, maker.mix, 30)
    far = maker.make(plan)["plain"][1]
    video = plan.pools["plain"][1]
    first = 4 * (video.position - clips.WARM_LATENTS)
    tracks = clips.simulate([video.timeline], first + 81, 0)
    assert plan.clip.frames == 81 and plan.sink.frames == 9 and tracks.frames == first + 81
    frames = render(plan.clip[1:2], slice(None), CPU, 32)
    torch.testing.assert_close(encode_video(vae, frames)[0, 3:], far.latents[3:], rtol=0, atol=1e-5)
    assert (
        first + 4 * 3 == 4 * video.position
    )  # the last frame before latent `position` begins, and 3 latents on


def test_ring_overwrites_the_oldest_and_refills_itself(maker):
    """After a resume the ring holds, clip for clip, what it held before."""
    ring, other = ClipRing(maker, 2), ClipRing(maker, 2)
    for _ in range(5):
        ring.refresh()
    other.refill(5)
    for pool in ("plain", "late", "early2"):
        a, b = (r.sample(pool, 40, torch.Generator().manual_seed(7)) for r in (ring, other))
        assert torch.equal(a.latents, b.latents) and torch.equal(a.ids, b.ids)
    quick = ClipRing(maker, 2)
    quick.refill(5, chunks=1)
    newest = maker.make(maker.plan(4))["plain"].ids.tolist()
    clips = quick.sample("plain", 40, torch.Generator().manual_seed(7))
    assert all(ids in newest for ids in clips.ids.tolist()) and clips.latents.flatten(1).any(dim=1).all()


@pytest.fixture(scope="module")
def workers():
    pool = start_workers(1)
    yield pool
    pool.shutdown(cancel_futures=True)


def test_planned_elsewhere_is_planned_here(vae, workers):
    """Chunks from another process, in whatever order they are asked for, are those made in this one."""
    here, there = (ClipMaker(vae, 128, 32, seed=3, mix=Mix(1, 1, 1, 1, 1), far=30, workers=pool)
                   for pool in (None, workers))
    for index in (2, 3, 0):
        a, b = here.plan(index), there.plan(index)
        assert a.pools == b.pools and torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.clip.position, b.clip.position) and torch.equal(a.sink.rgb, b.sink.rgb)
    assert sorted(there.planner._coming) == list(range(1, 9))


def test_error_of_a_worker_is_raised(workers):
    planner = Planner(divide_one, workers, ahead=1)
    assert planner(2) == 0.5
    with pytest.raises(ZeroDivisionError):
        planner(0)


def divide_one(index: int) -> float:
    return 1 / index


SCRIPT = """
import os, sys, time
from longlive_opt.tiny.training.workers import Planner, start_workers

def pid(index):
    return os.getpid()

if __name__ == "__main__":
    print(Planner(pid, start_workers(1))(0), flush=True)
    {then}
"""


@pytest.mark.parametrize("then, status", [("time.sleep(600)", -signal.SIGKILL), ("sys.exit(5)", 5),
                                          ("raise SystemError", 1)])
def test_workers_end_with_their_parent(tmp_path, then, status):
    """However it ends: killed, by an exit, by an error; and a script of any name can start them."""
    path = tmp_path / "some script.py"
    path.write_text(SCRIPT.format(then=then), encoding="utf-8")
    root = Path(command.__file__).parents[3]
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(root)})
    worker = int(process.stdout.readline())
    if status < 0:
        process.send_signal(-status)
    assert process.wait(timeout=60) == status
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_video_ring_cuts_its_videos():
    """A clip is a window of a rendered video on the grid of latents, and a resumed ring holds the same."""
    ring, other = (VideoRing(5, 2, 9, 2, 32, CPU) for _ in range(2))
    for _ in range(3):
        ring.refresh()
    other.refill(3)
    clips, again = (r.sample(6, 5, 16, torch.Generator().manual_seed(1)) for r in (ring, other))
    assert torch.equal(clips, again) and clips.shape == (6, 3, 5, 16, 16)
    videos = [to_uint8(render(unpack_tracks(plan_videos(5, 2, 9, index)), slice(None), size=32))
              for index in (1, 2)]
    windows = torch.cat(videos).transpose(1, 2).unfold(2, 5, 1).unfold(3, 16, 8).unfold(4, 16, 8)
    windows = windows.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(0, 3)
    assert all((windows == clip).flatten(1).all(dim=1).any() for clip in clips)
    assert len({clip.numpy().tobytes() for clip in clips}) > 1


def test_attention_of_blocks_is_masked_attention():
    """Grouped attention, and its gradient, are those of dense attention under the mask that `sees` spells,
    whichever order the blocks come in, with blocks stored before.
    """
    sees = ((0, 1, 4), (5,), (0, 2, 6), (0, 1, 2, 7), (0, 2, 3, 8), (9,))
    g = torch.Generator().manual_seed(1)
    stored, new = ([torch.randn(n, 2, 3, 2, 4, generator=g, requires_grad=True) for _ in range(k)]
                   for n, k in ((4, 2), (6, 3)))
    out = attend_blocks(*new, sees, *stored)
    mask = torch.tensor([[key in seen for key in range(10)] for seen in sees])
    mask = mask.repeat_interleave(3, 0).repeat_interleave(3, 1)
    q, k, v = (t.permute(1, 3, 0, 2, 4).flatten(2, 3) for t in (
        new[0], torch.cat([stored[0], new[1]]), torch.cat([stored[1], new[2]])))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    dense = dense.unflatten(2, (6, 3)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(out, dense)
    weight = torch.randn(out.shape, generator=g)
    for a, b in zip(*(torch.autograd.grad((result * weight).sum(), [*new, *stored]) for result in (
            out, dense))):
        torch.testing.assert_close(a, b)


def test_compiled_transformer_is_the_transformer(maker):
    """Without graph breaks, equal in values and gradients; clips of other kinds and numbers need no other
    graph than the first, of which there are three: two halves of a block and the head.
    """
    from torch._dynamo.utils import counters

    def gradients(plain: int, switch: int) -> list[Tensor]:
        sizes = dict(plain_batch=plain, switch_batch=switch, clips_from=0, **OPENINGS)
        stage = TeacherStage(SMALL, PLAN, maker, CPU, torch.float32, 0, TeacherSettings(**sizes))
        stage.ring, stage.openings = ring, openings
        for parameter in stage.masters.work.parameters():
            parameter.data.add_(0.02)  # gates begin at zero
        stage.step(0, 0.0)
        return [parameter.grad for parameter in stage.masters.work.parameters() if parameter.grad is not None]

    ring, openings = OneBatch(maker), OneBatch(maker, 4)
    plain = gradients(3, 2)
    counters.clear()
    use_compiler("aot_eager")
    try:
        compiled, graphs = gradients(3, 2), counters["stats"]["unique_graphs"]
        gradients(2, 4)
        assert not counters["graph_break"] and graphs == counters["stats"]["unique_graphs"] == 3
    finally:
        use_compiler(None)
    assert len(plain) == len(compiled)
    for a, b in zip(plain, compiled):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compiled_vae_and_drawing_are_the_same():
    """One graph for each size of picture and number of channels, and one to draw any number of objects."""
    from torch._dynamo.utils import counters

    tracks, vae = unpack_tracks(plan_videos(5, 2, 5, 0)), WanVAE(SMALL.vae)
    init_vae_(vae)

    def run() -> list[Tensor]:
        video = render_fast(tracks, slice(None), CPU, 32).transpose(1, 2)
        pixels = decode_clip(vae, moments(vae, video)[0])
        losses = reconstruction_losses(pixels, video)
        return [video, pixels, *torch.autograd.grad(sum(losses.values()), list(vae.decoder.parameters()))]

    plain = run()
    counters.clear()
    use_compiler("aot_eager")
    try:
        compiled = run()
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 10
    finally:
        use_compiler(None)
    for a, b in zip(plain, compiled):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_text_of_training_is_text_of_inference():
    """Encoding a batch at once gives what `TextEncoder.encode` gives prompt by prompt."""
    module = UMT5Encoder(TEXT)
    random_init_(module, 0, CPU, torch.float32)
    tokenizer = load_tokenizer("bytes", TEXT.text_len)
    prompts = ["a small red circle moves left, on a dotted grey ground", "a star"]
    encoder = TextEncoder(TEXT, tokenizer, "test", lambda keep_on: (module, {}))
    torch.testing.assert_close(text_features(module, tokenizer(prompts)[0]), encoder.encode(prompts))


def test_labels_fit_their_classes():
    for seed in range(50):
        labels = scene_labels(sample_scene(np.random.default_rng(seed)))
        assert len(labels) == len(CLASSES) and all(label < size for label, size in zip(labels, CLASSES))


def student(maker: ClipMaker, dit: CausalDiT, **settings) -> StudentStage:
    encoder = UMT5Encoder(TEXT)
    random_init_(encoder, 0, CPU, torch.float32)
    teacher = CausalDiT(DIT)
    teacher.load_state_dict(dit.state_dict())
    sizes = {**dataclasses.asdict(QUICK.student), **settings}
    return StudentStage(SMALL, PLAN, maker, teacher, encoder, CPU, torch.float32, 0, StudentSettings(**sizes))


def test_student_sees_the_samplers_noise_levels(maker, dit):
    """The timesteps and sigmas of the student are the sampler's own, and its loss at a level is of the clean
    estimate that the sampler makes there.
    """
    stage, sampler = student(maker, dit), Sampler(PLAN, EagerForward(dit))
    assert stage.timesteps.tolist() == sampler.timesteps
    assert stage.sigmas.tolist() == [float(sampler.schedule.sigma(t)) for t in sampler.timesteps]
    assert [round(s, 4) for s in stage.sigmas.tolist()] == [1.0, 0.9375, 0.8333, 0.625]


@torch.no_grad()
def test_rollout_is_the_sampler(maker, dit):
    """A stream of the student is what sampler and rolling cache make of the same noise, and the noisy blocks
    that it keeps are those that the sampler denoised."""
    stage = student(maker, dit)
    ids = torch.ones((2, 128), dtype=torch.int64)
    text = stage._prompt(stage.dit, ids, ids).now
    stage.generator.manual_seed(5)
    task = stage._roll_out("plain", ids, ids)
    stage.generator.manual_seed(5)
    level = stage._levels(2, CLIP_BLOCKS)
    assert torch.equal(level, task.level)
    sampler, cache = inference(dit)
    for block in range(CLIP_BLOCKS):
        part = slice(3 * block, 3 * block + 3)
        noise = [stage._noise((2, 3, 16, 4, 4)) for _ in range(4)]
        clean = sampler.denoise_block(cache, text, 3 * block, noise[0], torch.stack(noise[1:]))
        torch.testing.assert_close(task.latents[:, part], clean, rtol=0, atol=2e-4)
        first = level[:, block] == 0
        assert torch.equal(task.noisy[first, part], noise[0][first])


@torch.no_grad()
def test_end_points_follow_the_flow(maker, dit):
    """For a teacher whose flow is constant the end point is one straight step: noisy - sigma * flow."""
    stage = student(maker, dit, ode_steps=3)
    for parameter in stage.teacher.head.parameters():
        parameter.zero_()
    stage.teacher.head.head.bias.fill_(0.25)
    clips = Clips(latents(7, 2), torch.arange(21).expand(2, -1), torch.ones(2, 7),
                  *(torch.ones(2, 128, dtype=torch.int64) for _ in range(2)), torch.zeros(2))
    level = torch.tensor([[0, 1], [2, 3]])
    task = Task(clips.latents, clips.positions, stage.layouts["plain"], (3, 4), latents(2, 8), level,
                torch.ones(2, 2), clips.sink_ids, clips.ids)
    sigma = stage.sigmas[level].repeat_interleave(3, 1)[:, :, None, None, None]
    found, again = stage.end_points([task, task])
    torch.testing.assert_close(found, task.noisy - 0.25 * sigma, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, again)


def test_streams_run_on_and_switch(maker, dit):
    """Streams keep their sink, move on by what was made, and take their other prompt at a switch."""
    stage = student(maker, dit, birth_batch=4, stream_batch=4)
    stage.ring.refresh()
    stage._start()
    streams = stage.streams
    sink, ids, other = streams.latents[:, :3].clone(), streams.ids.clone(), streams.next_ids.clone()
    assert len(streams) == 4 and streams.position.tolist() == [12] * 4 and not torch.equal(ids, other)
    stage._go_on(switch=False)
    stage._go_on(switch=True)
    assert streams.position.tolist() == [30] * 4 and torch.equal(streams.latents[:, :3], sink)
    assert torch.equal(streams.ids, other) and torch.equal(streams.sink_ids, ids)
    streams.position.fill_(299)
    stage._go_on(switch=False)
    assert streams.position.tolist() == [12] * 4


OPENINGS = dict(opening_batch=3, opening_with_clips=2, opening_chunk=4, opening_ring_chunks=2,
                opening_first_chunks=1, opening_refresh_every=2)


def stages(maker: ClipMaker, dit: CausalDiT) -> dict:
    """A new instance of every stage, tiny."""
    sizes = dict(plain_batch=2, switch_batch=1, ring_chunks=2, first_chunks=1, refresh_every=2, **OPENINGS)
    return {
        "vae": lambda: VAEStage(
            SMALL.vae,
            32,
            CPU,
            torch.float32,
            0,
            VAESettings(crop=16, crop_batch=2, crop_frames=5, whole_batch=1, whole_frames=5, horizon=8,
                        ring_videos=2, ring_chunks=2, first_chunks=1, refresh_every=2),
        ),
        "text": lambda: ReadingStage(SMALL, CPU, torch.float32, 0, batch=4, prompts=16),
        "teacher": lambda: TeacherStage(SMALL, PLAN, maker, CPU, torch.float32, 0, TeacherSettings(**sizes)),
        "student": lambda: student(maker, dit),
    }


@pytest.mark.parametrize("name", ["vae", "text", "teacher", "student"])
def test_resumed_training_is_uninterrupted_training(maker, dit, tmp_path, name):
    """Weights, average, moments, random numbers, ring and streams all come back, to the bit."""
    make = stages(maker, dit)[name]
    whole, part, rest = make(), make(), make()
    assert run_stage(whole, tmp_path / "a", Budget(steps=6), log_steps=2)
    assert not run_stage(part, tmp_path / "b", Interrupted(6, at=4), log_steps=2)
    assert run_stage(rest, tmp_path / "b", Budget(steps=6), log_steps=2)
    a, b = whole.masters.groups(), rest.masters.groups()
    for group in a:
        assert a[group].keys() == b[group].keys()
        assert all(torch.equal(a[group][key], b[group][key]) for key in a[group]), group
    rows = [
        [json.loads(line) for line in (tmp_path / f / "log.jsonl").read_text().splitlines()] for f in "ab"
    ]
    drop = "ms_per_step"
    assert [{k: v for k, v in r.items() if k != drop} for r in rows[0]] == [
        {k: v for k, v in r.items() if k != drop} for r in rows[1]]
    assert len(checkpoints(tmp_path / "b", name)) == 1


class Interrupted(Budget):
    """A budget of `steps` whose process ends at step `at`."""

    def __init__(self, steps: int, at: int):
        super().__init__(steps=steps, deadline=float("inf"))
        object.__setattr__(self, "at", at)

    def progress(self, step: int, seconds: float) -> float:
        if step >= self.at:
            object.__setattr__(self, "deadline", 0.0)
        return super().progress(step, seconds)


def test_checkpoint_without_moments_goes_on(maker, dit, tmp_path, caplog):
    """What travels between machines is enough to go on, and the log says what was lost."""
    make = stages(maker, dit)["teacher"]
    run_stage(make(), tmp_path, Interrupted(6, at=4))
    for path in checkpoints(tmp_path, "teacher")[0].glob("exact.*"):
        path.unlink()
    assert run_stage(make(), tmp_path, Budget(steps=6))
    assert "moments are reset" in caplog.text


def test_broken_checkpoint_is_named(maker, dit, tmp_path):
    make = stages(maker, dit)["text"]
    run_stage(make(), tmp_path, Budget(steps=1))
    (checkpoints(tmp_path, "text")[0] / "weights.0.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="text-0000001"):
        run_stage(make(), tmp_path, Budget(steps=2))


def test_weights_that_are_no_numbers_are_not_saved(maker, dit, tmp_path):
    """A stage that blew up between two logs must leave the last good checkpoint, and say what to do."""
    make = stages(maker, dit)["text"]
    run_stage(make(), tmp_path, Interrupted(4, at=2))
    stage = make()
    with torch.no_grad():
        stage.masters._master[0].fill_(float("nan"))
    stage.masters.restore = lambda groups, steps: None
    with pytest.raises(UserError, match="--rate-scale"):
        run_stage(stage, tmp_path, Interrupted(4, at=3))
    assert [path.name for path in checkpoints(tmp_path, "text")] == ["text-0000002"]


def test_budget():
    assert Budget(steps=4).progress(1, 1e9) == 0.25
    assert Budget(steps=10, minutes=1).progress(1, 30) == 0.5
    with pytest.raises(UserError, match="--minutes"):
        Budget()


def falls(stage, steps: int, key: str, share: float) -> None:
    """The loss `key` of `stage` ends below `share` of where it began."""
    losses = []
    for step in range(steps):
        losses.append(float(stage.step(step, 0.0)[key].detach()))
        stage.masters.update(0.0)
    assert np.mean(losses[-5:]) < share * np.mean(losses[:5]), losses


class OneBatch:
    """A ring that always gives the same clips, or the same `openings`."""

    def __init__(self, maker: ClipMaker, openings: int = 0):
        whose = maker.openings(openings) if openings else maker
        self.clips = whose.make(whose.plan(0))

    def produce(self, chunks: int) -> None:
        pass

    def sample(self, pool: str, count: int, generator: torch.Generator) -> Clips:
        clips = self.clips[pool]
        return clips[torch.arange(count) % len(clips)]

    def has(self, pool: str) -> bool:
        return pool in self.clips


def test_vae_learns():
    falls(VAEStage(SMALL.vae, 32, CPU, torch.float32, 0,
                   VAESettings(rate=4e-3, crop=16, crop_batch=4, crop_frames=5, horizon=8, ring_videos=4)),
          40, "loss", 0.7)


def test_text_encoder_learns():
    falls(ReadingStage(SMALL, CPU, torch.float32, 0, rate=1e-2, batch=16, prompts=16), 60, "reading", 0.8)


@pytest.mark.parametrize("key", ["flow", "opening_flow"])
def test_teacher_learns(maker, key):
    stage = TeacherStage(SMALL, PLAN, maker, CPU, torch.float32, 0,
                         TeacherSettings(rate=5e-3, plain_batch=2, switch_batch=1, clips_from=0, **OPENINGS))
    stage.ring, stage.openings = OneBatch(maker), OneBatch(maker, 4)
    for clips in (*stage.ring.clips.values(), *stage.openings.clips.values()):
        clips.latents = clips.latents / clips.latents.std()  # the untrained VAE's have no unit scale
    falls(stage, 40, key, 0.95)


def test_teacher_begins_with_openings(maker):
    """No clip is asked for, or made, before its time."""
    sizes = dict(plain_batch=2, switch_batch=1, ring_chunks=2, first_chunks=1, clips_from=0.5, **OPENINGS)
    stage = TeacherStage(SMALL, PLAN, maker, CPU, torch.float32, 0, TeacherSettings(**sizes))
    assert "flow" not in stage.step(0, 0.0) and stage.ring.produced == 0 and stage.openings.produced == 1
    assert {"opening_flow", "flow", "switch_flow"} < stage.step(7, 0.5).keys()
    assert stage.ring.produced == 1 and stage.openings.produced == 4 and stage.state()["clips_since"] == 7


class NoQuestions(TorchDispatchMode):
    """Fails where a tensor's value is wanted, or one is made from values on the host."""

    ASKED = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in self.ASKED), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_what_is_recorded_asks_the_host_for_nothing(maker, dit, monkeypatch, name):
    """A CUDA graph replays launches; a copy from the host, or a look at a value, could not be replayed."""
    seen: dict = {}

    def call(recorder, key, function, *inputs):
        # Tables come with the first call; the third is the second again.
        with NoQuestions() if seen.setdefault(key, 0) == 1 else contextlib.nullcontext():
            found = list(function(*inputs))
        seen[key] += 1
        return found

    monkeypatch.setattr(Recorder, "__call__", call)
    stage = stages(maker, dit)[name]()
    stage.ring = OneBatch(maker)  # making clips is not recorded, and takes longer than the steps
    stage.ring.clips |= maker.make(maker.plan(1))  # which switches at another block
    if name == "teacher":
        stage.openings = OneBatch(maker, 4)
    kinds = {"teacher": 4, "student": 7}[name]
    for step in range(48):
        stage.step(step, step / 48)
        stage.masters.update(0.0)
        if sum(count > 1 for count in seen.values()) == kinds:
            return
    pytest.fail(f"too few kinds of work came twice: {seen}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_replayed_steps_are_steps(vae, dit, name):
    """With graphs and without, the same losses and the same weights from the same random numbers."""
    cuda = torch.device("cuda")

    def train(graphs: bool) -> tuple[list, list]:
        maker = ClipMaker(copy.deepcopy(vae).to(cuda), 128, 32, seed=3, mix=Mix(1, 1, 1, 1, 1), far=30)
        if name == "teacher":
            sizes = dict(plain_batch=2, switch_batch=1, ring_chunks=2, first_chunks=1, refresh_every=2)
            stage = TeacherStage(SMALL, PLAN, maker, cuda, torch.float32, 0,
                                 TeacherSettings(**sizes, **OPENINGS), graphs=graphs)
        else:
            encoder = UMT5Encoder(TEXT)
            random_init_(encoder, 0, CPU, torch.float32)
            stage = StudentStage(SMALL, PLAN, maker, copy.deepcopy(dit).to(cuda), encoder.to(cuda), cuda,
                                 torch.float32, 0, QUICK.student, graphs)
        losses = []
        for step in range(24):
            losses.append({key: float(value) for key, value in stage.step(step, step / 24).items()})
            stage.masters.update(0.0)
        assert bool(stage.recorder._recordings) == graphs
        return losses, [p.detach().cpu() for p in stage.masters._master]

    (eager, weights), (replayed, again) = train(False), train(True)
    for a, b in zip(eager, replayed):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-3 * (1 + abs(a[k])) for k in a)
    for a, b in zip(weights, again):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_openings_are_first_blocks(maker, vae):
    """What an opening shows is what a video of that scene begins with, under its own prompt."""
    openings = maker.openings(4)
    plan = openings.plan(2)
    clips = openings.make(plan)[OPENING]
    assert clips.latents.shape[:2] == (4, 3) and clips.positions.tolist() == [[0, 1, 2]] * 4
    assert torch.equal(clips.ids, clips.sink_ids) and clips.loss.tolist() == [[1.0]] * 4
    for i, video in enumerate(plan.pools[OPENING]):
        frames = render(plan.clip[i:i + 1], slice(None), size=32)
        assert frames.shape[1] == 9
        torch.testing.assert_close(encode_video(vae, frames)[0], clips.latents[i], rtol=0, atol=1e-4)
        assert clips.labels[i].tolist() == scene_labels(video.timeline[0][1])
    assert not torch.equal(clips.ids, openings.make(openings.plan(3))[OPENING].ids)


def test_student_learns(maker, dit):
    """From a random start the student comes to name the end points of its teacher."""
    stage = student(maker, dit, rate=1e-2, guidance=1.0)
    stage.ring = OneBatch(maker)
    with torch.no_grad():
        for parameter in stage.masters._master:
            parameter.mul_(0.5)
    falls(stage, 20, "true", 0.7)


def test_export_loads_and_streams(tmp_path, monkeypatch, dit, vae):
    """The folder is found, every part loads with its values, the tokenizer is the training's, and a session
    runs through a prompt switch.
    """
    from longlive_opt import config

    encoder = UMT5Encoder(TEXT)
    random_init_(encoder, 0, CPU, torch.float32)
    sizes = export_weights(tmp_path, dit.state_dict(), encoder.state_dict(), vae.state_dict())
    assert sum(sizes.values()) < 24e6 and len(sizes) == 4
    files = resolve_weights(tmp_path, MODELS["tiny"])
    loaded, report = load_dit(DIT, files, CPU, torch.bfloat16)
    assert report["lora_targets"] == 0
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, dit.state_dict()[name].bfloat16()), name
    load_vae(SMALL.vae, files, CPU, torch.bfloat16)
    text = open_text_encoder(TEXT, files, CPU, torch.float32)
    prompts = ["a small red circle, moves left  ON grey", "déjà vu ☃ <b> &amp; 12"]
    ours = load_tokenizer("bytes", TEXT.text_len)
    for a, b in zip(text.tokenizer(prompts), ours(prompts)):
        assert torch.equal(a, b)
    monkeypatch.setattr(config, "MODELS", {**config.MODELS, "small": SMALL})
    pipeline = build_reference(ExperimentConfig.from_mapping(
        {"model": "small", "weights": str(tmp_path), "model_dtype": "bfloat16", "warmup_blocks": 12}))
    session = StreamingSession(pipeline)
    chunks = []
    for chunk in session.stream("a small red circle moves left, on a dotted grey ground", 4):
        chunks.append(chunk)
        if chunk.block == 1:
            session.switch_prompt("a large blue star spins, on a dotted grey ground")
    assert [chunk.switched for chunk in chunks] == [False, False, True, False]
    assert torch.cat([chunk.frames for chunk in chunks], dim=1).shape == (1, 45, 3, 32, 32)


def test_command_trains_exports_and_resumes(tmp_path, monkeypatch):
    """`--quick` goes through all stages, a second call has nothing to train, and the folder is a weights
    folder.
    """
    monkeypatch.setattr(command, "MODELS", {"tiny": dataclasses.replace(SMALL, name="tiny")})
    arguments = ["--out", str(tmp_path), "--quick", "--steps", "2,2,2"]
    assert command.main([*arguments, "--call-minutes", "0"]) == command.CONTINUE
    assert command.main(arguments) == 0
    files = resolve_weights(tmp_path, MODELS["tiny"])
    vae, _ = load_vae(SMALL.vae, files, CPU, torch.float32)
    stage = VAEStage(SMALL.vae, 32, CPU, torch.float32, 9, VAESettings())
    encoded = vae.encode(stage.video(0, 8, 33, 32)).transpose(1, 2).transpose(0, 1).flatten(1)
    # An untrained VAE has far more mean than deviation, and bfloat16 rounds the mean.
    assert encoded.mean(1).abs().max() < 3 and 0.4 < encoded.std(1).min() and encoded.std(1).max() < 2.5
    elsewhere = tmp_path / "elsewhere"
    assert command.main([*arguments, "--stage", "export", "--pack", str(elsewhere)]) == 0
    packed = [path for path in elsewhere.rglob("*") if path.is_file()]
    assert len(packed) <= 8 and max(len(path.relative_to(elsewhere).parts) for path in packed) == 3
    assert command.main(["--out", str(elsewhere), "--quick", "--stage", "export"]) == 0
    for part in ("dit", "text", "vae"):
        path = getattr(resolve_weights(elsewhere, MODELS["tiny"]), part)
        assert path.read_bytes() == getattr(files, part).read_bytes()
    assert command.main(["--out", str(elsewhere), "--quick", "--steps", "2,2,4"]) == 0
    before = sorted(path.name for path in (tmp_path / "training").iterdir())
    assert command.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--stage", "bench", "--only", "tea"], "teacher"),
        (["--stage", "plan"], "--ms"), (["--stage", "plan", "--ms", "teacher"], "name=milliseconds"),
        (["--minutes", "4,x,8"], "--minutes"),
        (["--steps", "1,2"], "--steps"), (["--rate-scale", "0"], "--rate-scale"),
        (["--stage", "student"], "teacher"), (["--stage", "teacher", "--graphs"], "--graphs"),
        (["--stage", "export"], "teacher"),
    ],
)
def test_command_names_what_is_wrong(tmp_path, caplog, arguments, said):
    assert command.main(["--out", str(tmp_path), "--quick", *arguments]) == 1
    assert said in caplog.text


def test_bench_times_every_stage_and_plan_reads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "MODELS", {"tiny": dataclasses.replace(SMALL, name="tiny")})
    arguments = ["--out", str(tmp_path), "--quick"]
    monkeypatch.setattr(bench, "PROFILED_STEPS", 1)
    assert command.main([*arguments, "--stage", "bench"]) == 0
    rows = json.loads((tmp_path / "training" / "bench.json").read_text())
    assert list(rows) == ["vae_crop", "vae_whole", "text", "opening", "teacher", "student"]
    assert all(row["wall"] > 0 and row["host"] > 0 for row in rows.values())
    assert rows["teacher"]["chunk"] > 0 < rows["vae_whole"]["plan"] and "chunk" not in rows["text"]
    assert command.main([*arguments, "--stage", "plan", "--minutes", "4,10,8"]) == 0
    assert "student" in capsys.readouterr().out


def test_plan_counts_what_the_minutes_buy():
    """One minute at 100 ms and, every 60 steps, 600 ms for a chunk; two chunks come before."""
    settings = Settings(minutes=(None, 1.0, None),
                        teacher=TeacherSettings(clips_from=0.0, first_chunks=2, refresh_every=60))
    row = budget(settings, times_of("teacher=100,teacher_chunk=600"))["teacher"]
    assert row["steps"] == int((60_000 - 1200) / 110) and row["clips"] == 44 * row["steps"]
    assert row["frames"] == 81 * row["clips"] and row["chunks"] == 2 + row["steps"] // 60
    halves = budget(Settings(minutes=(1.0, None, None)), times_of("vae_crop=50,vae_whole=100"))
    assert [halves[name]["steps"] for name in ("vae_crop", "vae_whole")] == [720, 240]
    halves = budget(Settings(minutes=(None, 1.0, None), teacher=TeacherSettings(clips_from=0.25)),
                    times_of("opening=50,teacher=100"))
    assert [halves[name]["steps"] for name in ("opening", "teacher")] == [300, 450]


def test_true_videos_pass_the_check():
    """What the check counts as frames after a switch are those: a true video has the new scene at once."""
    rng = np.random.default_rng(4)
    scene = sample_scene(rng, objects=1)
    other = change_scene(rng, scene)
    start = first_video_frame(3 * SWITCH_BLOCK)
    tracks = simulate([[(0, scene), (start, other)]], start + 48, 0)
    found = evaluate_switch(to_uint8(render(tracks, slice(None)))[0], scene, other)
    assert found["delay_blocks"] == 1 and found["adherence"] > 0.9 and found["permanence"] == 1.0
    assert found["old_left"] == 0 and found["new_shown"] == 1
    tracks = simulate([[(0, scene)]], start + 48, 0)
    found = evaluate_switch(to_uint8(render(tracks, slice(None)))[0], scene, other)
    assert found["old_left"] == 1 and found["new_shown"] == 0


def test_a_check_that_is_cut_off_keeps_what_it_has(tmp_path, monkeypatch):
    """An hour of videos lost to the last variant; an unknown variant found out after that hour."""
    full, few = {"switch": [{"old_left": 0.0}, {"old_left": 1.0}]}, {"switch": [{"old_left": 1.0}]}
    monkeypatch.setattr(check_module, "_judge", Mock(side_effect=[(full, []), (few, []), KeyboardInterrupt]))
    monkeypatch.setattr(check_module, "_pipeline", lambda *arguments: None)
    with pytest.raises(UserError, match="--variants: 'no_such' is unknown; known: no_sink"):
        check_weights(tmp_path, "cpu", variants=("window_6", "no_such"))
    with pytest.raises(KeyboardInterrupt):
        check_weights(tmp_path, "cpu", variants=("window_6", "no_sink"))
    kept = json.loads((tmp_path / "check.json").read_text())
    assert kept["switch"] == {"videos": 2, "old_left": 0.5, "old_left_se": 0.5}
    assert kept["variants"] == {"window_6": {"switch": {"videos": 1, "old_left": 1.0,
                                                        "old_left_change": 1.0}},
                                "full": {"switch": {"videos": 1, "old_left": 0.0}}}


def test_changes_are_those_of_the_same_video():
    """An error that the spread of the scenes makes, where each video loses the same; a delay of a video that
    never came.
    """
    full = [{"adherence": 1.0, "delay": 1}, {"adherence": 0.5, "delay": 1}, {"adherence": 0.2, "delay": 3}]
    less = [{"adherence": 0.9, "delay": 2}, {"adherence": 0.4, "delay": None}, {"adherence": 0.1, "delay": 5}]
    assert check_module._changes(less, full) == {"adherence_change": -0.1, "adherence_change_se": 0.0,
                                                 "delay_change": 1.5, "delay_change_se": 0.5}


def test_each_variant_has_its_videos():
    """Minutes of video without a switch for a recache that is left out; as many for each of the windows."""
    sizes = check_module.Sizes(0, 8, 4, 2, 1)
    found = {name: variant.videos(sizes) for name, variant in check_module.VARIANTS.items()}
    assert found == {"no_sink": (8, 4), "no_recache": (8, 0), "window_9": (2, 1), "window_6": (2, 1)}


def test_things_out_of_place_fail_the_check():
    """A video that loses an object's place within its last five seconds keeps its adherence."""
    scene = SceneSpec((ObjectSpec("large", "red", "square", "pulses"),), "grey", "dotted")
    tracks = simulate([[(0, scene)]], 160, 0)
    for shift, share in ((0, 1), (15, 0)):
        tracks.position[..., 0, :] = torch.tensor([60.0, 60.0])
        tracks.position[:, 80:, 0, :] += shift
        found = evaluate_long(to_uint8(render(tracks, slice(None)))[0], scene)
        assert found["in_place"] == share and found["first"] == found["last"] == 1


@torch.no_grad()
def test_without_recache_the_old_prompt_stays(dit, tmp_path):
    """The variant that is measured leaves the cache alone, and only that."""
    old, new = texts(dit, 2)
    sampler, cache = inference(dit)
    clean = latents(2, 1)
    sampler.run_pass(cache, old, 0, clean[:, :3], 0, keys_only=True)
    before = cache.layers[0].key.clone(), cache.layers[-1].key.clone()
    NoRecache(PLAN, sampler.forward).recache(cache, new, 3, clean[:, :3])
    assert torch.equal(cache.layers[-1].key, before[1])
    sampler.recache(cache, new, 3, clean[:, :3])
    assert not torch.equal(cache.layers[-1].key, before[1])


def test_tiny_fits_its_budget():
    """All parts together, in bfloat16, stay below 24 MB."""
    model = MODELS["tiny"]
    with torch.device("meta"):
        parts = CausalDiT(model.dit), WanVAE(model.vae), UMT5Encoder(model.text)
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 24e6


def test_a_file_as_the_folder_is_one_sentence(tmp_path, capsys):
    """A traceback after the data were made."""
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit) as left:
        command.main(["--out", str(tmp_path / "out"), "--stage", "export"])
    assert left.value.code == 2 and "out is a file; name a folder" in capsys.readouterr().err
