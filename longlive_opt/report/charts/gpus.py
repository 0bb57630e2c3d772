"""Chart of the latency of one stream on one and on several GPUs."""

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from ...config import several_suffix
from ...measurement.result import lookup
from .chart import (
    Chart,
    Result,
    colour_of,
    described,
    mean_of,
    ms_per_frame,
    name_of,
    new_axes,
    not_drawn,
    preset_of,
)
from .labels import name_lines


def latency_by_gpus(results: Sequence[Result]) -> Chart:
    """SS max and mean against the number of GPUs, and the mean of one GPU divided by their number."""
    title = "Steady-state latency against GPUs"
    series = {name: points for name, points in _series(results).items() if len(points) > 1}
    if not series:
        return not_drawn(title, "no preset ran both on one GPU and on several")
    figure, ax = new_axes(title, 3.6)
    names, readings = [], []
    for name, points in series.items():
        colour, counts = colour_of(name), sorted(points)
        means, worst = ([of(ms_per_frame(points[count])) for count in counts] for of in (mean_of, max))
        ax.plot(counts, worst, color=colour, lw=1.8, marker="o")
        ax.plot(counts, means, color=colour, lw=1.0, marker="o", ms=3)
        ax.plot(counts, [means[0] * counts[0] / count for count in counts], color=colour, lw=1.0, ls=":")
        names.append((counts[-1], worst[-1], name_of(points[counts[0]]), colour))
        readings.append(f"{name} " + ", ".join(
            f"{value:.1f} on {count}" for count, value in zip(counts, worst, strict=True)))
    ax.set(ylim=(0, None), ylabel="ms per video frame",
           xlabel="GPUs   (thick: SS max, thin: SS mean, dotted: the mean on one GPU, shared equally)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_lines(ax, names)
    return described(figure, "SS max in ms per video frame by number of GPUs", readings)


def _series(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """preset -> number of GPUs -> result."""
    found: dict[str, dict[int, Result]] = {}
    for result in results:
        count = int(lookup(result, "ranks.count") or 1)
        if ms_per_frame(result):
            found.setdefault(preset_of(result).removesuffix(several_suffix(count)), {})[count] = result
    return found
