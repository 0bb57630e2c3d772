"""The decoder component: latents in, finished frames out, in order."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..models.vae import StreamingDecoder, frames_to_uint8
from .timeline import NullTimeline, Timeline

HOST_BUFFERS = 3
"""Blocks of frames: one is shown, the next one was handed out or is about to be, and a decoder that works
asynchronously has begun with the one after it.
"""


class Decoder(Protocol):
    """Turns latents into frames. Returned frames are complete: the device has finished them, and where they
    go to the host, they are there.
    """

    def push(self, latents: Tensor) -> list[Tensor]:
        """Take one block of latents [B, F, C, h, w]; return the blocks of frames, uint8 [B, T, 3, H, W], that
        are due, oldest first.
        """

    def flush(self) -> list[Tensor]:
        """Wait for all blocks that are still held back and return them."""

    def reset(self) -> None:
        """Forget the video."""


class Delivery:
    """Where a decoder leaves its frames: on the device, or, with `to_host`, in page-locked host memory.

    The memory is allocated when `to_host` is switched on first, `HOST_BUFFERS` blocks of frames, and used in
    turn. The copy goes over the stream that is current, so a decoder that waits for its frames waits for the
    copy as well. A chunk keeps its frames until the next one was handed out and the one after it is asked
    for. On a CPU frames are in host memory already and are left alone.
    """

    def __init__(self, device: torch.device, block_shape: tuple[int, ...]):
        """Args: block_shape: [B, T, 3, H, W] of a block of frames; the first of a video is shorter."""
        self._copies = device.type == "cuda"
        self._shape = block_shape
        self._buffers: list[Tensor] = []
        self._turn = 0
        self._to_host = False

    @property
    def to_host(self) -> bool:
        return self._to_host

    @to_host.setter
    def to_host(self, wanted: bool) -> None:
        self._to_host = wanted
        if wanted and self._copies and not self._buffers:
            self._buffers = [self._allocate() for _ in range(HOST_BUFFERS)]

    @property
    def copies(self) -> bool:
        """Whether frames are copied."""
        return self._to_host and self._copies

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames, uint8 [B, T, 3, H, W], where they shall lie: complete once the current stream got here."""
        if not self.copies:
            return frames
        buffer = self._buffers[self._turn][:frames.numel()].view(frames.shape)
        self._turn = (self._turn + 1) % HOST_BUFFERS
        return buffer.copy_(frames, non_blocking=True)

    def _allocate(self) -> Tensor:
        size = torch.Size(self._shape).numel()
        return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


class InlineDecoder:
    """The reference: decodes on the stream that denoises, waits, returns. Records a `decode` span per block,
    and `copy_to_host` where frames are copied.
    """

    def __init__(self, decoder: StreamingDecoder, timeline: Timeline | NullTimeline, delivery: Delivery):
        self._decoder = decoder
        self._timeline = timeline
        self._delivery = delivery
        self._block = 0

    def push(self, latents: Tensor) -> list[Tensor]:
        frames = self.enqueue(latents)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        return frames

    def enqueue(self, latents: Tensor) -> list[Tensor]:
        """`push` without waiting: the frames are complete once the current stream has come here."""
        with self._timeline.span("decode", self._block):
            frames = [frames_to_uint8(part) for part in self._decoder.push(latents)]
        if self._delivery.copies:
            with self._timeline.span("copy_to_host", self._block):
                frames = [self._delivery(part) for part in frames]
        self._block += 1
        return frames

    def flush(self) -> list[Tensor]:
        return []

    def reset(self) -> None:
        self._decoder.reset()
        self._block = 0
