"""decisions.json: the verdicts of a whole campaign, the one place that log, table and reports read.

While a preset runs, the repetitions that tell the noise may still lie ahead, so its result.json holds a
provisional decision. The summary decides when everything is there, and writes, atomically:

    schema_version  1                       campaign    the folder's name
    baseline        created_utc of the baseline's first run, or null
    noise           {preset: {runs, blocks, switches, values {metric: [one per run]}, metric: spread or n/a}}
                    of what was run more than once (see `decision.aa_noise`)
    decisions       {label: {preset, run, created_utc, verdict: "keep" | "drop" | "undecided" | "reference" |
                    "repetition" | "study", keep: bool or null, rule, rationale, gate {} or null,
                    not_comparable: why the run must not be compared with the baseline, else ""}}; a label is
                    the run's folder
    recommended     {preset: str or null, reasons [str]}: what the log advises
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_path
from ..measurement import decision
from ..measurement.result import run_label
from .campaign import Campaign, Result, baseline_of, load, verdict_of
from .conclusion import Page, card_html, recommendation_html

DECISIONS_FILE = "decisions.json"
SCHEMA_VERSION = 1


def decisions_of(campaign: Campaign, recommended: str | None, reasons: Sequence[str]) -> dict[str, Any]:
    """What decisions.json holds of a campaign whose results are decided (`campaign.decided`)."""
    baseline = baseline_of(campaign.results)
    return {"schema_version": SCHEMA_VERSION, "campaign": campaign.folder.name,
            "baseline": None if baseline is None else baseline["created_utc"],
            "noise": decision.campaign_noise(campaign.results),
            "decisions": {run_label(run["preset"], run["run"]): _entry(run, baseline)
                          for run in campaign.results},
            "recommended": {"preset": recommended, "reasons": list(reasons)}}


def _entry(run: Result, baseline: Result | None) -> dict[str, Any]:
    decided = run["decision"]
    alone = baseline is None or run is baseline
    return {"preset": run["preset"], "run": run["run"], "created_utc": run["created_utc"],
            "verdict": verdict_of(run), "keep": decided["keep"], "rule": decided["rule"],
            "rationale": decided["rationale"], "gate": decided.get("gate"),
            "not_comparable": "" if alone else decision.fidelity_reason(run, baseline)}


def write_decisions(folder: Path, decisions: Mapping[str, Any]) -> Path:
    """Write decisions.json into the campaign's folder, atomically; return its path.

    Raises:
        UserError: it cannot be written.
    """
    path = folder / DECISIONS_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(decisions, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
                             encoding="utf-8")
    return path


def read_decisions(folder: Path) -> dict[str, Any]:
    """decisions.json of a campaign's folder; without decisions where there is none that can be read."""
    try:
        found = json.loads((folder / DECISIONS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    usable = isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION
    return found if usable else {"decisions": {}, "noise": {}, "recommended": {"preset": None, "reasons": []}}


def cards(folder: Path) -> dict[str, str]:
    """label -> the HTML that the run's report opens with: its conclusion, as decisions.json has it.

    A run that is newer than its decision has none yet.
    """
    found = read_decisions(folder)
    if not found["decisions"]:
        return {}
    results = load(folder).results
    baseline, shown = baseline_of(results), {}
    for result in results:
        label = run_label(result["preset"], result["run"])
        entry = found["decisions"].get(label)
        if entry is not None and entry["created_utc"] == result["created_utc"]:
            best = entry["preset"] == found["recommended"]["preset"] and entry["run"] == 1
            shown[label] = card_html(result, baseline, entry, found["campaign"], recommended=best)
    return shown


def recommendation(campaign: Campaign) -> Page:
    """HTML: which preset to take and why, as decisions.json has it."""
    advised = read_decisions(campaign.folder)["recommended"]
    best = next((run for run in campaign.results if run["preset"] == advised["preset"]), None)
    return recommendation_html(best, baseline_of(campaign.results), advised["reasons"])
