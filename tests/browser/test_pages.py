"""Reports, a campaign's page and a comparison in a headless Chromium: on A4, 390 pixels wide, in the dark."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from example_results import example_result
from test_lab import chromium

from longlive_opt.config import ExperimentConfig
from longlive_opt.measurement.result import write_result
from longlive_opt.report import cards, load, video, write_campaign_log, write_index
from longlive_opt.report.campaign_diff import compare, page
from longlive_opt.report.charts import latency_ecdf
from longlive_opt.report.conclusion import conclusion_html, provenance_html
from longlive_opt.report.html_export import export_html
from longlive_opt.report.tables import fidelity_table, numbers_table, parameters_table

pytestmark = pytest.mark.browser
PHONE = {"width": 390, "height": 844}
PAPER = {"width": 703, "height": 1032}  # A4 less 12 mm on each side, in CSS pixels
PAGES = ("speed/report.html", "summary/report.html", "index.html", "compare.html")
PROMPT = "a large red square with the letter A pulses and a small blue circle orbits, on a dotted grey ground"


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign of two presets with reports that have what real ones have: wide tables, charts, videos."""
    folder = tmp_path_factory.mktemp("c")
    runs = [example_result("baseline", 1.0, steady=12, switches=2), example_result("speed", 0.5, steady=12,
                                                                                   switches=2)]
    frames = torch.randint(0, 256, (9, 3, 48, 64), dtype=torch.uint8)
    for run in runs:
        place = folder / run["preset"]
        place.mkdir()
        write_result(place / "result.json", run)
        video.write_mp4(place / "video.mp4", frames, 16)
        video.contact_sheet(place / "frames.png", frames)
    loaded = load(folder)
    write_campaign_log(loaded)
    baseline, speed = loaded.results
    player = video.video_html(folder / "speed/video.mp4", f"0.0 s: {PROMPT}",
                              sheet=folder / "speed/frames.png")
    outputs = {"video": player, "conclusion": conclusion_html(speed, baseline),
               "charts": latency_ecdf(loaded.results),
               "compare": fidelity_table(baseline["quality"], {"baseline": speed["quality"] | {
                   "free_running": speed["quality"]["latent_error"],
                   "forced": speed["quality"]["latent_error"]}, "nulls": baseline["quality"]["nulls"]}),
               "all-parameters": parameters_table(ExperimentConfig(seed=3))}
    write_report(folder / "speed", outputs, cards(folder)["speed"], [speed])
    (folder / "summary").mkdir(exist_ok=True)
    write_report(folder / "summary", {"numbers": numbers_table(loaded.results)}, "", loaded.results)
    write_index(loaded)
    (folder / "compare.html").write_text(page(compare(loaded, loaded), loaded, loaded))
    return folder


def write_report(folder: Path, outputs: dict[str, Any], card: str, runs: list[dict]) -> None:
    v4 = nbformat.v4
    cells = [v4.new_markdown_cell("# A question\n\nSome `words` on it.", id="question")]
    for name, value in outputs.items():
        if isinstance(value, str):
            data, metadata = {"text/html": value}, {}
        elif hasattr(value, "to_html"):
            data, metadata = {"text/html": value.to_html()}, {}
        else:
            png, metadata = value._repr_png_()
            data = {"image/png": base64.b64encode(png).decode("ascii")}
            metadata = {"image/png": metadata}
        output = v4.new_output("display_data", data=data, metadata=metadata)
        cells.append(v4.new_code_cell("experiment.do(something_long) " * 6, id=name, outputs=[output]))
    nbformat.write(v4.new_notebook(cells=cells), folder / "notebook.ipynb")
    export_html(folder / "notebook.ipynb", folder / "report.html", title="A report", card=card,
                foot=provenance_html(runs))


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chrome: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page, and what it asked of anything but its own folder."""
    asked: list[str] = []
    context = chrome.new_context(**options)
    tab = context.new_page()
    tab.on("request", lambda it: asked.append(it.url) if not it.url.startswith(("file:", "data:")) else None)
    tab.goto(path.as_uri())
    tab.wait_for_load_state("load")
    return tab, asked


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_down_only(chrome: Any, campaign: Path, name: str) -> None:
    """A page that is wider than its phone, of which one sees a third."""
    tab, asked = opened(chrome, campaign / name, viewport=PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert asked == []
    tab.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_paper_has_all_of_it(chrome: Any, campaign: Path, name: str) -> None:
    """A table whose last columns, with the verdict, are beyond the paper; a video that is a black box."""
    tab, _ = opened(chrome, campaign / name, viewport=PAPER)
    tab.emulate_media(media="print")
    beyond = tab.evaluate("""() => [...document.querySelectorAll('table, td, th, img, p, section')].filter(
        it => it.getBoundingClientRect().right > innerWidth + 1).map(it => it.outerHTML.slice(0, 80))""")
    assert beyond == []
    seen = tab.evaluate("""selector => [...document.querySelectorAll(selector)].map(
        it => it.getBoundingClientRect().height)""", "video")
    assert not any(seen)
    pictures = tab.evaluate("""() => [...document.querySelectorAll('.on-paper')].map(
        it => it.getBoundingClientRect().height * it.naturalWidth)""")
    assert len(pictures) == len(seen) and all(pictures)
    tab.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_the_dark_is_dark_and_can_be_read(chrome: Any, campaign: Path, name: str) -> None:
    """A white page at night, or black words on a dark one."""
    tab, _ = opened(chrome, campaign / name, viewport=PAPER, color_scheme="dark")
    found = tab.evaluate("""() => {
        const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const light = colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data; return (r + g + b) / 3 };
        const probe = document.createElement('div');
        probe.style.background = 'Canvas';
        document.body.append(probe);
        const own = getComputedStyle(document.body).backgroundColor;
        const back = own === 'rgba(0, 0, 0, 0)' ? getComputedStyle(probe).backgroundColor : own;
        const words = [...document.querySelectorAll('h1, p, td, th, section b, footer, summary')]
            .filter(it => it.getBoundingClientRect().height)
            .map(it => [light(getComputedStyle(it).color), it.outerHTML]);
        return {back: light(back), darkest: words.sort((a, b) => a[0] - b[0])[0]} }""")
    assert found["back"] < 50 and found["darkest"][0] > 120, found
    tab.context.close()
