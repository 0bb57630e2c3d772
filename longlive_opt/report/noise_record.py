"""outputs/noise.json: the measurements of every recorded campaign, one row per preset.

Two runs of one campaign agree more closely than runs of two campaigns, which differ in day, card and machine
state. So the record keeps the runs of earlier campaigns even after their results were replaced. Machines,
commits and presets differ between rows, and each row names its own.

    schema_version  1
    rows            [{campaign, preset, machine, torch, model, commit, date (created_utc of the first run),
                    runs, blocks [one per run], switches [...], ss_mean, ss_max, ps_mean: [ms, one per run,
                    null if not measured]}]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import atomic_path, project_path, read_json
from ..measurement.catalogue import shown_in
from ..measurement.result import is_finite, lookup
from .campaign import BASELINE, Campaign, Result
from .log.markdown import digits, escape

NOISE_FILE = "outputs/noise.json"
SCHEMA_VERSION = 1
_TEXTS = ("campaign", "preset", "machine", "model", "date")


def rows_of(results: Sequence[Result], campaign: str) -> list[dict[str, Any]]:
    """A campaign's rows of the record: one per preset, with its runs in order."""
    runs: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result["run"]):
        runs.setdefault(result["preset"], []).append(result)
    rows = []
    for preset, repeated in runs.items():
        first = repeated[0]
        rows.append({"campaign": campaign, "preset": preset,
                     "machine": lookup(first, "environment.gpu") or lookup(first, "environment.cpu"),
                     "torch": lookup(first, "environment.torch"), "model": lookup(first, "model.name"),
                     "commit": lookup(first, "environment.git_commit"), "date": first["created_utc"],
                     "runs": len(repeated),
                     "blocks": [run["sizes"]["blocks_measured"] for run in repeated],
                     "switches": [run["sizes"]["switches"] for run in repeated]}
                    | {metric.key: [_rounded(metric.value(run)) for run in repeated]
                       for metric in shown_in("record")})
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def read_record(path: Path) -> list[dict[str, Any]]:
    """The rows of a record, or none if the file does not exist.

    Raises:
        UserError: the file is not a record of this schema.
    """
    if not path.exists():
        return []
    found = read_json(path, "restore it from git")
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or found.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path.name}: is not a noise record of schema {SCHEMA_VERSION}; restore it from git")
    for number, row in enumerate(rows):
        if not _is_row(row):
            raise UserError(f"{path.name}: rows[{number}] is damaged; restore it from git")
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("runs")) is not int:
        return False
    series = [row.get(metric.key, []) for metric in shown_in("record")]
    return all(key in row and isinstance(row[key], str | None) for key in _TEXTS) and all(
        isinstance(values, list) and all(value is None or is_finite(value) for value in values)
        for values in series)


def joined(record: Iterable[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`record` with `rows` appended. They replace rows of the same run."""
    own = {(row["preset"], row["date"]) for row in rows}
    return [*(row for row in record if (row["preset"], row["date"]) not in own), *rows]


def write_record(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a record atomically, one line per row, so that a diff shows the new rows.

    Raises:
        UserError: the file cannot be written.
    """
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    with atomic_path(path) as temporary:
        temporary.write_text(f'{{"schema_version": {SCHEMA_VERSION}, "rows": [\n{lines}\n]}}\n',
                             encoding="utf-8")


def record_noise(campaign: Campaign, path: Path | None = None) -> int:
    """Add a campaign's rows to the record and return their number.

    Raises:
        UserError: the record cannot be read or written.
    """
    path = path or project_path(NOISE_FILE)
    rows = rows_of(campaign.results, campaign.folder.name)
    write_record(path, joined(read_record(path), rows))
    return len(rows)


def over_campaigns(record: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> list[str]:
    """One sentence per repeated preset and for the baseline: the range of its runs over all recorded
    campaigns of this model on this kind of machine. Nothing for a preset that only this campaign recorded.
    """
    rows = joined(record, rows_of(results, ""))
    own = {row["preset"]: row for row in rows_of(results, "")}
    lines = []
    for preset, row in own.items():
        alike = [other for other in rows
                 if all(other[key] == row[key] for key in ("preset", "machine", "model"))]
        if len(alike) < 2 or (row["runs"] < 2 and preset != BASELINE):
            continue
        words = []
        for metric in shown_in("record"):
            values = [value for other in alike for value in other.get(metric.key, ()) if value is not None]
            if values:
                unit = metric.unit.partition(" per ")[0]
                words.append(f"{metric.label} {digits(min(values))} to {digits(max(values))} {unit}")
        total = sum(other["runs"] for other in alike)
        lines.append(f"Over {len(alike)} campaigns on this kind of machine, {total} runs at several commits "
                     f"({NOISE_FILE}): {escape(preset)} {', '.join(words)}.")
    return lines
