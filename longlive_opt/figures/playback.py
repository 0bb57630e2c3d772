"""The viewer's side: how far the stream is ahead of whoever watches it."""

from collections.abc import Sequence

from ..results import lookup, number
from .chart import Chart, new_axes, not_drawn, told
from .facts import Result, events_of, first_measured, frames_per_block, name_of, result_colour
from .labels import name_lines
from .palette import RED


def playback_buffer(results: Sequence[Result]) -> Chart:
    """How far delivery is ahead of a viewer who starts at the first measured chunk; a stall below 0.

    Lines end with the shortest stream, so that their ends compare; the buffers are those of whole streams.
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
    return told(figure, f"Rising lines keep up; {first}; start-up buffer without / with prompt switches",
                (text for _, _, text, _ in names))


def _margins(results: Sequence[Result], stream: str) -> list[tuple[Result, list[float], list[float]]]:
    """(result, its `_margin`) of those that have one, all cut to the length of the shortest."""
    found = [(result, margin) for result in results if (margin := _margin(result, stream))]
    shortest = min((len(video) for _, (video, _) in found), default=0)
    return [(result, video[:shortest], ahead[:shortest]) for result, (video, ahead) in found]


def _margin(result: Result, stream: str) -> tuple[list[float], list[float]] | None:
    """(seconds of video, seconds ahead of a viewer without start-up buffer) at every measured chunk."""
    ready = {event.block: event.start_ms for event in events_of(result, stream)
             if event.name == "chunk_ready" and event.block is not None}
    times = [ready[block] for block in sorted(ready) if block >= first_measured(result) - 1]
    fps = number(result, "playback.fps")
    if len(times) < 2 or not fps:
        return None
    video = [index * frames_per_block(result) / fps for index in range(len(times))]
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
