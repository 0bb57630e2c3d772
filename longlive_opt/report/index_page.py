"""outputs/<campaign>/index.html: a campaign on one page, with links to the report of each run.

The page has no script but one button that plays all videos together, loads nothing from a network, and refers
to videos and charts by relative paths, since it lies next to them. It reads on paper, on a phone and in the
dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from ..files import atomic_path, without_places
from ..measurement.result import lookup, run_label
from .campaign import SUMMARY, Campaign, Result, by_ladder
from .conclusion import NOISE_BY_DESIGN, provenance_html
from .log.document import LOG_NAME
from .stylesheet import PAGE
from .tables import numbers_table
from .verdicts import recommendation

INDEX_NAME = "index.html"
_CHARTS = (("pareto", "Latency against fidelity"), ("latency_boxes", "Steady-state latency"))
_STYLE = PAGE + """
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(14em, 1fr)); gap: 1em }
.videos video, .videos img { width: 100% }
"""
_PLAY = "document.querySelectorAll('video').forEach(v => { v.currentTime = 0; v.play() })"


def page(campaign: Campaign) -> str:
    """The whole page: recommendation, table, videos, charts, provenance."""
    runs = by_ladder(campaign.results)
    title = html.escape(f"Campaign {campaign.folder.name}")
    return "".join((
        f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{title}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style><body><h1>{title}</h1>{recommendation(campaign)}",
        f"<h2>Results</h2><div class='wide'>{_table(campaign, runs)}</div>{_failures(campaign)}",
        _videos(campaign.folder,
                runs), _charts(campaign.folder), f"<footer>{provenance_html(runs)}</footer></body></html>\n"))


def write_index(campaign: Campaign) -> Path:
    """Write the page into the campaign's folder, atomically, and return its path.

    Raises:
        UserError: the file cannot be written.
    """
    path = campaign.folder / INDEX_NAME
    with atomic_path(path) as temporary:
        temporary.write_text(without_places(page(campaign)), encoding="utf-8")
    return path


def _table(campaign: Campaign, runs: Sequence[Result]) -> str:
    """The numbers of every run, in the order of the log; a preset links to its report if there is one."""
    numbers = numbers_table(campaign.results)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in numbers if name != "run")
    rows = []
    for result, cells in zip(runs, numbers.to_dict("records"), strict=True):
        label = run_label(result["preset"], result["run"])
        name, report = html.escape(label), campaign.folder / label / "report.html"
        linked = f"<a href='{name}/report.html'>{name}</a>" if report.is_file() else name
        values = "".join(f"<td>{html.escape(str(value))}</td>" for column, value in cells.items()
                         if column not in ("preset", "run"))
        rows.append(f"<tr><td>{linked}</td>{values}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _failures(campaign: Campaign) -> str:
    lines = [f"{failure.label}: {failure.outcome}, {failure.reason}" for failure in campaign.failures]
    lines += [f"{place}: {reason}" for place, reason in campaign.problems]
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _videos(folder: Path, runs: Sequence[Result]) -> str:
    """A grid of the videos of all first runs that are there, and a button that plays them together."""
    shown = [run for run in runs if run["run"] == 1 and (folder / run["preset"] / "video.mp4").is_file()]
    if not shown:
        return ""
    random = any(lookup(run, "weights.kind") == "random" for run in shown)
    note = f"<p>{NOISE_BY_DESIGN}</p>" if random else ""
    figures = "".join(
        "<figure><video controls loop muted playsinline preload='metadata' "
        f"src='{html.escape(run['preset'])}/video.mp4'></video>{_sheet(folder, run['preset'])}"
        f"<figcaption>{html.escape(run['title'])}</figcaption></figure>" for run in shown)
    return (f"<h2>Videos</h2>{note}<p><button onclick=\"{_PLAY}\">Play all from the start</button></p>"
            f"<div class='videos'>{figures}</div>")


def _sheet(folder: Path, preset: str) -> str:
    """The contact sheet of a video, which takes its place on paper."""
    if not (folder / preset / "frames.png").is_file():
        return ""
    return f"<img class='on-paper' src='{html.escape(preset)}/frames.png' alt='frames of the video'>"


def _charts(folder: Path) -> str:
    found = [(name, words) for name, words in _CHARTS if (folder / SUMMARY / f"{name}.png").is_file()]
    links = [f"<a href='{SUMMARY}/report.html'>all charts</a>"] * (folder / SUMMARY / "report.html").is_file()
    links += [f"<a href='{LOG_NAME}'>the log</a>"] * (folder / LOG_NAME).is_file()
    pictures = "".join(f"<figure class='wide'><img src='{SUMMARY}/{name}.png' alt='{words}'>"
                       f"<figcaption>{words}</figcaption></figure>" for name, words in found)
    return f"<h2>Charts</h2><p>See {' and '.join(links)}.</p>{pictures}" if links or found else ""
