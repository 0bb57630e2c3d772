"""The page of a campaign: everything is on it, escaped, and nothing comes from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_results import example_result

from longlive_opt.measurement.result import write_result
from longlive_opt.report import load, write_campaign_log, write_index
from longlive_opt.report.html_export import network_references


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    folder = tmp_path / "c"
    for run in (example_result("baseline", 1.0, steady=12, switches=2),
                example_result("baseline", 1.01, run=2, steady=12, switches=2),
                example_result("speed", 0.5, steady=12, switches=2) | {"title": "Speed <b>&</b>"}):
        place = folder / (run["preset"] + (f".repeat{run['run']}" if run["run"] > 1 else ""))
        place.mkdir(parents=True)
        write_result(place / "result.json", run)
        (place / "report.html").write_text("a report")
        (place / "video.mp4").write_bytes(b"mp4")
    write_campaign_log(load(folder))
    return folder


def test_page_has_every_run_video_and_its_recommendation(campaign: Path) -> None:
    """A run that is not on the page, a link to nothing, or a title that becomes markup."""
    text = write_index(load(campaign)).read_text()
    for label in ("baseline", "baseline.repeat2", "speed"):
        assert f"<a href='{label}/report.html'>{label}</a>" in text
    assert text.count("<video ") == 2 and "baseline.repeat2/video.mp4" not in text
    assert "Which preset to take" in text and "noise by design" in text
    assert "Speed &lt;b&gt;&amp;&lt;/b&gt;" in text and "<b>&</b>" not in text
    assert text.index("Which preset to take") < text.index("Results") < text.index("Videos")
    assert network_references(text) == [] and "NVIDIA H100" in text
    assert "on-paper" not in text.partition("</style>")[2]
    (campaign / "speed" / "frames.png").write_bytes(b"png")
    assert "<img class='on-paper' src='speed/frames.png'" in write_index(load(campaign)).read_text()


def test_page_of_a_clone_without_videos(campaign: Path) -> None:
    """Players with nothing in them where videos are not part of the repository."""
    for video in campaign.glob("*/video.mp4"):
        video.unlink()
    (campaign / "speed" / "report.html").unlink()
    text = write_index(load(campaign)).read_text()
    assert "<video" not in text and "<td>speed</td>" in text


def test_failed_runs_are_on_the_page(campaign: Path) -> None:
    """A campaign that looks complete though one preset failed."""
    (campaign / "balanced").mkdir()
    (campaign / "balanced" / "failed.json").write_text(
        '{"label": "balanced", "meaning": "no <compiler>", "status": "not available"}')
    text = write_index(load(campaign)).read_text()
    assert "balanced: not available, no &lt;compiler&gt;" in text
