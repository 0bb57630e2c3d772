"""The evaluator of Moving Shapes: right on the truth, wrong on everything else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_opt.errors import UserError
from longlive_opt.tiny.shapes import evaluator
from longlive_opt.tiny.shapes.detection import read_tracks
from longlive_opt.tiny.shapes.evaluator import (
    Reading,
    check,
    drift,
    permanence,
    read,
    read_objects,
    switch_delay,
    wandered,
)
from longlive_opt.tiny.shapes.render import render, simulate, to_uint8
from longlive_opt.tiny.shapes.scene import (
    LETTERS,
    MOTIONS,
    SHAPES,
    STAYING,
    ObjectSpec,
    SceneSpec,
    sample_scene,
)
from longlive_opt.tiny.shapes.tracking import follow, motion_of

pytestmark = pytest.mark.usefixtures("one_thread")

RED = ObjectSpec("small", "red", "star", "still")
BLUE = ObjectSpec("large", "blue", "square", "spins", "A")
SCENE = SceneSpec((RED, BLUE), "grey", "dotted")


def video(*timeline: tuple[int, SceneSpec], frames: int = 24, seed: int = 0, first: int = 0) -> Tensor:
    tracks = simulate([list(timeline)], first + frames, seed)
    return to_uint8(render(tracks, slice(first, first + frames))[0])


def worn(frames: Tensor, sigma: float = 0.8, noise: float = 4) -> Tensor:
    """Blurred by a Gaussian of `sigma` pixels, with noise of that many levels of 255."""
    reach = torch.arange(-3, 4.0)
    kernel = torch.exp(-reach.square() / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 7)
    blurred = F.conv2d(F.pad(frames.float(), (3, 3, 3, 3), mode="replicate"), kernel[:, :, None], groups=3)
    blurred = F.conv2d(blurred, kernel[..., None], groups=3)
    return (blurred + noise * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))).clamp(
        0, 255).round().to(torch.uint8)


def test_truth_is_right_and_other_scenes_are_not() -> None:
    """An evaluator that blames the model for its own misreadings, or that lets anything pass."""
    rng = np.random.default_rng(0)
    truth, blurred, others = [], [], []
    for turn in range(6):
        scene = sample_scene(rng, held_out=turn % 3 == 0)
        frames = video((0, scene), seed=turn, first=int(rng.integers(200)))
        truth.append(check(frames, scene).adherence)
        blurred.append(check(worn(frames), scene).adherence)
        others.append(check(frames, sample_scene(rng)).adherence)
    assert np.mean(truth) >= 0.99 and np.mean(blurred) >= 0.97
    assert np.mean(others) < 0.45


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_are_told_apart(motion: str) -> None:
    """Two motions that the evaluator cannot tell apart in one block, at any size."""
    for size in ("small", "large"):
        scene = SceneSpec((ObjectSpec(size, "white", "star", motion),), "teal", "checked")
        track = read_tracks(video((0, scene), frames=12))[0]["white"]
        assert motion_of(track, follow(track, [], ("star", 1.0)), slice(0, 12)) == motion


@pytest.mark.parametrize(("claimed", "wrong"), [
    (replace(SCENE, ground="navy"), "ground colour"),
    (replace(SCENE, pattern="striped"), "ground pattern"),
    (replace(SCENE, objects=(RED,)), "extra"),
    *[(replace(SCENE, objects=(replace(RED, **{field: value}), BLUE)), f"object 0 {field}")
      for field, value in (("colour", "green"), ("shape", "circle"), ("size", "large"), ("motion", "left"))],
    *[(replace(SCENE, objects=(RED, replace(BLUE, **{field: value}))), f"object 1 {field}")
      for field, value in (("colour", "yellow"), ("shape", "triangle"), ("letter", "X"), ("letter", None),
                           ("motion", "still"))],
])
def test_each_wrong_attribute_is_caught_alone(claimed: SceneSpec, wrong: str) -> None:
    """An attribute that is always taken to be right, or an error that spreads to the others."""
    result = check(video((0, SCENE)), claimed)
    assert result.wrong == (wrong,) and result.adherence < 1


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_letters_and_shapes_are_read(shape: str, letter: str) -> None:
    """A letter read for another when the object is turned, or a shape that its letter changes."""
    scene = SceneSpec((ObjectSpec("large", "yellow", shape, "spins", letter),), "brown", "striped")
    tracks = simulate([[(0, scene)]], 46, seed=1)
    for frame in to_uint8(render(tracks, [0, 20, 45])[0]):
        (seen,) = read_objects(worn(frame[None])[0])
        assert (seen.shape, seen.letter, seen.colour, seen.whole) == (shape, letter, "yellow", True)
        assert abs(seen.scale - 1) < 0.06
        assert abs(seen.x - float(tracks.position[0, 0, 0, 0])) < 1


def test_missing_object_is_wrong_in_everything() -> None:
    """Attributes of an object that is not there counted as not evaluated: an empty picture would be perfect.
    """
    result = check(video((0, replace(SCENE, objects=(RED,)))), SCENE)
    assert not any(result.objects[1].values()) and set(result.objects[1]) >= {"colour", "shape", "motion"}
    assert result.adherence == pytest.approx(2 / 3)
    empty = torch.full((12, 3, 128, 128), 100, dtype=torch.uint8)
    assert check(empty, SCENE).adherence <= 1 / 6


def test_cut_and_hidden_objects_are_not_blamed() -> None:
    """A partly hidden square taken for a triangle; a large object at the edge taken for a small one."""
    white = ObjectSpec("large", "white", "square", "still")
    scene = SceneSpec((white, replace(RED, size="large")), "navy", "checked")
    tracks = simulate([[(0, scene)]], 24, seed=0)
    tracks.position[..., 0, :] = torch.tensor([30.0, 64.0])
    tracks.position[..., 1, :] = torch.tensor([50.0, 64.0])
    assert check(to_uint8(render(tracks, slice(None))[0]), scene).wrong == ()
    tracks.position[..., 0, :] = torch.tensor([4.0, 64.0])
    assert check(to_uint8(render(tracks, slice(None))[0]), scene).wrong == ()


def test_switch_delay_counts_blocks() -> None:
    """A delay counted from the wrong frame, or a model that ignores the prompt and still arrives."""
    after = replace(SCENE, objects=(replace(RED, colour="green", motion="left"), BLUE))
    frames = video((0, SCENE), (40, after), frames=64)
    assert switch_delay(frames[40:], after, before=SCENE) == 1
    assert switch_delay(frames[16:], after, before=SCENE) in (3, 4)
    assert switch_delay(frames[:36], after, before=SCENE) is None
    assert switch_delay(frames[40:], after) in (1, 2)


def test_permanence_excuses_what_one_cannot_see() -> None:
    """An object that leaves at one edge counted as lost, or one that vanishes in the open as there."""
    around = SceneSpec((ObjectSpec("large", "red", "square", "left"),), "grey", "dotted")
    assert permanence(video((0, around), frames=110), around) == 1
    lost = video((0, SCENE), (30, replace(SCENE, objects=(RED,))), frames=60)
    assert 0.5 <= permanence(lost, SCENE) < 0.65
    assert permanence(video((0, replace(SCENE, objects=(RED,)))), SCENE) == 0


def test_drift_compares_both_ends() -> None:
    """The same seconds compared with themselves."""
    other = replace(SCENE, objects=(replace(RED, shape="circle", motion="right"), BLUE))
    result = drift(video((0, SCENE), (30, other), frames=72), SCENE, seconds=1.5)
    assert result.first == 1 and result.last < 0.9 and result.lost == result.first - result.last


def test_what_is_to_stay_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that is lost counted as one that stays; one that may move blamed; one followed twice."""
    scene = SceneSpec((RED, BLUE, ObjectSpec("small", "white", "star", "bounces")), "grey", "dotted")
    assert {thing.motion for thing in scene.objects[:2]} <= set(STAYING)

    def span(place: float, things: SceneSpec = scene) -> Reading:
        tracks = simulate([[(0, things)]], 24, seed=0)
        tracks.position[..., 0, :] = torch.tensor([40.0, 40.0])
        tracks.position[..., 1, :] = torch.tensor([40.0 + place, 80.0])
        return read(to_uint8(render(tracks, slice(None))[0]))

    first = span(0)
    assert wandered(first, span(0), scene) == pytest.approx([0, 0], abs=0.5)
    assert wandered(first, span(20), scene) == pytest.approx([0, 20], abs=1)
    lost = span(0, replace(scene, objects=(RED,)))
    assert wandered(first, lost, scene)[1] == float("inf")
    assert len(wandered(lost, first, scene)) == 1
    check(again := span(0), scene)
    monkeypatch.setattr(evaluator, "follow", None)
    assert wandered(again, again, scene) == [0, 0]


def test_a_course_is_remembered_for_one_shape_one_size_and_what_may_hide_it():
    """What was followed for another object, or behind other things, taken for this one's way."""
    blue = ObjectSpec("small", "blue", "circle", "orbits")
    scene = SceneSpec((RED, blue), "grey", "dotted")
    reading = read(to_uint8(render(simulate([[(0, scene)]], 24, seed=0), slice(None))[0]))
    other = {name: replace(scene, objects=objects) for name, objects in {
        "in front": (blue, RED), "shape": (RED, replace(blue, shape="star")),
        "size": (RED, replace(blue, size="large"))}.items()}
    behind = evaluator._trajectory(reading, "blue", scene, 1)
    assert evaluator._trajectory(reading, "blue", scene, 1) is behind
    assert evaluator._trajectory(reading, "blue", other["in front"], 0) is not behind
    assert evaluator._trajectory(reading, "blue", other["shape"], 1) is not behind
    assert evaluator._trajectory(reading, "blue", other["size"], 1) is not behind


@pytest.mark.parametrize("frames", [torch.zeros(11, 3, 128, 128, dtype=torch.uint8),
                                    torch.zeros(12, 3, 64, 64, dtype=torch.uint8),
                                    torch.zeros(12, 3, 128, 128)])
def test_other_frames_are_refused(frames: Tensor) -> None:
    """Floats in 0..1 read as black, or too few frames to see a motion."""
    with pytest.raises(UserError, match="frames: .*give uint8"):
        check(frames, SCENE)
