"""Evaluate an exported weights folder: generate videos of held-out prompts with the ordinary session, and
evaluate them with `shapes.evaluator`.

Each metric is a mean over videos, and `..._se` is its standard error.

    plain   adherence over five seconds switch  adherence in the second block after a prompt switch;
    `new_shown`, the share of the changed attributes
            that this block shows as in the new prompt; the delay in blocks, and the number of videos in which
            the new scene never came; permanence of the objects; `old_left`, the share of the changed
            attributes that the 12 frames from the second latent frame on still show as in the old prompt
    long    adherence in the first and the last five seconds of a minute; the adherence `lost` between them;
            `in_place`, the share of the objects that kept their place, of those that should

`variants` repeats the evaluation without one part of LongLive: no sink, no recache, shorter windows.
`..._change` is the mean difference to the full model on the same scenes and noise. Its standard error is
smaller for that reason. Windows are evaluated on fewer videos, and `full` is the full model on the same
videos. `switches.png` shows the first videos with a switch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import ExperimentConfig
from ..errors import UserError
from ..files import atomic_path
from ..measurement.environment import environment
from ..prompts import PromptSchedule
from ..streaming.pipeline import Pipeline, build_reference
from ..streaming.sampler import Sampler
from ..streaming.session import StreamingSession
from .shapes.captions import describe
from .shapes.evaluator import (
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
from .shapes.examples import sheet
from .shapes.scene import STAYING, SceneSpec, change_scene, sample_scene

logger = logging.getLogger(__name__)

Row = dict[str, float | None]
Video = tuple[str, Callable[..., Row], Tensor, tuple[SceneSpec, ...]]  # kind, evaluate, frames, scenes
Strip = tuple[str, Sequence[int], Tensor]

PLAIN_BLOCKS = 7
SWITCH_BLOCK = 7
SWITCH_FRAME = 12 * SWITCH_BLOCK - 3
AFTER_BLOCKS = 6
LONG_BLOCKS = 80
FROM_FRAME = 4
"""First frame after a switch in which `old_left` looks for the old scene. The change itself takes six frames.
"""
NEAR_PIXELS = 6
"""Half of the radius of a small object."""
SHOWN_FRAMES = (8, 40, 78, 84, 92, 104, 128, 152)
SHOWN_VIDEOS = 3
PICTURE_NAME = "switches.png"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Number of videos of each kind. Shorter windows use `window_switch` and `window_long`."""

    plain: int = 32
    switch: int = 36
    long: int = 12
    window_switch: int = 12
    window_long: int = 3


class NoRecache(Sampler):
    """A sampler that keeps the keys of the old prompt at a prompt switch."""

    def recache(self, cache: Any, text: Any, start: int, latents: Tensor) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Variant:
    """An ablation of the weights. `few`: evaluated on fewer videos, together with `full` on the same ones."""

    keys: Mapping[str, Any]
    recache: bool = True
    few: bool = False

    def videos(self, sizes: Sizes) -> tuple[int, int]:
        """Number of videos with a switch and of long videos. Without recache long videos are left out, since
        they have no switch.
        """
        switch, long = (sizes.window_switch, sizes.window_long) if self.few else (sizes.switch, sizes.long)
        return switch, long if self.recache else 0


FULL = Variant({})
VARIANTS: Mapping[str, Variant] = {
    "no_sink": Variant({"sink_size": 0}),
    "no_recache": Variant({}, recache=False),
    "window_9": Variant({"local_attn_size": 9}, few=True),
    "window_6": Variant({"local_attn_size": 6}, few=True),
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
    """Write `check.json` and `switches.png` into `folder`. Returns the content of `check.json`.

    Args:
        processes: number of evaluating processes; with 0 this process evaluates.
        keys: more keys of the preset, such as `denoising_steps`.

    Raises:
        UserError: the weights, the device or a variant do not exist.
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
        rows, shown = _judge(_videos(_pipeline(base, FULL), seed, sizes.plain, *FULL.videos(sizes)), pool)
        result |= {**_summary(rows), "variants": {}}
        if shown:
            with atomic_path(folder / PICTURE_NAME) as temporary:
                sheet(shown).savefig(temporary, format="png")
        _write(result, folder)
        for name in variants:
            variant = VARIANTS[name]
            made, _ = _judge(_videos(_pipeline(base, variant), seed, 0, *variant.videos(sizes)), pool)
            same = {kind: rows[kind][:len(some)] for kind, some in made.items()}
            result["variants"][name] = {kind: _means(some) | _changes(some, same[kind])
                                        for kind, some in made.items()}
            if variant.few:
                result["variants"]["full"] = _summary(same)
            _write(result, folder)
    return result


def _write(result: Mapping[str, Any], folder: Path) -> None:
    """Write check.json. Called after each part, because the whole evaluation takes long."""
    with atomic_path(folder / "check.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _processes(count: int) -> contextlib.AbstractContextManager[Executor | None]:
    """A pool of processes, or None for 0. They are spawned, because CUDA does not survive a fork."""
    if not count:
        return contextlib.nullcontext()
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, initializer=torch.set_num_threads, initargs=(1,))


def _pipeline(base: Mapping[str, Any], variant: Variant) -> Pipeline:
    pipeline = build_reference(ExperimentConfig.from_mapping({**base, **variant.keys, "warmup_blocks": 12}))
    if variant.recache:
        return pipeline
    return dataclasses.replace(pipeline, sampler=NoRecache(pipeline.sampler.plan, pipeline.sampler.forward))


def judge_plain(frames: Tensor, scene: SceneSpec) -> Row:
    """Metrics of a video of one scene."""
    return {"adherence": check(frames, scene).adherence, "permanence": permanence(frames, scene)}


def evaluate_switch(frames: Tensor, scene: SceneSpec, other: SceneSpec) -> Row:
    """Metrics of a video that switches to `other` at SWITCH_BLOCK."""
    after = read(frames[SWITCH_FRAME:])
    second = after[BLOCK_FRAMES:2 * BLOCK_FRAMES]
    return {"adherence": check(second, other).adherence, "new_shown": changed_share(second, other, scene),
            "later_adherence": check(after[24:], other).adherence,
            "delay_blocks": switch_delay(after, other, scene), "permanence": permanence(after[24:], other),
            "old_left": changed_share(after[FROM_FRAME:FROM_FRAME + BLOCK_FRAMES], scene, other)}


def evaluate_long(frames: Tensor, scene: SceneSpec) -> Row:
    """Metrics of the first and the last five seconds of a long video of one scene."""
    first, last = ends(frames)
    away = wandered(first, last, scene)
    begin, end = check(first, scene).adherence, check(last, scene).adherence
    return {"first": begin, "last": end, "lost": begin - end,
            "permanence": permanence(last, scene),
            "in_place": float(np.mean([distance < NEAR_PIXELS for distance in away])) if away else None}


def _videos(pipeline: Pipeline, seed: int, plain: int, switch: int, long: int) -> Iterator[Video]:
    """The requested number of videos of each kind, as they are generated."""
    for kind, evaluate, stream, count, blocks in (
            ("plain", judge_plain, 100, plain, PLAIN_BLOCKS),
            ("switch", evaluate_switch, 101, switch, SWITCH_BLOCK + AFTER_BLOCKS),
            ("long", evaluate_long, 102, long, LONG_BLOCKS)):
        for i in range(count):
            scenes = _scenes(kind, np.random.default_rng([seed, stream, i]))
            yield kind, evaluate, _play(pipeline, scenes, blocks, i), scenes


def _scenes(kind: str, rng: np.random.Generator) -> tuple[SceneSpec, ...]:
    """Held-out scenes. In a long video at least one object should keep its place."""
    scene = sample_scene(rng, held_out=True)
    while kind == "long" and not any(thing.motion in STAYING for thing in scene.objects):
        scene = sample_scene(rng, held_out=True)
    return (scene, change_scene(rng, scene, held_out=True)) if kind == "switch" else (scene,)


def _play(pipeline: Pipeline, scenes: Sequence[SceneSpec], blocks: int, seed: int) -> Tensor:
    """Frames uint8 [T, 3, H, W] of one video, on the CPU. A second scene starts at SWITCH_BLOCK."""
    config = dataclasses.replace(pipeline.config, seed=seed)
    session = StreamingSession(dataclasses.replace(pipeline, config=config))
    switch = pipeline.sampler.plan.block_frames * SWITCH_BLOCK
    schedule = PromptSchedule(tuple(map(describe, scenes)), (switch,) * (len(scenes) - 1))
    return torch.cat([chunk.frames[0] for chunk in session.play(schedule, blocks)]).cpu()


def _judge(videos: Iterable[Video], pool: Executor | None) -> tuple[dict[str, list[Row]], list[Strip]]:
    """Metrics by kind, computed in other processes while the next video is generated; first switches for
    `sheet`.
    """
    found: dict[str, list[Any]] = {}
    shown = []
    for kind, evaluate, frames, scenes in videos:
        # Tensors would go through shared memory, which may be small, so send arrays.
        row = pool.submit(evaluate, frames.numpy(), *scenes) if pool else evaluate(frames, *scenes)
        found.setdefault(kind, []).append(row)
        if kind == "switch" and len(shown) < SHOWN_VIDEOS:
            text = f"{describe(scenes[0])}\nfrom {SWITCH_FRAME / FPS:.1f} s on: {describe(scenes[1])}"
            shown.append((text, SHOWN_FRAMES, frames[list(SHOWN_FRAMES)]))
    made = {kind: [row.result() if pool else row for row in rows] for kind, rows in found.items()}
    logger.info("%s", _summary(made))
    return made, shown


def _summary(rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    return {kind: _means(some) for kind, some in rows.items()}


def _means(rows: list[Row]) -> dict[str, Any]:
    means: dict[str, Any] = {"videos": len(rows)}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        means |= _mean(key, values)
        if len(values) < len(rows) and key == "delay_blocks":
            means[f"{key}_never"] = len(rows) - len(values)
    return means


def _changes(rows: list[Row], full: list[Row]) -> dict[str, Any]:
    """Mean difference of each metric to that of the full model on the same videos."""
    changes: dict[str, Any] = {}
    for key in rows[0]:
        pairs = [(row[key], other[key]) for row, other in zip(rows, full, strict=True)]
        changes |= _mean(f"{key}_change", [ours - theirs for ours, theirs in pairs
                                           if None not in (ours, theirs)])
    return changes


def _mean(key: str, values: list[float]) -> dict[str, float | None]:
    """The mean under its key and, for at least two values, its standard error."""
    mean = {key: round(float(np.mean(values)), 4) if values else None}
    if len(values) > 1:
        mean[f"{key}_se"] = round(float(np.std(values, ddof=1)) / len(values) ** 0.5, 4)
    return mean
