"""The trained weights that come with the project: they load everywhere, and they read their prompts."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from longlive_opt.config import ExperimentConfig
from longlive_opt.files import project_path
from longlive_opt.models.weight_files import resolve_weights
from longlive_opt.prompts import PromptSchedule
from longlive_opt.streaming.pipeline import build_reference
from longlive_opt.streaming.session import StreamingSession
from longlive_opt.tiny.shapes.captions import MAX_BYTES, describe, parse
from longlive_opt.tiny.shapes.evaluator import check, read
from longlive_opt.tiny.shapes.scene import COLOURS, GROUNDS, LETTERS, change_scene, sample_scene
from longlive_opt.tiny.training_report import TrainingReport
from longlive_opt.tiny.training_report.scores import FIGURES, TARGETS, cell

BLOCKS, SWITCH = 6, 3


@pytest.fixture(scope="module")
def pipeline():
    # bfloat16 takes ten times as long on a CPU that has no instructions for it.
    return build_reference(ExperimentConfig.from_mapping({"warmup_blocks": 4, "model_dtype": "float32"}))


def test_they_are_the_default_and_small(pipeline):
    config = ExperimentConfig()
    assert config.weights == "weights/tiny" and pipeline.weights["kind"] == "files"
    assert sum(path.stat().st_size for path in project_path(config.weights).rglob("*")
               if path.suffix == ".safetensors") < 24e6
    assert all(getattr(resolve_weights(config.weights, config.model_config()), part)
               for part in ("dit", "text", "vae"))


def test_default_prompts_are_of_their_world():
    for prompt in ExperimentConfig().prompts:
        assert describe(parse(prompt)) == prompt


@torch.no_grad()
def test_videos_show_their_prompts_before_and_after_a_switch(pipeline):
    """On held-out prompts, a video fits what was asked for far better than what was not: the scene it began
    with fits no longer once the prompt has changed.
    """
    own, other, later, before = [], [], [], []
    for i in range(2):
        rng = np.random.default_rng([5, i])
        scene, second = (sample_scene(rng, held_out=True) for _ in range(2))
        schedule = PromptSchedule((describe(scene), describe(second)), (3 * SWITCH,))
        session = StreamingSession(pipeline)
        reading = read(torch.cat([chunk.frames[0] for chunk in session.play(schedule, BLOCKS)]))
        first, last = reading[:33], reading[-24:]
        own.append(check(first, scene).adherence)
        other.append(check(first, change_scene(rng, sample_scene(rng, held_out=True))).adherence)
        later.append(check(last, second).adherence)
        before.append(check(last, scene).adherence)
    assert np.mean(own) > 0.7 and np.mean(own) > np.mean(other) + 0.4, (own, other)
    assert np.mean(later) > 0.65 and np.mean(later) > np.mean(before) + 0.3, (later, before)


def test_the_model_card_says_what_was_recorded():
    """Figures of an earlier training on the card, or a colour that the model does not know."""
    folder = project_path("weights/tiny")
    card = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    ours, again = (json.loads((folder / name).read_text()) for name in ("check.json", "again/check.json"))
    shown = [path for path, words in FIGURES.items() if f"| {words} |" in card]
    assert len(shown) == 8 and set(TARGETS) <= set(shown)
    for path in shown:
        sign, target = TARGETS.get(path, ("", 0.0))
        wanted = f"{sign} {target:.2f} |" if sign else "|"
        assert f"| {FIGURES[path]} | {cell(ours, path)} | {cell(again, path)} | {wanted}" in card
    files = resolve_weights("weights/tiny", ExperimentConfig().model_config())
    for part in ("dit", "vae", "text"):
        path = getattr(files, part)
        with safe_open(path, "pt") as tensors:
            count = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
        assert f"| {count:,} | `{path.relative_to(folder).as_posix()}` |" in card
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")
               and "check" not in path.name)
    assert f"in {size / 1e6:.1f} MB" in card
    minutes = TrainingReport.open("weights/tiny").stages()["minutes"].tolist()
    assert f"{sum(minutes):.1f} minutes in all: VAE {minutes[0]:.1f}, text encoder alone {minutes[1]:.1f}, " \
        f"teacher {minutes[2]:.1f}, student {minutes[3]:.1f}" in card
    for words in (COLOURS, LETTERS):
        assert f"| {', '.join(words)} |" in card
    assert all(ground in card for ground in GROUNDS) and f"at most {MAX_BYTES} bytes" in card
    example = re.search(r"a small red circle moves .*? grey ground", card)[0]
    assert describe(parse(example)) == example
