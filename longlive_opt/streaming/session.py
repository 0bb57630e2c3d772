"""A session streams blocks of video frames, optionally without end, and can switch the prompt in between.

    session = StreamingSession(pipeline)
    for chunk in session.stream("a red fox"):
        show(chunk.frames)                     # uint8 [1, 9, 3, H, W] first, then [1, 12, 3, H, W]
        if bored:
            session.switch_prompt("a blue whale")

Memory is constant: the cache holds one window, and the session holds the latents of one window for the
recache. Call `warm_up` first to avoid compilation later.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..config import check_switches_fit
from ..errors import UserError, short
from ..files import whole_text
from ..models.specs import VAE_TEMPORAL_STRIDE
from ..models.vae import IMAGE_CHANNELS
from ..prompts import PromptSchedule
from .decoder import Delivery
from .pipeline import Pipeline
from .preview import clip_html, facts_html
from .prompt_queue import PromptQueue
from .sampler import NoiseSource, StreamNoise
from .timeline import NullTimeline, Timeline

MAX_SEED = 2**63 - 1
BUSY = ("session: another thread is using it; a stream, reset() and warm_up() belong to one thread, and only "
        "switch_prompt() may be called from others.")


@dataclass(frozen=True, repr=False)
class Chunk:
    """One block of video, or with `use_early_frames` a part of one that begins a prompt.

    `frames` is uint8 [B, T, 3, H, W] on the session's device or, with `host_frames`, in host memory.
    `latents` is [B, F, C, h, w]. `start_frame` is the first latent frame. `switched` is true if `prompt` took
    over with these frames, and `ends_block` unless more frames of the block follow.
    """

    block: int
    start_frame: int
    latents: Tensor
    prompt: str
    switched: bool
    frames: Tensor
    ends_block: bool = True

    def __repr__(self) -> str:
        _, count, _, height, width = self.frames.shape
        new = ", new prompt" if self.switched else ""
        return (f"Chunk(block {self.block}, {count} frames {width}x{height} on {self.frames.device}{new}, "
                f"prompt={self.prompt!r})")

    def _repr_html_(self) -> str:
        """Return the frames as a small clip that plays by itself in a notebook."""
        return clip_html(self.frames[0], repr(self))


class StreamingSession:
    """Streams one video at a time. `timeline` records the events.

    One thread owns a session: it iterates over `stream` or `play`, calls `reset` and `warm_up`, and sets
    `host_frames`. The owner may change while no step of a stream runs, but then the per-thread state of
    compilers and cuDNN is lost. Any thread may call `switch_prompt` and read `next_block` and `seed` at any
    time. A second thread in the middle of a step raises UserError.
    """

    def __init__(self, pipeline: Pipeline, *, noise: NoiseSource | None = None,
                 timeline: Timeline | NullTimeline | None = None, host_frames: bool = False):
        """Args:
            noise: None draws noise from the config's seed.
            host_frames: see the property.
        """
        self.pipeline = pipeline
        self.plan = pipeline.sampler.plan
        self.timeline = timeline if timeline is not None else NullTimeline()
        self._seed = pipeline.config.seed
        self._noise = noise or self._noise_of(self._seed)
        self._step = threading.Lock()
        self._video = 0
        self._requests = PromptQueue(pipeline)
        self.cache = pipeline.make_cache()
        model, frames = pipeline.model, self.plan.block_frames * VAE_TEMPORAL_STRIDE
        self._delivery = Delivery(pipeline.device, (1, frames, IMAGE_CHANNELS, model.height, model.width))
        self._decoder = pipeline.make_decoder(pipeline.make_vae_decoder(), self.timeline, self._delivery)
        self.host_frames = host_frames
        self._forget()

    def __repr__(self) -> str:
        plan = self.plan
        window = f"a window of {plan.window} latent frames with a sink of {plan.sink}"
        now = f"at block {self._block}, prompt {self._prompt!r}" if self._streaming else "holds no video"
        return f"StreamingSession({self.pipeline!r}, {window}, seed {self._seed}, {now})"

    def _repr_html_(self) -> str:
        """Where the stream is: its block, its prompt, the window, the noise and the cache's memory."""
        plan, model = self.plan, self.pipeline.model
        shown = self._block * plan.block_frames * VAE_TEMPORAL_STRIDE / model.fps
        now = f"{self._block} is next, about {shown:.1f} s of video so far"
        rows = [("block", now if self._streaming else "holds no video"),
                ("prompt", self._prompt or "none yet"),
                ("requested", "; ".join(tuple(self._requests)) or "no other prompt"),
                ("window", f"{plan.window} latent frames, {plan.sink} of them the sink"),
                ("seed", str(self._seed)), ("KV cache", f"{self.cache.nbytes / 1e9:.3g} GB"),
                ("pipeline", repr(self.pipeline))]
        return facts_html("StreamingSession", rows)

    def _noise_of(self, seed: int) -> StreamNoise:
        pipeline = self.pipeline
        return StreamNoise(self.plan, pipeline.latent_shape, seed, pipeline.device, pipeline.dtype)

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        """Refuse a second thread while the body runs."""
        if not self._step.acquire(blocking=False):
            raise UserError(BUSY)
        try:
            yield
        finally:
            self._step.release()

    def reset(self, seed: int | None = None) -> None:
        """Forget the video; the next `stream` starts a new one, with the same noise or with that of `seed`.
        This ends a stream that is still iterated over.

        Raises:
            UserError: the seed is invalid, or another thread is in the middle of a step.
        """
        if seed is not None and not (type(seed) is int and 0 <= seed <= MAX_SEED):
            raise UserError(f"seed: {short(seed)} is no seed; write a whole number from 0 to {MAX_SEED}.")
        with self._owned():
            self._reset()
            if seed is not None:
                self._seed, self._noise = seed, self._noise_of(seed)

    def _reset(self) -> None:
        self.cache.reset()
        self._decoder.reset()
        self._noise.reset()
        self._forget()

    def close(self) -> None:
        """End the other ranks of a pipeline on several GPUs, which cannot be used afterwards. On one GPU,
        nothing needs to be closed.
        """
        if self.pipeline.ranks is not None:
            self.pipeline.ranks.close()

    @property
    def seed(self) -> int:
        """The seed of the noise. Random weights keep the seed of the pipeline's config."""
        return self._seed

    def warm_up(self, on_block: Callable[[int, int], None] | None = None) -> None:
        """Run everything that a later block could be the first to need: compilation, capture of CUDA graphs,
        and the choice of convolutions. Then no block of a later stream waits for it, not even at the first
        prompt switch. Collects garbage as well, because compiling leaves a lot.

        Runs two short streams until the window is full and has moved: one without a switch, and one with a
        switch at every block, so that each length of a recache occurs. The session must hold no video and
        holds none afterwards; its timeline is cleared. Call it in the thread that streams later.

        Args:
            on_block: called with (finished blocks, all blocks) after each block; may raise to stop.

        Raises:
            UserError: the session holds a video, or another thread is in the middle of a step.
        """
        if self._streaming:
            raise UserError("session: it already holds a video; call reset() before warm_up().")
        blocks = -(-self.plan.window // self.plan.block_frames) + 2
        try:
            for first, switching in ((0, False), (blocks, True)):
                for chunk in self.stream("warm-up", blocks):
                    if switching and chunk.ends_block:
                        self.switch_prompt(f"warm-up {chunk.block}")
                    if on_block is not None:
                        on_block(first + chunk.block + 1, 2 * blocks)
                self.reset()
        finally:
            self.reset()
            self.timeline.clear()
            gc.collect()

    def _forget(self) -> None:
        self._video += 1
        self._prompt = ""
        self._block = 0
        self._requests.clear()
        self._history: deque[Tensor] = deque(maxlen=-(-self.plan.window // self.plan.block_frames))
        self._undelivered: deque[Chunk] = deque()
        self._streaming = False

    @property
    def host_frames(self) -> bool:
        """Whether chunks have their frames in page-locked host memory instead of on the device. This memory
        is reused: a chunk's frames stay valid until the next chunk was handed out and the one after it is
        requested, so copy frames to keep them. A change takes effect with the next block. On the CPU, frames
        are in host memory anyway and stay valid.
        """
        return self._delivery.to_host

    @host_frames.setter
    def host_frames(self, wanted: bool) -> None:
        self._delivery.to_host = wanted

    @property
    def next_block(self) -> int:
        """Index of the block to be denoised next."""
        return self._block

    def switch_prompt(self, prompt: str) -> None:
        """Let `prompt` take over at the next block boundary. Requests queue up; as in LongLive, each block
        boundary serves one. Any thread may call this. On a GPU, encoding begins at once, in a thread of its
        own (`prompt_queue`); what it raises, the stream raises at that boundary.

        Raises:
            UserError: the prompt is empty or contains half a character.
        """
        self._requests.ask(checked_prompt(prompt), partial(self.timeline.mark, "switch_request"))

    def stream(self, prompt: str, blocks: int | None = None) -> Iterator[Chunk]:
        """Start a video with `prompt` and yield its chunks; without end if `blocks` is None.

        An asynchronous decoder may deliver a chunk while the next block is denoised. All chunks arrive in
        order.

        Raises:
            UserError: the prompt is empty, the block count is not positive, the session was not reset since
                its last stream, or absolute positions end (`relative_rope: true` has no end).
        """
        return self._start(PromptSchedule((prompt,)), blocks)

    def play(self, schedule: PromptSchedule, blocks: int) -> Iterator[Chunk]:
        """Stream a schedule. Its prompts take over at its switch frames (latent frames), rounded up to a
        block, at most one per block.

        Raises:
            UserError: a switch is past the end of the video, or `stream` raises.
        """
        check_switches_fit(schedule.switch_frames, blocks, self.plan.block_frames)
        return self._start(schedule, blocks)

    def _start(self, schedule: PromptSchedule, blocks: int | None) -> Iterator[Chunk]:
        if blocks is not None and (type(blocks) is not int or blocks < 1):
            raise UserError(
                f"blocks: {short(blocks)} is no number of blocks; ask for 1 or more, or None for an endless "
                "stream."
            )
        if self._streaming:
            raise UserError("session: it already holds a video; call reset() before starting another.")
        schedule = PromptSchedule(tuple(map(checked_prompt, schedule.prompts)), schedule.switch_frames)
        self._streaming = True
        return self._stepwise(self._whole(self._stream(schedule, blocks)), self._video)

    def _stepwise(self, chunks: Iterator[Chunk], video: int) -> Iterator[Chunk]:
        """Yield `chunks` until the session is reset; no other thread may make one meanwhile."""
        while True:
            with self._owned():
                if video != self._video:
                    return
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk
            del chunk  # otherwise its frames would stay in memory while the next ones are made

    def _whole(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yield `chunks`, and before an error the blocks that a decoder still holds."""
        try:
            yield from chunks
        except Exception:
            with contextlib.suppress(Exception):  # of the decoder; the first error counts
                yield from self._deliver(self._decoder.flush())
            raise

    @torch.no_grad()
    def _stream(self, schedule: PromptSchedule, blocks: int | None) -> Iterator[Chunk]:
        timeline, sampler = self.timeline, self.pipeline.sampler
        prompts = deque(schedule.prompts)
        switch_frames = deque(schedule.switch_frames)
        if switch_frames and switch_frames[0] == 0:
            # A switch before the first block replaces the first prompt, as in LongLive.
            switch_frames.popleft()
            prompts.popleft()
        self._prompt = prompt = prompts.popleft()
        with timeline.span("text_encode", 0):
            text = self._requests.encode(prompt)
        clean_pass: Callable[[], None] | None = None
        while blocks is None or self._block < blocks:
            block, start = self._block, self._block * self.plan.block_frames
            if switch_frames and start >= switch_frames[0]:
                switch_frames.popleft()
                self.switch_prompt(prompts.popleft())
            timeline.mark("block_start", block)
            asked = self._requests.take(block)
            switched = asked is not None
            if clean_pass and not switched:
                with timeline.span("denoise", block):
                    clean_pass()
            clean_pass = None
            if asked is not None:
                self._prompt = prompt = asked.prompt
                with timeline.span("text_encode", block):
                    text = self._requests.text(asked)
                if start:
                    with timeline.span("recache", block):
                        past = torch.cat(tuple(self._history), dim=1)[:, -self.plan.window:]
                        sampler.recache(self.cache, text, start, past)
            noise, step_noise = self._noise.next_block()
            with timeline.span("denoise", block):
                if sampler.defer_clean_pass:
                    latents = sampler.denoise(self.cache, text, start, noise, step_noise)[-1]
                    clean_pass = partial(sampler.clean_pass, self.cache, text, start, latents)
                else:
                    latents = sampler.denoise_block(self.cache, text, start, noise, step_noise)
            self._history.append(latents)
            self._block += 1
            self._undelivered.append(Chunk(block, start, latents, prompt, switched, latents[:, :0]))
            yield from self._deliver(self._decoder.push(latents, urgent=switched or not block))
        yield from self._deliver(self._decoder.flush())

    def _deliver(self, ready: Iterable[Tensor]) -> Iterator[Chunk]:
        """Give the frames with their latents, the oldest undelivered ones."""
        for frames in ready:
            rest = self._undelivered.popleft()
            count = -(-frames.shape[1] // VAE_TEMPORAL_STRIDE)
            chunk = replace(rest, latents=rest.latents[:, :count], frames=frames,
                            ends_block=count == rest.latents.shape[1])
            if not chunk.ends_block:
                self._undelivered.appendleft(replace(
                    rest, start_frame=rest.start_frame + count, latents=rest.latents[:, count:],
                    switched=False))
            self.timeline.mark("chunk_ready" if chunk.ends_block else "first_frames", chunk.block)
            yield chunk


def whole_blocks(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Join the parts of blocks that `use_early_frames` hands out in parts; other chunks stay as they are."""
    parts: list[Chunk] = []
    for chunk in chunks:
        parts.append(chunk)
        if not chunk.ends_block:
            continue
        if len(parts) > 1:
            latents, frames = (torch.cat([getattr(part, name) for part in parts], dim=1)
                               for name in ("latents", "frames"))
            chunk = replace(parts[0], latents=latents, frames=frames, ends_block=True)
        parts = []
        yield chunk


def checked_prompt(prompt: str) -> str:
    """The prompt, with pairs of surrogates joined. Raises UserError if it is no text, or empty."""
    if not isinstance(prompt, str):
        raise UserError(f"prompt: {short(prompt)} is not a text; describe the video in words.")
    if not prompt.strip():
        raise UserError("prompt: it is empty; describe the video in words.")
    return whole_text(prompt, "prompt")
