"""The check of trained weights: metrics with their errors, also without parts of the model, and conclusions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ...measurement.result import lookup, number
from ...report.charts import Chart
from .curves import COLOURS, digits, dress
from .reader import variants_of

DRIFT = "long.lost"
TARGETS = {"plain.adherence": (">=", 0.90), "switch.adherence": (">=", 0.85), DRIFT: ("<=", 0.05)}
"""Targets of the tiny model: adherence to held-out prompts, adherence in the second block after a switch, and
the loss of adherence over a minute."""
MIN_VIDEOS = 10
"""The report draws no conclusion from fewer videos, because three that happen to agree have almost no error.
"""

FIGURES = {
    "plain.adherence": "prompt adherence, 5 s of one held-out prompt",
    "switch.adherence": "adherence in the second block after a prompt switch",
    DRIFT: "adherence lost over 60 s (first 5 s minus last 5 s)",
    "switch.new_shown": "share of what a switch changed that the second block has",
    "switch.later_adherence": "adherence from the third block after a switch on",
    "switch.delay_blocks": "switch delay in blocks, where the new scene came",
    "switch.delay_blocks_never": "switches whose new scene never came",
    "plain.permanence": "object permanence, 5 s of one prompt",
    "switch.old_left": "share of what changed that is as before, 0.25 to 1 s after a switch",
    "switch.permanence": "object permanence after a switch",
    "long.first": "adherence, first 5 s of 60 s",
    "long.last": "adherence, last 5 s of 60 s",
    "long.permanence": "object permanence, last 5 s of 60 s",
    "long.in_place": "share of the objects that keep their place over 60 s, of those that are to",
}
ABLATION = {"videos": "switch.videos", "second block after a switch": "switch.adherence",
            "new prompt shown": "switch.new_shown", "later": "switch.later_adherence",
            "delay, blocks": "switch.delay_blocks", "never": "switch.delay_blocks_never",
            "old prompt left": "switch.old_left", "permanence": "switch.permanence",
            "videos of 60 s": "long.videos", "first 5 s": "long.first", "last 5 s": "long.last",
            "lost over 60 s": DRIFT, "in place": "long.in_place"}
_NEVER = "switch.delay_blocks_never"
_BARS = {"switch.adherence": ("", "adherence"),  # end of the title after the column, and the unit
         "switch.old_left": (" after a switch", "share of what changed"),
         "long.last": (" of 60 s", "adherence"),
         "long.in_place": (" after 60 s", "share of what is to stay")}
_FULL = "full model"
_VARIANTS = {"no_sink": "no sink", "no_recache": "no recache",
             "full": f"{_FULL}, on the videos of the windows"}
_MACHINE = ("gpu", "cpu", "cpu_threads", "torch", "git_commit", "git_dirty")


def check_table(check: Mapping[str, Any]) -> pd.DataFrame:
    """Every metric of a check with its number of videos. Metrics with a target come first."""
    rows = []
    for path, words in FIGURES.items():
        key = path.partition(".")[2]
        sign, target = TARGETS.get(path, ("", None))
        none_came = key == "delay_blocks" and (number(check, f"{path}_never") or 0) > 0
        rows.append({"metric": words,
                     "value": cell(check, path) or ("none came" if none_came else "not measured"),
                     "target": "" if target is None else f"{sign} {target:.2f}",
                     "met": "" if target is None else _met(check, path),
                     "videos": _videos(check, path)})
    return pd.DataFrame(rows)


def _videos(part: Mapping[str, Any], path: str) -> int:
    """The number of videos behind a metric."""
    videos = number(part, f"{path.partition('.')[0]}.videos") or 0
    return int(videos - (number(part, _NEVER) or 0) * path.endswith(".delay_blocks"))


def too_few(path: str, *parts: Mapping[str, Any]) -> bool:
    """Whether the metric of one of the parts is a mean of fewer than MIN_VIDEOS videos."""
    return min(_videos(part, path) for part in parts) < MIN_VIDEOS


def _met(check: Mapping[str, Any], path: str) -> str:
    value, (sign, target) = number(check, path), TARGETS[path]
    if value is None:
        return "not measured"
    return "yes" if (value >= target if sign == ">=" else value <= target) else "no"


def cell(part: Mapping[str, Any], path: str) -> str:
    """A metric with its error if it has one. Empty if it was not measured."""
    if path == _NEVER:
        never = _share(part, path)
        videos = int(number(part, "switch.videos") or 0)
        return "" if never is None else f"{round(never * videos)} of {videos}"
    value, error = number(part, path), _error(part, path)
    if value is None or error is None:
        return "" if value is None else digits(value)
    return f"{value:.3f} ± {error:.2f}"


def figure(part: Mapping[str, Any], path: str) -> float | None:
    """A metric for comparison. Switches whose scene never came are compared by their share."""
    return _share(part, path) if path == _NEVER else number(part, path)


def _share(part: Mapping[str, Any], path: str) -> float | None:
    """A metric that is a share per video. None for other metrics and for one that was not measured."""
    videos = number(part, f"{path.partition('.')[0]}.videos")
    if not videos or path.endswith((".videos", ".delay_blocks")):
        return None
    return (number(part, path) or 0.0) / videos if path == _NEVER else number(part, path)  # absent: never 0


def _error(part: Mapping[str, Any], path: str) -> float | None:
    """Standard error of a metric. If the check stored none or all videos agree, a conservative binomial
    bound.

    The bound takes every video as wholly right or wholly wrong, which is the largest spread between 0 and 1,
    and adds one of each, since 12 of 12 prove little.
    """
    if recorded := number(part, f"{path}_se"):
        return recorded
    if path == DRIFT:
        ends = [_error(part, f"long.{end}") for end in ("first", "last")]
        return None if None in ends else math.hypot(*ends)
    share, videos = _share(part, path), number(part, f"{path.partition('.')[0]}.videos")
    if share is None:
        return None
    share = (videos * share + 1) / (videos + 2)
    return math.sqrt(share * (1 - share) / (videos + 2))


def ablation_table(check: Mapping[str, Any]) -> pd.DataFrame:
    """The full model and each variant, one per row. An empty cell was not measured."""
    table = {variant_name(name): {column: cell(part, path) for column, path in ABLATION.items()}
             for name, part in {_FULL: check, **variants_of(check)}.items()}
    return pd.DataFrame.from_dict(table, orient="index", columns=list(ABLATION))


def conclusions(check: Mapping[str, Any]) -> list[str]:
    """One sentence per target, and one per variant on the metrics that differ from the full model by more
    than twice the error of the difference. The difference is that of the same videos if the check stored it.
    Metrics of fewer than MIN_VIDEOS videos are named as such.
    """
    lines = []
    for path, (sign, target) in TARGETS.items():
        value, error = number(check, path), _error(check, path)
        state = {"yes": "is met", "no": "is missed"}.get(_met(check, path), "was not measured")
        near = value is not None and error is not None and abs(value - target) < error
        few = value is not None and too_few(path, check)
        found = cell(check, path) and f": {cell(check, path)}"
        lines.append(f"Target {sign} {target:.2f} for {FIGURES[path]} {state}"
                     f"{', by less than the error' if near else ''}"
                     f"{f', on {_videos(check, path)} videos, too few to say' if few else ''}{found}.")
    for name, part in variants_of(check).items():
        if name != "full":
            full = compared_with(check, name)
            found = [f"{column} {cell(part, path)} against {cell(full, path)}{_change(part, path)}"
                     for column, path in ABLATION.items()
                     if not too_few(path, part, full) and _differ(part, full, path)]
            unsaid = [column for column, path in ABLATION.items() if not path.endswith(".videos")
                      and cell(part, path) and cell(full, path) and too_few(path, part, full)]
            lines.append(f"{variant_name(name).capitalize()}, beyond twice the error of the difference: "
                         f"{'; '.join(found) or 'nothing'}."
                         + (f" Fewer than {MIN_VIDEOS} videos, too few to say: {'; '.join(unsaid)}."
                            if unsaid else ""))
    return lines


def compared_with(check: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The check to compare a variant with. For windows it is the full model on their fewer videos."""
    return variants_of(check).get("full", check) if name.startswith("window_") else check


def _differ(part: Mapping[str, Any], full: Mapping[str, Any], path: str) -> bool:
    return beyond(effect_of(full, part, path))


def beyond(effect: tuple[float, float] | None) -> bool:
    """Whether an effect exists and exceeds twice its error."""
    return effect is not None and abs(effect[0]) > 2 * effect[1]


def effect_of(full: Mapping[str, Any], part: Mapping[str, Any], path: str) -> tuple[float, float] | None:
    """A variant's change against the full model and its error, on the same videos if the check stored it."""
    return _paired(part, path) or difference(full, part, path)


def _change(part: Mapping[str, Any], path: str) -> str:
    paired = _paired(part, path)
    return f" (video by video {paired[0]:+.3f} ± {paired[1]:.3f})" if paired else ""


def _paired(part: Mapping[str, Any], path: str) -> tuple[float, float] | None:
    """A variant's change against the full model on the same videos, and its error. None if the check stored
    none, or if all videos agree.
    """
    change, error = (number(part, f"{path}_{key}") for key in ("change", "change_se"))
    return None if change is None or not error else (change, error)


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> tuple[float, float] | None:
    """The second value minus the first, and the error of this difference."""
    values, errors = ([of(one, path) for one in (ours, theirs)] for of in (figure, _error))
    if None in (*values, *errors):
        return None
    return values[1] - values[0], math.hypot(*errors)


def conditions(check: Mapping[str, Any]) -> str:
    """The conditions of a check in one sentence."""
    others = ("weights", "sizes", "variants", "plain", "switch", "long", "environment")
    machine = {key: lookup(check, f"environment.{key}") for key in _MACHINE}
    facts = {key: value for key, value in check.items() if key not in others} | machine
    words = (f"{key.replace('_', ' ')} {json.dumps(value).strip(chr(34))}" for key, value in facts.items()
             if value is not None)
    return f"Checked: {check.get('weights', 'weights')}; {', '.join(words)}."


def variant_name(name: str) -> str:
    """The readable name of a variant."""
    if name.startswith("window_"):
        return f"window of {name.removeprefix('window_')} latent frames"
    return _VARIANTS.get(name, name)


def ablation_chart(check: Mapping[str, Any]) -> Chart:
    """Bars of the full model and each variant, after a switch and at the end of a minute."""
    parts = {variant_name(name): part for name, part in {_FULL: check, **variants_of(check)}.items()}
    chart = Chart(figsize=(11, 1.4 + 0.34 * len(parts)), dpi=110, layout="constrained")
    columns = [(column, path) for column, path in ABLATION.items() if path in _BARS]
    for ax, (column, path) in zip(chart.subplots(1, len(_BARS), sharey=True), columns):
        when, unit = _BARS[path]
        for height, (name, part) in enumerate(parts.items()):
            value, error = number(part, path), _error(part, path)
            ax.barh(height, value or 0.0, height=0.62, color=COLOURS[0] if name == _FULL else "#b8b8b8")
            if value is None:
                ax.text(0.02, height, "not measured", va="center", fontsize=8)
                continue
            ax.plot([max(value - error, 0.0), min(value + error, 1.0)], [height] * 2, color="#222222", lw=1.0)
            ax.text(1.04, height, f"{value:.2f}", va="center", fontsize=8)
        ax.set(xlim=(0, 1), ylim=(len(parts) - 0.4, -0.6))
        ax.set_yticks(range(len(parts)), list(parts))
        dress(ax, column + when, f"{unit}{_target(path)}")
        if path in TARGETS:
            ax.axvline(TARGETS[path][1], color="#c21f1f", lw=1.0, ls="--")
    chart.supxlabel("black: ± one standard error", fontsize=8)
    values = ("; ".join(f"{name} {cell(part, path) or 'n/a'}" for name, part in parts.items())
              for _, path in columns)
    chart.alt = "Bars with one standard error. " + " ".join(
        f"{column}{_BARS[path][0]}: {words}." for (column, path), words in zip(columns, values))
    return chart


def _target(path: str) -> str:
    return f"   (dashed: target {TARGETS[path][1]:.2f})" if path in TARGETS else ""
