"""The prompts that a session was asked for and that wait for their block.

On a GPU, encoding begins the moment a prompt is asked for, in a thread and on a CUDA stream of its own. The
block at whose edge the prompt takes over waits for the result. So what is asked for while a block is made
need not be encoded after it. A request at the edge itself gains nothing. Encoding shares the multiprocessors
with the block that is made: what it hides is its launches, the gaps between its kernels and its reading of
weights, not its arithmetic.

Otherwise (`Pipeline.encode_ahead`) a prompt is encoded at the edge of its block.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import torch_internals
from ..models.dit import TextContext
from .pipeline import Pipeline


@dataclass
class Asked:
    """A prompt that was asked for. `future` is its encoding, if that has begun."""

    prompt: str
    future: Future[tuple[TextContext, torch.cuda.Event | None]] | None = None


class PromptQueue:
    """Prompts in the order in which they were asked for. Any thread may call `ask`; the rest is for the
    thread that owns the session.
    """

    def __init__(self, pipeline: Pipeline):
        self._encode = pipeline.encode_prompt
        self._waiting: deque[Asked] = deque()
        self._edge = 0  # the block at whose edge the next prompt takes over
        self._lock = threading.Lock()
        self._encoding = threading.Lock()  # encoders and caches know one thread at a time
        self._device = pipeline.device
        self._stream: torch.cuda.Stream | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._alone: AbstractContextManager[Any] = nullcontext()
        if pipeline.encode_ahead:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
            if pipeline.config.use_torch_compile:
                self._alone = torch_internals.compile_lock()
            if self._device.type == "cuda":
                # A few kernels that a viewer waits for take priority over a block, which takes long anyway.
                self._stream = torch.cuda.Stream(self._device, priority=-1)
                self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        return iter([asked.prompt for asked in tuple(self._waiting)])

    def ask(self, prompt: str, note: Callable[[int], None]) -> None:
        """Let `prompt` take over at the next free block's edge.

        Args:
            note: called with this block before the encoding begins.
        """
        with self._lock:
            asked = Asked(prompt)
            self._waiting.append(asked)
            note(self._edge + len(self._waiting) - 1)
            if self._worker is not None:
                asked.future = self._worker.submit(self._ahead, prompt)

    def take(self, block: int) -> Asked | None:
        """The prompt that takes over at the edge of `block`; None if the one before stays."""
        with self._lock:
            self._edge = block + 1
            return self._waiting.popleft() if self._waiting else None

    def text(self, asked: Asked) -> TextContext:
        """The encoded prompt, for the current stream.

        Raises:
            Exception: whatever encoding raised.
        """
        if asked.future is None:
            return self.encode(asked.prompt)
        text, done = asked.future.result()
        if done is not None:
            running = torch.cuda.current_stream(self._device)
            running.wait_event(done)
            # Their memory must not be used again before this stream has read them.
            for tensor in (*text.keys, *text.values):
                tensor.record_stream(running)
        return text

    def encode(self, prompt: str) -> TextContext:
        """Encode a prompt now, on the current stream."""
        with self._encoding:
            if self._stream is None:
                return self._encode(prompt)
            # Weights that one stream loads, or a cache keeps, are there for the other.
            running = torch.cuda.current_stream(self._device)
            running.wait_stream(self._stream)
            text = self._encode(prompt)
            self._stream.wait_stream(running)
            return text

    def clear(self) -> None:
        """Forget what waits. An encoding that has begun is finished first."""
        with self._lock:
            forgotten = tuple(self._waiting)
            self._waiting.clear()
            self._edge = 0
        begun = [asked.future for asked in forgotten if asked.future and not asked.future.cancel()]
        for future in begun:
            future.exception()  # wait; the result is no longer needed

    @torch.no_grad()
    def _ahead(self, prompt: str) -> tuple[TextContext, torch.cuda.Event | None]:
        with self._encoding, self._alone:
            if self._stream is None:
                return self._encode(prompt), None
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                return self._encode(prompt), self._stream.record_event()
