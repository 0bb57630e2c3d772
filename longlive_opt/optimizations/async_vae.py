"""Async VAE: decode a block while the next one is denoised.

Idea: frames of block k are decoded on their own CUDA stream (on the CPU, in a worker thread) while block k +
1 is denoised. The hand-over is double-buffered, so at most one decode is outstanding. Chunks come in order
and at most one block later.

Replaces: `make_decoder`. Costs: memory for one more block of frames, and up to one block of delay for each
chunk, prompt switches included. It hides launch gaps and delivers frames while the host works. On one GPU it
cannot remove compute, because both streams share the multiprocessors. Bit-exact: the same kernels on the same
numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Callable, ClassVar

import torch
from torch import Tensor

from ..kernels import torch_internals
from ..models.vae import StreamingDecoder
from ..streaming.decoder import Decoder, Delivery, InlineDecoder
from ..streaming.pipeline import Pipeline
from ..streaming.timeline import NullTimeline, Timeline
from .base import Exactness, Optimization


@dataclass(frozen=True)
class AsyncVAE(Optimization):
    name: ClassVar[str] = "async_vae"
    exactness: ClassVar[Exactness] = "bitwise"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        device, make_inline = pipeline.device, pipeline.make_decoder

        def make_decoder(vae: StreamingDecoder, timeline: Timeline | NullTimeline,
                         delivery: Delivery) -> Decoder:
            inner = make_inline(vae, timeline, delivery)
            if device.type == "cuda":
                return StreamDecoder(inner, device)
            compiles = pipeline.config.use_torch_compile
            return ThreadDecoder(inner, *[torch_internals.compile_lock()] if compiles else [])

        pipeline = dataclasses.replace(pipeline, make_decoder=make_decoder)
        return self.report(
            pipeline, "decoding on its own " + ("stream" if device.type == "cuda" else "thread")
        )


IN_FLIGHT = 1
"""Number of blocks whose decode may still run when `push` returns."""


class ThreadDecoder:
    """Decodes in one worker thread, in order. An error in the worker is raised by the next call."""

    def __init__(self, inner: InlineDecoder, lock: AbstractContextManager[Any] = contextlib.nullcontext()):
        """Args: lock: held while the worker decodes."""
        self._inner = inner
        self._lock = lock
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._pending: deque[Future[list[Tensor]]] = deque()

    def push(self, latents: Tensor, urgent: bool = False) -> list[Tensor]:
        self._pending.append(self._worker.submit(self._decode, latents, urgent))
        return self._collect(lambda: len(self._pending) > IN_FLIGHT or self._pending[0].done())

    def _decode(self, latents: Tensor, urgent: bool) -> list[Tensor]:
        with self._lock:
            return list(self._inner.push(latents, urgent))

    def flush(self) -> list[Tensor]:
        return self._collect(lambda: True)

    def reset(self) -> None:
        while self._pending:
            self._pending.popleft().exception()  # wait; the results are no longer needed
        self._inner.reset()

    def _collect(self, due: Callable[[], bool]) -> list[Tensor]:
        frames: list[Tensor] = []
        while self._pending and due():
            frames += self._pending.popleft().result()
        return frames


class StreamDecoder:
    """Decodes in order on its own CUDA stream, behind the latents' stream."""

    def __init__(self, inner: InlineDecoder, device: torch.device):
        self._inner = inner
        self._device = device
        # Frames that are almost done take priority over a block that has just begun.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def push(self, latents: Tensor, urgent: bool = False) -> list[Tensor]:
        denoising = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(denoising)
        # The allocator must not reuse the latents' memory before this stream has read them.
        latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            launched = self._inner.enqueue(latents, urgent)
        for frames, _ in launched:
            if frames.is_cuda:
                frames.record_stream(denoising)
        self._pending += launched
        return self._collect(lambda: len(self._pending) > IN_FLIGHT or self._pending[0][1].query())

    def flush(self) -> list[Tensor]:
        return self._collect(lambda: True)

    def reset(self) -> None:
        self._collect(lambda: True)
        with torch.cuda.stream(self._stream):
            self._inner.reset()

    def _collect(self, due: Callable[[], bool]) -> list[Tensor]:
        ready: list[Tensor] = []
        while self._pending and due():
            frames, done = self._pending.popleft()
            done.synchronize()
            ready.append(frames)
        return ready
