"""The product's heart: a session streams blocks of video frames, for ever if asked, and changes the prompt
meanwhile.

    session = StreamingSession(pipeline)
    for chunk in session.stream("a red fox"):
        show(chunk.frames)                     # uint8 [1, 9, 3, H, W] first, then [1, 12, 3, H, W]
        if bored:
            session.switch_prompt("a blue whale")

Memory is constant: the cache holds one window, the session the latents of one window for the recache.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator

import torch
from torch import Tensor

from ..config import check_switches_fit
from ..errors import UserError
from ..files import whole_text
from ..models.specs import VAE_TEMPORAL_STRIDE
from ..models.vae import IMAGE_CHANNELS
from ..prompts import PromptSchedule
from .decoder import Delivery
from .pipeline import Pipeline
from .sampler import NoiseSource, StreamNoise
from .timeline import NullTimeline, Timeline


@dataclass(frozen=True)
class Chunk:
    """One block of video.

    `frames` is uint8 [B, T, 3, H, W] on the session's device or, with `host_frames`, in host memory;
    `latents` [B, F, C, h, w]; `start_frame` is its first latent frame; `switched` says that `prompt` took
    over with this block.
    """

    block: int
    start_frame: int
    latents: Tensor
    prompt: str
    switched: bool
    frames: Tensor


class StreamingSession:
    """Streams one video at a time. `timeline` records what happened when."""

    def __init__(self, pipeline: Pipeline, *, noise: NoiseSource | None = None,
                 timeline: Timeline | NullTimeline | None = None, host_frames: bool = False):
        """Args:
            noise: None draws from the seed of the pipeline's config.
            host_frames: see the property.
        """
        self.pipeline = pipeline
        self.plan = pipeline.sampler.plan
        self.timeline = timeline if timeline is not None else NullTimeline()
        self._noise = noise or StreamNoise(
            self.plan, pipeline.latent_shape, pipeline.config.seed, pipeline.device, pipeline.dtype
        )
        self.cache = pipeline.make_cache()
        model, frames = pipeline.model, self.plan.block_frames * VAE_TEMPORAL_STRIDE
        self._delivery = Delivery(pipeline.device, (1, frames, IMAGE_CHANNELS, model.height, model.width))
        self._decoder = pipeline.make_decoder(pipeline.make_vae_decoder(), self.timeline, self._delivery)
        self.host_frames = host_frames
        self._forget()

    def reset(self) -> None:
        """Forget the video; the next `stream` starts a new one with the same noise."""
        self.cache.reset()
        self._decoder.reset()
        self._noise.reset()
        self._forget()

    def _forget(self) -> None:
        self._block = 0
        self._requests: deque[str] = deque()
        self._history: deque[Tensor] = deque(maxlen=-(-self.plan.window // self.plan.block_frames))
        self._undelivered: deque[Callable[[Tensor], Chunk]] = deque()
        self._streaming = False

    @property
    def host_frames(self) -> bool:
        """Whether chunks come with their frames in page-locked host memory, complete there, instead of on the
        device. That memory is used again: a chunk keeps its frames until the next one was handed out and the
        one after it is asked for; copy what has to stay. Setting it takes effect with the next block. On the
        CPU frames are in host memory anyway, and stay.
        """
        return self._delivery.to_host

    @host_frames.setter
    def host_frames(self, wanted: bool) -> None:
        self._delivery.to_host = wanted

    @property
    def next_block(self) -> int:
        """Index of the block that is denoised next."""
        return self._block

    def switch_prompt(self, prompt: str) -> None:
        """Let `prompt` take over at the next block boundary. Requests queue up: each block boundary serves
        one, as in LongLive.

        Raises:
            UserError: the prompt is empty, or holds half a character.
        """
        prompt = _checked_prompt(prompt)
        self._requests.append(prompt)
        self.timeline.mark("switch_request", self._block + len(self._requests) - 1)

    def stream(self, prompt: str, blocks: int | None = None) -> Iterator[Chunk]:
        """Start a video with `prompt` and yield its chunks; `blocks` None never ends.

        A decoder that works asynchronously may hold a chunk back while the next block is denoised; every
        chunk comes, in order.

        Raises:
            UserError: an empty prompt, a block count that is not positive, a session that already streams and
                was not reset, or absolute positions that ended (`relative_rope: true` has no end).
        """
        return self._start(PromptSchedule((prompt,)), blocks)

    def play(self, schedule: PromptSchedule, blocks: int) -> Iterator[Chunk]:
        """Stream a schedule: its prompts take over at its switch frames (latent frames), rounded up to a
        block, at most one a block.

        Raises:
            UserError: a switch past the end of the video, or what `stream` refuses.
        """
        check_switches_fit(schedule.switch_frames, blocks, self.plan.block_frames)
        return self._start(schedule, blocks)

    def _start(self, schedule: PromptSchedule, blocks: int | None) -> Iterator[Chunk]:
        if blocks is not None and blocks < 1:
            raise UserError(
                f"blocks: {blocks} is not positive; ask for at least 1, or None for an endless stream."
            )
        if self._streaming:
            raise UserError("session: it already holds a video; call reset() before starting another.")
        schedule = PromptSchedule(tuple(map(_checked_prompt, schedule.prompts)), schedule.switch_frames)
        self._streaming = True
        return self._stream(schedule, blocks)

    @torch.no_grad()
    def _stream(self, schedule: PromptSchedule, blocks: int | None) -> Iterator[Chunk]:
        timeline, sampler = self.timeline, self.pipeline.sampler
        prompts = deque(schedule.prompts)
        switch_frames = deque(schedule.switch_frames)
        if switch_frames and switch_frames[0] == 0:
            # A switch before anything exists is a start; LongLive never uses the first prompt then either.
            switch_frames.popleft()
            prompts.popleft()
        prompt = prompts.popleft()
        with timeline.span("text_encode", 0):
            text = self.pipeline.encode_prompt(prompt)
        clean_pass: Callable[[], None] | None = None
        while blocks is None or self._block < blocks:
            block, start = self._block, self._block * self.plan.block_frames
            if switch_frames and start >= switch_frames[0]:
                switch_frames.popleft()
                self.switch_prompt(prompts.popleft())
            timeline.mark("block_start", block)
            switched = bool(self._requests)
            if clean_pass and not switched:
                with timeline.span("denoise", block):
                    clean_pass()
            clean_pass = None
            if switched:
                prompt = self._requests.popleft()
                with timeline.span("text_encode", block):
                    text = self.pipeline.encode_prompt(prompt)
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
            self._undelivered.append(partial(Chunk, block, start, latents, prompt, switched))
            yield from self._deliver(self._decoder.push(latents))
        yield from self._deliver(self._decoder.flush())

    def _deliver(self, ready: list[Tensor]) -> Iterator[Chunk]:
        for frames in ready:
            chunk = self._undelivered.popleft()(frames)
            self.timeline.mark("chunk_ready", chunk.block)
            yield chunk


def _checked_prompt(prompt: str) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"prompt: {prompt!r} is empty; describe the video in words.")
    return whole_text(prompt, "prompt")
