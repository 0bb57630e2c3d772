"""The decoder component: latents in, finished frames out, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..models.vae import StreamingDecoder, frames_to_uint8
from .timeline import NullTimeline, Timeline

HOST_BUFFERS = 3
"""Blocks of frames in host memory: the one on display, the one just handed out or about to be, and the next
one, which an asynchronous decoder has already begun.
"""


class Decoder(Protocol):
    """Turns latents into frames. Returned frames are complete: the device has finished them and, if they go
    to the host, they have arrived there.
    """

    def push(self, latents: Tensor, urgent: bool = False) -> Iterable[Tensor]:
        """Take one block of latents [B, F, C, h, w]. Give the frames that are due, uint8 [B, T, 3, H, W],
        oldest first: whole blocks, or of an `urgent` block (one that a viewer waits for) the first frames
        before the others, as `use_early_frames` has it.
        """

    def flush(self) -> list[Tensor]:
        """Wait for all outstanding blocks and return them."""

    def reset(self) -> None:
        """Forget the video."""


class Delivery:
    """Delivers a decoder's frames on the device or, with `to_host`, in page-locked host memory.

    The memory holds `HOST_BUFFERS` blocks of frames, used in turn; it is allocated when `to_host` is first
    switched on. The copy runs on the current stream, so a decoder that waits for its frames also waits for
    the copy. A chunk's frames stay valid until the next chunk was handed out and the one after it is
    requested. On a CPU, frames are already in host memory and are not copied.
    """

    def __init__(self, device: torch.device, block_shape: tuple[int, ...]):
        """Args: block_shape: [B, T, 3, H, W] of a block of frames; the first block of a video is shorter."""
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
        """Move frames, uint8 [B, T, 3, H, W]; complete when the current stream gets here."""
        if not self.copies:
            return frames
        buffer = self._buffers[self._turn][:frames.numel()].view(frames.shape)
        self._turn = (self._turn + 1) % HOST_BUFFERS
        return buffer.copy_(frames, non_blocking=True)

    def _allocate(self) -> Tensor:
        size = torch.Size(self._shape).numel()
        return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


class InlineDecoder:
    """The reference: decodes on the stream that denoises, waits, and gives the frames. Records one `decode`
    span per call of the VAE's decoder, and `copy_to_host` where frames are copied.
    """

    def __init__(self, decoder: StreamingDecoder, timeline: Timeline | NullTimeline, delivery: Delivery, *,
                 first_alone: bool = False):
        """Args: first_alone: decode the first latent of an urgent block before the others, and give its
        frames before theirs.
        """
        self._decoder = decoder
        self._timeline = timeline
        self._delivery = delivery
        self._first_alone = first_alone
        self._block = 0

    def push(self, latents: Tensor, urgent: bool = False) -> Iterator[Tensor]:
        for frames, done in self.enqueue(latents, urgent):
            if done is not None:
                done.synchronize()
            yield frames

    def enqueue(self, latents: Tensor, urgent: bool = False) -> list[tuple[Tensor, torch.cuda.Event | None]]:
        """Launch what `push` does without waiting: each tensor of frames with the event after which it is
        complete (None on the CPU: it is).
        """
        alone = self._first_alone and urgent and latents.shape[1] > 1
        parts = (latents[:, :1], latents[:, 1:]) if alone else (latents,)
        launched = [self._launch(part) for part in parts]
        self._block += 1
        return launched

    def _launch(self, latents: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        with self._timeline.span("decode", self._block):
            (frames,) = self._decoder.push(latents)
            frames = frames_to_uint8(frames)
        if self._delivery.copies:
            with self._timeline.span("copy_to_host", self._block):
                frames = self._delivery(frames)
        if not latents.is_cuda:
            return frames, None
        done = torch.cuda.Event()
        done.record()
        return frames, done

    def flush(self) -> list[Tensor]:
        return []

    def reset(self) -> None:
        self._decoder.reset()
        self._block = 0
