"""Charts of a run's distance from the truth, and of the speed that this distance buys."""

import math
from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from ...measurement.catalogue import metric_of
from ...measurement.result import is_finite, lookup, number, numbers
from .chart import (
    GREY,
    Chart,
    Result,
    colour_of,
    described,
    is_identical,
    mean_of,
    name_of,
    new_axes,
    not_drawn,
    note,
    preset_of,
    result_colour,
    targets_of,
)
from .labels import name_lines, name_points
from .latency import draw_targets, latency_limits


def pareto(results: Sequence[Result]) -> Chart:
    """Worst-case latency against the error ratio. Results older than protocol 2 show the PSNR to the baseline
    instead. Up and to the left is better.
    """
    timed = {name_of(r): r for r in results if metric_of("ss_max").value(r) is not None}
    title = "Speed against fidelity"
    if not timed:
        return not_drawn(title, "no steady-state latency")
    ratios = {name: _ratio(result) for name, result in timed.items()}
    by_ratio = any(metric_of("error_ratio").value(result) is not None for result in timed.values())
    # Turn the ratio into a score in which higher is better, like PSNR.
    scores = {name: -10 * math.log10(ratio) if ratio else None for name, ratio in ratios.items()} \
        if by_ratio else {name: metric_of("psnr").value(result) for name, result in timed.items()}
    known = [value for value in scores.values() if value is not None] or [30.0, 40.0]
    span = max(max(known) - min(known), 2.0 if by_ratio else 6.0)
    top, bottom = max(known) + 0.3 * span, min(known) - 0.3 * span  # the rows for "identical" and "n/a"

    def text(score: float) -> str:
        return f"{10 ** (-score / 10):.2g}" if by_ratio else f"{score:g}"

    points = []
    for name, result in timed.items():
        y = bottom if scores[name] is None else scores[name]
        if not by_ratio and is_identical(result):
            y = top
        points.append((metric_of("ss_max").value(result), y, name, result_colour(result)))
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
           xlabel="SS max, ms per video frame   (left is faster)",
           ylabel="error ratio   (up is closer to float32)" if by_ratio else "mean PSNR to the baseline, dB")
    rows = {label: y for label, y in (("identical", top), ("n/a", bottom)) if y in [p[1] for p in points]}
    scale = [tick for tick in ax.get_yticks() if bottom + 0.12 * span < tick < top - 0.12 * span
             and any(value is not None for value in scores.values())]
    ax.set_yticks([*scale, *rows.values()], [*map(text, scale), *rows])
    draw_targets(ax, targets)
    name_points(ax, [((x, y), name, colour) for x, y, name, colour in points])
    words = {y: label for label, y in rows.items()}
    unit = "" if by_ratio else " dB"
    kind = "error ratio" if by_ratio else "PSNR to the baseline"
    return described(figure, f"SS max in ms per video frame, and {kind}", (
        f"{name} {x:.1f} ms, {words.get(y, text(y if by_ratio else round(y, 1)) + unit)}"
        for x, y, name, _ in points))


def _ratio(result: Result) -> float | None:
    """The error ratio, which is 1 for the baseline and for bit-identical runs."""
    return 1.0 if is_identical(result) else metric_of("error_ratio").value(result)


def error_by_block(result: Result, baseline: Result | None = None) -> Chart:
    """The relative error of the latents per block, free-running and teacher-forced, compared with the
    baseline's own error and with the campaign's null rows (dashed lines).
    """
    title = "Error of the latents by block"
    own = baseline or (result if preset_of(result) == "baseline" else {})
    lines = [("free-running", result, "quality.free_running", result_colour(result), {"lw": 1.8}),
             ("teacher-forced", result, "quality", result_colour(result), {"lw": 1.2, "ls": "-."})]
    if own is not result:
        lines.append(("baseline", own, "quality.free_running", colour_of("baseline"), {"lw": 1.4}))
    drawn = [(name, errors, colour, style) for name, of, path, colour, style in lines
             if (errors := numbers(of, f"{path}.latent_error.by_block"))]
    if not drawn or drawn[0][0] == "baseline":
        reason = lookup(result, "quality.latent_error.reason") or lookup(result, "quality.psnr_db.reason")
        return not_drawn(title, reason or "no errors by block in this result")
    for row in lookup(own, "quality.nulls") or []:
        errors = numbers(row, "free_running.latent_error.by_block")
        if errors:
            drawn.append((f"null: {row['title']}", errors, GREY, {"lw": 1.0, "ls": "--"}))
    figure, ax = new_axes(title, 4.4)
    names = []
    for name, errors, colour, style in drawn:
        # Logarithms on a linear axis, because `name_lines` needs one. An error of 0 has no logarithm.
        shown = [(block, math.log10(100 * error)) for block, error in enumerate(errors) if error > 0]
        if shown:
            ax.plot(*zip(*shown, strict=True), color=colour, marker=".", **style)
            names.append((shown[-1][0], shown[-1][1], name, colour))
    ax.yaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
    switch = number(result, "quality.prompt_schedule.switch_block")
    if switch is not None:
        ax.axvline(switch, color=GREY, lw=0.7, ls=":", zorder=0)
    ax.set(ylabel="relative error of the latents, %",
           xlabel="block" + ("" if switch is None else "   (dotted: prompt switch)"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_lines(ax, names)
    return described(figure, "Relative error of the latents in per cent, last block", (
        f"{name} {100 * errors[-1]:.2g}" for name, errors, _, _ in drawn))


def quality_by_frame(result: Result) -> Chart:
    """PSNR to the truth's frames, frame by frame, to show whether the deviation grows. Results older than
    protocol 2 show the PSNR to the baseline's frames instead.
    """
    of_truth = lookup(result, "quality.protocol") == 2
    title = f"Deviation from {'the baseline in float32' if of_truth else 'the baseline'}: {name_of(result)}"
    if preset_of(result) == "baseline" and not of_truth:
        return not_drawn(title, "this is the baseline itself")
    if is_identical(result) and not of_truth:
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
    return described(figure, f"PSNR of {len(points)} frames in dB", (
        f"mean {mean_of([value for _, value in points]):.1f}", f"worst {low:.1f} at frame {worst[0]}"))
