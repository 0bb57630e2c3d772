"""Moving Shapes: scenes, their prompts and their pictures."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from longlive_opt.errors import UserError
from longlive_opt.tiny.shapes.captions import MAX_BYTES, describe, parse
from longlive_opt.tiny.shapes.render import SIZE, render, simulate, to_uint8
from longlive_opt.tiny.shapes.scene import (
    COLOURS,
    HELD_OUT_TRIPLES,
    MOTIONS,
    SHAPES,
    ObjectSpec,
    SceneSpec,
    change_scene,
    sample_scene,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RED = ObjectSpec("small", "red", "circle", "right")
BLUE = ObjectSpec("large", "blue", "square", "spins", "A")


def scene_of(*objects: ObjectSpec, ground: str = "grey", pattern: str = "dotted") -> SceneSpec:
    return SceneSpec(objects, ground, pattern)


# ---- scenes


def test_training_never_shows_a_held_out_triple() -> None:
    """A held-out figure measured on what was trained on, by way of a change of scene for example."""
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        for _ in range(300):
            scene = sample_scene(rng, held_out)
            later = change_scene(rng, scene, held_out)
            assert later != scene
            for thing in scene.objects + later.objects:
                assert (thing.triple in HELD_OUT_TRIPLES) == held_out


def test_held_out_triples_are_these() -> None:
    """Another hash tomorrow: weights trained today would be tested on what they have seen."""
    assert len(HELD_OUT_TRIPLES) == 27
    assert HELD_OUT_TRIPLES[:2] == (("red", "triangle", "up"), ("red", "triangle", "orbits"))
    for axis, words in enumerate((COLOURS, SHAPES, MOTIONS)):
        assert {triple[axis] for triple in HELD_OUT_TRIPLES} == set(words)


def test_a_change_keeps_the_other_objects_at_their_index() -> None:
    """Object 1 that becomes object 0 would jump across the picture at a switch."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = sample_scene(rng)
        later = change_scene(rng, scene)
        assert abs(len(later.objects) - len(scene.objects)) <= 2
        same = sum(a == b for a, b in zip(scene.objects, later.objects))
        assert same >= min(len(scene.objects), len(later.objects)) - 2


@pytest.mark.parametrize(("make", "words"), [
    (lambda: ObjectSpec("small", "pink", "star", "left"), "colour: 'pink'.*red, green"),
    (lambda: ObjectSpec("small", "red", "star", "left", "A"), "letter: a small object"),
    (lambda: ObjectSpec("large", "red", "circle", "spins"), "circle without a letter"),
    (lambda: scene_of(), "objects: 0"),
    (lambda: scene_of(RED, RED), "two objects are red"),
    (lambda: sample_scene(np.random.default_rng(0), objects=4), "objects: 4"),
])
def test_impossible_scenes_are_refused(make, words: str) -> None:
    """A scene that no prompt can name, or that no one could tell from another."""
    with pytest.raises(UserError, match=words):
        make()


# ---- prompts


def test_prompts_come_back_as_the_scene() -> None:
    """A paraphrase that the parser reads as something else, or one longer than the tokenizer takes."""
    rng = np.random.default_rng(2)
    seen = set()
    for turn in range(1500):
        scene = sample_scene(rng, held_out=turn % 3 == 0)
        for prompt in (describe(scene), describe(scene, rng)):
            assert parse(prompt) == scene, prompt
            assert prompt.isascii() and len(prompt) <= MAX_BYTES
        seen.add(prompt)
    assert len(seen) > 1450


def test_longest_scene_still_fits() -> None:
    """The short form of the three longest objects beyond the tokenizer's 128 positions."""
    colours = "yellow", "purple", "green"
    longest = [ObjectSpec("large", colour, "triangle", "right", "X") for colour in colours]
    prompt = describe(scene_of(*longest, pattern="checked", ground="brown"))
    assert len(prompt) <= MAX_BYTES and parse(prompt).objects == tuple(longest)


def test_canonical_prompt() -> None:
    """The wording of the README and of the presets."""
    scene = scene_of(RED, BLUE)
    assert describe(scene) == ("a small red circle moves right and a large blue square with the letter A "
                               "spins, on a dotted grey ground")
    assert parse("On dotted grey, the SMALL red disc goes right while a big blue box A rotates.") == scene


@pytest.mark.parametrize(("prompt", "words"), [
    ("a small pink circle moves left, on dotted grey", "the word 'pink'.*red, green, blue"),
    ("a red circle moves left, on dotted grey", "'red' is in the wrong place.*small, little"),
    ("a small red circle", "a motion is missing"),
    ("a small red circle stays", "names no ground"),
    ("on dotted grey", "names no object"),
    ("on dotted grey, small red circle stays, on dotted navy", "two grounds"),
    ("a small red circle jumps, on dotted grey", "the word 'jumps'.*moves left"),
])
def test_unknown_prompts_are_refused(prompt: str, words: str) -> None:
    """A word silently ignored: the video then shows something else than was asked for."""
    with pytest.raises(UserError, match=words):
        parse(prompt)


# ---- motion and pictures


def test_motions_move_as_named() -> None:
    """left that goes right, or an object that leaves the picture for good."""
    things = [ObjectSpec("large", "red", "star", motion, "A") for motion in MOTIONS]
    tracks = simulate([[(0, scene_of(thing))] for thing in things], 400, seed=3)
    place = tracks.position[:, :, 0]
    step = place.diff(dim=1).median(1).values
    ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for index, motion in enumerate(MOTIONS):
        reach = (place[index] - SIZE / 2).abs().amax()
        if motion in ways:
            speed = float(step[index] @ torch.tensor(ways[motion], dtype=torch.float32))
            assert 1.5 <= speed <= 2.5 and reach > SIZE / 2
        else:
            assert reach < SIZE / 2 - 20
        assert (tracks.angle[index, -1, 0] != 0) == (motion == "spins")
        assert (tracks.scale[index, :, 0].std() > 0.05) == (motion == "pulses")
        assert bool((place[index].std(0) > 3).any()) == (motion not in ("spins", "pulses", "still"))


def test_a_switch_goes_on_from_where_things_are() -> None:
    """An object that jumps at a switch, or a colour that changes at once."""
    green = ObjectSpec("large", "green", "star", "left")
    tracks = simulate([[(0, scene_of(RED, BLUE)), (30, scene_of(green, BLUE))]], 60, seed=0)
    steps = tracks.position[0, 28:40, 0].diff(dim=0).norm(dim=1)
    assert steps.max() < 5
    frames = render(tracks, slice(28, 40))[0]
    assert (frames.diff(dim=0).abs().amax(dim=(1, 2, 3)) < 0.9).all()
    assert torch.equal(tracks.rgb[0, 36, 0], tracks.rgb[0, 59, 0])
    assert not torch.equal(tracks.rgb[0, 32, 0], tracks.rgb[0, 59, 0])


def test_objects_that_come_and_go_fade() -> None:
    """A removed object that stays, or a new one that is there before it is asked for."""
    both, one = scene_of(RED, BLUE), scene_of(RED)
    tracks = simulate([[(0, both), (20, one), (40, both)]], 60, seed=0)
    assert tracks.alpha[0, [0, 19, 27, 40, 59], 1].tolist() == pytest.approx([1, 1, 0, 0, 1], abs=0.01)


def test_one_video_does_not_depend_on_the_others() -> None:
    """A seed that means something else in another batch: no figure could be repeated."""
    rng = np.random.default_rng(0)
    videos = [[(0, sample_scene(rng)), (9, sample_scene(rng))] for _ in range(3)]
    one, all_three = simulate(videos[:1], 20, seed=5), simulate(videos, 20, seed=5)
    for field in fields(one):
        assert torch.equal(getattr(one, field.name), getattr(all_three, field.name)[:1])


def test_frames_can_be_rendered_alone() -> None:
    """Frames that depend on which others are rendered with them: training clips unlike the video."""
    rng = np.random.default_rng(4)
    tracks = simulate([[(0, sample_scene(rng)), (15, sample_scene(rng))] for _ in range(2)], 30, seed=0)
    video = render(tracks, slice(None))
    assert video.shape == (2, 30, 3, SIZE, SIZE) and 0 <= video.min() and video.max() <= 1
    assert torch.equal(render(tracks, [17, 3]), video[:, [17, 3]])
    own = render(tracks, torch.tensor([[1, 2], [20, 29]]))
    assert torch.equal(own, torch.stack([video[0, [1, 2]], video[1, [20, 29]]]))
    assert to_uint8(video).dtype == torch.uint8


def test_front_objects_hide_back_ones() -> None:
    """Objects drawn in another order than the prompt names them."""
    small = ObjectSpec("small", "red", "square", "still")
    large = ObjectSpec("large", "blue", "square", "still")
    tracks = simulate([[(0, scene_of(small, large))], [(0, scene_of(large, small))]], 1, seed=0)
    tracks.position[:] = SIZE / 2
    middle = render(tracks, [0])[:, 0, :, SIZE // 2, SIZE // 2]
    assert middle[0].argmax() == 2 and middle[1].argmax() == 0


def test_timelines_begin_at_the_first_frame() -> None:
    """A switch list in the wrong order: frames of no scene."""
    for starts in ([], [3], [0, 9, 9]):
        with pytest.raises(UserError, match="scenes: video 0"):
            simulate([[(start, scene_of(RED)) for start in starts]], 10, seed=0)


@pytest.mark.gpu
def test_pictures_are_the_same_on_a_gpu() -> None:
    """A device tensor missing somewhere, or another world in training than in the tests."""
    rng = np.random.default_rng(0)
    tracks = simulate([[(0, sample_scene(rng)), (5, sample_scene(rng))] for _ in range(4)], 12, seed=0)
    difference = render(tracks, slice(None), "cuda").cpu() - render(tracks, slice(None))
    assert difference.abs().mean() < 1e-4
