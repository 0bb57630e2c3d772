"""Read the log and the check that training writes, and refuse damaged ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import parse_json
from ...measurement.result import is_finite, lookup, number

LOG = "training/log.jsonl"
CHECK = "check.json"
ROW_KEYS = ("stage", "step", "progress", "ms_per_step")
"""The keys of a log row that are not curves."""

Row = dict[str, Any]


def train_command(name: str) -> str:
    """The command that makes a log."""
    return f"python -m longlive_opt.tiny.training --out {name} --device cuda"


def check_command(name: str) -> str:
    """The command that makes a check."""
    return f"{train_command(name)} --stage check"


def read_log(folder: str | Path, name: str = "") -> list[Row]:
    """The rows of a training log, without those that a resumed stage repeated.

    Args:
        name: the name of the folder in messages.

    Raises:
        UserError: the log does not exist, or one of its lines is damaged.
    """
    path, name = Path(folder) / LOG, name or str(folder)
    text = _read(path, f"train the model first: {train_command(name)}")
    rows: dict[str, list[Row]] = {}
    for line, content in enumerate(text.splitlines(), 1):
        row = _parse(content)
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) \
                or not all(is_finite(row.get(key)) for key in ROW_KEYS[1:]) \
                or not all(is_finite(value) for key, value in row.items() if key != "stage"):
            raise UserError(f"{path}: line {line} is damaged; delete that line, or delete the folder "
                            f"{name}/training and train again: {train_command(name)}")
        stage = rows.setdefault(row["stage"], [])
        while stage and stage[-1]["step"] >= row["step"]:  # resumed from a checkpoint before it
            stage.pop()
        stage.append(row)
    if not rows:
        raise UserError(f"{path}: is empty; train the model first: {train_command(name)}")
    return [row for stage in rows.values() for row in stage]


def read_check(folder: str | Path, name: str = "") -> dict[str, Any]:
    """The content of check.json, with `lost` added if videos of a minute were evaluated.

    Args:
        name: the name of the folder in messages.

    Raises:
        UserError: the check does not exist, or is damaged.
    """
    path, name = Path(folder) / CHECK, name or str(folder)
    check = _parse(_read(path, f"check the weights first: {check_command(name)}"))
    parts = [check, *variants_of(check).values()] if isinstance(check, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts) or not lookup(check, "plain.videos") \
            and not lookup(check, "switch.videos") and not lookup(check, "long.videos"):
        raise UserError(f"{path}: is damaged, or not a check; make it again: {check_command(name)}")
    for part in parts:
        first, last = number(part, "long.first"), number(part, "long.last")
        if first is not None and last is not None:
            part["long"].setdefault("lost", round(first - last, 4))
    return check


def variants_of(check: Mapping[str, Any]) -> Mapping[str, Any]:
    """The evaluations without a part of the model, by name."""
    variants = check.get("variants")
    return variants if isinstance(variants, Mapping) else {}


def _read(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from error


def _parse(text: str) -> Any:
    """JSON, or None for anything else, including NaN and infinity."""
    try:
        return parse_json(text, "", "")
    except UserError:
        return None
