"""Charts of the stages of a block: where the time goes, what a preset saves, and what ran when."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...measurement.catalogue import metric_of
from ...measurement.result import number, numbers
from .chart import (
    DARK,
    FONT,
    GREY,
    RED,
    STAGES,
    Chart,
    Result,
    described,
    events_of,
    first_measured,
    frames_per_block,
    in_ms,
    ink_on,
    mean_of,
    ms_per_frame,
    name_of,
    name_rows,
    new_axes,
    not_drawn,
    note,
    ordered,
    preset_of,
    result_colour,
    spans_of,
    stage_colour,
    stage_names,
    steady_blocks,
)


def stage_bars(results: Sequence[Result]) -> Chart:
    """Mean time of each stage per steady-state block. The tick marks the block interval on the host clock."""
    rows = []
    for result in results:
        parts = {name: number(result, f"latency.stages_ms.{name}.mean") for name in stage_names(result)}
        parts = {name: value for name, value in parts.items() if value is not None}
        total = mean_of(numbers(result, "latency.ss_block_ms"))
        if total is not None:
            parts["other"] = max(0.0, total - sum(parts.values()))
            rows.append((f"{name_of(result)} (n={len(ms_per_frame(result))})", parts, total))
    return _stacked("Where the time of a block goes", rows, "ms per steady-state block", "block interval")


def switch_bars(results: Sequence[Result]) -> Chart:
    """Mean prompt-switch latency by stage, from the request to the first new decoded frames."""
    rows = []
    for result in results:
        parts = {name: number(result, f"latency.ps_breakdown_ms.{name}") for name in STAGES}
        parts = {name: max(0.0, value) for name, value in parts.items() if value is not None}
        total = metric_of("ps_mean").value(result)
        if total is not None:
            rows.append((f"{name_of(result)} (n={len(numbers(result, 'latency.ps_ms_all'))})", parts, total))
    title = "Prompt switch: from the request to the first new frames"
    return _stacked(title, rows, "ms per switch", "PS mean")


def _stacked(title: str, rows: Sequence[tuple[str, dict[str, float], float]], unit: str, tick: str) -> Chart:
    """Horizontal stacked bars from (row name, stage -> ms, total ms). The tick marks the total."""
    if not rows:
        return not_drawn(title, "no stage times in these results")
    figure, ax = new_axes(title, 1.8 + 0.46 * len(rows))
    right = 1.16 * max(total for _, _, total in rows)
    overlapped = [_hidden(parts, total) for _, parts, total in rows]
    for row, ((_, parts, total), second) in enumerate(zip(rows, overlapped, strict=True)):
        end, second_at = 0.0, total - parts.get(second, 0.0)
        for name in ordered(parts):
            width, left = parts[name], second_at if name == second else end
            ax.barh(row + 0.155 if name == second else row, width, left=left, lw=0.8 * (name == second),
                    height=0.31 if name == second else 0.62, edgecolor="white", color=stage_colour(name))
            free = width if name == second else min(left + width, second_at) - left if second else width
            if free > 0.06 * right:
                ax.text(left + free / 2, row + 0.155 * (name == second), in_ms(width), ha="center",
                        va="center", color=ink_on(name), fontsize=FONT)
            end = max(end, left + width)
        ax.plot([total, total], [row - 0.36, row + 0.36], color=DARK, lw=1.8)
        note(ax, f"{in_ms(total)} ms", (total, row), (6, 0), va="center")
    name_rows(ax, [name for name, _, _ in rows])
    overlap = "; lower half: at the same time" if any(overlapped) else ""
    ax.set(xlim=(0, right), xlabel=f"{unit}   (black tick: {tick}, host clock{overlap})")
    names = ordered({name for _, parts, _ in rows for name in parts})
    figure.legend(handles=[Patch(color=stage_colour(name), label=name) for name in names],
                  loc="outside upper right", ncols=len(names), frameon=False, fontsize=FONT)
    stages = (", ".join(f"{key} {in_ms(parts[key])}" for key in ordered(parts) if parts[key])
              for _, parts, _ in rows)
    return described(figure, f"One bar per preset in {unit}", (
        f"{name} {in_ms(total)}: {words}" for (name, _, total), words in zip(rows, stages, strict=True)))


def _hidden(parts: Mapping[str, float], total: float) -> str:
    """The last stage if the stages add up to clearly more than the total, so that it overlapped others."""
    over = sum(parts.values()) > 1.01 * total
    return [name for name in ordered(parts) if parts[name] > 0][-1] if over else ""


def waterfall(results: Sequence[Result]) -> Chart:
    """From the baseline to the preset with the lowest SS mean, stage by stage."""
    means = [(result, mean) for result in results
             if (mean := mean_of(numbers(result, "latency.ss_block_ms")))]
    base, start = next(((r, mean) for r, mean in means if preset_of(r) == "baseline"), (None, 0.0))
    others = [item for item in means if item[0] is not base]
    title = "From the baseline to the fastest preset"
    if base is None or not others:
        return not_drawn(title, "it needs a baseline and another preset")
    best, end = min(others, key=lambda item: item[1])
    steps = []
    for name in ordered({*stage_names(base), *stage_names(best)}):
        before, after = (number(r, f"latency.stages_ms.{name}.mean") or 0.0 for r in (base, best))
        steps.append((name, after - before))
    steps.append(("gaps, overlap", end - start - sum(delta for _, delta in steps)))
    figure, ax = new_axes(f"{title}: {name_of(best)}", 4.6)
    bars = [(0.0, start, result_colour(base), _block_and_frame(start, base))]
    levels = [start]  # overlapping stages can lift a level above both ends or push it below 0
    for name, delta in steps:
        sign = "+" if delta >= 0 else ""
        bars.append((levels[-1], delta, stage_colour(name), sign + in_ms(delta)))
        levels.append(levels[-1] + delta)
    bars.append((0.0, end, result_colour(best), _block_and_frame(end, best)))
    for column, (bottom, height, colour, text) in enumerate(bars):
        ax.bar(column, height, bottom=bottom, width=0.62, color=colour)
        note(ax, text, (column, max(bottom, bottom + height)), (0, 3), ha="center")
        if column < len(bars) - 1:
            ax.plot([column - 0.31, column + 1.31], [bottom + height] * 2, color=GREY, lw=0.9)
    first, last = (f"{name_of(r)} (n={len(numbers(r, 'latency.ss_block_ms'))})" for r in (base, best))
    ax.set_xticks(range(len(bars)), [first, *(name for name, _ in steps), last])
    ax.axhline(0, color=DARK, lw=0.8)
    ax.set(ylim=(1.05 * min(0.0, *levels), 1.2 * max(levels)), ylabel="ms per steady-state block (mean)")
    ax.grid(visible=False, axis="x")
    ends = f"{name_of(base)} {in_ms(start)} ms per block, {name_of(best)} {in_ms(end)} ms"
    return described(figure, f"{ends}; between them", (f"{name} {delta:+.0f} ms" for name, delta in steps))


def _block_and_frame(block_ms: float, result: Result) -> str:
    return f"{in_ms(block_ms)} ms\n{block_ms / frames_per_block(result):.1f} ms/frame"


def stage_blocks(result: Result) -> Chart:
    """The stages of every block of the stream, stacked, including the warm-up."""
    title = f"Stages of every block: {name_of(result)}"
    totals: dict[str, dict[int, float]] = {}
    for event in spans_of(result, "events"):
        blocks = totals.setdefault(event.name, {})
        blocks[event.block] = blocks.get(event.block, 0.0) + event.duration_ms
    if not totals:
        return not_drawn(title, "no stage events")
    shown = sorted({block for blocks in totals.values() for block in blocks})
    figure, ax = new_axes(title, 4.2)
    level = dict.fromkeys(shown, 0.0)
    for name in ordered(totals):
        heights = [totals[name].get(block, 0.0) for block in shown]
        ax.bar(shown, heights, bottom=list(level.values()), width=1.0 if len(shown) > 40 else 0.8, label=name,
               color=stage_colour(name))
        level = {block: level[block] + height for block, height in zip(shown, heights, strict=True)}
    edge = min(first_measured(result), shown[-1] + 1)
    if edge > shown[0]:
        ax.axvspan(shown[0] - 0.5, edge - 0.5, color=GREY, alpha=0.18, lw=0, label="warm-up")
    ax.set(xlim=(shown[0] - 0.5, shown[-1] + 0.5), ylim=(0, 1.05 * max(level.values())),
           xlabel=f"block   (n={len(shown)})", ylabel="ms per block, spans added up")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=len(totals) + 1,
                  frameon=False, fontsize=FONT)
    means = {name: math.fsum(totals[name].values()) / len(shown) for name in ordered(totals)}
    return described(figure, f"{len(shown)} stacked bars; mean over all blocks in ms",
                (f"{name} {in_ms(mean)}" for name, mean in means.items()))


def block_timeline(result: Result, blocks: Sequence[int] | None = None) -> Chart:
    """The spans of a few blocks over time (default: the first three measured steady-state blocks)."""
    shown = list(blocks) if blocks is not None else steady_blocks(result)[:3]
    return _gantt(f"Timeline of a few blocks: {name_of(result)}", result, "events", shown)


def switch_timeline(result: Result) -> Chart:
    """The spans of the first measured prompt switch and of the blocks before and after it."""
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
        # A white edge would hide a stage shorter than a millisecond.
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
    return described(figure, "One lane per stage; its spans in ms",
                (f"{lane} {words}" for lane, words in durations.items()))
