"""How well an exported folder does what it was trained for: held-out prompts through the ordinary session,
judged by `world.checker`.

Each figure is a mean over videos. `plain`: adherence over five seconds. `switch`: adherence in the second
block after a prompt switch, the delay in blocks (and how many videos never got there), permanence of the
objects; `old_left`, how much of what changed is still as the old prompt had it in the 12 frames from the
second latent frame on. `long`: adherence in the first and the last five seconds of a minute, and `in_place`,
the share of the objects which are to keep their place that did. `variants` repeats it with what LongLive adds
taken away: no sink, no recache, shorter windows. These are made on fewer videos; `full` is nothing taken away
on the same ones. The first of the videos with a switch are shown in `switches.png`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import ExperimentConfig
from ..errors import UserError
from ..inputs import Script
from ..pipeline import Pipeline, build_reference
from ..provenance import environment
from ..results import atomic_path
from ..sampler import Sampler
from ..session import StreamingSession
from ..world.checker import (
    BLOCK_FRAMES,
    FPS,
    changed_share,
    check,
    ends,
    permanence,
    read,
    switch_delay,
    wandered,
)
from ..world.gallery import sheet
from ..world.prompts import describe
from ..world.scene import STAYING, SceneSpec, change_scene, sample_scene

logger = logging.getLogger(__name__)

Row = dict[str, float | None]

PLAIN_BLOCKS = 7
SWITCH_BLOCK = 7
AFTER_BLOCKS = 6
LONG_BLOCKS = 80
FROM_FRAME = 4
"""After a switch, whose change is drawn over six frames: where the old scene is looked for."""
NEAR_PIXELS = 6
"""Half of the radius of a small object."""
SHOWN_FRAMES = (8, 40, 78, 84, 92, 104, 128, 152)
SHOWN_VIDEOS = 3
PICTURE_NAME = "switches.png"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many videos of each kind; those of shorter windows are `window_switch` and `window_long`."""

    plain: int = 32
    switch: int = 36
    long: int = 12
    window_switch: int = 12
    window_long: int = 3

    def of(self, variant: str) -> tuple[int, int]:
        """How many with a switch, and how many long ones; without a switch there is nothing to recache."""
        if variant == "no_recache":
            return self.switch, 0
        return (self.switch, self.long) if variant == "no_sink" else (self.window_switch, self.window_long)


class NoRecache(Sampler):
    """Goes on with the keys that the old prompt left."""

    def recache(self, cache: Any, text: Any, start: int, latents: Tensor) -> None:
        pass


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "no_sink": {"sink_size": 0},
    "no_recache": {},
    "window_9": {"local_attn_size": 9},
    "window_6": {"local_attn_size": 6},
}


def check_weights(
    folder: Path,
    device: str,
    model: str = "tiny",
    dtype: str = "bfloat16",
    seed: int = 0,
    sizes: Sizes = Sizes(),
    variants: Sequence[str] = tuple(VARIANTS),
    processes: int = 0,
    **keys: Any,
) -> dict[str, Any]:
    """Write and return `check.json` in `folder`; writes `switches.png` there too.

    Args:
        processes: how many judge at the same time; 0: this one does.
        keys: more keys of the preset, such as `denoising_steps`.

    Raises:
        UserError: no such weights, device or variant.
    """
    if unknown := set(variants) - set(VARIANTS):
        raise UserError(f"--variants: {min(unknown)!r} is unknown; known: {', '.join(VARIANTS)}.")
    base = {"weights": str(folder.resolve()), "device": device, "model": model, "model_dtype": dtype, **keys}
    result: dict[str, Any] = {
        "weights": folder.name,
        "device": device,
        "model": model,
        "dtype": dtype,
        "seed": seed,
        "sizes": dataclasses.asdict(sizes),
        **keys,
        "environment": environment(torch.device(device)),
    }
    with _processes(processes) as pool:
        counts = (sizes.plain, sizes.switch, sizes.long)
        shown: list[tuple[str, Sequence[int], Tensor]] = []
        rows = _judge(_pipeline(base), seed, counts, pool, shown)
        result |= {**_summary(rows), "variants": {}}
        if shown:
            with atomic_path(folder / PICTURE_NAME) as temporary:
                sheet(shown).savefig(temporary, format="png")
        _write(result, folder)
        for name in variants:
            pipeline = _pipeline({**base, **VARIANTS[name]}, name == "no_recache")
            made = _judge(pipeline, seed, (0, *sizes.of(name)), pool)
            result["variants"][name] = _summary(made)
            if name.startswith("window"):
                same = {kind: rows[kind][:len(some)] for kind, some in made.items()}
                result["variants"]["full"] = _summary(same)
            _write(result, folder)
    return result


def _write(result: Mapping[str, Any], folder: Path) -> None:
    """After each part, for the whole takes long."""
    with atomic_path(folder / "check.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Executor | None]:
    """A pool of processes, or None for 0; spawned, since CUDA does not survive a fork."""
    if not count:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def _pipeline(keys: Mapping[str, Any], no_recache: bool = False) -> Pipeline:
    pipeline = build_reference(ExperimentConfig.from_mapping({**keys, "warmup_blocks": 12}))
    if no_recache:
        sampler = NoRecache(pipeline.sampler.plan, pipeline.sampler.forward)
        pipeline = dataclasses.replace(pipeline, sampler=sampler)
    return pipeline


def judge_plain(frames: Tensor, scene: SceneSpec) -> Row:
    """Figures of a video of one scene."""
    return {"adherence": check(frames, scene).adherence, "permanence": permanence(frames, scene)}


def judge_switch(frames: Tensor, scene: SceneSpec, other: SceneSpec) -> Row:
    """Figures of a video that turns to `other` at SWITCH_BLOCK."""
    after = read(frames[12 * SWITCH_BLOCK - 3:])
    return {"adherence": check(after[12:24], other).adherence,
            "later_adherence": check(after[24:], other).adherence,
            "delay_blocks": switch_delay(after, other, scene), "permanence": permanence(after[24:], other),
            "old_left": changed_share(after[FROM_FRAME:FROM_FRAME + BLOCK_FRAMES], scene, other)}


def judge_long(frames: Tensor, scene: SceneSpec) -> Row:
    """Figures of the first and the last five seconds of a long video of one scene."""
    first, last = ends(frames)
    away = wandered(first, last, scene)
    return {"first": check(first, scene).adherence, "last": check(last, scene).adherence,
            "permanence": permanence(last, scene),
            "in_place": float(np.mean([distance < NEAR_PIXELS for distance in away])) if away else None}


def _judge(pipeline: Pipeline, seed: int, counts: tuple[int, int, int], pool: Executor | None,
           shown: list[tuple[str, Sequence[int], Tensor]] | None = None) -> dict[str, list[Row]]:
    """Make (plain, switch, long) videos and judge them, in other processes while the next is made. The first
    with a switch are added to `shown`, as rows of `sheet`.
    """
    play = _player(pipeline)
    found: dict[str, list[Callable[[], Row]]] = {}

    def judge(kind: str, function: Callable[..., Row], frames: Tensor, *scenes: SceneSpec) -> None:
        if pool is None:
            row = function(frames, *scenes)
            found.setdefault(kind, []).append(lambda: row)
        else:  # arrays: tensors would travel through shared memory, which may be small
            found.setdefault(kind, []).append(pool.submit(function, frames.numpy(), *scenes).result)

    plain, switch, long = counts
    for i in range(plain):
        scene = sample_scene(np.random.default_rng([seed, 100, i]), held_out=True)
        judge("plain", judge_plain, play([scene], [], PLAIN_BLOCKS, i), scene)
    for i in range(switch):
        rng = np.random.default_rng([seed, 101, i])
        scene = sample_scene(rng, held_out=True)
        other = change_scene(rng, scene, held_out=True)
        frames = play([scene, other], [SWITCH_BLOCK], SWITCH_BLOCK + AFTER_BLOCKS, i)
        judge("switch", judge_switch, frames, scene, other)
        if shown is not None and i < SHOWN_VIDEOS:
            at = (12 * SWITCH_BLOCK - 3) / FPS
            text = f"{describe(scene)}\nfrom {at:.1f} s on: {describe(other)}"
            shown.append((text, SHOWN_FRAMES, frames[list(SHOWN_FRAMES)]))
    for i in range(long):
        scene = _scene_that_stays(np.random.default_rng([seed, 102, i]))
        judge("long", judge_long, play([scene], [], LONG_BLOCKS, i), scene)
    made = {kind: [row() for row in rows] for kind, rows in found.items()}
    logger.info("%s", _summary(made))
    return made


def _scene_that_stays(rng: np.random.Generator) -> SceneSpec:
    """A held-out scene in which at least one object is to keep its place."""
    while True:
        scene = sample_scene(rng, held_out=True)
        if any(thing.motion in STAYING for thing in scene.objects):
            return scene


def _summary(rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    return {kind: _means(some) for kind, some in rows.items()}


def _means(rows: list[Row]) -> dict[str, Any]:
    means: dict[str, Any] = {"videos": len(rows)}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        means[key] = round(float(np.mean(values)), 4) if values else None
        if len(values) < len(rows) and key == "delay_blocks":
            means[f"{key}_never"] = len(rows) - len(values)
    return means


def _player(pipeline: Pipeline) -> Callable[[Sequence[SceneSpec], Sequence[int], int, int], Tensor]:
    size = pipeline.sampler.plan.block_frames

    def play(scenes: Sequence[SceneSpec], switches: Sequence[int], blocks: int, seed: int) -> Tensor:
        """Frames uint8 [T, 3, H, W] on the CPU of one video; prompts change at the blocks `switches`."""
        config = dataclasses.replace(pipeline.config, seed=seed)
        session = StreamingSession(dataclasses.replace(pipeline, config=config))
        script = Script(tuple(map(describe, scenes)), tuple(size * block for block in switches))
        return torch.cat([chunk.frames[0] for chunk in session.play(script, blocks)]).cpu()

    return play
