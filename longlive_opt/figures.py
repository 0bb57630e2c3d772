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

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from longlive_opt.metrics import percentile
from longlive_opt.timeline import Event

Result = Mapping[str, Any]

TARGET_MS = 40.0  # per video frame: 25 FPS
STAGE_COLOURS = {"text_encode": "#9467bd", "recache": "#e0a100", "denoise": "#3b75af", "decode": "#5aa469",
                 "other": "#b8b8b8"}
PRESET_COLOURS = {
    "baseline": "#4d4d4d", "cuda_graphs": "#d98b00", "static_kv": "#3d9ad1", "async_vae": "#009e73",
    "quality": "#0a5c9c", "balanced": "#b4508f", "speed": "#d1491b", "low_memory": "#7a5c1e",
    "torch_compile": "#6a3d9a", "quantized_kv": "#5f7d1f", "fp8": "#8c2d3f", "prompt_cache": "#1f8a8a"}
_MORE_COLOURS = ("#e7298a", "#455a8f", "#a6761d", "#2f6b3a", "#9c6ade", "#b3562b")
_DARK, _GREY, _RED = "#222222", "#8a8a8a", "#c21f1f"
_HALO = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85}
_DPI = 110
PALETTE_COLOURS = 128
_FONT = 9  # points
_WIDTH = 9  # inches
_STAGES = tuple(STAGE_COLOURS)


class Chart(Figure):
    """A Figure that a notebook shows by itself: no pyplot, hence no global state."""

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.save(buffer)
        return buffer.getvalue(), {"alt": "; ".join(ax.get_title(loc="left") for ax in self.axes)}

    def save(self, target: Path | BinaryIO) -> None:
        """Write as PNG. Without pictures in it, a palette will do: a third of the size for lines and text."""
        if any(ax.images for ax in self.axes):
            self.savefig(target, format="png")
            return
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        Image.open(buffer).convert("RGB").quantize(PALETTE_COLOURS).save(target, "PNG", optimize=True)


def colour_of(preset: str) -> str:
    """The preset's colour; a preset that the table does not name gets one that depends on its name only."""
    spare = _MORE_COLOURS[zlib.crc32(preset.encode()) % len(_MORE_COLOURS)]
    return PRESET_COLOURS.get(preset, spare)


def lookup(result: Any, path: str) -> Any:
    """The value at a dotted path, None where any part of the path is missing."""
    for key in path.split("."):
        result = result.get(key) if isinstance(result, Mapping) else None
    return result


def number(result: Result, path: str) -> float | None:
    """The finite number at a dotted path; None where it is missing, n/a or something else."""
    value = lookup(result, path)
    return float(value) if _is_number(value) else None


def numbers(result: Result, path: str) -> list[float]:
    """The finite numbers of the list at a dotted path; empty where it is missing."""
    values = lookup(result, path)
    return [float(value) for value in values if _is_number(value)] if isinstance(values, list) else []


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
    for index, (result, values) in enumerate(series):
        n = len(values)
        shares = [count / n for count in range(n + 1)]
        ax.step([values[0], *values], shares, where="post", lw=1.8, color=_colour(result))
        level = (index + 0.5) / len(series)  # each name at a height of its own, so that none overlap
        _note(ax, f"{_name(result)} (n={n})", (values[int(level * n)], level), (7, 0), va="center",
              color=_colour(result), bbox=_HALO)
    ax.set(xlim=_limits([value for _, values in series for value in values], 0.04, 0.24), ylim=(0, 1.02),
           xlabel="ms per video frame")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _target(ax)
    return figure


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
    return figure


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
    names = [(_mean(values), f"{_name(result)} (n={len(values)})", _colour(result))
             for result, _, values in series]
    high = _limits([value for _, _, values in series for value in values], 0, 0.05)[1]
    if high > TARGET_MS:
        ax.axhline(TARGET_MS, color=_RED, lw=1.0, ls="--", zorder=1)
        names.append((TARGET_MS, f"{TARGET_MS:.0f} ms target", _RED))
    far = "" if high > TARGET_MS else f"   ({TARGET_MS:.0f} ms target: far above)"
    ax.set(ylim=(0, high), ylabel=f"ms per video frame{far}",
           xlabel="block" + ("   (dotted: prompt switches, not part of SS)" if switches else ""))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_lines(ax, names)
    return figure


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
           xlabel="seconds of video" + ("   (dashed: the stream with prompt switches)" if dashed else ""))
    _name_lines(ax, [(margin[1][-1], _name(result) + _buffer_words(result), _colour(result))
                     for result, margin in series])
    return figure


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
    ax.plot([x for x, _ in front], [y for _, y in front], color=_GREY, lw=1.0, zorder=1)
    for x, y, _, colour in points:
        ax.scatter([x], [y], s=46, color=colour, zorder=3)
    ax.set(xlim=_limits([x for x, _, _, _ in points], 0.15, 0.3),
           ylim=(bottom - 0.35 * span, top + 0.35 * span),
           xlabel="SS max, ms per video frame   (left is faster)", ylabel="mean PSNR to the baseline, dB")
    rows = {label: y for label, y in (("identical", top), ("n/a", bottom)) if y in [p[1] for p in points]}
    scale = [tick for tick in ax.get_yticks() if bottom + 0.12 * span < tick < top - 0.12 * span]
    ax.set_yticks([*scale, *rows.values()], [*(f"{tick:g}" for tick in scale), *rows])
    _target(ax)
    _name_points(ax, points)
    return figure


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
    return figure


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
           xlabel=f"block   (n={len(shown)})", ylabel="ms per block")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=len(totals) + 1,
                  frameon=False, fontsize=_FONT)
    return figure


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
    points = [(i, v) for i, v in enumerate(values) if _is_number(v)] if isinstance(values, list) else []
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
    return figure


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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
            if isinstance(row, (list, tuple)) and len(row) == 5 and _is_number(row[1]) and _is_number(row[2])]


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


def _buffer_words(result: Result) -> str:
    buffer_ms = number(result, "playback.startup_buffer_ms")
    if lookup(result, "playback.sustained") is False:
        return ": too slow"
    if buffer_ms is None:
        return ""
    return f": buffer {buffer_ms / 1e3:.2f} s" if buffer_ms >= 5 else ": no buffer"


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
    return figure


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
    names = _ordered({name for _, parts, _ in rows for name in parts})
    right = 1.16 * max(max(total, sum(parts.values())) for _, parts, total in rows)
    ends = [0.0] * len(rows)
    for name in names:
        widths = [parts.get(name, 0.0) for _, parts, _ in rows]
        ax.barh(range(len(rows)), widths, left=ends, height=0.62, label=name,
                color=STAGE_COLOURS.get(name, _STAGE_GREY))
        for row, width in enumerate(widths):
            if width > 0.06 * right:
                ax.text(ends[row] + width / 2, row, _ms(width), ha="center", va="center", color="white",
                        fontsize=_FONT)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, (_, _, total) in enumerate(rows):
        ax.plot([total, total], [row - 0.36, row + 0.36], color=_DARK, lw=1.8)
        _note(ax, f"{_ms(total)} ms", (max(total, ends[row]), row), (6, 0), va="center")
    _rows(ax, [name for name, _, _ in rows])
    ax.set(xlim=(0, right), xlabel=f"{unit}   (black tick: {tick}, host clock)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=len(names), frameon=False,
                  fontsize=_FONT)
    return figure


def _gantt(title: str, result: Result, stream: str, blocks: Sequence[int]) -> Chart:
    spans = [event for event in _spans(result, stream) if event.block in blocks]
    if not spans:
        return _empty(title, "no stage events in these blocks")
    lanes = _ordered({event.name for event in spans})
    on_device = {event.name for event in spans if event.clock == "cuda"}
    origin = min(event.start_ms for event in spans)
    width = max(event.start_ms + event.duration_ms for event in spans) - origin
    figure, ax = _axes(title, 1.7 + 0.55 * len(lanes))
    ax.set_title(title, loc="left", fontsize=_FONT + 2, pad=18)  # room for the names of the blocks
    for event in spans:
        lane, left = lanes.index(event.name), event.start_ms - origin
        ax.barh(lane, event.duration_ms, left=left, height=0.5, edgecolor="white", lw=0.6,
                color=STAGE_COLOURS.get(event.name, _STAGE_GREY))
        if event.duration_ms > 0.055 * width:
            ax.text(left + event.duration_ms / 2, lane, _ms(event.duration_ms), ha="center", va="center",
                    color="white", fontsize=_FONT - 1)
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
        elif event.name in on_device:
            ax.barh(lanes.index(event.name) + 0.36, event.duration_ms, left=left, height=0.12, color=_DARK,
                    alpha=0.6)
    for block in blocks:
        begin = min((event.start_ms for event in spans if event.block == block), default=None)
        if begin is not None:
            _note(ax, f"block {block}", (begin - origin, 1), (2, 3), xycoords=("data", "axes fraction"),
                  color=_GREY, fontsize=_FONT - 1)
    _rows(ax, lanes)
    launches = "; thin bars: launching on the host" if on_device else ""
    ax.set(xlim=(-0.01 * width, 1.02 * width), xlabel=f"ms   (dashed: frames complete in pixels{launches})")
    return figure


def _name_lines(ax: Axes, names: Sequence[tuple[float, str, str]]) -> None:
    """Names of lines at the right edge from (value, text, colour), moved apart so that none overlap."""
    low, high = ax.get_ylim()
    gap = 1.45 * _FONT / 72 / (0.78 * ax.figure.get_figheight())  # a line of text, in heights of the axes
    items = sorted(((value - low) / (high - low), text, colour) for value, text, colour in names)
    for (height, text, colour), moved in zip(items, _spread([item[0] for item in items], gap), strict=True):
        ax.annotate(text, (1.0, height), (1.035, moved), xycoords="axes fraction", textcoords="axes fraction",
                    va="center", color=colour, fontsize=_FONT, annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 0})


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


def _name_points(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names of (x, y, text, colour), each at the first nearby place that covers no other name or point."""
    ax.figure.draw_without_rendering()  # the layout must be final before data coordinates become pixels
    pixels_per_point = ax.figure.dpi / 72
    anchors = [ax.transData.transform(point[:2]) / pixels_per_point for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    offsets = [(dx, side * 14 * row) for row in range(8) for side in (1, -1) for dx in (8, -8)]
    for (x, y), (*at, text, colour) in zip(anchors, points, strict=True):
        width, height = 0.6 * _FONT * len(text), 1.3 * _FONT
        boxes = {}
        for dx, dy in offsets:
            left = x + dx - (width if dx < 0 else 0)
            boxes[dx, dy] = (left, y + dy - height / 2, left + width, y + dy + height / 2)
        free = (offset for offset, box in boxes.items() if not any(_overlap(box, other) for other in taken))
        dx, dy = next(free, offsets[0])
        taken.append(boxes[dx, dy])
        _note(ax, text, at, (dx, dy), va="center", ha="left" if dx > 0 else "right", color=colour, bbox=_HALO,
              arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6} if dy else None)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
