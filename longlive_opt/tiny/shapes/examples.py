"""Examples of Moving Shapes: pictures of scenes with their prompts, and their evaluation.

Everything is rendered from a seed on the CPU: about 30 pictures per figure, in one or two seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Sequence

import numpy as np
import pandas as pd
import torch.nn.functional as F
from torch import Tensor

from ...report.charts import Chart
from .adherence import evaluate
from .captions import describe
from .evaluator import FPS, check, read, read_objects
from .render import SIZE, render, simulate, to_uint8
from .scene import GROUNDS, MOTIONS, SceneSpec, change_scene, sample_scene

COLUMNS = 7
FRAMES = 36
SWITCH_FRAME = 33  # the beginning of block 3

_GAP = 3  # pixels on both sides of each picture of a row


def scenes(seed: int, count: int = 4, held_out: bool = False) -> Chart:
    """Random scenes under their prompts in random wording: one row per scene, one picture per 12 frames
    (0.75 s).
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        scene = sample_scene(rng, held_out)
        shown = range(0, 12 * COLUMNS, 12)
        rows.append((describe(scene, rng), shown, _pictures([(0, scene)], shown, seed + i)))
    return sheet(rows)


def switch(seed: int) -> Chart:
    """A prompt switch at frame 33 (2.06 s): two frames before it, and five within the two blocks after it."""
    rng = np.random.default_rng(seed)
    before = sample_scene(rng, objects=2)
    after = change_scene(rng, before)
    shown = [SWITCH_FRAME + offset for offset in (-12, -1, 1, 3, 5, 11, 23)]
    pictures = _pictures([(0, before), (SWITCH_FRAME, after)], shown, seed)
    return sheet([(f"{describe(before)}\n-> {describe(after)}", shown, pictures)])


@dataclass(frozen=True)
class Sample:
    """One video of one scene, FRAMES long."""

    scene: SceneSpec
    seed: int

    @classmethod
    def of(cls, seed: int) -> Sample:
        """A random sample with two objects."""
        return cls(sample_scene(np.random.default_rng(seed), objects=2), seed)

    @cached_property
    def frames(self) -> Tensor:
        """uint8 [FRAMES, 3, 128, 128]"""
        return _pictures([(0, self.scene)], range(FRAMES), self.seed)

    def chart(self) -> Chart:
        """Some of its frames under its prompt."""
        return sheet([(describe(self.scene), range(0, FRAMES, 6), self.frames[::6])])

    def seen(self) -> pd.DataFrame:
        """The objects that the evaluator reads in the first frame, without the prompt: one per row."""
        rows = [(thing.colour, thing.shape, thing.letter, thing.scale, thing.x, thing.y, thing.area,
                 thing.whole) for thing in read_objects(self.frames[0])]
        columns = ["colour", "shape", "letter", "scale (1: large)", "x", "y", "pixels", "whole"]
        return pd.DataFrame(rows, columns=columns).round(2).fillna("")

    def scores(self) -> pd.DataFrame:
        """Adherence of the video to its own prompt and to wrong prompts."""
        first, *others = self.scene.objects
        moved = replace(first, motion=_another(first.motion, MOTIONS[:4]))
        claims = {"its own": self.scene, "another motion": replace(self.scene, objects=(moved, *others)),
                  "another ground": replace(self.scene, ground=_another(self.scene.ground, GROUNDS)),
                  "one object less": replace(self.scene, objects=(first,)),
                  "another scene": sample_scene(np.random.default_rng([self.seed, 1]))}
        rows = {}
        for name, scene in claims.items():
            found = evaluate(self.frames, [describe(scene)] * FRAMES, weights_kind="none")
            rows[name] = {"prompt": describe(scene), "adherence": round(found["adherence_before"], 3),
                          "wrong": ", ".join(found["wrong"])}
        return pd.DataFrame.from_dict(rows, orient="index")


def scores(seed: int, count: int = 6) -> pd.DataFrame:
    """Adherence of `count` random scenes of two seconds to three prompts: mean, lowest and highest."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"its own prompt": [], "one or two things changed": [],
                                     "the prompt of another scene": []}
    for i in range(count):
        scene = sample_scene(rng)
        reading = read(_pictures([(0, scene)], range(32), seed + i))
        for values, claim in zip(found.values(), (scene, change_scene(rng, scene), sample_scene(rng))):
            values.append(check(reading, claim).adherence)
    rows = {name: {"mean": np.mean(values), "lowest": min(values), "highest": max(values)}
            for name, values in found.items()}
    return pd.DataFrame.from_dict(rows, orient="index").round(3)


def _another(word: str, words: Sequence[str]) -> str:
    return next(other for other in words if other != word)


def _pictures(timeline: list[tuple[int, SceneSpec]], frames: Sequence[int], seed: int) -> Tensor:
    """uint8 [len(frames), 3, 128, 128] of these frames of one video."""
    return to_uint8(render(simulate([timeline], max(frames) + 1, seed), list(frames))[0])


def sheet(rows: Sequence[tuple[str, Sequence[int], Tensor]]) -> Chart:
    """A chart of rows (text, frame numbers, pictures), with the text above each row and the seconds below."""
    columns = max(len(pictures) for _, _, pictures in rows)
    lines = max(text.count("\n") + 1 for text, _, _ in rows)
    chart = Chart(figsize=(9, (9 / columns + 0.2 + 0.17 * lines) * len(rows)), dpi=110, layout="constrained")
    for ax, (text, frames, pictures) in zip(chart.subplots(len(rows), 1, squeeze=False)[:, 0], rows):
        strip = F.pad(pictures, (_GAP, _GAP), value=255).permute(2, 0, 3, 1).flatten(1, 2)
        ax.imshow(strip.numpy())
        ax.set_title(text, loc="left", fontsize=8)
        middles = [(i + 0.5) * (SIZE + 2 * _GAP) for i in range(len(frames))]
        ax.set_xticks(middles, [f"{frame / FPS:.2f} s" for frame in frames], fontsize=7)
        ax.set_yticks([])
        ax.tick_params(length=0, pad=1)
        ax.spines[:].set_visible(False)
    return chart
