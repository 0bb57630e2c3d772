"""decisions.json: the verdicts of a whole campaign. Log, table and reports read them from here.

A run's result.json holds only a provisional decision, because the repetitions that measure the noise may
still follow. The summary decides when all runs have finished, and writes atomically:

    schema_version  1                       campaign    the folder's name
    baseline        created_utc of the baseline's first run, or null
    noise           {preset: {runs, blocks, switches, values {metric: [one per run]}, metric: spread or n/a}}
                    for each preset that was run more than once (see `decision.aa_noise`)
    decisions       {label: {preset, run, created_utc, verdict: "keep" | "drop" | "undecided" | "reference" |
                    "repetition" | "study", keep: bool or null, rule, rationale, gate {} or null,
                    not_comparable: why the run must not be compared with the baseline, else ""}}; a label is
                    the name of the run's folder
    recommended     {preset: str or null, reasons [str]}: the recommendation of the log
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import atomic_path, read_json
from ..measurement import decision
from ..measurement.result import run_label
from .campaign import Campaign, Result, baseline_of, load, verdict_of
from .conclusion import Page, card_html, recommendation_html

DECISIONS_FILE = "decisions.json"
SCHEMA_VERSION = 1


def decisions_of(campaign: Campaign, recommended: str | None, reasons: Sequence[str]) -> dict[str, Any]:
    """The content of decisions.json for a campaign whose results are decided (`campaign.decided`)."""
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
    """Write decisions.json into the campaign's folder, atomically, and return its path.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / DECISIONS_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(decisions, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
                             encoding="utf-8")
    return path


def read_decisions(folder: Path) -> dict[str, Any]:
    """Read decisions.json of a campaign's folder. An absent or unreadable file gives no decisions."""
    try:
        found = read_json(folder / DECISIONS_FILE, "make the summary again")
    except UserError:
        found = None
    return found if _is_whole(found) else {"decisions": {}, "noise": {}, "campaign": folder.name,
                                           "recommended": {"preset": None, "reasons": []}}


def _is_whole(found: Any) -> bool:
    """Whether the content of the file is what `decisions_of` makes, as far as a reader relies on it."""
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        return False
    advised, entries = found.get("recommended"), found.get("decisions")
    texts = ("preset", "verdict", "rule", "rationale", "created_utc", "not_comparable")
    return (isinstance(found.get("campaign"), str) and isinstance(found.get("noise"), dict)
            and isinstance(entries, dict) and isinstance(advised, dict)
            and isinstance(advised.get("preset"), str | None) and isinstance(advised.get("reasons"), list)
            and all(isinstance(reason, str) for reason in advised["reasons"])
            and all(isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in texts)
                    and isinstance(entry.get("run"), int) and isinstance(entry.get("keep"), bool | None)
                    for entry in entries.values()))


def cards(folder: Path) -> dict[str, str]:
    """label -> the HTML card on top of the run's report, with the verdict from decisions.json.

    A run that is newer than its decision has no card yet.
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
    """HTML: the recommended preset and the reasons, from decisions.json."""
    advised = read_decisions(campaign.folder)["recommended"]
    best = next((run for run in campaign.results if run["preset"] == advised["preset"]), None)
    return recommendation_html(best, baseline_of(campaign.results), advised["reasons"])
