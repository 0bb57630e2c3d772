"""Checks of values that need no config: their type, as YAML read them, text that can be written, and when
prompts switch. No torch.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Mapping, Sequence

from .errors import UserError


def unknown_key(key: str, known: list[str]) -> str:
    """What to say of `key`, with the known key that it resembles most."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (
        f" (did you mean {close[0]!r}?)" if close else " (README lists the keys)"
    )


def coerce(key: str, value: Any, kind: str) -> Any:
    """Check `value` against the annotation `kind`; lists become tuples, integers are accepted for floats.

    Raises:
        UserError: naming `key`, the value and, for a wrong type, what to write.
    """
    base = kind.removesuffix(" | None")
    if value is None:
        if kind != base:
            return None
        raise UserError(f"{key}: it is empty; write a value of type {base}.")
    if base.startswith("tuple["):
        element = base[len("tuple["):].split(",")[0]
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
            raise UserError(f"{key}: {value!r} is not a list; write [a, b, ...].")
        return tuple(coerce(f"{key}[{i}]", item, element) for i, item in enumerate(value))
    if base == "float" and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**53:
            raise UserError(f"{key}: {str(value)[:24]}... is too large; it must be at most {2**53}.")
        return float(value)
    expected = {"int": int, "float": float, "str": str, "bool": bool}[base]
    if type(value) is not expected:
        hint = _type_hint(value, base)
        raise UserError(f"{key}: {value!r} is of type {type(value).__name__}, expected {base}; {hint}.")
    if base == "str":
        return whole_text(value, key)
    if base == "float" and (value != value or value in (float("inf"), float("-inf"))):
        raise UserError(f"{key}: {value} is not a finite number.")
    return value


def _type_hint(value: Any, base: str) -> str:
    """What to write in place of `value`, which is not of type `base`."""
    if base == "bool":
        return "write true or false"
    if base == "str":
        booleans = "YAML reads bare yes, no, on and off as booleans: " if isinstance(value, bool) else ""
        return f"{booleans}put quotes around it"
    text = value.strip() if isinstance(value, str) else str(value)
    number = re.fullmatch(r"([+-]?\d+)(\.\d*)?(?:[eE]([+-]?)(\d{1,2}))?", text, re.ASCII)
    if not number or isinstance(value, bool):
        return "write a whole number, such as 4" if base == "int" else "write a number, such as 2.5"
    if base == "int":
        whole = float(text).is_integer() and abs(float(text)) < 2**53
        return f"write {int(float(text))}" if whole else "write a whole number"
    digits, fraction, sign, exponent = number.groups()
    plain = digits + (fraction or ".0") + (f"e{sign or '+'}{exponent}" if exponent else "")
    return f"write {text} without quotes" if plain == text else f"YAML reads {text} as text: write {plain}"


def whole_text(text: str, where: str) -> str:
    """`text` with every pair of surrogates, as JSON and YAML escape them, as the one character that it means.

    Raises:
        UserError: naming `where`: half a pair is no character, and no file could hold it.
    """
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        half = next(character for character in _paired(text) if "\ud800" <= character <= "\udfff")
        raise UserError(
            f"{where}: {text!a} holds {half!a}, half of a character, which cannot be written as UTF-8; write "
            "the whole character, or leave it out."
        ) from None


def _paired(text: str) -> str:
    """`text` with its pairs of surrogates joined; halves stay."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def check_texts(value: Any, where: str) -> Any:
    """`whole_text` of every text in a plain value: itself, or in lists and mappings, keys included.

    Raises:
        UserError: naming the place below `where`.
    """
    if isinstance(value, str):
        return whole_text(value, where)
    if isinstance(value, list):
        return [check_texts(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        whole = {check_texts(key, f"{where}, a key"): item for key, item in value.items()}
        return {key: check_texts(item, f"{where}, {key}") for key, item in whole.items()}
    return value


def check_switches(indices: tuple[int, ...], prompts: int, where: str) -> None:
    """Check that `indices` (latent frames) rise and are one fewer than the prompts.

    Raises:
        UserError: naming `where`, the value and the remedy.
    """
    if len(indices) != prompts - 1:
        raise UserError(
            f"{where}: {len(indices)} switch frames for {prompts} prompts; {prompts} prompts need "
            f"{prompts - 1}."
        )
    if any(f < 0 for f in indices) or any(a >= b for a, b in zip(indices, indices[1:])):
        raise UserError(f"{where}: {list(indices)} must rise strictly and not be negative.")


def check_switches_fit(indices: Sequence[int], blocks: int, block_frames: int) -> None:
    """Check that a video of `blocks` blocks serves every switch: each takes effect at the next block
    boundary, at most one a boundary.

    Raises:
        UserError: naming the first latent frame that comes too late.
    """
    boundary = -1
    for frame in indices:
        boundary = max(boundary + 1, -(-frame // block_frames))
        if boundary >= blocks:
            raise UserError(
                f"switch_frame_indices: {frame} takes effect at latent frame {boundary * block_frames}, past "
                f"the end of the video ({blocks * block_frames} latent frames); switch earlier or make the "
                "video longer (video_latent_frames)."
            )
