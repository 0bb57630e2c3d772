"""What ran when: a few blocks of one result, in lanes."""

from collections.abc import Sequence

from ..results import numbers
from .chart import FONT, Chart, in_ms, name_rows, new_axes, not_drawn, note, told
from .facts import Result, events_of, name_of, ordered, spans_of, steady_blocks
from .palette import DARK, GREY, RED, ink_on, stage_colour


def block_timeline(result: Result, blocks: Sequence[int] | None = None) -> Chart:
    """What ran when in a few blocks (default: the first three measured steady-state ones)."""
    shown = list(blocks) if blocks is not None else steady_blocks(result)[:3]
    return _gantt(f"Timeline of a few blocks: {name_of(result)}", result, "events", shown)


def switch_timeline(result: Result) -> Chart:
    """The first measured prompt switch with the blocks before and after it."""
    title = f"Timeline of a prompt switch: {name_of(result)}"
    switches = [int(block) for block in numbers(result, "latency.ps_blocks")]
    if not switches:
        return not_drawn(title, "no prompt switch in this run")
    stream = "switch_events" if result.get("switch_events") else "events"
    return _gantt(title, result, stream, range(switches[0] - 1, switches[0] + 2))


def _gantt(title: str, result: Result, stream: str, blocks: Sequence[int]) -> Chart:
    spans = [event for event in spans_of(result, stream) if event.block in blocks]
    if not spans:
        return not_drawn(title, "no stage events in these blocks")
    lanes = ordered({event.name for event in spans})
    on_device = {event.name for event in spans if event.clock == "cuda"}
    launches = [event for event in events_of(result, stream) if event.block in blocks
                and event.clock == "host" and event.name in on_device]
    origin = min(event.start_ms for event in [*spans, *launches])
    width = max(event.start_ms + event.duration_ms for event in spans) - origin
    figure, ax = new_axes(title, 1.7 + 0.55 * len(lanes))
    ax.set_title(title, loc="left", fontsize=FONT + 2, pad=18)  # room for the names of the blocks
    for event in spans:
        lane, left = lanes.index(event.name), event.start_ms - origin
        colour = stage_colour(event.name)
        # A white edge would hide a stage of less than a millisecond.
        ax.barh(lane, event.duration_ms, left=left, height=0.5, lw=0.6, color=colour,
                edgecolor="white" if event.duration_ms > 0.01 * width else colour)
        if event.duration_ms > 0.055 * width:
            ax.text(left + event.duration_ms / 2, lane, in_ms(event.duration_ms), ha="center", va="center",
                    color=ink_on(event.name), fontsize=FONT - 1)
    for event in launches:
        ax.barh(lanes.index(event.name) + 0.36, event.duration_ms, left=event.start_ms - origin, height=0.12,
                color=DARK, alpha=0.6)
    for event in events_of(result, stream):
        if event.block not in blocks or event.clock != "host":
            continue
        left = event.start_ms - origin
        if event.name == "chunk_ready":
            ax.axvline(left, color=DARK, lw=0.9, ls="--")
        elif event.name == "switch_request":
            note(ax, "switch requested", (left, 1), (2, -2), xycoords=("data", "axes fraction"), va="top",
                 color=RED, fontsize=FONT - 1)
            ax.axvline(left, color=RED, lw=0.9)
    for block in blocks:
        begin = min((event.start_ms for event in spans if event.block == block), default=None)
        if begin is not None:
            note(ax, f"block {block}", (begin - origin, 1), (2, 3), xycoords=("data", "axes fraction"),
                 color=GREY, fontsize=FONT - 1)
    name_rows(ax, lanes)
    thin = "; thin bars: launching on the host" if launches else ""
    ax.set(xlim=(-0.01 * width, 1.02 * width), xlabel=f"ms   (dashed: frames complete{thin})")
    durations = {lane: ", ".join(in_ms(span.duration_ms) for span in spans if span.name == lane)
                 for lane in lanes}
    return told(figure, "One lane per stage; its spans in ms",
                (f"{lane} {words}" for lane, words in durations.items()))
