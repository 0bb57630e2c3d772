"""Numbers, sentences and table rows in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ...measurement.result import is_na

BLANK = "___"


def digits(value: float) -> str:
    """A number with one, two or four decimals. Smaller numbers get more."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A change in percent with its sign, or n/a."""
    return "n/a" if value is None else f"{round(value, 1) + 0.0:+.1f}%"  # + 0.0: no -0.0


def share_text(value: Any, places: int = 3) -> str:
    """A number with `places` decimals, or n/a with the reason."""
    return f"n/a ({value['reason']})" if is_na(value) else f"{value:.{places}f}"


def escape(text: Any) -> str:
    """Any text as one line of Markdown that shows it literally: no markup, no HTML, no blank."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Within a word an underscore is plain text in Markdown, and names are full of them.
    return re.sub(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def sentence(text: Any) -> str:
    """Escape `text` and end it with a full stop. It begins with a capital, unless with a name or a symbol."""
    text = str(text).strip().rstrip(" .;")
    is_word = re.match(r"[a-z]{2,}(?![\w.=])", text) or re.match(r"an? ", text)
    return f"{escape(text[:1].upper() + text[1:] if is_word else text)}."


def bullets(lines: Iterable[str]) -> str:
    """A list with one bullet per line."""
    return "\n".join(f"- {line}" for line in lines)


def first_cell(line: str) -> str:
    """The first cell of a table row, or empty."""
    return line.split("|")[1].strip() if line.startswith("|") else ""


def table_row(line: str, values: Sequence[str]) -> str:
    """Fill the blanks of a table row in order. An n/a replaces both number and unit. Brackets after a number
    move behind the unit.
    """
    cells, todo = line.split("|"), iter(values)
    for index, cell in enumerate(cells):
        if BLANK in cell:
            value = next(todo)
            number, space, more = value.partition(" (")
            cells[index] = f" {value} " if value.startswith("n/a") else \
                cell.replace(BLANK, number).rstrip() + f"{space}{more} "
    return "|".join(cells)
