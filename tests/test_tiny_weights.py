"""The trained weights that come with the project: they load everywhere, and they read their prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longlive_opt.config import ExperimentConfig
from longlive_opt.files import project_path
from longlive_opt.models.weight_files import resolve_weights
from longlive_opt.prompts import PromptSchedule
from longlive_opt.streaming.pipeline import build_reference
from longlive_opt.streaming.session import StreamingSession
from longlive_opt.tiny.shapes.captions import describe, parse
from longlive_opt.tiny.shapes.evaluator import check
from longlive_opt.tiny.shapes.scene import change_scene, sample_scene

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
    for i in range(4):
        rng = np.random.default_rng([5, i])
        scene, second = (sample_scene(rng, held_out=True) for _ in range(2))
        schedule = PromptSchedule((describe(scene), describe(second)), (3 * SWITCH,))
        session = StreamingSession(pipeline)
        frames = torch.cat([chunk.frames[0] for chunk in session.play(schedule, BLOCKS)])
        first, last = frames[:33], frames[-24:]
        own.append(check(first, scene).adherence)
        other.append(check(first, change_scene(rng, sample_scene(rng, held_out=True))).adherence)
        later.append(check(last, second).adherence)
        before.append(check(last, scene).adherence)
    assert np.mean(own) > 0.7 and np.mean(own) > np.mean(other) + 0.4, (own, other)
    assert np.mean(later) > 0.65 and np.mean(later) > np.mean(before) + 0.3, (later, before)
