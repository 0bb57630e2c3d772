"""Figures: pure functions from result.json dictionaries to matplotlib figures, redrawable without a GPU.

Every function takes one result or several and draws what is there; a missing or n/a part becomes a sentence
in the figure, never an exception. A preset has the same colour in every chart, lines carry their names, n is
printed. Nothing touches pyplot, so neither a backend nor a display is needed.
"""

import io
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from longlive_opt.metrics import percentile
from longlive_opt.results import is_finite, lookup, number, numbers
from longlive_opt.timeline import Event

Result = Mapping[str, Any]

TARGET_MS = 40.0  # per video frame: 25 FPS
STAGE_COLOURS = {"text_encode": "#9467bd", "recache": "#e0a100", "denoise": "#3b75af", "decode": "#5aa469",
                 "other": "#b8b8b8"}
PRESET_COLOURS = {  # apart from one another also without red or green receptors
    "baseline": "#4d4d4d", "cuda_graphs": "#d98b00", "static_kv": "#3d9ad1", "async_vae": "#009e73",
    "quality": "#0a5c9c", "balanced": "#b4508f", "speed": "#d1491b", "low_memory": "#662200",
    "realtime": "#2318f0", "ablation": "#8866ff"}
_MORE_COLOURS = ("#e7298a", "#455a8f", "#a6761d", "#2f6b3a", "#9c6ade", "#b3562b")
_DARK, _GREY, _RED = "#222222", "#8a8a8a", "#c21f1f"
_HALO = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85}
_DPI = 110
_KEPT_COLOURS = 64
_FONT = 9  # points
_WIDTH = 9  # inches
_STAGES = tuple(STAGE_COLOURS)
_ON_LIGHT = ("recache", "other")  # stages whose colour is too light for white figures
_LEVELS = tuple(level / 20 for level in range(1, 20))  # where on its curve a name may stand


class Chart(Figure):
    """A Figure that a notebook shows by itself: no pyplot, hence no global state.

    `alt` says in words what there is to see; without it the titles stand for it.
    """

    alt = ""

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.save(buffer)
        return buffer.getvalue(), {"alt": self.alt or "; ".join(ax.get_title(loc="left") for ax in self.axes)}

    def save(self, target: Path | BinaryIO) -> None:
        """Write as PNG. Without pictures in it, a palette will do: a third of the size for lines and text."""
        if any(ax.images for ax in self.axes):
            self.savefig(target, format="png")
            return
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        _few_colours(Image.open(buffer).convert("RGB")).save(target, "PNG", optimize=True)


def _few_colours(picture: Image.Image) -> Image.Image:
    """The picture in 256 colours: the most frequent ones as they are, the others by greatest coverage. By
    frequency alone a thin line would get the colour of a thicker one.
    """
    codes = np.asarray(picture, dtype=np.int64) @ (1 << 16, 1 << 8, 1)
    found, places, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    others = picture.quantize(256 - _KEPT_COLOURS, Image.Quantize.MAXCOVERAGE).getpalette()
    frequent = colours[np.argsort(-counts, kind="stable")[:_KEPT_COLOURS]]
    palette = np.concatenate([frequent, np.reshape(others, (-1, 3))])[:256]
    nearest = ((colours[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1).astype(np.uint8)
    few = Image.fromarray(nearest[places].reshape(codes.shape), "P")
    few.putpalette(palette.astype(np.uint8).tobytes())
    return few


def colour_of(preset: str) -> str:
    """The preset's colour; a preset that the table does not name gets one that depends on its name only."""
    spare = _MORE_COLOURS[zlib.crc32(preset.encode()) % len(_MORE_COLOURS)]
    return PRESET_COLOURS.get(preset, spare)


def first_runs(results: Iterable[Result]) -> list[Result]:
    """One result per preset, the first: an A/A repeat measures noise and is no preset of its own."""
    kept: dict[str, Result] = {}
    for result in results:
        kept.setdefault(_preset(result), result)
    return list(kept.values())


# ------------------------------------------------------------------------------- several results


def latency_ecdf(results: Sequence[Result]) -> Chart:
    """Share of steady-state blocks at or below a latency in ms per video frame, one curve per preset."""
    series = [(result, sorted(_per_frame(result))) for result in results if _per_frame(result)]
    title = "Steady-state latency: share of blocks at or below"
    if not series:
        return _empty(title, "no steady-state samples")
    series.sort(key=lambda item: item[1][len(item[1]) // 2], reverse=True)
    figure, ax = _axes(title, 1.8 + max(2.8, 0.34 * len(series)))
    names = []
    for result, values in series:
        n = len(values)
        shares = [count / n for count in range(n + 1)]
        ax.step([values[0], *values], shares, where="post", lw=1.8, color=_colour(result))
        places = [(values[int(level * n)], level) for level in _LEVELS]
        names.append((places, f"{_name(result)} (n={n})", _colour(result)))
    ax.set(xlim=_limits([value for _, values in series for value in values], 0.04, 0.24), ylim=(0, 1.02),
           xlabel="ms per video frame")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _target(ax)
    _name_points(ax, names)
    return _told(figure, "One curve per preset; median in ms per video frame", (
        f"{_name(result)} {percentile(values, 50):.1f}" for result, values in reversed(series)))


def latency_boxes(results: Sequence[Result]) -> Chart:
    """Every steady-state sample and its box (quartiles, whiskers at 1.5 IQR), one row per preset."""
    series = [(result, _per_frame(result)) for result in results if _per_frame(result)]
    title = "Steady-state latency by preset: every block"
    if not series:
        return _empty(title, "no steady-state samples")
    figure, ax = _axes(title, 1.5 + 0.52 * len(series))
    for row, (result, values) in enumerate(series):
        # A fixed spread instead of random jitter: the same result gives the same picture.
        heights = [row + 0.3 * (i * 0.618034 % 1.0 - 0.5) for i in range(len(values))]
        ax.scatter(values, heights, s=7, alpha=0.35, color=_colour(result), linewidths=0)
        first, median, third = (percentile(values, q) for q in (25, 50, 75))
        reach = 1.5 * (third - first)
        inside = [value for value in values if first - reach <= value <= third + reach]
        ax.plot([min(inside), max(inside)], [row, row], color=_colour(result), lw=1.2, marker="|", ms=9)
        ax.barh(row, third - first, left=first, height=0.5, fill=False, edgecolor=_colour(result), lw=1.2)
        ax.plot([median, median], [row - 0.25, row + 0.25], color=_DARK, lw=1.6)
        digits = 1 if max(values) >= 10 else 2
        words = f"mean {_mean(values):.{digits}f}, max {max(values):.{digits}f}"
        _note(ax, words, (1, row), (8, 0), va="center", xycoords=("axes fraction", "data"))
    _rows(ax, [f"{_name(result)} (n={len(values)})" for result, values in series])
    ax.set(xlim=_limits([value for _, values in series for value in values], 0.05, 0.05),
           xlabel="ms per video frame")
    _target(ax)
    return _told(figure, "Every block is a point; mean and maximum in ms per video frame", (
        f"{_name(result)} {_mean(values):.1f} and {max(values):.1f}" for result, values in series))


def latency_by_block(results: Sequence[Result]) -> Chart:
    """Latency against block index: drift and outliers."""
    series = [(result, _blocks(result), _per_frame(result)) for result in results if _per_frame(result)]
    title = "Latency over the stream: is there drift?"
    if not series:
        return _empty(title, "no steady-state samples")
    figure, ax = _axes(title, 1.8 + max(2.8, 0.26 * len(series)))
    # Switches that had a stream of their own are not in this one.
    switches = {block for result, _, _ in series if not result.get("switch_events")
                for block in numbers(result, "latency.ps_blocks")}
    for block in switches:
        ax.axvline(block, color=_GREY, lw=0.7, ls=":", zorder=0)
    for result, blocks, values in series:
        ax.plot(blocks, values, lw=1.0, color=_colour(result), marker="." if len(values) < 40 else None)
    names = [(blocks[-1], _mean(values), f"{_name(result)} (n={len(values)})", _colour(result))
             for result, blocks, values in series]
    high = _limits([value for _, _, values in series for value in values], 0, 0.05)[1]
    if high > TARGET_MS:
        ax.axhline(TARGET_MS, color=_RED, lw=1.0, ls="--", zorder=1)
        names.append((math.inf, TARGET_MS, f"{TARGET_MS:.0f} ms target", _RED))
    far = "" if high > TARGET_MS else f"   ({TARGET_MS:.0f} ms target: far above)"
    ax.set(ylim=(0, high), ylabel=f"ms per video frame{far}",
           xlabel="block" + ("   (dotted: prompt switches, not part of SS)" if switches else ""))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_lines(ax, names)
    halves = ((result, values[:len(values) // 2] or values, values[len(values) // 2:])
              for result, _, values in series)
    return _told(figure, "One line per preset; second half of the blocks minus first, in ms per video frame",
                 (f"{_name(result)} {_mean(last) - _mean(first):+.2f}" for result, first, last in halves))


def stage_bars(results: Sequence[Result]) -> Chart:
    """Mean time of each stage per steady-state block; the tick is the block interval on the host clock."""
    rows = []
    for result in results:
        parts = {name: number(result, f"latency.stages_ms.{name}.mean") for name in _stage_names(result)}
        parts = {name: value for name, value in parts.items() if value is not None}
        total = _mean(numbers(result, "latency.ss_block_ms"))
        if total is not None:
            parts["other"] = max(0.0, total - sum(parts.values()))
            rows.append((f"{_name(result)} (n={len(_per_frame(result))})", parts, total))
    return _stacked("Where the time of a block goes", rows, "ms per steady-state block", "block interval")


def switch_bars(results: Sequence[Result]) -> Chart:
    """Mean prompt-switch latency, from the request to the first new frames in pixels, by stage."""
    rows = []
    for result in results:
        parts = {name: number(result, f"latency.ps_breakdown_ms.{name}") for name in _STAGES}
        parts = {name: max(0.0, value) for name, value in parts.items() if value is not None}
        total = number(result, "latency.ps_ms.mean")
        if total is not None:
            rows.append((f"{_name(result)} (n={len(numbers(result, 'latency.ps_ms_all'))})", parts, total))
    title = "Prompt switch: from the request to the first new frames"
    return _stacked(title, rows, "ms per switch", "PS mean")


def playback_buffer(results: Sequence[Result]) -> Chart:
    """How far delivery is ahead of a viewer who starts at the first measured chunk; a stall below 0."""
    series = [(result, margin) for result in results if (margin := _margin(result, "events"))]
    title = "Playback: seconds of video ahead of the viewer"
    if not series:
        return _empty(title, "no chunk times in the events")
    figure, ax = _axes(f"{title}, {number(series[0][0], 'playback.fps'):g} FPS",
                       1.8 + max(2.8, 0.26 * len(series)))
    for result, margin in series:
        ax.plot(*margin, lw=1.6, color=_colour(result))
        if switched := _margin(result, "switch_events"):
            ax.plot(*switched, lw=1.2, ls="--", color=_colour(result))
    ax.axhline(0, color=_RED, lw=1.2)
    low, high = ax.get_ylim()
    ax.axhspan(low, 0, color=_RED, alpha=0.06, lw=0)
    dashed = any(result.get("switch_events") for result, _ in series)
    ax.set(ylim=(low, max(high, 0.05 * -low)), ylabel="s ahead (below 0: stall)",
           xlabel="seconds of video" + ("   (dashed: with prompt switches; buffer: without / with them)"
                                        if dashed else ""))
    names = [(margin[0][-1], margin[1][-1], f"{_name(result)}: {_buffer_label(result)}", _colour(result))
             for result, margin in series]
    _name_lines(ax, names)
    return _told(figure, "Rising lines keep up; start-up buffer without / with prompt switches",
                 (text for _, _, text, _ in names))


def pareto(results: Sequence[Result]) -> Chart:
    """Worst-case latency against deviation from the baseline: up and to the left is better."""
    timed = {_name(r): r for r in results if number(r, "latency.ss_ms_per_frame.max") is not None}
    title = "Speed against fidelity to the baseline"
    if not timed:
        return _empty(title, "no steady-state latency")
    psnr = {name: number(result, "quality.psnr_db.mean") for name, result in timed.items()}
    known = [value for value in psnr.values() if value is not None] or [30.0, 40.0]
    span = max(max(known) - min(known), 6.0)
    top, bottom = max(known) + 0.3 * span, min(known) - 0.3 * span  # the rows for "identical" and "n/a"
    points = []
    for name, result in timed.items():
        y = top if _identical(result) else bottom if psnr[name] is None else psnr[name]
        points.append((number(result, "latency.ss_ms_per_frame.max"), y, name, _colour(result)))
    figure, ax = _axes(title, 4.8)
    front: list[tuple[float, float]] = []
    for x, y, _, _ in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > max((height for _, height in front), default=bottom):
            front.append((x, y))
    if front:
        ax.plot(*zip(*front, strict=True), color=_GREY, lw=1.0, zorder=1)
    for x, y, _, colour in points:
        ax.scatter([x], [y], s=46, color=colour, zorder=3)
    ax.set(xlim=_limits([x for x, _, _, _ in points], 0.15, 0.3),
           ylim=(bottom - 0.35 * span, top + 0.35 * span),
           xlabel="SS max, ms per video frame   (left is faster)", ylabel="mean PSNR to the baseline, dB")
    rows = {label: y for label, y in (("identical", top), ("n/a", bottom)) if y in [p[1] for p in points]}
    scale = [tick for tick in ax.get_yticks() if bottom + 0.12 * span < tick < top - 0.12 * span
             and any(psnr.values())]
    ax.set_yticks([*scale, *rows.values()], [*(f"{tick:g}" for tick in scale), *rows])
    _target(ax)
    _name_points(ax, [([(x, y)], name, colour) for x, y, name, colour in points])
    words = {y: label for label, y in rows.items()}
    return _told(figure, "SS max in ms per video frame, and PSNR to the baseline", (
        f"{name} {x:.1f} ms, {words.get(y, f'{y:.1f} dB')}" for x, y, name, _ in points))


def waterfall(results: Sequence[Result]) -> Chart:
    """From the baseline to the preset with the lowest SS mean, stage by stage."""
    means = [(result, mean) for result in results if (mean := _mean(numbers(result, "latency.ss_block_ms")))]
    base, start = next(((r, mean) for r, mean in means if _preset(r) == "baseline"), (None, 0.0))
    others = [item for item in means if item[0] is not base]
    title = "From the baseline to the fastest preset"
    if base is None or not others:
        return _empty(title, "it needs a baseline and another preset")
    best, end = min(others, key=lambda item: item[1])
    steps = []
    for name in _ordered({*_stage_names(base), *_stage_names(best)}):
        before, after = (number(r, f"latency.stages_ms.{name}.mean") or 0.0 for r in (base, best))
        steps.append((name, after - before))
    steps.append(("gaps, overlap", end - start - sum(delta for _, delta in steps)))
    figure, ax = _axes(f"{title}: {_name(best)}", 4.6)
    bars = [(0.0, start, _colour(base), f"{_ms(start)} ms\n{start / _frames(base):.1f} ms/frame")]
    level = start
    for name, delta in steps:
        sign = "+" if delta >= 0 else ""
        bars.append((level, delta, STAGE_COLOURS.get(name, _STAGE_GREY), sign + _ms(delta)))
        level += delta
    bars.append((0.0, end, _colour(best), f"{_ms(end)} ms\n{end / _frames(best):.1f} ms/frame"))
    for column, (bottom, height, colour, text) in enumerate(bars):
        ax.bar(column, height, bottom=bottom, width=0.62, color=colour)
        _note(ax, text, (column, max(bottom, bottom + height)), (0, 3), ha="center")
        if column < len(bars) - 1:
            ax.plot([column - 0.31, column + 1.31], [bottom + height] * 2, color=_GREY, lw=0.9)
    ax.set_xticks(range(len(bars)), [_name(base), *(name for name, _ in steps), _name(best)])
    ax.set(ylim=(0, 1.2 * max(start, end)), ylabel="ms per steady-state block (mean)")
    ax.grid(visible=False, axis="x")
    return _told(figure, f"{_name(base)} {_ms(start)} ms a block, {_name(best)} {_ms(end)} ms; between them",
                 (f"{name} {delta:+.0f} ms" for name, delta in steps))


# ------------------------------------------------------------------------------- one result


def stage_blocks(result: Result) -> Chart:
    """The stages of every block of the stream, stacked, warm-up included."""
    title = f"Stages of every block: {_name(result)}"
    totals: dict[str, dict[int, float]] = {}
    for event in _spans(result, "events"):
        blocks = totals.setdefault(event.name, {})
        blocks[event.block] = blocks.get(event.block, 0.0) + event.duration_ms
    if not totals:
        return _empty(title, "no stage events")
    shown = sorted({block for blocks in totals.values() for block in blocks})
    figure, ax = _axes(title, 4.2)
    level = dict.fromkeys(shown, 0.0)
    for name in _ordered(totals):
        heights = [totals[name].get(block, 0.0) for block in shown]
        ax.bar(shown, heights, bottom=list(level.values()), width=1.0 if len(shown) > 40 else 0.8, label=name,
               color=STAGE_COLOURS.get(name, _STAGE_GREY))
        level = {block: level[block] + height for block, height in zip(shown, heights, strict=True)}
    edge = min(_first_measured(result), shown[-1] + 1)
    if edge > shown[0]:
        ax.axvspan(shown[0] - 0.5, edge - 0.5, color=_GREY, alpha=0.18, lw=0, label="warm-up")
    ax.set(xlim=(shown[0] - 0.5, shown[-1] + 0.5), ylim=(0, 1.05 * max(level.values())),
           xlabel=f"block   (n={len(shown)})", ylabel="ms per block, spans added up")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=len(totals) + 1,
                  frameon=False, fontsize=_FONT)
    means = {name: math.fsum(totals[name].values()) / len(shown) for name in _ordered(totals)}
    return _told(figure, f"{len(shown)} stacked bars; mean over all blocks in ms",
                 (f"{name} {_ms(mean)}" for name, mean in means.items()))


def block_timeline(result: Result, blocks: Sequence[int] | None = None) -> Chart:
    """What ran when in a few blocks (default: the first three measured steady-state ones)."""
    shown = list(blocks) if blocks is not None else _blocks(result)[:3]
    return _gantt(f"Timeline of a few blocks: {_name(result)}", result, "events", shown)


def switch_timeline(result: Result) -> Chart:
    """The first measured prompt switch with the blocks before and after it."""
    title = f"Timeline of a prompt switch: {_name(result)}"
    switches = [int(block) for block in numbers(result, "latency.ps_blocks")]
    if not switches:
        return _empty(title, "no prompt switch in this run")
    stream = "switch_events" if result.get("switch_events") else "events"
    return _gantt(title, result, stream, range(switches[0] - 1, switches[0] + 2))


def quality_by_frame(result: Result) -> Chart:
    """PSNR to the baseline's frames, frame by frame: does the deviation grow?"""
    title = f"Deviation from the baseline: {_name(result)}"
    if _preset(result) == "baseline":
        return _empty(title, "this is the baseline itself")
    if _identical(result):
        return _empty(title, f"all {lookup(result, 'quality.frames_compared')} compared frames are identical")
    values = lookup(result, "quality.psnr_db.per_frame")
    points = [(i, v) for i, v in enumerate(values) if is_finite(v)] if isinstance(values, list) else []
    if not points:
        return _empty(title, lookup(result, "quality.psnr_db.reason") or "no PSNR in this result")
    figure, ax = _axes(title, 3.6)
    ax.plot([i for i, _ in points], [v for _, v in points], color=_colour(result), lw=1.5, marker="o", ms=3)
    worst = min(points, key=lambda point: point[1])
    low, high = worst[1], max(value for _, value in points)
    margin = max(1.0, 0.18 * (high - low))
    _note(ax, f"worst {low:.1f} dB", worst, (0, -8), va="top", color=_colour(result),
          ha="right" if worst[0] > points[-1][0] / 2 else "left")
    ax.set(ylim=(low - margin, high + margin), ylabel="PSNR, dB",
           xlabel=f"compared frame   (n={len(points)})")
    return _told(figure, f"PSNR of {len(points)} frames in dB", (
        f"mean {_mean([value for _, value in points]):.1f}", f"worst {low:.1f} at frame {worst[0]}"))


# ------------------------------------------------------------------------------- sets


def campaign_figures(results: Sequence[Result]) -> dict[str, Chart]:
    """Every figure of the summary by name, from the first run of each preset."""
    kept = first_runs(results)
    functions = (latency_ecdf, latency_boxes, latency_by_block, stage_bars, switch_bars, playback_buffer,
                 pareto, waterfall)
    reference = next((r for r in kept if _preset(r) == "baseline"), kept[0] if kept else {"preset": "none"})
    return {function.__name__: function(kept) for function in functions} | {
        "block_timeline": block_timeline(reference), "switch_timeline": switch_timeline(reference)}


def run_figures(result: Result, baseline: Result | None = None) -> dict[str, Chart]:
    """Every figure of one run by name; with `baseline`, latency and stages are drawn beside it."""
    alone = baseline is None or _preset(baseline) == _preset(result)
    pair = [result] if alone else [baseline, result]
    functions = (latency_ecdf, latency_by_block, stage_bars, switch_bars, playback_buffer)
    own = (stage_blocks, block_timeline, switch_timeline, quality_by_frame)
    return {function.__name__: function(pair) for function in functions} | {
        function.__name__: function(result) for function in own}


# ------------------------------------------------------------------------------- reading results

_STAGE_GREY = STAGE_COLOURS["other"]


def _preset(result: Result) -> str:
    return str(result.get("preset"))


def _name(result: Result) -> str:
    return _plain(_preset(result), 22)


def _plain(text: Any, length: int = 100) -> str:
    """One line of bounded length without mathtext: a dollar sign in a name must not stop a report."""
    text = " ".join(str(text).split())
    return (text if len(text) <= length else text[:length - 1] + "…").replace("$", r"\$")


def _colour(result: Result) -> str:
    return colour_of(_preset(result))


def _frames(result: Result) -> float:
    return number(result, "sizes.frames_per_block") or 12.0


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _per_frame(result: Result) -> list[float]:
    return [interval / _frames(result) for interval in numbers(result, "latency.ss_block_ms")]


def _blocks(result: Result) -> list[int]:
    """Block index of each steady-state sample; consecutive numbers where the result does not say."""
    blocks = [int(block) for block in numbers(result, "latency.ss_blocks")]
    n = len(numbers(result, "latency.ss_block_ms"))
    return blocks if len(blocks) == n else list(range(n))


def _first_measured(result: Result) -> int:
    """First block after warm-up, which both streams of a result share."""
    return int(number(result, "sizes.warmup_blocks") or 0)


def _stage_names(result: Result) -> list[str]:
    stages = lookup(result, "latency.stages_ms")
    return _ordered(stages) if isinstance(stages, Mapping) else []


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (_STAGES.index(name) if name in _STAGES else len(_STAGES), name))


def _identical(result: Result) -> bool:
    return _preset(result) == "baseline" or lookup(result, "quality.identical") is True


def _events(result: Result, stream: str) -> list[Event]:
    rows = result.get(stream)
    return [Event.from_row(list(row)) for row in (rows if isinstance(rows, list) else [])
            if isinstance(row, (list, tuple)) and len(row) == 5 and is_finite(row[1]) and is_finite(row[2])]


def _spans(result: Result, stream: str) -> list[Event]:
    """Stage spans with a block, on the device's clock where the stage has one."""
    spans = [event for event in _events(result, stream) if event.duration_ms > 0 and event.block is not None]
    on_device = {event.name for event in spans if event.clock == "cuda"}
    return [event for event in spans if (event.clock == "cuda") == (event.name in on_device)]


def _margin(result: Result, stream: str) -> tuple[list[float], list[float]] | None:
    """(seconds of video, seconds ahead of a viewer without start-up buffer) at every measured chunk."""
    ready = {event.block: event.start_ms for event in _events(result, stream)
             if event.name == "chunk_ready" and event.block is not None}
    times = [ready[block] for block in sorted(ready) if block >= _first_measured(result) - 1]
    fps = number(result, "playback.fps")
    if len(times) < 2 or not fps:
        return None
    video = [index * _frames(result) / fps for index in range(len(times))]
    return video, [due - (time - times[0]) / 1e3 for due, time in zip(video, times, strict=True)]


def buffer_words(result: Result) -> str:
    """The start-up buffer that a viewer needs, and behind a slash that of the stream with prompt switches
    where it is another. A stream that is too slow has none: it would grow with the stream.
    """
    steady, switched = (_buffer(result, path) for path in ("playback", "playback.switch_stream"))
    return steady if switched in ("n/a", steady) else f"{steady} / {switched}"


def _buffer(result: Result, path: str) -> str:
    buffer_ms = number(result, f"{path}.startup_buffer_ms")
    if lookup(result, f"{path}.sustained") is False:
        return "too slow"
    return "n/a" if buffer_ms is None else f"{buffer_ms / 1e3:.2f} s" if buffer_ms >= 5 else "0 s"


def _buffer_label(result: Result) -> str:
    words = buffer_words(result)
    return words if words == "too slow" else f"buffer {words}"


# ------------------------------------------------------------------------------- drawing


def _axes(title: str, height: float) -> tuple[Chart, Axes]:
    figure = Chart(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    ax = figure.add_subplot()
    ax.set_title(title, loc="left", fontsize=_FONT + 2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=_FONT)
    return figure, ax


def _empty(title: str, reason: Any) -> Chart:
    figure, ax = _axes(title, 1.4)
    ax.set_axis_off()
    ax.text(0.0, 0.6, f"Not drawn: {_plain(reason)}.", transform=ax.transAxes, color=_GREY)
    return _told(figure, f"Not drawn: {_plain(reason)}")


def _told(chart: Chart, shown: str, readings: Iterable[str] = ()) -> Chart:
    """The chart with its alternative text: the title, what is shown, and what can be read there."""
    values = "; ".join(readings)
    title = chart.axes[0].get_title(loc="left")
    words = f"{title}{'' if title.endswith('?') else '.'} {shown}{': ' if values else ''}{values}."
    chart.alt = words.replace(r"\$", "$")
    return chart


def _note(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Text at `offset` points from `at`."""
    ax.annotate(text, at, offset, textcoords="offset points",
                **{"fontsize": _FONT, "color": _DARK, "annotation_clip": False} | style)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 10 else f"{round(milliseconds, 1) + 0.0:.1f}"


def _limits(values: Sequence[float], left: float, right: float) -> tuple[float, float]:
    """Limits around latencies with margins in shares of their span, and around the target unless it is so far
    away that it would squeeze them into a corner."""
    low, high = min(values), max(values)
    if TARGET_MS < 4 * high and low < 4 * TARGET_MS:
        low, high = min(low, TARGET_MS), max(high, TARGET_MS)
    span = max(high - low, 0.1 * high)
    return low - left * span, high + right * span


def _target(ax: Axes) -> None:
    """The target's line, or beside the axis' name on which side it lies outside."""
    low, high = ax.get_xlim()
    if low < TARGET_MS < high:
        ax.axvline(TARGET_MS, color=_RED, lw=1.0, ls="--", zorder=1)
        _note(ax, f"{TARGET_MS:.0f} ms target", (TARGET_MS, 1), (3, -2), xycoords=("data", "axes fraction"),
              va="top", color=_RED, fontsize=_FONT - 1)
    else:
        side = "right" if high < TARGET_MS else "left"
        ax.set_xlabel(f"{ax.get_xlabel()}   ({TARGET_MS:.0f} ms target: far to the {side})")


def _rows(ax: Axes, names: Sequence[str]) -> None:
    """Rows from top to bottom, named on the left."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.75)
    ax.grid(visible=False, axis="y")


def _stacked(title: str, rows: Sequence[tuple[str, dict[str, float], float]], unit: str, tick: str) -> Chart:
    """Horizontal stacked bars from (row name, stage -> ms, total ms); the tick marks the total."""
    if not rows:
        return _empty(title, "no stage times in these results")
    figure, ax = _axes(title, 1.8 + 0.46 * len(rows))
    right = 1.16 * max(total for _, _, total in rows)
    beside = [_hidden(parts, total) for _, parts, total in rows]
    for row, ((_, parts, total), second) in enumerate(zip(rows, beside, strict=True)):
        end, second_at = 0.0, total - parts.get(second, 0.0)
        for name in _ordered(parts):
            width, left = parts[name], second_at if name == second else end
            ax.barh(row + 0.155 if name == second else row, width, left=left, lw=0.8 * (name == second),
                    height=0.31 if name == second else 0.62, edgecolor="white",
                    color=STAGE_COLOURS.get(name, _STAGE_GREY))
            free = width if name == second else min(left + width, second_at) - left if second else width
            if free > 0.06 * right:
                ax.text(left + free / 2, row + 0.155 * (name == second), _ms(width), ha="center", va="center",
                        color=_DARK if name in _ON_LIGHT else "white", fontsize=_FONT)
            end = max(end, left + width)
        ax.plot([total, total], [row - 0.36, row + 0.36], color=_DARK, lw=1.8)
        _note(ax, f"{_ms(total)} ms", (total, row), (6, 0), va="center")
    _rows(ax, [name for name, _, _ in rows])
    overlap = "; lower half: at the same time" if any(beside) else ""
    ax.set(xlim=(0, right), xlabel=f"{unit}   (black tick: {tick}, host clock{overlap})")
    names = _ordered({name for _, parts, _ in rows for name in parts})
    figure.legend(handles=[Patch(color=STAGE_COLOURS.get(name, _STAGE_GREY), label=name) for name in names],
                  loc="outside upper right", ncols=len(names), frameon=False, fontsize=_FONT)
    stages = (", ".join(f"{key} {_ms(parts[key])}" for key in _ordered(parts) if parts[key])
              for _, parts, _ in rows)
    return _told(figure, f"One bar per preset in {unit}", (
        f"{name} {_ms(total)}: {words}" for (name, _, total), words in zip(rows, stages, strict=True)))


def _hidden(parts: Mapping[str, float], total: float) -> str:
    """The last stage if the stages add up to clearly more than the total, so that it ran beside others."""
    over = sum(parts.values()) > 1.01 * total
    return [name for name in _ordered(parts) if parts[name] > 0][-1] if over else ""


def _gantt(title: str, result: Result, stream: str, blocks: Sequence[int]) -> Chart:
    spans = [event for event in _spans(result, stream) if event.block in blocks]
    if not spans:
        return _empty(title, "no stage events in these blocks")
    lanes = _ordered({event.name for event in spans})
    on_device = {event.name for event in spans if event.clock == "cuda"}
    launches = [event for event in _events(result, stream) if event.block in blocks
                and event.clock == "host" and event.name in on_device]
    origin = min(event.start_ms for event in [*spans, *launches])
    width = max(event.start_ms + event.duration_ms for event in spans) - origin
    figure, ax = _axes(title, 1.7 + 0.55 * len(lanes))
    ax.set_title(title, loc="left", fontsize=_FONT + 2, pad=18)  # room for the names of the blocks
    for event in spans:
        lane, left = lanes.index(event.name), event.start_ms - origin
        colour = STAGE_COLOURS.get(event.name, _STAGE_GREY)
        # A white edge would hide a stage of less than a millisecond.
        ax.barh(lane, event.duration_ms, left=left, height=0.5, lw=0.6, color=colour,
                edgecolor="white" if event.duration_ms > 0.01 * width else colour)
        if event.duration_ms > 0.055 * width:
            ax.text(left + event.duration_ms / 2, lane, _ms(event.duration_ms), ha="center", va="center",
                    color=_DARK if event.name in _ON_LIGHT else "white", fontsize=_FONT - 1)
    for event in launches:
        ax.barh(lanes.index(event.name) + 0.36, event.duration_ms, left=event.start_ms - origin, height=0.12,
                color=_DARK, alpha=0.6)
    for event in _events(result, stream):
        if event.block not in blocks or event.clock != "host":
            continue
        left = event.start_ms - origin
        if event.name == "chunk_ready":
            ax.axvline(left, color=_DARK, lw=0.9, ls="--")
        elif event.name == "switch_request":
            _note(ax, "switch requested", (left, 1), (2, -2), xycoords=("data", "axes fraction"), va="top",
                  color=_RED, fontsize=_FONT - 1)
            ax.axvline(left, color=_RED, lw=0.9)
    for block in blocks:
        begin = min((event.start_ms for event in spans if event.block == block), default=None)
        if begin is not None:
            _note(ax, f"block {block}", (begin - origin, 1), (2, 3), xycoords=("data", "axes fraction"),
                  color=_GREY, fontsize=_FONT - 1)
    _rows(ax, lanes)
    thin = "; thin bars: launching on the host" if launches else ""
    ax.set(xlim=(-0.01 * width, 1.02 * width), xlabel=f"ms   (dashed: frames complete in pixels{thin})")
    durations = {lane: ", ".join(_ms(span.duration_ms) for span in spans if span.name == lane)
                 for lane in lanes}
    return _told(figure, "One lane per stage; its spans in ms",
                 (f"{lane} {words}" for lane, words in durations.items()))


def _name_lines(ax: Axes, names: Sequence[tuple[float, float, str, str]]) -> None:
    """Names of lines at the right edge from (where it ends, value, text, colour), moved apart so that none
    overlap; dots lead there from a line that ends before.
    """
    (low, high), right = ax.get_ylim(), ax.get_xlim()[1]
    ax.set_xlim(right=right)
    gap = 1.45 * _FONT / 72 / (0.78 * ax.figure.get_figheight())  # a line of text, in heights of the axes
    items = sorted(((value - low) / (high - low), end, text, colour) for end, value, text, colour in names)
    for (height, end, text, colour), moved in zip(items, _spread([item[0] for item in items], gap),
                                                  strict=True):
        if end < right:
            ax.hlines(low + height * (high - low), end, right, color=colour, lw=0.8, ls=":", alpha=0.7)
        # From the name's left side: from its centre, a steep leader would strike its neighbours.
        ax.annotate(text, (1.0, height), (1.04, moved), xycoords="axes fraction", textcoords="axes fraction",
                    va="center", color=colour, fontsize=_FONT, annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 0,
                                "relpos": (0, 0.5)})


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Sorted heights moved to lie `gap` apart: those too close become one group around their mean."""
    groups: list[list[float]] = []

    def bottom(group: list[float]) -> float:
        return sum(group) / len(group) - (len(group) - 1) * gap / 2

    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + len(groups[-2]) * gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [bottom(group) + index * gap for group in groups for index in range(len(group))]


def _name_points(ax: Axes, names: Sequence[tuple[Sequence[tuple[float, float]], str, str]]) -> None:
    """Names from (points, text, colour): each beside one of its points, where it covers least of other names,
    points and lines.
    """
    ax.figure.draw_without_rendering()  # the layout must be final before data coordinates become pixels
    scale = ax.figure.dpi / 72
    lines = np.concatenate([np.zeros((0, 2)), *map(_along, ax.get_lines())]) / scale
    (left, bottom), (right, top) = ax.get_window_extent().get_points() / scale
    anchors = [[tuple(ax.transData.transform(point) / scale) for point in points] for points, _, _ in names]
    taken = [(x - 5, y - 5, x + 5, y + 5) for places in anchors if len(places) == 1 for x, y in places]
    offsets = [(dx, side * 14 * row) for row in range(8) for side in (1, -1) for dx in (8, -8)]
    beside = [(8, 0), (-8, 0), (8, -10), (-8, 10)]
    for places, (points, text, colour) in zip(anchors, names, strict=True):
        width, height = 0.6 * _FONT * len(text), 1.3 * _FONT
        best = None
        for (x, y), at in zip(places, points, strict=True):
            for rank, (dx, dy) in enumerate(offsets if len(places) == 1 else beside):
                begin = x + dx - (width if dx < 0 else 0)
                box = (begin, y + dy - height / 2, begin + width, y + dy + height / 2)
                outside = box[0] < left or box[1] < bottom or box[2] > right or box[3] > top
                struck = np.all((lines > box[:2]) & (lines < box[2:]), axis=1).sum()
                cost = 1000 * (outside + sum(_overlap(box, other) for other in taken)) + 10 * struck + rank
                if best is None or cost < best[0]:
                    best = cost, box, at, dx, dy
        _, box, at, dx, dy = best
        taken.append(box)
        _note(ax, text, at, (dx, dy), va="center", ha="left" if dx > 0 else "right", color=colour, bbox=_HALO,
              arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (dx < 0, 0.5)}
              if len(places) == 1 and dy else None)


def _along(line: Line2D) -> np.ndarray:
    """Points every two pixels along a line as it is drawn."""
    corners = line.get_transform().transform(line.get_xydata())
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(corners, axis=0).T))])
    at = np.arange(0.0, lengths[-1], 2.0)
    return np.stack([np.interp(at, lengths, corners[:, axis]) for axis in (0, 1)], axis=1)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
