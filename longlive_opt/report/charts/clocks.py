"""The chart of the GPU's clock and power during a stream."""

from collections.abc import Mapping, Sequence

from ...measurement.catalogue import metric_of
from ...measurement.result import is_finite, lookup, number
from .chart import FONT, GREY, Chart, Result, described, mean_of, name_of, new_lanes, not_drawn, result_colour
from .labels import name_lines

_LANES = {"sm_mhz": "SM clock, MHz", "power_w": "power, W"}
_TITLE = "The GPU during the steady stream: clock and power"


def gpu_load(results: Sequence[Result]) -> Chart:
    """Clock (top) and power (bottom) over the seconds of the stream without prompt switches."""
    series = [(result, points) for result in results if any((points := _points(result)).values())]
    if not series:
        reasons = (lookup(result, "gpu_samples.reason") for result in reversed(results))
        return not_drawn(_TITLE, next(filter(None, reasons), "no readings in these results"))
    figure, axes = new_lanes(_TITLE, 4.6, len(_LANES))
    for ax, (key, label) in zip(axes, _LANES.items(), strict=True):
        names = []
        for result, points in series:
            if points[key]:
                at, values = zip(*points[key])
                ax.plot(at, values, color=result_colour(result), lw=1.3)
                names.append((at[-1], mean_of(values), f"{name_of(result)}: {mean_of(values):.0f}",
                              result_colour(result)))
        ax.set_ylabel(label, fontsize=FONT)
        ax.margins(x=0)
        name_lines(ax, names)
    limit = max(number(result, "environment.gpu_power_limit_w") or 0.0 for result, _ in series)
    power = axes[-1]
    capped = ""
    if limit and power.get_ylim()[1] > 0.9 * limit:
        power.axhline(limit, color=GREY, lw=0.9, ls="--")
        capped = f"; dashed: the limit of {limit:.0f} W"
    power.set_xlabel(f"seconds since the stream began   (with warm-up; names: mean{capped})", fontsize=FONT)
    return described(figure, "Mean SM clock in MHz, mean power in W, and joules per video frame", (
        f"{name_of(result)} {_mean(points['sm_mhz'])}, {_mean(points['power_w'])}, {_joules(result)}"
        for result, points in series))


def _points(result: Result) -> dict[str, list[tuple[float, float]]]:
    """(second, reading) by field. Empty if nothing was read."""
    samples = result.get("gpu_samples")
    samples = samples if isinstance(samples, Mapping) else {}
    return {key: [(at, value) for at, value in zip(samples.get("t_s") or (), samples.get(key) or ())
                  if is_finite(at) and is_finite(value)] for key in _LANES}


def _mean(points: Sequence[tuple[float, float]]) -> str:
    return f"{mean_of([value for _, value in points]):.0f}" if points else "n/a"


def _joules(result: Result) -> str:
    joules = metric_of("joules_per_frame").value(result)
    return "n/a" if joules is None else f"{joules:.1f}"
