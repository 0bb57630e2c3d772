"""The check of trained weights: figures with their errors, the same with parts taken away, what follows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..figures import Chart
from ..results import lookup, number
from .files import variants_of
from .style import COLOURS, digits, dress

DRIFT = "long.lost"
TARGETS = {"plain.adherence": (">=", 0.90), "switch.adherence": (">=", 0.85), DRIFT: ("<=", 0.05)}
"""What the tiny model is to reach: adherence to held-out prompts, in the second block after a switch, and
what of it a minute may cost."""
MIN_VIDEOS = 10
"""Of fewer nothing is concluded: three that happen to agree have next to no error."""

_FIGURES = {
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
_ABLATION = {"videos": "switch.videos", "second block after a switch": "switch.adherence",
             "new prompt shown": "switch.new_shown", "later": "switch.later_adherence",
             "delay, blocks": "switch.delay_blocks", "never": "switch.delay_blocks_never",
             "old prompt left": "switch.old_left", "permanence": "switch.permanence",
             "videos of 60 s": "long.videos", "first 5 s": "long.first", "last 5 s": "long.last",
             "lost over 60 s": DRIFT, "in place": "long.in_place"}
_NEVER = "switch.delay_blocks_never"
_BARS = {"switch.adherence": ("", "adherence"),  # what the title says after the column, and what is counted
         "switch.old_left": (" after a switch", "share of what changed"),
         "long.last": (" of 60 s", "adherence"),
         "long.in_place": (" after 60 s", "share of what is to stay")}
_FULL = "full model"
_VARIANTS = {"no_sink": "no sink", "no_recache": "no recache",
             "full": f"{_FULL}, on the videos of the windows"}
_MACHINE = ("gpu", "cpu", "cpu_threads", "torch", "git_commit", "git_dirty")


def check_table(check: Mapping[str, Any]) -> pd.DataFrame:
    """Every figure of a check, those with a target first, with the number of videos that it is a mean of."""
    rows = []
    for path, words in _FIGURES.items():
        key = path.partition(".")[2]
        sign, target = TARGETS.get(path, ("", None))
        none_came = key == "delay_blocks" and (number(check, f"{path}_never") or 0) > 0
        rows.append({"figure": words,
                     "value": _cell(check, path) or ("none came" if none_came else "not measured"),
                     "target": "" if target is None else f"{sign} {target:.2f}",
                     "met": "" if target is None else _met(check, path),
                     "videos": _videos(check, path)})
    return pd.DataFrame(rows)


def _videos(part: Mapping[str, Any], path: str) -> int:
    """How many videos a figure is a mean of."""
    videos = number(part, f"{path.partition('.')[0]}.videos") or 0
    return int(videos - (number(part, _NEVER) or 0) * path.endswith(".delay_blocks"))


def _few(path: str, *parts: Mapping[str, Any]) -> bool:
    return min(_videos(part, path) for part in parts) < MIN_VIDEOS


def _met(check: Mapping[str, Any], path: str) -> str:
    value, (sign, target) = number(check, path), TARGETS[path]
    if value is None:
        return "not measured"
    return "yes" if (value >= target if sign == ">=" else value <= target) else "no"


def _cell(part: Mapping[str, Any], path: str) -> str:
    """A figure with its error where it has one; empty if it was not measured."""
    if path == _NEVER:
        never = _share(part, path)
        videos = int(number(part, "switch.videos") or 0)
        return "" if never is None else f"{round(never * videos)} of {videos}"
    value, error = number(part, path), _error(part, path)
    if value is None or error is None:
        return "" if value is None else digits(value)
    return f"{value:.3f} ± {error:.2f}"


def _figure(part: Mapping[str, Any], path: str) -> float | None:
    """A figure as it is compared: of the switches whose scene never came their share."""
    return _share(part, path) if path == _NEVER else number(part, path)


def _share(part: Mapping[str, Any], path: str) -> float | None:
    """A figure that is a share of each video; None if it is none, or was not measured."""
    videos = number(part, f"{path.partition('.')[0]}.videos")
    if not videos or path.endswith((".videos", ".delay_blocks")):
        return None
    return (number(part, path) or 0.0) / videos if path == _NEVER else number(part, path)  # named if it was


def _error(part: Mapping[str, Any], path: str) -> float | None:
    """Standard error of a figure. Where the check kept none, or all videos agree, that of a share from above:
    between 0 and 1 nothing spreads more than videos that are wholly right or wholly wrong. One of each is
    added, since 12 of 12 prove little.
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
    """The full model and each variant, a row each; an empty cell was not measured."""
    table = {_variant(name): {column: _cell(part, path) for column, path in _ABLATION.items()}
             for name, part in {_FULL: check, **variants_of(check)}.items()}
    return pd.DataFrame.from_dict(table, orient="index", columns=list(_ABLATION))


def conclusions(check: Mapping[str, Any]) -> list[str]:
    """A sentence on each target, and one on each variant: where it differs from the full model by more than
    twice the error of the difference; where the check kept it, that of the same videos. What fewer than
    MIN_VIDEOS showed is named as such.
    """
    lines = []
    for path, (sign, target) in TARGETS.items():
        value, error = number(check, path), _error(check, path)
        state = {"yes": "is met", "no": "is missed"}.get(_met(check, path), "was not measured")
        near = value is not None and error is not None and abs(value - target) < error
        few = value is not None and _few(path, check)
        found = _cell(check, path) and f": {_cell(check, path)}"
        lines.append(f"Target {sign} {target:.2f} for {_FIGURES[path]} {state}"
                     f"{', by less than the error' if near else ''}"
                     f"{f', on {_videos(check, path)} videos, too few to say' if few else ''}{found}.")
    for name, part in variants_of(check).items():
        if name != "full":
            full = _full(check, name)
            found = [f"{column} {_cell(part, path)} against {_cell(full, path)}{_change(part, path)}"
                     for column, path in _ABLATION.items()
                     if not _few(path, part, full) and _differ(part, full, path)]
            unsaid = [column for column, path in _ABLATION.items() if not path.endswith(".videos")
                      and _cell(part, path) and _cell(full, path) and _few(path, part, full)]
            lines.append(f"{_variant(name).capitalize()}, beyond twice the error of the difference: "
                         f"{'; '.join(found) or 'nothing'}."
                         + (f" Fewer than {MIN_VIDEOS} videos, too few to say: {'; '.join(unsaid)}."
                            if unsaid else ""))
    return lines


def _full(check: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a variant is compared with: windows are judged on fewer videos, and so is that."""
    return variants_of(check).get("full", check) if name.startswith("window_") else check


def _differ(part: Mapping[str, Any], full: Mapping[str, Any], path: str) -> bool:
    return _beyond(_effect(full, part, path))


def _beyond(effect: tuple[float, float] | None) -> bool:
    return effect is not None and abs(effect[0]) > 2 * effect[1]


def _effect(full: Mapping[str, Any], part: Mapping[str, Any], path: str) -> tuple[float, float] | None:
    """A variant's change against the full model and its error, of the same videos where the check kept it."""
    return _paired(part, path) or _difference(full, part, path)


def _change(part: Mapping[str, Any], path: str) -> str:
    paired = _paired(part, path)
    return f" (video by video {paired[0]:+.3f} ± {paired[1]:.3f})" if paired else ""


def _paired(part: Mapping[str, Any], path: str) -> tuple[float, float] | None:
    """A variant's change against the full model on the same videos, and its error; None if the check kept
    none, or all videos agree.
    """
    change, error = (number(part, f"{path}_{key}") for key in ("change", "change_se"))
    return None if change is None or not error else (change, error)


def beside_table(check: Mapping[str, Any], other: Mapping[str, Any]) -> pd.DataFrame:
    """A check beside that of another training, figure by figure; the difference is counted in its own
    standard errors. Variants too, but for those that were judged on fewer videos.
    """
    table = {words: {"these weights": _cell(ours, path), "the other training": _cell(theirs, path),
                     "difference in errors": "" if distance is None else f"{distance:+.1f}"}
             for words, ours, theirs, path, distance in _pairs(check, other)}
    return pd.DataFrame.from_dict(table, orient="index")


def beside_conclusions(check: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """How many of the figures of MIN_VIDEOS and more differ by more than twice the error of the difference,
    and which; whether what the variants changed is found in both; what the other check says by itself.
    """
    pairs = [pair for pair in _pairs(check, other) if pair[-1] is not None and not _few(pair[3], *pair[1:3])]
    found = [f"{words} {_cell(ours, path)} here, {_cell(theirs, path)} there"
             for words, ours, theirs, path, distance in pairs if abs(distance) > 2]
    return [f"Of {len(pairs)} figures {len(found)} differ from the other training's by more than twice the "
            f"error of the difference; by chance alone, one in twenty, {len(pairs) / 20:.1f} would: "
            f"{'; '.join(found) or 'none'}.",
            *_effects(check, other),
            *(f"The other training alone: {line[0].lower()}{line[1:]}" for line in conclusions(other))]


def _effects(check: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """A sentence on each variant that either check found to differ from its full model, by what the two say
    of it together.
    """
    lines = []
    for name in [name for name in variants_of(check) if name != "full" and name in variants_of(other)]:
        sides = [(_full(one, name), variants_of(one)[name]) for one in (check, other)]
        found: dict[str, list[str]] = {}
        for column, path in _ABLATION.items():
            here, there = (None if _few(path, *side) else _effect(*side, path) for side in sides)
            if here and there and (_beyond(here) or _beyond(there)):
                words = (f"{' to '.join(digits(_figure(part, path)) for part in side)} {where} "
                         f"({change:+.3f} ± {error:.3f})" for side, where, (change, error)
                         in zip(sides, ("here", "there"), (here, there)))
                found.setdefault(_verdict(here, there), []).append(f"{column} {', '.join(words)}")
        if found:
            told = (f"{verdict}: {'; '.join(changes)}." for verdict, changes in found.items())
            lines.append(f"{_variant(name).capitalize()}, here and in the other training. {' '.join(told)}")
    return lines


def _verdict(here: tuple[float, float], there: tuple[float, float]) -> str:
    """What two trainings say of an effect. It is confirmed if beyond twice its error in both, its size only
    within one error of the difference: agreement is to be shown, not the lack of a contradiction.
    """
    if here[0] * there[0] <= 0:
        return "Direction not confirmed"
    if not (_beyond(here) and _beyond(there)):
        return f"Same direction, beyond twice the error only {'here' if _beyond(here) else 'there'}"
    apart = abs(there[0] - here[0]) / math.hypot(here[1], there[1])
    return "Confirmed" if apart <= 1 else (
        f"Direction confirmed, size not ({there[0] / here[0]:.1f} times as large there, {apart:.1f} errors "
        f"of the difference apart)")


def _pairs(check: Mapping[str, Any], other: Mapping[str, Any]
           ) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any], str, float | None]]:
    """(words, part of the one, part of the other, path, difference in errors) of all that both judged."""
    pairs = [(words, check, other, path) for path, words in _FIGURES.items()]
    for name, ours in variants_of(check).items():
        theirs = variants_of(other).get(name)
        if theirs and lookup(ours, "switch.videos") == lookup(check, "switch.videos"):
            pairs += [(f"{_variant(name)}: {column}", ours, theirs, path)
                      for column, path in _ABLATION.items() if not path.endswith(".videos")]
    return [(words, ours, theirs, path, _distance(ours, theirs, path)) for words, ours, theirs, path in pairs
            if _cell(ours, path) and _cell(theirs, path)]


def _distance(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> float | None:
    difference = _difference(ours, theirs, path)
    return None if difference is None else difference[0] / difference[1]


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> tuple[float, float] | None:
    """How much more the second has, and the error of that."""
    values, errors = ([of(one, path) for one in (ours, theirs)] for of in (_figure, _error))
    if None in (*values, *errors):
        return None
    return values[1] - values[0], math.hypot(*errors)


def conditions(check: Mapping[str, Any]) -> str:
    """On what a check was made, in a sentence."""
    beside = ("weights", "sizes", "variants", "plain", "switch", "long", "environment")
    machine = {key: lookup(check, f"environment.{key}") for key in _MACHINE}
    facts = {key: value for key, value in check.items() if key not in beside} | machine
    words = (f"{key.replace('_', ' ')} {json.dumps(value).strip(chr(34))}" for key, value in facts.items()
             if value is not None)
    return f"Checked: {check.get('weights', 'weights')}; {', '.join(words)}."


def _variant(name: str) -> str:
    if name.startswith("window_"):
        return f"window of {name.removeprefix('window_')} latent frames"
    return _VARIANTS.get(name, name)


def ablation_chart(check: Mapping[str, Any]) -> Chart:
    """The full model and each variant: what is there after a switch, and at the end of a minute."""
    parts = {_variant(name): part for name, part in {_FULL: check, **variants_of(check)}.items()}
    chart = Chart(figsize=(11, 1.4 + 0.34 * len(parts)), dpi=110, layout="constrained")
    columns = [(column, path) for column, path in _ABLATION.items() if path in _BARS]
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
    told = ("; ".join(f"{name} {_cell(part, path) or 'n/a'}" for name, part in parts.items())
            for _, path in columns)
    chart.alt = "Bars with one standard error. " + " ".join(
        f"{column}{_BARS[path][0]}: {words}." for (column, path), words in zip(columns, told))
    return chart


def _target(path: str) -> str:
    return f"   (dashed: target {TARGETS[path][1]:.2f})" if path in TARGETS else ""
