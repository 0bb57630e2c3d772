"""The pictures and scores of Moving Shapes that the notebook on the training shows."""

import pytest

from longlive_opt.tiny.shapes import examples
from longlive_opt.tiny.shapes.captions import parse

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pictures_are_drawn_under_their_prompts() -> None:
    """A figure without its prompt, or one that changes from run to run."""
    chart, again = examples.scenes(3, count=2), examples.scenes(3, count=2)
    first, second = (parse(ax.get_title(loc="left")) for ax in chart.axes)
    assert first != second
    assert chart._repr_png_() == again._repr_png_()
    assert "\n-> " in examples.switch(3).axes[0].get_title(loc="left")


def test_sample_scores_its_own_prompt_best() -> None:
    """A table that would show an evaluator to which every prompt is right."""
    sample = examples.Sample.of(0)
    scores, seen = sample.scores(), sample.seen()
    assert set(seen["colour"]) == {thing.colour for thing in sample.scene.objects}
    assert scores.loc["its own", "adherence"] == 1 and scores.loc["its own", "wrong"] == ""
    assert scores["adherence"].iloc[1:].max() < 1 and scores["wrong"].iloc[1:].all()
    assert "motion" in scores.loc["another motion", "wrong"]
    many = examples.scores(0, count=2)["mean"]
    assert many.iloc[0] >= 0.95 and many.is_monotonic_decreasing
