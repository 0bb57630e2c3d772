"""Videos for training the VAE: rendered once, kept as uint8 on the device, and cut at random places many
times.

Chunk n of the videos is a pure function of the seed and n, as in `clips`, whose rings hold latents instead.
Other processes simulate the motion, and the device renders.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..shapes.render import Tracks, draw_object, render, simulate, to_uint8
from ..shapes.scene import change_scene
from .attribute_head import sample_scenes
from .compiling import compilable, compiling
from .workers import Planner

draw_compiled = compilable(dynamic=True)(draw_object)


def render_fast(tracks: Tracks, frames: slice | Tensor, device: torch.device, size: int) -> Tensor:
    """`render`, compiled if `use_compiler` is on."""
    return render(tracks, frames, device, size, draw_compiled if compiling() else None)


def pack_tracks(tracks: Tracks) -> dict[str, np.ndarray]:
    """Tracks as arrays, to send between processes."""
    return {f.name: getattr(tracks, f.name).numpy() for f in fields(tracks)}


def unpack_tracks(packed: dict[str, np.ndarray]) -> Tracks:
    """The inverse of `pack_tracks`."""
    return Tracks(**{name: torch.from_numpy(array) for name, array in packed.items()})


def plan_videos(seed: int, videos: int, frames: int, index: int) -> dict[str, np.ndarray]:
    """Packed tracks of chunk `index`. The scene changes twice in every second video."""
    rng = np.random.default_rng([seed, 1, index])
    timelines = [[(0, scene)] for scene in sample_scenes(rng, videos)]
    for timeline in timelines[::2]:
        for frame in sorted(rng.choice(np.arange(1, frames), min(2, frames - 1), replace=False).tolist()):
            timeline.append((frame, change_scene(rng, timeline[-1][1])))
    return pack_tracks(simulate(timelines, frames, int(rng.integers(2**31))))


class VideoRing:
    """The newest chunks of videos. Each new chunk overwrites the oldest."""

    def __init__(self, seed: int, videos: int, frames: int, chunks: int, size: int, device: torch.device,
                 workers: Executor | None = None):
        """Args: videos: per chunk, each `frames` long. chunks: number in the ring. size: in pixels."""
        self.videos, self.frames, self.chunks = videos, frames, chunks
        self.size, self.device, self.produced = size, device, 0
        self.planner = Planner(partial(plan_videos, seed, videos, frames), workers)
        self._pictures: Tensor | None = None

    def refresh(self) -> None:
        """Make one more chunk."""
        self._store(self.produced)
        self.produced += 1

    def refill(self, produced: int) -> None:
        """Restore the ring to its state after `produced` chunks."""
        for index in range(max(0, produced - self.chunks), produced):
            self._store(index)
        self.produced = produced

    def sample(self, count: int, frames: int, crop: int, generator: torch.Generator) -> Tensor:
        """Random clips uint8 [count, 3, frames, crop, crop], channels last in memory. Cuts are at multiples
        of 8 pixels, at the borders of the latents of the whole picture.
        """
        assert self._pictures is not None
        # Four values in 0..1 per clip: video, first frame, top, left.
        draws = torch.rand((4, count), generator=generator, device=self.device)
        limits = (min(self.produced, self.chunks) * self.videos, self.frames - frames + 1,
                  *[(self.size - crop) // 8 + 1] * 2)
        video, start, top, left = ((draw * limit).long().clamp(max=limit - 1)
                                   for draw, limit in zip(draws, limits))
        t, pixels = torch.arange(frames, device=self.device), torch.arange(crop, device=self.device)
        clips = self._pictures[
            video[:, None, None, None], (start[:, None] + t)[:, :, None, None], :,
            (8 * top[:, None] + pixels)[:, None, :, None], (8 * left[:, None] + pixels)[:, None, None, :]]
        return clips.permute(0, 4, 1, 2, 3)

    def _store(self, index: int) -> None:
        tracks = unpack_tracks(self.planner(index))
        made = to_uint8(render_fast(tracks, slice(None), self.device, self.size))
        if self._pictures is None:
            self._pictures = torch.zeros((self.chunks * self.videos, *made.shape[1:]), dtype=torch.uint8,
                                         device=self.device)
        first = index % self.chunks * self.videos
        self._pictures[first:first + self.videos] = made
