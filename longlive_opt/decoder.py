"""The decoder seam: latents in, finished frames out, in order."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .models.vae import StreamingDecoder, frames_to_uint8
from .timeline import NullTimeline, Timeline


class Decoder(Protocol):
    """Turns latents into frames. Returned frames are complete: the device has finished them."""

    def push(self, latents: Tensor) -> list[Tensor]:
        """Take one block of latents [B, F, C, h, w]; return the blocks of frames, uint8 [B, T, 3, H, W], that
        are due, oldest first.
        """

    def flush(self) -> list[Tensor]:
        """Wait for all blocks that are still held back and return them."""

    def reset(self) -> None:
        """Forget the video."""


class InlineDecoder:
    """The reference: decodes on the stream that denoises, waits, returns. Records one `decode` span a block.
    """

    def __init__(self, decoder: StreamingDecoder, timeline: Timeline | NullTimeline):
        self._decoder = decoder
        self._timeline = timeline
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
        self._block += 1
        return frames

    def flush(self) -> list[Tensor]:
        return []

    def reset(self) -> None:
        self._decoder.reset()
        self._block = 0
