"""`longlive compare A B`: what changed from one campaign to another, preset by preset.

The samples are those of the results: the interval of every steady-state block and the latency of every prompt
switch, of all runs of a preset. The interval of confidence is a percentile bootstrap (Efron, 1979) in two
stages: runs are drawn first and then samples within each, so that the spread between runs counts.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import UserError
from ..files import atomic_path, project_path
from ..measurement.decision import NOISE_FLOOR, unfair
from ..measurement.result import lookup, numbers
from . import charts
from .campaign import Campaign, Result, load
from .stylesheet import PAGE

SAMPLES = {"SS mean, ms per frame": ("latency.ss_block_ms", True),
           "PS mean, ms": ("latency.ps_ms_all", False)}
"""Metric -> where its samples lie, and whether they are ms per block, to be divided by its frames."""
DRAWS = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Change:
    """One metric of one preset in two campaigns: the means, the relative change of the mean with its interval
    of confidence, and what that says. `reason` says why there is no verdict; the rest is None if there is no
    comparison either.
    """

    preset: str
    metric: str
    before: float | None = None
    after: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """faster, slower or noise: a change counts where its interval leaves out 0 and it exceeds 2 %. It is
        undecided where runs were disturbed, of which the interval knows nothing.
        """
        if self.change is None:
            return "n/a"
        if self.reason:
            return "undecided"
        if self.low <= 0 <= self.high or abs(self.change) < NOISE_FLOOR:
            return "noise"
        return "faster" if self.change < 0 else "slower"


@dataclass(frozen=True)
class Comparison:
    """Two campaigns and what changed from `before` to `after`; the verbs of notebooks/92_compare.ipynb."""

    before: Campaign
    after: Campaign
    changes: list[Change]

    @classmethod
    def open(cls, before: str | Path, after: str | Path) -> Comparison:
        """Load both campaigns, each a name in outputs/ or a folder, and compare them.

        Raises:
            UserError: one has no finished run, or they share no preset.
        """
        campaigns = [load(campaign_folder(str(asked))) for asked in (before, after)]
        for campaign in campaigns:
            name_unusable(campaign)
            if not campaign.results:
                raise UserError(f"{campaign.folder.name}: it has no finished run; measure presets first.")
        changes = compare(*campaigns)
        if not changes:
            first, second = (campaign.folder.name for campaign in campaigns)
            raise UserError(f"{second}: it shares no preset with {first}; measure one of its presets.")
        return cls(*campaigns, changes)

    def table(self) -> pd.DataFrame:
        return table(self.changes)

    def chart(self) -> charts.Chart:
        return charts.change_intervals(self.changes, NOISE_FLOOR, CONFIDENCE)

    def conclusion(self) -> str:
        """What changed in one sentence, then where each campaign was measured."""
        slower = [f"{one.preset} ({one.metric.partition(',')[0]} {one.change:+.1%})" for one in self.changes
                  if one.verdict == "slower"]
        regressions = f"Slower: {', '.join(slower)}." if slower else "Nothing got slower."
        machines = {campaign.results[0]["environment"]["gpu"] or campaign.results[0]["environment"].get("cpu")
                    for campaign in (self.before, self.after)}
        other = "" if len(machines) == 1 else " The machines differ, so the code alone explains none of it."
        return (f"{summary(self.changes)}. {regressions}{other}\nbefore: {where(self.before)}\nafter:  "
                f"{where(self.after)}")


def name_unusable(campaign: Campaign) -> None:
    """Say on standard error which results of a campaign are left out, and why."""
    for place, reason in campaign.problems:
        print(f"not usable: {place}: {reason}", file=sys.stderr)


def campaign_folder(asked: str) -> Path:
    """The folder of a campaign: a name in outputs/, or a path from the current or the project's folder.

    Raises:
        UserError: neither exists.
    """
    named = project_path(f"outputs/{asked}")
    if "/" not in asked and named.is_dir():
        return named
    for own in (Path(asked).resolve(), project_path(asked)):
        if own.is_dir():
            return own
    there = sorted({path.parent.parent.name for path in project_path("outputs").glob("*/*/result.json")})
    raise UserError(f"{asked}: neither a campaign in outputs/ nor a folder; outputs/ has "
                    f"{', '.join(there) or 'none'}.")


def compare(before: Campaign, after: Campaign) -> list[Change]:
    """Every metric of every preset that both campaigns have; `before` is what the change is relative to."""
    theirs, ours = _by_preset(before), _by_preset(after)
    return [change for preset, runs in theirs.items() if preset in ours
            for change in _changes(preset, runs, ours[preset])]


def _by_preset(campaign: Campaign) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for run in campaign.results:
        found.setdefault(run["preset"], []).append(run)
    return found


def _changes(preset: str, before: Sequence[Result], after: Sequence[Result]) -> list[Change]:
    # Two machines, commits or versions are what is compared; all else has to agree.
    if reason := unfair(*({**runs[0], "environment": {}} for runs in (before, after))):
        return [Change(preset, metric, reason=reason) for metric in SAMPLES]
    disturbed = sum(bool(lookup(run, "environment.co_scheduled")) for run in (*before, *after))
    reason = f"something else ran on the machine during {disturbed} of the runs" if disturbed else ""
    changes = []
    for metric, (path, per_frame) in SAMPLES.items():
        samples = [[np.asarray(numbers(run, path)) / (lookup(run, "sizes.frames_per_block") if per_frame
                                                      else 1)
                    for run in runs if len(numbers(run, path))] for runs in (before, after)]
        if not all(samples):
            changes.append(Change(preset, metric, reason="one of the two has no samples"))
            continue
        theirs, ours = (float(np.mean([run.mean() for run in runs])) for runs in samples)
        low, high = interval(*samples)
        changes.append(Change(preset, metric, theirs, ours, ours / theirs - 1, low, high, reason))
    return changes


def interval(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> tuple[float, float]:
    """The interval of confidence of mean(after) / mean(before) - 1."""
    generator = np.random.default_rng(0)
    theirs, ours = (_means(runs, generator) for runs in (before, after))
    low, high = np.quantile(ours / theirs - 1, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _means(runs: Sequence[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """[DRAWS] means of runs drawn with replacement, of samples drawn with replacement in each."""
    drawn = np.stack([generator.choice(run, (DRAWS, len(run))).mean(axis=1) for run in runs])
    chosen = generator.integers(len(runs), size=(len(runs), DRAWS))
    return np.take_along_axis(drawn, chosen, axis=0).mean(axis=0)


def table(changes: Sequence[Change]) -> pd.DataFrame:
    """A row per change, as text."""
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:+.1%}"

    rows = [(one.preset, one.metric, "" if one.before is None else f"{one.before:.2f}",
             "" if one.after is None else f"{one.after:.2f}", percent(one.change),
             "" if one.low is None else f"{percent(one.low)} to {percent(one.high)}",
             one.verdict + (f": {one.reason}" if one.reason else "")) for one in changes]
    return pd.DataFrame(rows, columns=["preset", "metric", "before", "after", "change",
                                       f"{CONFIDENCE:.0%} interval", "verdict"])


def where(campaign: Campaign) -> str:
    """Machine, commit and versions of a campaign's first run."""
    facts: Mapping[str, object] = campaign.results[0]["environment"]
    commit = str(facts.get("git_commit") or "unknown")[:12]
    machine = facts.get("gpu") or facts.get("cpu")
    return f"{campaign.folder.name}: {machine}, commit {commit}, torch {facts['torch']}"


def page(changes: Sequence[Change], before: Campaign, after: Campaign) -> str:
    """The comparison as one HTML page without scripts."""
    body = table(changes).to_html(index=False, border=0)
    png, metadata = charts.change_intervals(changes, NOISE_FLOOR, CONFIDENCE)._repr_png_()
    chart = (f"<figure class='wide'><img src='data:image/png;base64,{base64.b64encode(png).decode('ascii')}' "
             f"alt='{html.escape(metadata['alt'])}'></figure>")
    lines = "".join(f"<p>{html.escape(name)}: {html.escape(where(campaign))}</p>"
                    for name, campaign in (("before", before), ("after", after)))
    head = ("<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>Comparison</title><style>{PAGE}</style>")
    title = html.escape(summary(changes))
    return (f"<!doctype html><html lang='en'>{head}<body><h1>{title}</h1>{lines}"
            f"<div class='wide'>{body}</div>{chart}</body></html>\n")


def summary(changes: Sequence[Change]) -> str:
    """The result in one sentence."""
    found = [one.verdict for one in changes]
    return (f"{found.count('faster')} faster, {found.count('slower')} slower, {found.count('noise')} within "
            f"the noise, {found.count('undecided')} undecided, {found.count('n/a')} not comparable")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, 1 where something got slower, or 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="longlive compare",
                                     description="Compare two campaigns, preset by preset.")
    parser.add_argument("before", metavar="A", help="a campaign: a name in outputs/, or a folder")
    parser.add_argument("after", metavar="B", help="another one; its change is shown")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the table as a page, too")
    arguments = parser.parse_args(argv)
    try:
        found = Comparison.open(arguments.before, arguments.after)
        before, after, changes = found.before, found.after, found.changes
        if arguments.html:
            with atomic_path(arguments.html) as temporary:
                temporary.write_text(page(changes, before, after), encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"before: {where(before)}\nafter:  {where(after)}\n")
    print(table(changes).to_string(index=False), end="\n\n")
    print(summary(changes))
    return 1 if any(one.verdict == "slower" for one in changes) else 0
