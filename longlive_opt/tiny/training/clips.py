"""Training clips of Moving Shapes, made on the device: rendered, encoded by the frozen VAE, kept in rings.

Chunk n of the data is a pure function of the seed and n, so a resumed run sees what an uninterrupted one
would have seen. Rendering and encoding cost more than a training step uses up, therefore every clip is used
several times, each time with other noise, while new chunks overwrite the oldest.

A clip of n blocks is the first block of a video (the sink) and n - 1 blocks in a row from latent frame
`position` on. The kinds, by what an interactive session can meet:

    start   the first n blocks of a video
    far     anywhere up to latent frame FAR, so that all rotary positions and distances to the sink are met
    after   as far, but the prompt changed since the sink, which shows the old scene under the old prompt
    late    the prompt changes at block 4 with a full window: blocks 1..3 are recached together under the new
            prompt, the sink stays under the old one
    early m the prompt changes at block m of the first blocks, m <= 4: the recache takes the sink too

Openings are the first blocks of videos and nothing else. There all is invented that later blocks have only to
carry on, so it is where most is to be learned; and they cost a tenth of a clip.
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
"""Latent frames that the VAE reads, and that are thrown away, before a clip that is cut out of a video."""
EARLY_BLOCKS = (2, 4)
OPENING = "opening"
"""The pool and the layout of openings."""


@dataclass
class Clips:
    """Clips of one layout; N of them.

    `loss` says which blocks follow upon a past like that of inference; a cut clip begins without one.
    """

    latents: Tensor  # [N, blocks * 3, C, h, w], normalised
    positions: Tensor  # int64 [N, blocks * 3], latent frames of the video
    loss: Tensor  # float32 [N, blocks], 0 or 1
    sink_ids: Tensor  # int64 [N, text_len], the prompt of the sink
    ids: Tensor  # int64 [N, text_len], the prompt of all else
    labels: Tensor  # int64 [N, attributes], what `ids` say

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index) -> Clips:
        return Clips(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def tensors(self) -> list[Tensor]:
        """All there is, in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]

    def to(self, device: torch.device) -> Clips:
        return Clips(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class Mix:
    """How many clips of each kind a chunk holds."""

    start: int = 24
    far: int = 32
    after: int = 32
    late: int = 32
    early: int = 8


@dataclass(frozen=True)
class Video:
    """One clip before it is rendered: timeline of (video frame, scene), where it is cut, prompts, loss."""

    timeline: tuple[tuple[int, SceneSpec], ...]
    position: int
    sink_prompt: str
    prompt: str
    loss: tuple[int, ...]


@dataclass
class Plan:
    """A chunk before it is rendered: per pool its clips, the tracks of all, and the frames to render."""

    pools: dict[str, list[Video]]
    clip: Tracks  # [N, 81, ...]
    sink: Tracks  # [N, 9, ...]
    sink_ids: Tensor  # the rest as in `Clips`, of all pools
    ids: Tensor
    labels: Tensor
    positions: Tensor
    loss: Tensor

    def packed(self) -> Plan:
        """With arrays in place of tensors, as it travels between processes."""
        return self._mapped(lambda t: pack_tracks(t) if isinstance(t, Tracks) else t.numpy())

    def unpacked(self) -> Plan:
        """What was `packed`."""
        return self._mapped(lambda a: unpack_tracks(a) if isinstance(a, dict) else torch.from_numpy(a))

    def _mapped(self, change: Callable) -> Plan:
        names = [f.name for f in fields(self) if f.name != "pools"]
        return Plan(self.pools, **{name: change(getattr(self, name)) for name in names})


def layouts(past: int, block_frames: int = 3) -> dict[str, ClipLayout]:
    """The layout of every pool of clips."""
    plain = ClipLayout(CLIP_BLOCKS, past, block_frames)
    late = replace(plain, recached=LATE_BLOCK)
    early = {f"early{m}": replace(plain, recached=m, keeps_sink=False) for m in EARLY_BLOCKS}
    return {"plain": plain, "late": late, **early, OPENING: replace(plain, blocks=1)}


def first_video_frame(latent: int) -> int:
    """The first video frame that latent frame `latent` holds."""
    return max(0, 4 * latent - 3)


def plan_chunk(seed: int, index: int, mix: Mix, far: int = FAR, text_len: int = 128) -> Plan:
    """Scenes, prompts and motion of chunk `index`; needs no device."""
    rng = np.random.default_rng([seed, index])
    block = 3
    clip_latents = CLIP_BLOCKS * block
    # Most simulated frames are never shown: a horizon per chunk keeps the long ones few.
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
    """Scenes, prompts and motion of `count` first blocks; needs no device."""
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
    """A cut clip starts some latents early, with the last frame of the latent that stands first there."""
    return 0 if video.position == block else 4 * (video.position - WARM_LATENTS)


class ClipMaker:
    """Renders and encodes chunks."""

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
        """Args: vae: frozen, normalising (see `export.fold_statistics`). text_len: ids of a prompt. size: of
        the picture, in pixels. workers: plan the chunks ahead (see `workers`).
        """
        self.vae, self.text_len, self.size, self.seed = vae, text_len, size, seed
        self.mix, self.far, self.videos_at_once, self.workers = mix, far, videos_at_once, workers
        self.device, self.dtype = vae.conv1.weight.device, vae.conv1.weight.dtype
        self.planner = Planner(partial(_packed_chunk, seed, mix, far, text_len), workers)

    def plan(self, index: int) -> Plan:
        return self.planner(index).unpacked()

    def openings(self, count: int) -> OpeningMaker:
        """What makes chunks of `count` openings with the same VAE, seed and workers."""
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
        """Args: count: openings of a chunk."""
        self.clips, self.device = clips, clips.device
        self.planner = Planner(partial(_packed_openings, clips.seed, clips.text_len, count), clips.workers)

    def plan(self, index: int) -> Plan:
        return self.planner(index).unpacked()

    def make(self, plan: Plan) -> dict[str, Clips]:
        """The openings of a chunk, on the device."""
        at_once = self.clips.videos_at_once  # as many as sinks of clips: for other shapes all compiles again
        latents = torch.cat([self.clips.encode(plan.clip[first:first + at_once])
                             for first in range(0, len(plan.ids), at_once)])
        return {OPENING: Clips(latents, plan.positions, plan.loss, plan.sink_ids, plan.ids,
                               plan.labels).to(self.device)}


def text_mask(ids: Tensor) -> Tensor:
    """1 for a token, 0 for padding."""
    return (ids != PAD_ID).long()


class ClipRing:
    """The newest clips of every pool; chunk by chunk the oldest are overwritten."""

    def __init__(self, maker: ClipMaker, chunks: int):
        """Args: chunks: how many the ring holds."""
        self.maker, self.chunks = maker, chunks
        self.produced = 0
        self._pools: dict[str, Clips] = {}
        self._valid: dict[str, Tensor] = {}

    def refresh(self) -> None:
        """Make one more chunk."""
        self._store(self.produced)
        self.produced += 1

    def produce(self, chunks: int) -> None:
        """Make chunks until there have been `chunks`."""
        while self.produced < chunks:
            self.refresh()

    def refill(self, produced: int, chunks: int | None = None) -> None:
        """Bring back the ring as it was after `produced` chunks. With `chunks`, only so many of the newest
        are made, which is quicker, and stand in for the others.
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
        """Whether there is a clip in the pool."""
        return pool in self._pools

    def _filled(self, pool: str) -> int:
        """Clips of a pool once the ring has seen `produced` chunks."""
        clips = len(self._valid[pool])
        if not pool.startswith("early"):
            return min(clips, clips // self.chunks * self.produced)
        turns = self._early_turns
        first = EARLY_BLOCKS.index(int(pool.removeprefix("early")))
        return min(clips, clips // turns * -(-(self.produced - first) // len(EARLY_BLOCKS)))

    @property
    def _early_turns(self) -> int:
        """An early pool gets clips from some chunks only."""
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
