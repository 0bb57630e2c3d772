"""How far a run's frames are from the baseline's, and what speed that buys."""

from collections.abc import Sequence

from ..results import is_finite, lookup, number
from .chart import Chart, new_axes, not_drawn, note, told
from .facts import Result, is_identical, mean_of, name_of, preset_of, result_colour, targets_of
from .labels import name_points
from .latency import draw_targets, latency_limits
from .palette import GREY


def pareto(results: Sequence[Result]) -> Chart:
    """Worst-case latency against deviation from the baseline: up and to the left is better."""
    timed = {name_of(r): r for r in results if number(r, "latency.ss_ms_per_frame.max") is not None}
    title = "Speed against fidelity to the baseline"
    if not timed:
        return not_drawn(title, "no steady-state latency")
    psnr = {name: number(result, "quality.psnr_db.mean") for name, result in timed.items()}
    known = [value for value in psnr.values() if value is not None] or [30.0, 40.0]
    span = max(max(known) - min(known), 6.0)
    top, bottom = max(known) + 0.3 * span, min(known) - 0.3 * span  # the rows for "identical" and "n/a"
    points = []
    for name, result in timed.items():
        y = top if is_identical(result) else bottom if psnr[name] is None else psnr[name]
        points.append((number(result, "latency.ss_ms_per_frame.max"), y, name, result_colour(result)))
    figure, ax = new_axes(title, 4.8)
    front: list[tuple[float, float]] = []
    for x, y, _, _ in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > max((height for _, height in front), default=bottom):
            front.append((x, y))
    if front:
        ax.plot(*zip(*front, strict=True), color=GREY, lw=1.0, zorder=1)
    for x, y, _, colour in points:
        ax.scatter([x], [y], s=46, color=colour, zorder=3)
    targets = targets_of(timed.values())
    ax.set(xlim=latency_limits([x for x, _, _, _ in points], targets, 0.15, 0.3),
           ylim=(bottom - 0.35 * span, top + 0.35 * span),
           xlabel="SS max, ms per video frame   (left is faster)", ylabel="mean PSNR to the baseline, dB")
    rows = {label: y for label, y in (("identical", top), ("n/a", bottom)) if y in [p[1] for p in points]}
    scale = [tick for tick in ax.get_yticks() if bottom + 0.12 * span < tick < top - 0.12 * span
             and any(psnr.values())]
    ax.set_yticks([*scale, *rows.values()], [*(f"{tick:g}" for tick in scale), *rows])
    draw_targets(ax, targets)
    name_points(ax, [((x, y), name, colour) for x, y, name, colour in points])
    words = {y: label for label, y in rows.items()}
    return told(figure, "SS max in ms per video frame, and PSNR to the baseline", (
        f"{name} {x:.1f} ms, {words.get(y, f'{y:.1f} dB')}" for x, y, name, _ in points))


def quality_by_frame(result: Result) -> Chart:
    """PSNR to the baseline's frames, frame by frame: does the deviation grow?"""
    title = f"Deviation from the baseline: {name_of(result)}"
    if preset_of(result) == "baseline":
        return not_drawn(title, "this is the baseline itself")
    if is_identical(result):
        compared = lookup(result, "quality.frames_compared")
        return not_drawn(title, f"all {compared} compared frames are identical")
    values = lookup(result, "quality.psnr_db.per_frame")
    points = [(i, v) for i, v in enumerate(values) if is_finite(v)] if isinstance(values, list) else []
    if not points:
        return not_drawn(title, lookup(result, "quality.psnr_db.reason") or "no PSNR in this result")
    figure, ax = new_axes(title, 3.6)
    ax.plot(*zip(*points, strict=True), color=result_colour(result), lw=1.5, marker="o", ms=3)
    worst = min(points, key=lambda point: point[1])
    low, high = worst[1], max(value for _, value in points)
    margin = max(1.0, 0.18 * (high - low))
    note(ax, f"worst {low:.1f} dB", worst, (0, -8), va="top", color=result_colour(result),
          ha="right" if worst[0] > points[-1][0] / 2 else "left")
    ax.set(ylim=(low - margin, high + margin), ylabel="PSNR, dB",
           xlabel=f"compared frame   (n={len(points)})")
    return told(figure, f"PSNR of {len(points)} frames in dB", (
        f"mean {mean_of([value for _, value in points]):.1f}", f"worst {low:.1f} at frame {worst[0]}"))
