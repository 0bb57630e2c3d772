"""The judgement of a video: right on the truth, and plain about what it did not evaluate."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_opt.errors import UserError
from longlive_opt.measurement.result import is_na
from longlive_opt.tiny.shapes import adherence
from longlive_opt.tiny.shapes.adherence import delay_of, evaluate, table
from longlive_opt.tiny.shapes.captions import describe
from longlive_opt.tiny.shapes.evaluator import check, permanence, read, switch_delay
from longlive_opt.tiny.shapes.render import render, simulate, to_uint8
from longlive_opt.tiny.shapes.scene import ObjectSpec, SceneSpec

pytestmark = pytest.mark.usefixtures("one_thread")

RED = ObjectSpec("small", "red", "star", "still")
BLUE = ObjectSpec("large", "blue", "square", "spins", "A")
SCENE = SceneSpec((RED, BLUE), "grey", "dotted")
CHANGED = SceneSpec((replace(RED, colour="green", motion="left"), BLUE), "navy", "dotted")


def video(*timeline: tuple[int, SceneSpec], frames: int) -> Tensor:
    return to_uint8(render(simulate([list(timeline)], frames, 0), slice(None))[0])


def prompts(*parts: tuple[SceneSpec, int]) -> list[str]:
    return [describe(scene) for scene, count in parts for _ in range(count)]


def evaluated(frames: Tensor, *parts: tuple[SceneSpec, int], **keys: Any) -> dict[str, Any]:
    return evaluate(frames, prompts(*parts), **{"weights_kind": "official", **keys})


@pytest.fixture(scope="module")
def switched() -> Tensor:
    """18 latent frames: the truth of a switch at block 3."""
    return video((0, SCENE), (33, CHANGED), frames=69)


def test_truth_is_judged_right(switched: Tensor) -> None:
    """Frames of one prompt evaluated by another, or a delay counted from the wrong frame."""
    section = evaluated(switched, (SCENE, 33), (CHANGED, 36))
    figures = ("adherence_before", "adherence_after", "delay_blocks", "permanence", "switches", "never")
    assert [section[key] for key in figures] == [1, 1, 1, 1, 1, 0]
    assert section["wrong"] == [] and "random" not in section["label"]
    first, second = section["segments"]
    assert (first["first_frame"], first["evaluated_from"], first["evaluated_frames"]) == (0, 0, 33)
    assert (second["first_frame"], second["evaluated_from"], second["evaluated_frames"]) == (33, 45, 24)
    assert "delay_blocks" not in first and second["delay_limit_blocks"] == 3


def test_ignored_switch_is_never_and_names_what_is_wrong(switched: Tensor) -> None:
    """A model that keeps to the old prompt scored as if it had followed the new one."""
    stuck = video((0, SCENE), frames=69)
    section = evaluated(stuck, (SCENE, 33), (CHANGED, 36))
    assert section["adherence_before"] == 1 and section["adherence_after"] < 0.8
    assert section["never"] == 1 and "never came within 3 blocks" in section["delay_blocks"]["reason"]
    assert section["segments"][1]["delay_blocks"] is None
    assert section["wrong"] == ["green star: colour", "green star: motion", "ground: colour"]
    assert delay_of(section["segments"][1]) == "never within 3"


def test_late_switch_has_its_delay() -> None:
    """The first block after the switch may be anything; later ones may not."""
    section = evaluated(video((0, SCENE), (33 + 24, CHANGED), frames=69), (SCENE, 33), (CHANGED, 36))
    assert section["delay_blocks"] == 3 and section["never"] == 0 and section["adherence_after"] < 1


def test_vanished_object_breaks_permanence() -> None:
    """An object that goes and never comes back."""
    gone = video((0, SCENE), (24, SceneSpec((RED,), "grey", "dotted")), frames=48)
    section = evaluated(gone, (SCENE, 48))
    assert 0.5 <= section["permanence"] < 0.7
    assert is_na(section["adherence_after"]) and is_na(section["delay_blocks"]) and section["switches"] == 0


def test_too_few_frames_are_not_judged() -> None:
    """A motion read from nine frames, or the block in which the scene changes held against the model."""
    frames = video((0, SCENE), (9, CHANGED), frames=21)
    section = evaluated(frames, (SCENE, 9), (CHANGED, 12))
    first, second = section["segments"]
    assert "9 video frames" in first["adherence"]["reason"] and is_na(section["permanence"])
    assert "0 video frames after its first block" in second["adherence"]["reason"]
    assert section["delay_blocks"] in (1, None) or is_na(section["delay_blocks"])
    assert second["delay_limit_blocks"] == 1
    short = evaluated(frames[:15], (SCENE, 9), (CHANGED, 6))
    assert "ends 6 frames after" in short["delay_blocks"]["reason"] and short["switches"] == 0


def test_hidden_change_counts_neither_way() -> None:
    """A change behind another object reported as a switch that never came."""
    front = ObjectSpec("large", "white", "square", "still")
    behind = ObjectSpec("small", "red", "circle", "still")
    before = SceneSpec((behind, front), "teal", "checked")
    after = SceneSpec((replace(behind, motion="pulses"), front), "teal", "checked")
    tracks = simulate([[(0, before), (33, after)]], 69, 0)
    tracks.position[..., 1, :] = torch.tensor([64.0, 64.0])
    tracks.position[..., 0, :] = torch.tensor([43.0, 64.0])  # half of it shows
    section = evaluated(to_uint8(render(tracks, slice(None))[0]), (before, 33), (after, 36))
    assert is_na(section["delay_blocks"]) and section["never"] == 0
    assert "red circle: motion" in section["not_evaluated"]


def test_same_scene_in_other_words_is_no_switch(switched: Tensor) -> None:
    """A paraphrase reported as a switch that never came."""
    words = [describe(SCENE)] * 15 + [describe(SCENE).replace("small", "little")] * 18
    section = evaluate(switched[:33], words, weights_kind="official")
    assert "same scene" in section["delay_blocks"]["reason"] and section["switches"] == 0


@pytest.mark.parametrize(("prompt", "reason"), [
    ("A fox walks through fresh snow", "the word 'fox'"),
    ("a small red circle moves left", "names no ground"),
    ("a small red circle moves left and a big red box stays, on grey", "'grey'"),
])
def test_other_prompts_are_not_judged(prompt: str, reason: str) -> None:
    """The 1.3B model's fox evaluated as a world without objects."""
    section = evaluate(torch.zeros((24, 3, 128, 128), dtype=torch.uint8), [prompt] * 24,
                       weights_kind="official")
    assert is_na(section) and section["reason"].startswith("a prompt is not of Moving Shapes")
    assert reason in section["reason"] and section["how_to_fix"]
    assert list(table(section, [prompt] * 24)["adherence"]) == [section]


def test_other_sizes_are_not_judged_and_wrong_frames_are_refused() -> None:
    """An error at the end of a run that only filmed another size; floats read as black."""
    words = prompts((SCENE, 24))
    section = evaluate(torch.zeros((24, 3, 64, 96), dtype=torch.uint8), words, weights_kind="official")
    assert "64 x 96" in section["reason"]
    with pytest.raises(UserError, match="give uint8"):
        evaluate(torch.zeros((24, 3, 128, 128)), words, weights_kind="official")
    with pytest.raises(UserError, match="frame_prompts: 24 for 23 frames"):
        evaluate(torch.zeros((23, 3, 128, 128), dtype=torch.uint8), words, weights_kind="official")


def test_random_weights_are_called_random() -> None:
    """Noise that fits a prompt by chance, read as what a model can do."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (33, 3, 128, 128), dtype=torch.uint8, generator=generator)
    section = evaluated(noise, (SCENE, 33), weights_kind="random")
    assert section["label"].startswith("random weights") and section["adherence_before"] < 0.5


def test_long_times_are_read_in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of video in one reading takes gigabytes; a lapse in one part must not colour all of it."""
    assert [len(span) for span in adherence._spans(video((0, SCENE), frames=90))] == [90]
    monkeypatch.setattr(adherence, "SPAN_FRAMES", 24)
    other = replace(SCENE, ground="teal")
    section = evaluated(video((0, SCENE), (48, other), frames=72), (SCENE, 72))
    assert section["wrong"] == ["ground: colour (1 of 3 spans)"]
    drift = section["drift"]
    assert drift["first"] == 1 > drift["last"] and drift["change"] == drift["last"] - 1
    assert (drift["prompt"], drift["seconds"]) == (describe(SCENE), 4.5)
    short = evaluated(video((0, SCENE), frames=48), (SCENE, 48))
    assert "three spans" in short["drift"]["reason"] and "thirds" not in short["segments"][0]
    assert [len(span) for span in adherence._spans(torch.zeros((60, 3, 128, 128), dtype=torch.uint8))] == \
        [24, 36]
    monkeypatch.setattr(adherence, "DRIFT_SECONDS", 1)
    drifted = evaluated(video((0, SCENE), (24, other), frames=48), (SCENE, 48))["segments"][0]["drift"]
    assert drifted["first"] == 1 and drifted["last"] < 1


def test_a_slice_of_a_reading_is_the_reading_of_the_slice(switched: Tensor) -> None:
    """Frames read once for several judgements, each of which then sees something else than alone."""
    reading = read(switched)
    for part in (slice(0, 33), slice(45, 69), slice(30, 42)):
        assert check(reading[part], CHANGED) == check(switched[part], CHANGED)
        assert permanence(reading[part], CHANGED) == permanence(switched[part], CHANGED)
    assert switch_delay(reading[33:], CHANGED, SCENE) == switch_delay(switched[33:], CHANGED, SCENE)


def test_table_has_a_row_for_each_prompt(switched: Tensor) -> None:
    """A delay shown for the first prompt, which replaced nothing."""
    words = prompts((SCENE, 33), (CHANGED, 36))
    shown = table(evaluate(switched, words, weights_kind="official"), words)
    assert list(shown["prompt"]) == [describe(SCENE), describe(CHANGED)]
    assert list(shown["switch delay, blocks"]) == ["", 1] and list(shown["adherence"]) == [1, 1]
