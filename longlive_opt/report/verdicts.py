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

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_path
from ..measurement import decision
from ..measurement.result import run_label
from .campaign import Campaign, Result, baseline_of, verdict_of

DECISIONS_FILE = "decisions.json"
SCHEMA_VERSION = 1
_COLOURS = {"keep": "#1b7f3b", "drop": "#b3261e"}
_GREY = "#5f6368"


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
    """label -> the HTML that the run's report opens with: its verdict, as decisions.json has it.

    A run that is newer than its decision has none yet.
    """
    found = read_decisions(folder)
    best, shown = found["recommended"]["preset"], {}
    for label, entry in found["decisions"].items():
        try:
            result = json.loads((folder / label / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if result.get("created_utc") == entry["created_utc"]:
            shown[label] = card_html(entry, found["campaign"], recommended=entry["preset"] == best)
    return shown


def card_html(entry: Mapping[str, Any], campaign: str, *, recommended: bool = False) -> str:
    """The card of one run, complete and escaped."""
    verdict, first = entry["verdict"], entry["run"] == 1
    words = [f"{entry['rationale'][:1].upper()}{entry['rationale'][1:]}."]
    if recommended and first:
        words.append("The log recommends this preset.")
    if verdict in ("keep", "drop", "undecided"):
        words.append(f"Rule: {entry['rule']}.")
    words.append(f"From {DECISIONS_FILE} of the campaign {campaign}.")
    paragraphs = "".join(f"<p style=\"margin:0.3em 0\">{html.escape(text)}</p>" for text in words)
    colour = _COLOURS.get(verdict, _GREY)
    return (f'<section id="verdict" style="margin:1em 2em;padding:0.6em 1em;border-left:6px solid {colour};'
            f'background:#f6f6f6;font-family:sans-serif;font-size:14px">'
            f'<p style="margin:0.3em 0;font-size:18px"><b>Verdict: {html.escape(verdict)}</b></p>'
            f"{paragraphs}</section>")
