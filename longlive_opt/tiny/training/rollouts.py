"""The endless videos that the student generates: their state between training steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .clips import FAR, LATE_BLOCK, Clips

CONTEXT_BLOCKS = LATE_BLOCK - 1


class Streams:
    """`count` videos. Each is stored as its sink, its last three blocks, their position, and its prompts.

    The context of the next block is recomputed from these latents with the current student, because a cache
    from earlier steps would be stale. A stream beyond latent frame FAR continues near the beginning, which
    changes only its distance to the sink.
    """

    def __init__(self, count: int, block_frames: int, shape: tuple[int, int, int], text_len: int,
                 device: torch.device, dtype: torch.dtype):
        """Args: shape: (C, H, W) of one latent frame."""
        self.block_frames, self.shape = block_frames, shape
        frames = LATE_BLOCK * block_frames
        self.latents = torch.zeros((count, frames, *shape), device=device, dtype=dtype)
        self.position = torch.zeros(count, dtype=torch.int64, device=device)
        self.sink_ids, self.ids, self.next_ids = (
            torch.zeros((count, text_len), dtype=torch.int64, device=device) for _ in range(3))
        self.born = 0

    def __len__(self) -> int:
        """Number of existing streams."""
        return min(self.born, len(self.ids))

    def begin(self, latents: Tensor, ids: Tensor, next_ids: Tensor) -> None:
        """Replace the oldest streams by new videos [B, F, C, H, W] from their first frame on."""
        count, size = len(latents), self.block_frames
        rows = (self.born + torch.arange(count, device=latents.device)) % len(self.ids)
        self.latents[rows] = torch.cat([latents[:, :size], latents[:, -CONTEXT_BLOCKS * size:]], dim=1)
        self.position.index_fill_(0, rows, latents.shape[1] - CONTEXT_BLOCKS * size)
        self.sink_ids[rows], self.ids[rows], self.next_ids[rows] = ids, ids, next_ids
        self.born += count

    def take(self, rows: Tensor, frames: int, switch: bool) -> Clips:
        """The streams of `rows` as clips whose last `frames` latent frames are zeros, still to be generated.
        With `switch` their next prompt takes over, and the old prompt becomes the next.
        """
        if switch:
            self.ids[rows], self.next_ids[rows] = self.next_ids[rows], self.ids[rows]
        known, size = self.latents[rows], self.block_frames
        steps = torch.arange(known.shape[1] - size + frames, device=rows.device)
        positions = torch.cat([torch.arange(size, device=rows.device).expand(len(rows), -1),
                               self.position[rows, None] + steps], dim=1)
        latents = torch.cat([known, known.new_zeros((len(rows), frames, *self.shape))], dim=1)
        blocks = latents.shape[1] // size
        return Clips(
            latents,
            positions,
            torch.ones(len(rows), blocks, device=rows.device),
            self.sink_ids[rows],
            self.ids[rows],
            rows,
        )

    def give(self, rows: Tensor, latents: Tensor) -> None:
        """Store the finished clips that `take` returned."""
        context = CONTEXT_BLOCKS * self.block_frames
        moved = latents.shape[1] - self.block_frames - context
        self.latents[rows] = torch.cat([latents[:, :self.block_frames], latents[:, -context:]], dim=1)
        position = self.position[rows] + moved
        self.position[rows] = torch.where(position > FAR, 4 * self.block_frames, position)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("latents", "position", "sink_ids", "ids", "next_ids")}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            getattr(self, name).copy_(tensor)
