"""Compare the checks of two trainings: which metrics differ, and which effects of a part both found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ...measurement.result import lookup
from .curves import digits
from .reader import variants_of
from .scores import (
    ABLATION,
    FIGURES,
    beyond,
    cell,
    compared_with,
    conclusions,
    difference,
    effect_of,
    figure,
    too_few,
    variant_name,
)


def compare_table(check: Mapping[str, Any], other: Mapping[str, Any]) -> pd.DataFrame:
    """Two checks, metric by metric, with each difference in its own standard errors. Includes the variants,
    except those that were evaluated on fewer videos.
    """
    table = {words: {"these weights": cell(ours, path), "the other training": cell(theirs, path),
                     "difference in errors": "" if distance is None else f"{distance:+.1f}"}
             for words, ours, theirs, path, distance in _pairs(check, other)}
    return pd.DataFrame.from_dict(table, orient="index")


def compare_conclusions(check: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Conclusions from two checks: which metrics of at least MIN_VIDEOS videos differ by more than twice the
    error of the difference, whether both found the effects of the variants, and the other check's
    conclusions.
    """
    pairs = [pair for pair in _pairs(check, other)
             if pair[-1] is not None and not too_few(pair[3], *pair[1:3])]
    found = [f"{words} {cell(ours, path)} here, {cell(theirs, path)} there"
             for words, ours, theirs, path, distance in pairs if abs(distance) > 2]
    return [f"Of {len(pairs)} metrics {len(found)} differ from the other training's by more than twice the "
            f"error of the difference; by chance alone, one in twenty, {len(pairs) / 20:.1f} would: "
            f"{'; '.join(found) or 'none'}.",
            *_effects(check, other),
            *(f"The other training alone: {line[0].lower()}{line[1:]}" for line in conclusions(other))]


def _effects(check: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """One sentence per variant that differs from its full model in either check, with a joint verdict."""
    lines = []
    for name in [name for name in variants_of(check) if name != "full" and name in variants_of(other)]:
        sides = [(compared_with(one, name), variants_of(one)[name]) for one in (check, other)]
        found: dict[str, list[str]] = {}
        for column, path in ABLATION.items():
            here, there = (None if too_few(path, *side) else effect_of(*side, path) for side in sides)
            if here and there and (beyond(here) or beyond(there)):
                words = (f"{' to '.join(digits(figure(part, path)) for part in side)} {where} "
                         f"({change:+.3f} ± {error:.3f})" for side, where, (change, error)
                         in zip(sides, ("here", "there"), (here, there)))
                found.setdefault(_verdict(here, there), []).append(f"{column} {', '.join(words)}")
        if found:
            verdicts = (f"{verdict}: {'; '.join(changes)}." for verdict, changes in found.items())
            lines.append(f"{variant_name(name).capitalize()}, here and in the other training. "
                         f"{' '.join(verdicts)}")
    return lines


def _verdict(here: tuple[float, float], there: tuple[float, float]) -> str:
    """The joint verdict of two trainings on an effect. The effect is confirmed if it exceeds twice its error
    in both. Its size is confirmed only if the two differ by at most one error of the difference, so that the
    data show agreement and not only the lack of a contradiction.
    """
    if here[0] * there[0] <= 0:
        return "Direction not confirmed"
    if not (beyond(here) and beyond(there)):
        return f"Same direction, beyond twice the error only {'here' if beyond(here) else 'there'}"
    apart = abs(there[0] - here[0]) / math.hypot(here[1], there[1])
    return "Confirmed" if apart <= 1 else (
        f"Direction confirmed, size not ({there[0] / here[0]:.1f} times as large there, {apart:.1f} errors "
        f"of the difference apart)")


def _pairs(check: Mapping[str, Any], other: Mapping[str, Any]
           ) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any], str, float | None]]:
    """(words, our part, their part, path, difference in errors) for each metric that both checks have."""
    pairs = [(words, check, other, path) for path, words in FIGURES.items()]
    for name, ours in variants_of(check).items():
        theirs = variants_of(other).get(name)
        if theirs and lookup(ours, "switch.videos") == lookup(check, "switch.videos"):
            pairs += [(f"{variant_name(name)}: {column}", ours, theirs, path)
                      for column, path in ABLATION.items() if not path.endswith(".videos")]
    return [(words, ours, theirs, path, _distance(ours, theirs, path)) for words, ours, theirs, path in pairs
            if cell(ours, path) and cell(theirs, path)]


def _distance(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> float | None:
    apart = difference(ours, theirs, path)
    return None if apart is None else apart[0] / apart[1]
