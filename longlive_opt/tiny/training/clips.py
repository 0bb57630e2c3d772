"""Make training clips of Moving Shapes on the device: render them, encode them with the frozen VAE, and keep
them in rings.

Chunk n of the data is a pure function of the seed and n, so a resumed run sees the same data as an
uninterrupted one. Rendering and encoding a step's clips costs more than the step itself. Therefore every clip
is used several times, each time with other noise, while new chunks overwrite the oldest.

A clip of n blocks is the first block of a video (the sink) and n - 1 consecutive blocks from latent frame
`position` on. Its kinds cover the situations of an interactive session:

    start   the first n blocks of a video
    far     anywhere up to latent frame FAR, to cover all rotary positions and distances to the sink
    after   like far, but the prompt changed after the sink, which shows the old scene under the old prompt
    late    the prompt changes at block 4 with a full window; blocks 1..3 are recached together under the new
            prompt, and the sink stays under the old one
    early m the prompt changes at block m of the first blocks, m <= 4; the recache includes the sink

An opening is only the first block of a video. It contains most of what the model has to learn, because later
blocks only continue it, and it costs a tenth of a clip.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...models.text import PAD_ID, load_tokenizer
from ...models.vae import WanVAE
from ..shapes.captions import describe
from ..shapes.render import Tracks, simulate
from ..shapes.scene import SceneSpec, change_scene, sample_scene
from .attribute_head import sample_scenes, scene_labels
from .teacher_forcing import ClipLayout
from .vae_clips import pack_tracks, render_fast, unpack_tracks
from .vae_stage import encode_video
from .workers import Planner

FAR = 300
CLIP_BLOCKS = 7
LATE_BLOCK = 4
WARM_LATENTS = 3
"""Latent frames before a clip cut out of a video, which the VAE encodes and which are then discarded."""
EARLY_BLOCKS = (2, 4)
OPENING = "opening"
"""Name of the pool and of the layout of openings."""


@dataclass
class Clips:
    """N clips of one layout.

    `loss` marks the blocks whose past is as at inference. The first blocks of a cut clip have no such past.
    """

    latents: Tensor  # [N, blocks * 3, C, h, w], normalised
    positions: Tensor  # int64 [N, blocks * 3], latent frames of the video
    loss: Tensor  # float32 [N, blocks], 0 or 1
    sink_ids: Tensor  # int64 [N, text_len], the prompt of the sink
    ids: Tensor  # int64 [N, text_len], the prompt of all other blocks
    labels: Tensor  # int64 [N, attributes], the attributes that `ids` describe

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index) -> Clips:
        return Clips(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]

    def to(self, device: torch.device) -> Clips:
        return Clips(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class Mix:
    """The number of clips of each kind in a chunk."""

    start: int = 24
    far: int = 32
    after: int = 32
    late: int = 32
    early: int = 8


@dataclass(frozen=True)
class Video:
    """One clip before rendering: timeline of (video frame, scene), position of the cut, prompts, loss."""

    timeline: tuple[tuple[int, SceneSpec], ...]
    position: int
    sink_prompt: str
    prompt: str
    loss: tuple[int, ...]


@dataclass
class Plan:
    """A chunk before rendering: the clips of each pool, and for all clips the tracks of the frames to render.
    """

    pools: dict[str, list[Video]]
    clip: Tracks  # [N, 81, ...]
    sink: Tracks  # [N, 9, ...]
    sink_ids: Tensor  # this and the rest as in `Clips`, for all pools
    ids: Tensor
    labels: Tensor
    positions: Tensor
    loss: Tensor

    def packed(self) -> Plan:
        """A copy with arrays instead of tensors, to send between processes."""
        return self._mapped(lambda t: pack_tracks(t) if isinstance(t, Tracks) else t.numpy())

    def unpacked(self) -> Plan:
        """The inverse of `packed`."""
        return self._mapped(lambda a: unpack_tracks(a) if isinstance(a, dict) else torch.from_numpy(a))

    def _mapped(self, change: Callable) -> Plan:
        names = [f.name for f in fields(self) if f.name != "pools"]
        return Plan(self.pools, **{name: change(getattr(self, name)) for name in names})


def layouts(past: int, block_frames: int = 3) -> dict[str, ClipLayout]:
    """The layouts of all pools of clips."""
    plain = ClipLayout(CLIP_BLOCKS, past, block_frames)
    late = replace(plain, recached=LATE_BLOCK)
    early = {f"early{m}": replace(plain, recached=m, keeps_sink=False) for m in EARLY_BLOCKS}
    return {"plain": plain, "late": late, **early, OPENING: replace(plain, blocks=1)}


def first_video_frame(latent: int) -> int:
    """The first video frame of latent frame `latent`."""
    return max(0, 4 * latent - 3)


def plan_chunk(seed: int, index: int, mix: Mix, far: int = FAR, text_len: int = 128) -> Plan:
    """Scenes, prompts and motion of chunk `index`. Needs no device."""
    rng = np.random.default_rng([seed, index])
    block = 3
    clip_latents = CLIP_BLOCKS * block
    # Most simulated frames are never rendered. A random horizon per chunk keeps long simulations rare.
    horizon = int(np.exp(rng.uniform(np.log(15), np.log(far + 1))))

    def cut_position() -> int:
        return block * int(rng.integers(2, max(3, horizon // block) + 1))

    def story(changes: Sequence[int]) -> list[tuple[int, SceneSpec]]:
        scenes = [(0, sample_scene(rng))]
        for latent in sorted(set(changes)):
            scenes.append((first_video_frame(latent), change_scene(rng, scenes[-1][1])))
        return scenes

    def video(changes: Sequence[int], position: int, loss: Sequence[int], one_prompt: bool = False) -> Video:
        timeline = story(changes)
        prompts = [describe(scene, rng) for _, scene in timeline]
        return Video(tuple(timeline), position, prompts[-1 if one_prompt else 0], prompts[-1],
                     tuple(int(i in loss) for i in range(CLIP_BLOCKS)))

    everywhere, cut = range(CLIP_BLOCKS), (0, *range(3, CLIP_BLOCKS))
    plain = [video((), block, everywhere) for _ in range(mix.start)]
    plain += [video((), cut_position(), cut) for _ in range(mix.far)]
    for _ in range(mix.after):
        position = cut_position()
        changes = [
            block * int(rng.integers(1, position // block + 1)) for _ in range(1 + (rng.random() < 0.4))
        ]
        plain.append(video(changes, position, cut[1:]))
    late = []
    for _ in range(mix.late):
        position = cut_position()
        changes = [position + (LATE_BLOCK - 1) * block]
        if rng.random() < 0.4:
            changes.append(block * int(rng.integers(1, position // block + 1)))
        late.append(video(changes, position, range(LATE_BLOCK, CLIP_BLOCKS)))
    at = EARLY_BLOCKS[index % len(EARLY_BLOCKS)]
    early = [video((block * at,), block, range(at, CLIP_BLOCKS), one_prompt=True) for _ in range(mix.early)]
    pools = {name: part for name, part in (("plain", plain), ("late", late), (f"early{at}", early)) if part}

    videos = [v for part in pools.values() for v in part]
    firsts = torch.tensor([_first_rendered(v, block) for v in videos])
    frames = 4 * (clip_latents - 1) + 1
    tracks = simulate([v.timeline for v in videos], int(firsts.max()) + frames, int(rng.integers(2**31)))
    rows = torch.arange(len(videos))[:, None]
    tokenizer = load_tokenizer("bytes", text_len)
    position = torch.tensor([v.position for v in videos])[:, None]
    return Plan(
        pools, tracks[rows, firsts[:, None] + torch.arange(frames)], tracks[:, : first_video_frame(block)],
        tokenizer([v.sink_prompt for v in videos])[0], tokenizer([v.prompt for v in videos])[0],
        torch.tensor([scene_labels(v.timeline[-1][1]) for v in videos]),
        torch.cat([torch.arange(block).expand(len(videos), -1),
                   position + torch.arange(clip_latents - block)], dim=1),
        torch.tensor([v.loss for v in videos]).float())


def _packed_chunk(seed: int, mix: Mix, far: int, text_len: int, index: int) -> Plan:
    return plan_chunk(seed, index, mix, far, text_len).packed()


def plan_openings(seed: int, index: int, count: int, text_len: int = 128, block: int = 3) -> Plan:
    """Scenes, prompts and motion of `count` first blocks. Needs no device."""
    rng = np.random.default_rng([seed, index, 1])
    scenes = sample_scenes(rng, count)
    prompts = [describe(scene, rng) for scene in scenes]
    frames = first_video_frame(block)
    tracks = simulate([((0, scene),) for scene in scenes], frames, int(rng.integers(2**31)))
    ids = load_tokenizer("bytes", text_len)(prompts)[0]
    videos = [Video(((0, scene),), 0, prompt, prompt, (1,)) for scene, prompt in zip(scenes, prompts)]
    return Plan({OPENING: videos}, tracks, tracks, ids, ids,
                torch.tensor([scene_labels(scene) for scene in scenes]),
                torch.arange(block).expand(count, -1).clone(), torch.ones(count, 1))


def _packed_openings(seed: int, text_len: int, count: int, index: int) -> Plan:
    return plan_openings(seed, index, count, text_len).packed()


def _first_rendered(video: Video, block: int) -> int:
    """The first video frame to render. A cut clip starts WARM_LATENTS early."""
    return 0 if video.position == block else 4 * (video.position - WARM_LATENTS)


class ClipMaker:
    """Renders and encodes chunks of clips."""

    def __init__(
        self,
        vae: WanVAE,
        text_len: int,
        size: int,
        seed: int,
        mix: Mix = Mix(),
        far: int = FAR,
        videos_at_once: int = 16,
        workers: Executor | None = None,
    ):
        """Args:
            vae: frozen, with normalised latents (see `export.fold_statistics`).
            text_len: number of ids per prompt.
            size: picture size in pixels.
            workers: processes that plan the chunks ahead (see `workers`).
        """
        self.vae, self.text_len, self.size, self.seed = vae, text_len, size, seed
        self.mix, self.far, self.videos_at_once, self.workers = mix, far, videos_at_once, workers
        self.device, self.dtype = vae.conv1.weight.device, vae.conv1.weight.dtype
        self.planner = Planner(partial(_packed_chunk, seed, mix, far, text_len), workers)

    def plan(self, index: int) -> Plan:
        return self.planner(index).unpacked()

    def openings(self, count: int) -> OpeningMaker:
        """A maker of chunks of `count` openings with the same VAE, seed and workers."""
        return OpeningMaker(self, count)

    def make(self, plan: Plan) -> dict[str, Clips]:
        """The clips of a chunk by pool, on the device."""
        rest = Clips(plan.sink_ids[:, :0], plan.positions, plan.loss, plan.sink_ids, plan.ids,
                     plan.labels).to(self.device)
        is_cut = (rest.positions[:, 3] > 3)[:, None, None, None, None]
        latents = []
        for first in range(0, len(rest), self.videos_at_once):
            rows = slice(first, first + self.videos_at_once)
            whole, sinks = self.encode(plan.clip[rows]), self.encode(plan.sink[rows])
            cut = torch.cat([sinks, whole[:, WARM_LATENTS:]], dim=1)
            latents.append(torch.where(is_cut[rows], cut, whole))
        clips = replace(rest, latents=torch.cat(latents))
        made, first = {}, 0
        for name, part in plan.pools.items():
            made[name] = clips[first:first + len(part)]
            first += len(part)
        return made

    def encode(self, tracks: Tracks) -> Tensor:
        """Normalised latents of all frames of `tracks`."""
        frames = render_fast(tracks, slice(None), self.device, self.size)
        return encode_video(self.vae, frames.to(self.dtype))


class OpeningMaker:
    """Renders and encodes chunks of openings."""

    def __init__(self, clips: ClipMaker, count: int):
        """Args: count: openings per chunk."""
        self.clips, self.device = clips, clips.device
        self.planner = Planner(partial(_packed_openings, clips.seed, clips.text_len, count), clips.workers)

    def plan(self, index: int) -> Plan:
        return self.planner(index).unpacked()

    def make(self, plan: Plan) -> dict[str, Clips]:
        """The openings of a chunk, on the device."""
        at_once = self.clips.videos_at_once  # the batch of the clips' sinks; another shape would recompile
        latents = torch.cat([self.clips.encode(plan.clip[first:first + at_once])
                             for first in range(0, len(plan.ids), at_once)])
        return {OPENING: Clips(latents, plan.positions, plan.loss, plan.sink_ids, plan.ids,
                               plan.labels).to(self.device)}


def text_mask(ids: Tensor) -> Tensor:
    """1 for a token, 0 for padding."""
    return (ids != PAD_ID).long()


class ClipRing:
    """The newest clips of every pool. Each new chunk overwrites the oldest."""

    def __init__(self, maker: ClipMaker, chunks: int):
        """Args: chunks: number of chunks in the ring."""
        self.maker, self.chunks = maker, chunks
        self.produced = 0
        self._pools: dict[str, Clips] = {}
        self._valid: dict[str, Tensor] = {}

    def refresh(self) -> None:
        """Make one more chunk."""
        self._store(self.produced)
        self.produced += 1

    def produce(self, chunks: int) -> None:
        """Make chunks until `chunks` have been produced in total."""
        while self.produced < chunks:
            self.refresh()

    def refill(self, produced: int, chunks: int | None = None) -> None:
        """Restore the ring to its state after `produced` chunks. With `chunks`, make only that many of the
        newest chunks, which is faster, and let them replace the others.
        """
        held = min(self.chunks, produced)
        for index in range(produced - min(held, chunks or held), produced):
            self._store(index)
        self.produced = produced
        for name, pool in self._pools.items():
            valid = self._valid[name]
            known = valid.nonzero()[:, 0]
            index = torch.where(valid, torch.arange(len(valid)), known[torch.arange(len(valid)) % len(known)])
            self._pools[name] = pool[index.to(self.maker.device)]

    def sample(self, pool: str, count: int, generator: torch.Generator) -> Clips:
        """`count` random clips of a pool, with repetition."""
        filled = self._filled(pool)
        index = torch.randint(filled, (count,), generator=generator, device=self.maker.device)
        return self._pools[pool][index]

    def has(self, pool: str) -> bool:
        """Whether the pool has a clip."""
        return pool in self._pools

    def _filled(self, pool: str) -> int:
        """Number of clips in a pool after `produced` chunks."""
        clips = len(self._valid[pool])
        if not pool.startswith("early"):
            return min(clips, clips // self.chunks * self.produced)
        turns = self._early_turns
        first = EARLY_BLOCKS.index(int(pool.removeprefix("early")))
        return min(clips, clips // turns * -(-(self.produced - first) // len(EARLY_BLOCKS)))

    @property
    def _early_turns(self) -> int:
        """Chunks in the ring with clips for an early pool. Chunks alternate between the early pools."""
        return max(1, self.chunks // len(EARLY_BLOCKS))

    def _store(self, index: int) -> None:
        for name, clips in self.maker.make(self.maker.plan(index)).items():
            early = name.startswith("early")
            turn, turns = (index // len(EARLY_BLOCKS), self._early_turns) if early else (index, self.chunks)
            if name not in self._pools:
                self._pools[name] = Clips(**{
                    f.name: torch.zeros((turns * len(clips), *getattr(clips, f.name).shape[1:]),
                                        dtype=getattr(clips, f.name).dtype, device=self.maker.device)
                    for f in fields(Clips)})
                self._valid[name] = torch.zeros(turns * len(clips), dtype=torch.bool)
            slots = slice(turn % turns * len(clips), (turn % turns + 1) * len(clips))
            for f in fields(Clips):
                getattr(self._pools[name], f.name)[slots] = getattr(clips, f.name)
            self._valid[name][slots].fill_(True)
