"""Charts of the latency of several presets: its distribution, its drift, and how far the stream is ahead of
playback.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ...measurement.metrics import percentile
from ...measurement.result import lookup, number, numbers
from .chart import (
    DARK,
    FONT,
    GREY,
    RED,
    Chart,
    Result,
    described,
    events_of,
    first_measured,
    frames_per_block,
    mean_of,
    ms_per_frame,
    name_of,
    name_rows,
    new_axes,
    not_drawn,
    note,
    result_colour,
    steady_blocks,
    targets_of,
)
from .labels import name_lines


def latency_ecdf(results: Sequence[Result]) -> Chart:
    """Share of steady-state blocks at or below a latency in ms per video frame, one curve per preset."""
    series = [(result, sorted(ms_per_frame(result))) for result in results if ms_per_frame(result)]
    title = "Steady-state latency: share of blocks at or below"
    if not series:
        return not_drawn(title, "no steady-state samples")
    series.sort(key=lambda item: percentile(item[1], 50), reverse=True)
    figure, ax = new_axes(title, 1.8 + max(2.8, 0.34 * len(series)))
    for result, values in series:
        n = len(values)
        shares = [count / n for count in range(n + 1)]
        ax.step([values[0], *values], shares, where="post", lw=1.8, color=result_colour(result),
                label=f"{percentile(values, 50):.1f}  {name_of(result)} (n={n})")
    # Steep curves are closer together than their names are wide, so the names go into a legend.
    lines, names = ax.get_legend_handles_labels()
    figure.legend(lines[::-1], names[::-1], loc="outside right upper", title="median, preset", frameon=False,
                  fontsize=FONT, title_fontsize=FONT, labelcolor="linecolor", alignment="left")
    targets = targets_of(result for result, _ in series)
    ax.set(xlim=latency_limits([value for _, values in series for value in values], targets, 0.04, 0.04),
           ylim=(0, 1.07), xlabel="ms per video frame")  # the target's name fits above the curves
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    draw_targets(ax, targets)
    return described(figure, "One curve per preset; median in ms per video frame", (
        f"{name_of(result)} {percentile(values, 50):.1f}" for result, values in reversed(series)))


def latency_boxes(results: Sequence[Result]) -> Chart:
    """Every steady-state sample with its box (quartiles, whiskers at 1.5 times the interquartile range), one
    row per preset.
    """
    series = [(result, ms_per_frame(result)) for result in results if ms_per_frame(result)]
    title = "Steady-state latency by preset: every block"
    if not series:
        return not_drawn(title, "no steady-state samples")
    figure, ax = new_axes(title, 1.5 + 0.52 * len(series))
    for row, (result, values) in enumerate(series):
        # A fixed spread instead of random jitter, so that the same result gives the same picture.
        heights = [row + 0.3 * (i * 0.618034 % 1.0 - 0.5) for i in range(len(values))]
        ax.scatter(values, heights, s=7, alpha=0.35, color=result_colour(result), linewidths=0)
        first, median, third = (percentile(values, q) for q in (25, 50, 75))
        reach = 1.5 * (third - first)
        inside = [value for value in values if first - reach <= value <= third + reach]
        ax.plot([min(inside), max(inside)], [row, row], color=result_colour(result), lw=1.2, marker="|", ms=9)
        ax.barh(row, third - first, left=first, height=0.5, fill=False, lw=1.2,
                edgecolor=result_colour(result))
        ax.plot([median, median], [row - 0.25, row + 0.25], color=DARK, lw=1.6)
        digits = 1 if max(values) >= 10 else 2
        words = f"mean {mean_of(values):.{digits}f}, max {max(values):.{digits}f}"
        note(ax, words, (1, row), (8, 0), va="center", xycoords=("axes fraction", "data"))
    name_rows(ax, [f"{name_of(result)} (n={len(values)})" for result, values in series])
    targets = targets_of(result for result, _ in series)
    ax.set(xlim=latency_limits([value for _, values in series for value in values], targets, 0.05, 0.05),
           xlabel="ms per video frame")
    draw_targets(ax, targets)
    return described(figure, "Every block is a point; mean and maximum in ms per video frame", (
        f"{name_of(result)} {mean_of(values):.1f} and {max(values):.1f}" for result, values in series))


def latency_by_block(results: Sequence[Result]) -> Chart:
    """Latency against block index, to show drift and outliers."""
    series = [(result, steady_blocks(result), values) for result in results
              if (values := ms_per_frame(result))]
    title = "Latency over the stream: is there drift?"
    if not series:
        return not_drawn(title, "no steady-state samples")
    figure, ax = new_axes(title, 1.8 + max(2.8, 0.26 * len(series)))
    # Newer results measure switches in a separate stream, so they do not occur in this one.
    switches = {block for result, _, _ in series if not result.get("switch_events")
                for block in numbers(result, "latency.ps_blocks")}
    for block in switches:
        ax.axvline(block, color=GREY, lw=0.7, ls=":", zorder=0)
    for result, blocks, values in series:
        ax.plot(blocks, values, lw=1.0, color=result_colour(result), marker="." if len(values) < 40 else None)
    names = [(blocks[-1], mean_of(values), f"{name_of(result)} (n={len(values)})", result_colour(result))
             for result, blocks, values in series]
    targets = targets_of(result for result, _, _ in series)
    high = latency_limits([value for _, _, values in series for value in values], targets, 0, 0.05)[1]
    far = ""
    for target in targets:
        if high > target:
            ax.axhline(target, color=RED, lw=1.0, ls="--", zorder=1)
            names.append((math.inf, target, f"{target:g} ms target", RED))
        else:
            far += f"   ({target:g} ms target: far above)"
    ax.set(ylim=(0, high), ylabel=f"ms per video frame{far}",
           xlabel="block" + ("   (dotted: prompt switches, not part of SS)" if switches else ""))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_lines(ax, names)
    halves = ((result, values[:len(values) // 2] or values, values[len(values) // 2:])
              for result, _, values in series)
    shown = "One line per preset; second half of the blocks minus first, in ms per video frame"
    return described(figure, shown, (
        f"{name_of(result)} {mean_of(last) - mean_of(first):+.2f}" for result, first, last in halves))


def latency_limits(values: Sequence[float], targets: Sequence[float], left: float, right: float
                   ) -> tuple[float, float]:
    """Limits around the latencies and their targets, with margins in shares of the span. A distant target is
    left out, since it would squeeze the latencies into a corner.
    """
    low, high = min(values), max(values)
    near = [target for target in targets if target < 4 * high and low < 4 * target]
    low, high = min([low, *near]), max([high, *near])
    span = max(high - low, 0.1 * high)
    return low - left * span, high + right * span


def draw_targets(ax: Axes, targets: Sequence[float]) -> None:
    """Draw each target's line. For a target outside the limits, the axis label names the side instead."""
    low, high = ax.get_xlim()
    for target in targets:
        if low < target < high:
            ax.axvline(target, color=RED, lw=1.0, ls="--", zorder=1)
            note(ax, f"{target:g} ms target", (target, 1), (3, -2), xycoords=("data", "axes fraction"),
                 va="top", color=RED, fontsize=FONT - 1)
        else:
            side = "right" if high < target else "left"
            ax.set_xlabel(f"{ax.get_xlabel()}   ({target:g} ms target: far to the {side})")


def playback_buffer(results: Sequence[Result]) -> Chart:
    """How far delivery is ahead of a viewer who starts at the first measured chunk. Below 0 is a stall.

    All lines end with the shortest stream so that their ends are comparable. The buffers are those of the
    whole streams.
    """
    series = _margins(results, "events")
    title = "Playback: seconds of video ahead of the viewer"
    if not series:
        return not_drawn(title, "no chunk times in the events")
    figure, ax = new_axes(f"{title}, {number(series[0][0], 'playback.fps'):g} FPS",
                          1.8 + max(2.8, 0.26 * len(series)))
    switched = _margins([result for result, _, _ in series], "switch_events")
    for streams, style in ((series, {"lw": 1.6}), (switched, {"lw": 1.2, "ls": "--"})):
        for result, video, ahead in streams:
            ax.plot(video, ahead, color=result_colour(result), **style)
    ax.axhline(0, color=RED, lw=1.2)
    low, high = ax.get_ylim()
    ax.axhspan(low, 0, color=RED, alpha=0.06, lw=0)
    first = f"first {len(series[0][1]) - 1} blocks of each stream"
    dashed = (f"\n(dashed: first {len(switched[0][1]) - 1} blocks with prompt switches; "
              "buffer: without / with them)" if switched else "")
    ax.set(ylim=(low, max(high, 0.05 * -low)), ylabel="s ahead (below 0: stall)",
           xlabel=f"seconds of video, {first}{dashed}")
    names = [(video[-1], ahead[-1], f"{name_of(result)}: {_buffer_label(result)}", result_colour(result))
             for result, video, ahead in series]
    name_lines(ax, names)
    return described(figure, f"Rising lines keep up; {first}; start-up buffer without / with prompt switches",
                (text for _, _, text, _ in names))


def _margins(results: Sequence[Result], stream: str) -> list[tuple[Result, list[float], list[float]]]:
    """(result, its `_margin`) for each result that has one, cut to the length of the shortest."""
    found = [(result, margin) for result in results if (margin := _margin(result, stream))]
    shortest = min((len(video) for _, (video, _) in found), default=0)
    return [(result, video[:shortest], ahead[:shortest]) for result, (video, ahead) in found]


def _margin(result: Result, stream: str) -> tuple[list[float], list[float]] | None:
    """(seconds of video, seconds ahead of a viewer without a start-up buffer) at every measured chunk."""
    ready = {event.block: event.start_ms for event in events_of(result, stream)
             if event.name == "chunk_ready" and event.block is not None}
    times = [ready[block] for block in sorted(ready) if block >= first_measured(result) - 1]
    fps = number(result, "playback.fps")
    if len(times) < 2 or not fps:
        return None
    video = [index * frames_per_block(result) / fps for index in range(len(times))]
    return video, [due - (time - times[0]) / 1e3 for due, time in zip(video, times, strict=True)]


def buffer_words(result: Result) -> str:
    """The start-up buffer that a viewer needs. After a slash follows that of the stream with prompt switches
    if it differs. A stream that is too slow has none, since its buffer would grow with the stream.
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
