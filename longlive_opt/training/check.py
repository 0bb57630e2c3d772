"""How well an exported folder does what it was trained for: held-out prompts through the ordinary session,
judged by `world.checker`.

Each figure is a mean over videos. `plain`: adherence over five seconds. `switch`: adherence in the second
block after a prompt switch, the delay in blocks (and how many videos never got there), permanence of the
objects. `long`: adherence in the first and the last five seconds of a minute. `variants` repeats it with what
LongLive adds taken away: no sink, no recache, shorter windows. The first of the videos with a switch are
shown in `switches.png`.
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
from ..inputs import Script
from ..pipeline import Pipeline, build_reference
from ..provenance import environment
from ..results import atomic_path
from ..sampler import Sampler
from ..session import StreamingSession
from ..world.checker import FPS, check, drift, permanence, switch_delay
from ..world.gallery import sheet
from ..world.prompts import describe
from ..world.scene import SceneSpec, change_scene, sample_scene

logger = logging.getLogger(__name__)

Row = dict[str, float | None]

PLAIN_BLOCKS = 7
SWITCH_BLOCK = 7
AFTER_BLOCKS = 6
LONG_BLOCKS = 80
SHOWN_FRAMES = (8, 40, 78, 84, 92, 104, 128, 152)
SHOWN_VIDEOS = 3
PICTURE_NAME = "switches.png"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many videos of each kind; `variant_long` of the long ones for each variant."""

    plain: int = 32
    switch: int = 24
    long: int = 6
    variant_switch: int = 12
    variant_long: int = 2


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
        UserError: no such weights or device.
    """
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
        result |= _judge(_pipeline(base), seed, counts, pool, shown)
        result["variants"] = {
            name: _judge(_pipeline({**base, **VARIANTS[name]}, name == "no_recache"), seed,
                         (0, sizes.variant_switch, sizes.variant_long), pool) for name in variants}
    if shown:
        with atomic_path(folder / PICTURE_NAME) as temporary:
            sheet(shown).savefig(temporary, format="png")
    with atomic_path(folder / "check.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return result


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
    after = frames[12 * SWITCH_BLOCK - 3:]
    return {"adherence": check(after[12:24], other).adherence,
            "later_adherence": check(after[24:], other).adherence,
            "delay_blocks": switch_delay(after, other, scene), "permanence": permanence(after[24:], other)}


def judge_long(frames: Tensor, scene: SceneSpec) -> Row:
    """Figures of the first and the last five seconds of a long video of one scene."""
    found = drift(frames, scene)
    return {"first": found.first, "last": found.last, "permanence": permanence(frames[-80:], scene)}


def _judge(pipeline: Pipeline, seed: int, counts: tuple[int, int, int], pool: Executor | None,
           shown: list[tuple[str, Sequence[int], Tensor]] | None = None) -> dict[str, Any]:
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
        scene = sample_scene(np.random.default_rng([seed, 102, i]), held_out=True)
        judge("long", judge_long, play([scene], [], LONG_BLOCKS, i), scene)
    summary = {kind: _means([row() for row in rows]) for kind, rows in found.items()}
    logger.info("%s", summary)
    return summary


def _means(rows: list[Row]) -> dict[str, Any]:
    means: dict[str, Any] = {"videos": len(rows)}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        means[key] = round(float(np.mean(values)), 4) if values else None
        if len(values) < len(rows):
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
