"""Streaming: chunks, prompt switches, reset, constant memory, and the recorded rollouts through a session."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from micro import micro_model, micro_pipeline
from safetensors.torch import load_file
from torch import Tensor

from longlive_opt.errors import UserError
from longlive_opt.kernels.torch_internals import compiled_graphs
from longlive_opt.models.vae import StreamingDecoder, frames_to_uint8
from longlive_opt.optimizations.text_offload import TextOffload
from longlive_opt.parity.comparison import TARGET
from longlive_opt.parity.transformer import build_dit, make_rolling_cache, sampling_plan
from longlive_opt.prompts import PromptSchedule
from longlive_opt.streaming.decoder import HOST_BUFFERS, Delivery
from longlive_opt.streaming.pipeline import Pipeline
from longlive_opt.streaming.prompt_queue import PromptQueue
from longlive_opt.streaming.sampler import EagerForward, Sampler, StreamNoise
from longlive_opt.streaming.session import Chunk, StreamingSession
from longlive_opt.streaming.timeline import Timeline

GOLDEN = Path(__file__).parent / "golden"
POINT = {"height": 16, "width": 16}  # one token a frame


@pytest.fixture(autouse=True, scope="module")
def micro():
    with micro_model():
        yield


@pytest.fixture(scope="module")
def pipeline(micro) -> Pipeline:
    return micro_pipeline()


@pytest.fixture(scope="module")
def point(micro) -> Pipeline:
    return micro_pipeline(**POINT)


def same_video(a: list[Chunk], b: list[Chunk]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.frames, y.frames) and torch.equal(x.latents, y.latents)
                                    for x, y in zip(a, b))


def expected_latents(pipeline: Pipeline, segments: list[str]) -> list[Tensor]:
    """What a session must generate, SPEC 4.1 and 5 literally; segments[b] is block b's prompt."""
    sampler, cache, plan = pipeline.sampler, pipeline.make_cache(), pipeline.sampler.plan
    noise = StreamNoise(plan, pipeline.latent_shape, pipeline.config.seed, pipeline.device, pipeline.dtype)
    latents: list[Tensor] = []
    for block, prompt in enumerate(segments):
        text, start = pipeline.encode_prompt(prompt), block * plan.block_frames
        if block and prompt != segments[block - 1]:
            sampler.recache(cache, text, start, torch.cat(latents, dim=1)[:, -min(plan.window, start):])
        latents.append(sampler.denoise_block(cache, text, start, *noise.next_block()))
    return latents


def test_chunks_of_a_stream(pipeline):
    """9 frames first, 12 afterwards; the block's own latents, in order, as uint8 pixels."""
    chunks = list(StreamingSession(pipeline).stream("a fox", 4))
    assert [chunk.block for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.start_frame for chunk in chunks] == [0, 3, 6, 9]
    assert [tuple(chunk.frames.shape) for chunk in chunks] == [(1, 9, 3, 32, 48)] + [(1, 12, 3, 32, 48)] * 3
    assert {chunk.frames.dtype for chunk in chunks} == {torch.uint8}
    assert {tuple(chunk.latents.shape) for chunk in chunks} == {(1, 3, 16, 4, 6)}
    assert not any(chunk.switched for chunk in chunks) and {chunk.prompt for chunk in chunks} == {"a fox"}
    assert not any(chunk.latents.requires_grad or chunk.frames.requires_grad for chunk in chunks)
    latents = torch.cat([chunk.latents for chunk in chunks], dim=1)
    frames, = StreamingDecoder(pipeline.vae, 1, 4, 6).push(latents)
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=1), frames_to_uint8(frames))


@pytest.mark.parametrize("window, sink, block", [(12, 3, 3), (7, 2, 3), (6, 0, 1), (10, 1, 4)])
def test_session_is_the_loop_of_the_specification(window, sink, block):
    """History cut one block short, noise drawn in another order, the recache of the wrong frames."""
    pipeline = micro_pipeline(local_attn_size=window, sink_size=sink, block_frames=block, **POINT)
    switch_at = [2, window // block + 2]
    segments = [str(sum(b >= at for at in switch_at)) for b in range(switch_at[1] + 3)]
    expected = expected_latents(pipeline, segments)
    session, chunks = StreamingSession(pipeline), []
    for chunk in session.stream("0", len(segments)):
        chunks.append(chunk)
        if session.next_block in switch_at:
            session.switch_prompt(str(switch_at.index(session.next_block) + 1))
    assert [chunk.prompt for chunk in chunks] == segments
    assert [chunk.block for chunk in chunks if chunk.switched] == switch_at
    assert all(torch.equal(chunk.latents, latents) for chunk, latents in zip(chunks, expected, strict=True))


class RecordedNoise:
    """The noise of the recording, block after block."""

    def __init__(self, inputs: dict[str, Tensor]):
        self.inputs, self.block = inputs, 0

    def next_block(self) -> tuple[Tensor, Tensor]:
        start, self.block = 3 * self.block, self.block + 1
        return self.inputs["noise"][:, start:start + 3], self.inputs["step_noise"][self.block - 1][:, None]

    def reset(self) -> None:
        self.block = 0


class NoPixels:
    """A decoder whose frames are the latents, each four times."""

    def push(self, latents: Tensor, urgent: bool = False) -> list[Tensor]:
        return [latents.repeat_interleave(4, dim=1)]

    def flush(self) -> list[Tensor]:
        return []

    def reset(self) -> None:
        pass


def recorded_session(pipeline: Pipeline, global_sink: bool, infinity: bool) -> StreamingSession:
    """A session on the recorded weights, noise and prompts; prompt "i" is the i-th recorded one."""
    config = json.loads((GOLDEN / "manifest.json").read_text())["configs"]["stream"]
    inputs = load_file(GOLDEN / "stream_inputs.safetensors")
    dit = build_dit(config, load_file(GOLDEN / "stream_weights.safetensors")).requires_grad_(False)
    return StreamingSession(dataclasses.replace(
        pipeline, dit=dit, sampler=Sampler(sampling_plan(config, global_sink), EagerForward(dit)),
        encode_prompt=lambda prompt: dit.embed_text(inputs["prompt_embeds"][int(prompt):int(prompt) + 1]),
        make_cache=lambda: make_rolling_cache(dit, config, 1, infinity),
        make_decoder=lambda *_: NoPixels()), noise=RecordedNoise(inputs))


@pytest.mark.parametrize("case, global_sink, infinity", [
    ("switch_global_sink_true", True, False), ("switch_global_sink_false", False, False),
    ("infinity_switch_global_sink_true", True, True)])
def test_script_reproduces_the_recorded_video(pipeline, case, global_sink, infinity):
    """The product's own loop, not only the parity check's: switches at frames 6 and 15, as recorded."""
    recorded = load_file(GOLDEN / f"{case}.safetensors")["latents"]
    session = recorded_session(pipeline, global_sink, infinity)
    schedule = PromptSchedule(("0", "1", "2"), (6, 15))
    latents = torch.cat([chunk.latents for chunk in session.play(schedule, 6)], dim=1)
    assert (latents - recorded).abs().max() <= TARGET
    session.reset()
    live = []
    for chunk in session.stream("0", 6):
        live.append(chunk.latents)
        if chunk.block in (1, 4):
            session.switch_prompt({1: "1", 4: "2"}[chunk.block])
    assert torch.equal(torch.cat(live, dim=1), latents)


def test_reset_starts_the_same_video_again(pipeline):
    """History, cache, noise, decoder or a waiting request left over: another video, bit for bit visible."""
    session = StreamingSession(pipeline)
    first = []
    for chunk in session.stream("a fox", 6):
        first.append(chunk)
        if chunk.block == 3:
            session.switch_prompt("a whale")
    session.switch_prompt("never seen")
    session.reset()
    second = []
    for chunk in session.stream("a fox", 6):
        second.append(chunk)
        if chunk.block == 3:
            session.switch_prompt("a whale")
    assert same_video(first, second)
    assert same_video(second, list(StreamingSession(pipeline).play(PromptSchedule(("a fox", "a whale"),
                                                                                  (12,)), 6)))


def test_seed_changes_the_video(point):
    """Two seeds, one video: the seed does not reach the noise."""
    other = dataclasses.replace(point, config=dataclasses.replace(point.config, seed=1))
    a, b = (next(iter(StreamingSession(p).stream("a", 1))) for p in (point, other))
    assert not torch.equal(a.latents, b.latents)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_endless_stream_has_constant_memory():
    """A list of latents, events or requests that grows with the video; relative positions never end."""
    session = StreamingSession(micro_pipeline(relative_rope=True, **POINT))
    stream, sizes = session.stream("a fox"), []
    for chunk in itertools.islice(stream, 30):
        if chunk.block in (5, 20):
            session.switch_prompt(f"prompt {chunk.block}")
        block = chunk.block
        del chunk
        if block in (12, 29):
            sizes.append((session.cache.nbytes, len(session._history), len(session._undelivered),
                          len(session._requests), live_tensors()))
    *first, tensors_first = sizes[0]
    *last, tensors_last = sizes[1]
    assert first == last and first[1:] == [4, 0, 0]
    assert tensors_last <= tensors_first, "fewer is what earlier tests left behind"
    stream.close()


def test_half_a_character_is_no_prompt(point):
    """A prompt that neither a result nor a report can hold, refused after the stream."""
    session = StreamingSession(point)
    for ask in (session.switch_prompt, session.stream):
        with pytest.raises(UserError, match="prompt: .*half of a character"):
            ask("\ud83e fox")
    assert next(session.stream("\ud83e\udd8a", 1)).prompt == "\U0001f98a"


def test_requests_queue_up_and_each_block_serves_one(point):
    """The second request must not swallow the first, nor act in the same block."""
    session, chunks = StreamingSession(point), []
    for chunk in session.stream("0", 5):
        chunks.append(chunk)
        if chunk.block == 0:
            session.switch_prompt("1")
            session.switch_prompt("2")
    assert [(chunk.prompt, chunk.switched) for chunk in chunks] == [
        ("0", False), ("1", True), ("2", True), ("2", False), ("2", False)]
    assert all(map(torch.equal, (c.latents for c in chunks), expected_latents(point, list("01222"))))


def test_two_switch_frames_in_one_block(point):
    """SPEC 5: at most one switch per block start; frames 4 and 5 act at frames 6 and 9."""
    play = StreamingSession(point).play(PromptSchedule(("0", "1", "2"), (4, 5)), 5)
    assert [chunk.prompt for chunk in play] == list("00122")
    rounded = StreamingSession(point).play(PromptSchedule(("0", "1", "2"), (6, 9)), 5)
    play = StreamingSession(point).play(PromptSchedule(("0", "1", "2"), (4, 5)), 5)
    assert same_video(list(play), list(rounded))


def test_switch_at_frame_0_is_a_start(point):
    """LongLive never uses the first prompt then; there is nothing to recache and nothing was switched."""
    encoded = []
    pipeline = dataclasses.replace(point, encode_prompt=lambda p: encoded.append(p) or point.encode_prompt(p))
    chunks = list(StreamingSession(pipeline).play(PromptSchedule(("0", "1", "2"), (0, 3)), 3))
    assert encoded == ["1", "2"]
    assert [(chunk.prompt, chunk.switched) for chunk in chunks] == [("1", False), ("2", True), ("2", False)]
    assert same_video(chunks, list(StreamingSession(point).play(PromptSchedule(("1", "2"), (3,)), 3)))


def test_request_before_the_first_block_recaches_nothing(point):
    """A recache of 0 frames is an error deep in the cache."""
    session = StreamingSession(point)
    stream = session.stream("0", 2)
    session.switch_prompt("1")
    chunks = list(stream)
    assert [chunk.prompt for chunk in chunks] == ["1", "1"]
    assert same_video(chunks, list(StreamingSession(point).stream("1", 2)))


def test_request_during_a_script_waits_its_turn(point):
    """A viewer's request and the schedule's own switch at the same block: first come, first served."""
    session, prompts = StreamingSession(point), []
    for chunk in session.play(PromptSchedule(("0", "1"), (6,)), 5):
        prompts.append(chunk.prompt)
        if chunk.block == 1:
            session.switch_prompt("mine")
    assert prompts == ["0", "0", "mine", "1", "1"]


@pytest.mark.parametrize("prompt", ["", "  \n", None, 3, b"x"])
def test_empty_prompt_is_refused_at_once(point, prompt):
    """An empty prompt gives a video of nothing; it must not take the session with it."""
    session = StreamingSession(point)
    for call in (lambda: session.stream(prompt), lambda: session.switch_prompt(prompt),
                 lambda: session.play(PromptSchedule(("a", prompt), (3,)), 2)):
        with pytest.raises(UserError, match="prompt: .* is (empty|not a text)"):
            call()
    assert len(list(session.stream("a", 1))) == 1


@pytest.mark.parametrize("blocks", [0, -1, 1.5, "3", True])
def test_number_of_blocks_must_be_positive(point, blocks):
    """An empty stream looks like a hang."""
    with pytest.raises(UserError, match=f"blocks: {blocks!r} is no number of blocks"):
        StreamingSession(point).stream("a", blocks)
    with pytest.raises(UserError):
        StreamingSession(point).play(PromptSchedule(("a",)), blocks)


def test_second_stream_needs_a_reset(point):
    """Two videos interleaved in one cache; a stream that was left half-way counts, too."""
    session = StreamingSession(point)
    stream = session.stream("a")
    with pytest.raises(UserError, match="call reset"):
        session.stream("b")
    next(stream)
    stream.close()
    with pytest.raises(UserError, match="call reset"):
        session.play(PromptSchedule(("b",)), 1)
    session.reset()
    assert same_video(list(session.stream("b", 2)), list(StreamingSession(point).stream("b", 2)))


def test_switch_past_the_end_is_refused(point):
    """A schedule that is longer than the video would silently lose its last prompt."""
    session = StreamingSession(point)
    with pytest.raises(UserError, match="switch_frame_indices: 6 takes effect .* past the end of the video"):
        session.play(PromptSchedule(("a", "b"), (6,)), 2)
    assert [chunk.prompt for chunk in session.play(PromptSchedule(("a", "b"), (5,)), 3)] == ["a", "a", "b"]


@pytest.mark.parametrize("frames, blocks", [((4,), 2), ((4, 5), 3)])
def test_switch_that_no_block_serves_is_refused(point, frames, blocks):
    """A switch inside the last block, or the second of two before it, has no block to take effect at."""
    prompts = tuple("abc"[:len(frames) + 1])
    with pytest.raises(UserError, match="past the end"):
        StreamingSession(point).play(PromptSchedule(prompts, frames), blocks)


def test_absolute_positions_end_and_relative_ones_do_not():
    """At latent frame 1023: a clear error, not a slice that runs short; the infinity variant goes on."""
    long = {"block_frames": 60, "local_attn_size": 60, "sink_size": 0, "denoising_steps": [1000],
            "measure_blocks": 2, "num_switches": 0, "warmup_blocks": 1, **POINT}

    def session_of(pipeline: Pipeline) -> StreamingSession:
        return StreamingSession(dataclasses.replace(pipeline, make_decoder=lambda *_: NoPixels()))

    blocks, session = 0, session_of(micro_pipeline(**long))
    with pytest.raises(UserError, match="1023.*set relative_rope: true"):
        for _ in session.stream("a"):
            blocks += 1
    assert blocks == 17
    session.reset()
    assert len(list(session.stream("a", 1))) == 1
    chunks = list(session_of(micro_pipeline(relative_rope=True, **long)).stream("a", 19))
    assert chunks[-1].start_frame == 1080 and chunks[-1].latents.isfinite().all()


def test_timeline_of_a_stream(point):
    """Figures are derived from these marks and spans: a name or a block number that is off falsifies them."""
    timeline = Timeline("cpu")
    session = StreamingSession(point, timeline=timeline)
    for chunk in session.stream("0", 5):
        if chunk.block == 1:
            session.switch_prompt("1")
            session.switch_prompt("2")
    events = timeline.resolve()
    by_name = Counter(event.name for event in events)
    assert by_name == {"block_start": 5, "text_encode": 3, "recache": 2, "denoise": 5, "decode": 5,
                       "chunk_ready": 5,
                       "switch_request": 2}
    blocks = {name: [event.block for event in events if event.name == name] for name in by_name}
    assert blocks["switch_request"] == blocks["recache"] == [2, 3]
    assert blocks["text_encode"] == [0, 2, 3]
    for name in ("block_start", "denoise", "decode", "chunk_ready"):
        assert blocks[name] == [0, 1, 2, 3, 4]
    at = {(event.name, event.block): event.start_ms for event in events}
    for block in range(5):
        in_order = [at[name, block] for name in ("block_start", "denoise", "decode", "chunk_ready")]
        assert in_order == sorted(in_order)
    assert at["switch_request", 2] <= at["block_start", 2] <= at["text_encode", 2] <= at["recache", 2]


def copying(monkeypatch) -> None:
    """Let a session on the CPU copy its frames as one on a GPU does."""
    init = Delivery.__init__

    def on_gpu(self, device, block_shape):
        init(self, torch.device("cuda"), block_shape)

    monkeypatch.setattr(Delivery, "__init__", on_gpu)


@pytest.mark.parametrize("keys", [{}, {"use_async_vae": True}], ids=str)
def test_host_frames_are_the_frames_and_stay_as_long_as_promised(point, monkeypatch, keys):
    """Frames of the next block in a chunk that is still shown; memory that is allocated per block; a copy
    that no stage shows."""
    copying(monkeypatch)
    pipeline = micro_pipeline(**POINT, **keys)
    expected = list(StreamingSession(point).stream("a fox", 8))
    timeline = Timeline("cpu")
    session = StreamingSession(pipeline, timeline=timeline, host_frames=True)
    shown, places = None, set()
    for chunk in session.stream("a fox", 8):
        assert torch.equal(chunk.frames, expected[chunk.block].frames)
        if shown is not None:  # until the one after this is asked for
            assert torch.equal(shown.frames, expected[shown.block].frames)
        shown = chunk
        places.add(chunk.frames.data_ptr())
    assert len(places) == HOST_BUFFERS
    copies = [event.block for event in timeline.resolve() if event.name == "copy_to_host"]
    assert copies == list(range(8))
    session.reset()
    session.host_frames = False
    chunks = list(session.stream("a fox", 8))
    assert same_video(chunks, expected) and not places & {chunk.frames.data_ptr() for chunk in chunks}


def test_host_frames_on_the_cpu_are_left_alone(point):
    """A copy of what is in host memory already, and chunks that change although nothing had to be saved."""
    timeline = Timeline("cpu")
    session = StreamingSession(point, timeline=timeline, host_frames=True)
    chunks = list(session.stream("a fox", 6))
    assert same_video(chunks, list(StreamingSession(point).stream("a fox", 6)))
    assert "copy_to_host" not in {event.name for event in timeline.resolve()} and session.host_frames


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"use_async_vae": True}, {"use_torch_compile": True},
                                  {"use_cuda_graphs": True, "use_async_vae": True}], ids=str)
def test_gpu_host_frames_are_the_frames(keys):
    """A chunk handed out before its copy has come, or whose memory on the GPU was used again before."""
    from test_optimizations import gpu_pipeline

    torch._dynamo.reset()
    pipeline = gpu_pipeline(use_static_kv=True, **keys)
    expected = [chunk.frames.cpu() for chunk in StreamingSession(pipeline).stream("a", 9)]
    timeline = Timeline("cuda")
    session = StreamingSession(pipeline, timeline=timeline, host_frames=True)
    for _ in range(3):
        timeline.clear()
        for chunk in session.stream("a", 9):
            assert chunk.frames.device.type == "cpu" and chunk.frames.is_pinned()
            assert torch.equal(chunk.frames, expected[chunk.block])
        session.reset()
        copies = [e for e in timeline.resolve() if (e.name, e.clock) == ("copy_to_host", "cuda")]
        assert [event.block for event in copies] == list(range(9))


@pytest.mark.parametrize("encode_ahead", [False, True])
def test_error_while_streaming_leaves_a_session_that_can_be_reset(point, encode_ahead):
    """A failed block must not poison the next video."""
    fail = [False]

    def encode(prompt: str):
        if fail[0]:
            raise RuntimeError("encoder gone")
        return point.encode_prompt(prompt)

    session = StreamingSession(dataclasses.replace(point, encode_prompt=encode, encode_ahead=encode_ahead))
    with pytest.raises(RuntimeError, match="encoder gone"):
        for _ in session.stream("a"):
            fail[0] = True
            session.switch_prompt("b")
    fail[0] = False
    session.reset()
    assert same_video(list(session.stream("a", 2)), list(StreamingSession(point).stream("a", 2)))


@pytest.mark.parametrize("use_async_vae", [False, True])
@pytest.mark.parametrize("encode_ahead", [False, True])
def test_every_finished_block_comes_before_an_error(point, use_async_vae, encode_ahead):
    """The last block of a stream that ends by an error, lost in the decoder that works one block behind."""
    pipeline = dataclasses.replace(micro_pipeline(use_async_vae=use_async_vae, **POINT),
                                   encode_ahead=encode_ahead)

    def encode(prompt: str):
        if prompt == "b":
            raise RuntimeError("encoder gone")
        return point.encode_prompt(prompt)

    session, chunks = StreamingSession(dataclasses.replace(pipeline, encode_prompt=encode)), []
    with pytest.raises(RuntimeError, match="encoder gone"):
        chunks.extend(session.play(PromptSchedule(("a", "b"), (9,)), 5))
    with pytest.raises(RuntimeError, match="encoder gone"):
        session.reset()
        for chunk in session.play(PromptSchedule(("a", "b"), (9,)), 5):
            chunks.append(chunk)
    assert [chunk.block for chunk in chunks][-3:] == [0, 1, 2]


def test_prompt_may_be_switched_from_another_thread(point):
    """A request from the thread of a button that is lost, or that changes a block which is being made."""
    session, chunks = StreamingSession(point), []
    for chunk in session.stream("a", 5):
        chunks.append(chunk)
        if chunk.block == 1:
            other = threading.Thread(target=session.switch_prompt, args=("b",))
            other.start()
            other.join()
    assert [chunk.prompt for chunk in chunks] == ["a", "a", "b", "b", "b"]
    session.reset()
    assert same_video(chunks, list(session.play(PromptSchedule(("a", "b"), (6,)), 5)))


def in_the_middle_of_block(session: StreamingSession, block: int, act: Callable[[], None]) -> None:
    """Let `act` run once, while `block` is decoded."""
    decode = session._decoder.push

    def push(latents: Tensor, urgent: bool = False) -> list[Tensor]:
        if session.next_block == block + 1:
            act()
        return decode(latents, urgent)

    session._decoder.push = push


def test_a_prompt_is_encoded_while_a_block_is_made(point):
    """A request in the middle of a block that is only encoded after it, on the stream's thread, or with
    another result."""
    begun, seen = threading.Event(), []

    def encode(prompt: str):
        seen.append((prompt, threading.current_thread().name.startswith("encode"), torch.is_grad_enabled()))
        text = point.encode_prompt(prompt)
        begun.set() if prompt == "b" else None
        return text

    session = StreamingSession(dataclasses.replace(point, encode_prompt=encode, encode_ahead=True))
    encoded_in_time = []

    def ask() -> None:
        other = threading.Thread(target=session.switch_prompt, args=("b",))
        other.start()
        other.join()
        encoded_in_time.append(begun.wait(60))

    in_the_middle_of_block(session, 1, ask)
    chunks = list(session.stream("a", 5))
    assert encoded_in_time == [True] and [chunk.prompt for chunk in chunks] == list("aabbb")
    assert seen == [("a", False, False), ("b", True, False)]
    assert same_video(chunks, list(StreamingSession(point).play(PromptSchedule(("a", "b"), (6,)), 5)))


def test_requests_that_are_encoded_ahead_keep_their_order(point):
    """Two encodings that overtake each other; a cache whose outcomes are those of other switches."""
    cached = micro_pipeline(use_prompt_cache=True, **POINT)
    pipeline = dataclasses.replace(cached, encode_ahead=True)
    session = StreamingSession(pipeline)
    assert repr(session).endswith("holds no video)")
    in_the_middle_of_block(session, 1, lambda: [session.switch_prompt(prompt) for prompt in "bab"])
    chunks = list(session.stream("a", 6))
    assert [chunk.prompt for chunk in chunks] == list("aababb")
    assert all(map(torch.equal, (c.latents for c in chunks), expected_latents(point, list("aababb"))))
    assert cached.encode_prompt.stats.outcomes == ["miss", "miss", "hit", "hit"]


@pytest.mark.parametrize("encode_ahead", [False, True])
def test_a_request_is_marked_at_the_block_that_it_changes(point, encode_ahead):
    """A request in the middle of a block counted as a switch of that block: a latency that is too short."""
    timeline = Timeline("cpu")
    session = StreamingSession(dataclasses.replace(point, encode_ahead=encode_ahead), timeline=timeline)
    sampler, asked = session.pipeline.sampler, []

    def in_denoising() -> None:
        asked.append(session.next_block)
        session.switch_prompt("b")

    class Asking(Sampler):
        def denoise_block(self, *arguments):
            if session.next_block == 1 and not asked:
                in_denoising()
            return sampler.denoise_block(*arguments)

    fields = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)}
    session.pipeline = dataclasses.replace(session.pipeline, sampler=Asking(**fields))
    chunks = list(session.stream("a", 4))
    assert asked == [1] and [chunk.switched for chunk in chunks] == [False, False, True, False]
    assert [event.block for event in timeline.resolve() if event.name == "switch_request"] == [2]


def test_reset_while_a_prompt_is_encoded(point):
    """A prompt of the video before in the next one, an encoding that nobody waits for and that goes on next
    to another, or a reset that hangs."""
    going, release, encoded = threading.Event(), threading.Event(), []

    def encode(prompt: str):
        if prompt == "slow":
            going.set()
            assert release.wait(60)
        encoded.append(prompt)
        return point.encode_prompt(prompt)

    session = StreamingSession(dataclasses.replace(point, encode_prompt=encode, encode_ahead=True))
    next(stream := session.stream("a", 4))
    for prompt in ("slow", "never"):
        session.switch_prompt(prompt)
    assert going.wait(60)
    threading.Timer(0.2, release.set).start()
    session.reset()
    assert encoded == ["a", "slow"] and len(session._requests) == 0 and list(stream) == []
    assert same_video(list(session.stream("a", 3)), list(StreamingSession(point).stream("a", 3)))
    session.close()
    assert encoded == ["a", "slow", "a"]


def test_which_pipelines_encode_ahead(point):
    """Offloaded weights that visit the GPU next to a block that needs its memory; a CPU that both want."""
    assert not point.encode_ahead
    ahead = dataclasses.replace(point, encode_ahead=True)
    assert not TextOffload().apply(ahead).encode_ahead


def test_streams_wait_for_each_other(monkeypatch):
    """A prompt that one stream reads before the other has made it, or whose memory is free too early."""
    happened = []

    class Stream:
        def __init__(self, *_, **options):
            self.name = "own" if options else "main"

        def wait_stream(self, other):
            happened.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            happened.append(f"{self.name} waits for {event}")

        def record_event(self):
            happened.append("recorded")
            return "the event"

    main = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    part = SimpleNamespace(record_stream=lambda stream: happened.append(f"{stream.name} reads"))
    text = SimpleNamespace(keys=(part,), values=(part,))

    def encode(prompt: str):
        happened.append(f"encodes {prompt}")
        return text

    queue = PromptQueue(SimpleNamespace(encode_prompt=encode, encode_ahead=True, device=torch.device("cuda"),
                                        config=SimpleNamespace(use_torch_compile=True)))
    assert queue.encode("a") is text
    queue.ask("b", happened.append)
    assert queue.text(queue.take(0)) is text and queue.take(1) is None
    queue.ask("c", happened.append)
    assert happened[:4] == ["own waits for main", "main waits for own", "encodes a", "own waits for main"]
    assert happened[4:10] == [0, "encodes b", "recorded", "main waits for the event", *["main reads"] * 2]
    assert happened[10] == 2
    queue.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"use_async_vae": True}, {"use_torch_compile": True},
                                  {"use_cuda_graphs": True}], ids=str)
def test_gpu_prompts_encoded_ahead_are_the_same(keys):
    """A prompt read before its stream has made it, memory of an evicted prompt that is used again while it is
    read, or a capture that another thread breaks."""
    from test_optimizations import gpu_pipeline

    torch._dynamo.reset()
    pipeline = gpu_pipeline(use_static_kv=True, use_prompt_cache=True, **keys)
    assert pipeline.encode_ahead
    pipeline.encode_prompt._limit = 2 * pipeline.encode_prompt("a").nbytes
    prompts = [f"prompt {i % 5}" for i in range(12)]
    schedule = PromptSchedule(("a", *prompts), tuple(3 * (i + 1) for i in range(len(prompts))))
    at_edges = StreamingSession(dataclasses.replace(pipeline, encode_ahead=False))
    expected = [chunk.latents.cpu() for chunk in at_edges.play(schedule, len(prompts) + 1)]
    session = StreamingSession(pipeline, host_frames=True)
    decode = session._decoder.push
    for _ in range(2):  # at first, passes are compiled and captured meanwhile
        waiting = iter(prompts)

        def push(latents: Tensor, urgent: bool = False) -> list[Tensor]:
            if prompt := next(waiting, None):
                other = threading.Thread(target=session.switch_prompt, args=(prompt,))
                other.start()
                other.join()
            return decode(latents, urgent)

        session._decoder.push = push
        found = [chunk.latents.cpu() for chunk in session.stream("a", len(prompts) + 1)]
        session.reset()
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_second_thread_is_refused_in_the_middle_of_a_step(point, monkeypatch):
    """Two threads in one cache: a video of nonsense, and no error."""
    session, refused = StreamingSession(point), []

    def interrupt(kind: str):
        def call() -> None:
            with pytest.raises(UserError, match="another thread is using it"):
                next(chunks[1]) if kind == "stream" else getattr(session, kind)()
            refused.append(kind)
        return call

    def push(latents: Tensor, urgent: bool) -> list[Tensor]:
        for kind in ("reset", "stream"):
            thread = threading.Thread(target=interrupt(kind))
            thread.start()
            thread.join()
        return decode(latents, urgent)

    decode = session._decoder.push
    monkeypatch.setattr(session._decoder, "push", push)
    chunks = [session.stream("a", 2)]
    session._streaming = False
    chunks.append(session.stream("b", 2))
    next(chunks[0])
    assert refused == ["reset", "stream"]


def test_stream_ends_with_a_reset(point):
    """A loop over a video that was forgotten goes on in the middle of the next one."""
    session = StreamingSession(point)
    chunks = session.stream("a")
    next(chunks)
    session.reset()
    assert next(chunks, None) is None and session.next_block == 0


def test_seed_of_the_noise(point):
    """A seed that changes nothing, or that is forgotten with the video."""
    session = StreamingSession(point)
    videos = []
    for seed in (3, None, point.config.seed):
        session.reset(seed)
        videos.append(list(session.stream("a", 2)))
    assert same_video(videos[0], videos[1]) and not same_video(videos[0], videos[2])
    assert same_video(videos[2], list(StreamingSession(point).stream("a", 2)))
    assert session.seed == point.config.seed
    for seed in (-1, 2**63, 1.0, True):
        with pytest.raises(UserError, match="no seed"):
            session.reset(seed)


@pytest.mark.parametrize("keys", [
    {"use_static_kv": True}, {"use_static_kv": True, "use_early_decode": True, "use_async_vae": True},
    {"local_attn_size": 7, "sink_size": 2, "global_sink": False},
    {"use_static_kv": True, "local_attn_size": 10, "sink_size": 1, "block_frames": 4}], ids=str)
def test_warm_up_meets_every_kind_of_pass(keys):
    """A viewer who waits for a compiler at the first switch; warm-up that changes the video."""
    pipeline = micro_pipeline(**POINT, **keys, name="warm")
    kinds: set[object] = set()

    def forward(latents, timestep, text, cache, *, keys_only=False):
        kinds.add((cache.signature, tuple(latents.shape), timestep, keys_only))
        return inner(latents, timestep, text, cache, keys_only=keys_only)

    inner = pipeline.sampler.forward
    pipeline = dataclasses.replace(pipeline, sampler=pipeline.sampler.with_forward(forward))
    timeline = Timeline(pipeline.device)
    session, seen = StreamingSession(pipeline, timeline=timeline), []
    session.warm_up(lambda done, count: seen.append((done, count)))
    assert seen[-1] == (len(seen), len(seen)) and timeline.resolve() == []
    known = set(kinds)
    for switch_at in range(1, 8):
        for chunk in session.stream("a", 9):
            if session.next_block == switch_at:
                session.switch_prompt("b")
        session.reset()
    assert kinds == known
    assert same_video(list(session.stream("a", 2)), list(StreamingSession(pipeline).stream("a", 2)))
    with pytest.raises(UserError, match=r"reset\(\) before warm_up"):
        session.warm_up()


def test_nothing_is_compiled_after_the_warm_up(cheap_compile):
    """The first switch of a live stream waits for the compiler."""
    keys = {"use_static_kv": True, "use_torch_compile": True, "name": "warm"}
    session = StreamingSession(micro_pipeline(**POINT, **keys))
    session.warm_up()
    compiled = compiled_graphs()
    assert compiled > 0
    for switch_at in (1, 2, 5, 7):
        for _ in session.stream("a", 9):
            if session.next_block == switch_at:
                session.switch_prompt("b")
        session.reset()
    assert compiled_graphs() == compiled


def test_reprs_are_short(pipeline):
    """Pages of tensors and of modules where a notebook shows a value."""
    session = StreamingSession(pipeline)
    chunks = list(session.stream("a <b>fox</b>", 1))
    for thing in (pipeline, session, chunks[0]):
        assert len(repr(thing)) < 400 and "tensor" not in repr(thing)
    assert "block 1, prompt" in repr(session) and "micro 48x32" in repr(pipeline)
    assert repr(chunks[0]).startswith("Chunk(block 0, 9 frames 48x32 on cpu")
    html = chunks[0]._repr_html_()
    assert "data:image/webp;base64," in html and "<b>" not in html
    for thing in (pipeline, session):
        html = thing._repr_html_()
        assert len(html) < 2000 and "micro" in html and "<b>fox" not in html
    assert "12 latent frames, 3 of them the sink" in session._repr_html_()
    assert re.search(r"transformer 0\.000\d+ GB, VAE", pipeline._repr_html_())
