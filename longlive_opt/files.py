"""File handling: project paths, atomic writes, strict YAML and JSON, and text that can be written. Needs no
torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import site
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, short

HOME_VARIABLE = "LONGLIVE_OPT_HOME"
DEEPEST = 50
"""Levels of lists and mappings that a file may nest: far more than any of ours has, far fewer than Python's
recursion limit."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
# What stands before a file of an installed library, of a notebook's cell, and of torch's compiler.
_PLACES = (
    (re.compile(r"(?<![\w.])/(?:[^\s'\":<>&]{1,300}/)?(?:lib/python3\.\d+|(?:site|dist)-packages)/"), ""),
    (re.compile(r"(?<![\w.])/[^\s'\":<>&]{0,300}/ipykernel_\d+/\d+\.py"), "cell"),
    (re.compile(r"(?<![\w.])/[^\s'\":<>&]{0,300}/torchinductor_[^/\s'\":<>&]{1,100}/"), "torchinductor/"),
)
_PACKAGE = Path(__file__).resolve().parent


def project_root() -> Path:
    """The project's folder: the clone that holds this package. Where the package was installed without a
    clone, $LONGLIVE_OPT_HOME or the current folder, and outputs/ goes there.
    """
    if (_PACKAGE.parent / "params").is_dir() and (_PACKAGE.parent / "notebooks").is_dir():
        return _PACKAGE.parent
    return Path(os.environ.get(HOME_VARIABLE) or Path.cwd())


def project_path(path: str | Path) -> Path:
    """Resolve a path as users write it. `~` is the home folder; a relative path starts at the project's
    folder, because JupyterLab and papermill start elsewhere. Without a clone, what the folder lacks is taken
    from the files that were installed with the package: presets, notebooks and the tiny model's weights.

    Raises:
        UserError: no file can have this name.
    """
    try:
        asked = Path(path).expanduser()
        own = project_root() / asked
        if _exists(own) or asked.is_absolute():
            return own
        return next((found for folder in _shipped_folders() if _exists(found := folder / path)), own)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{short(str(path))}: this is no path ({error}); name a file or a folder.") from error


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(error.strerror) from error
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)
    return True


def _shipped_folders() -> list[Path]:
    """Where pip puts the data files of a package: with `--target`, in an environment, or for a user."""
    bases = (_PACKAGE.parent, Path(sysconfig.get_path("data")), Path(site.getuserbase()))
    return [base / "share" / "longlive_opt" for base in bases]


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; move it into place if the body succeeds, else delete it.

    Creates the folder. Raises UserError for any OSError (disk full, read-only folder), naming path and
    remedy.
    """
    path = Path(path)
    # Same suffix: writers that choose a format by suffix (PIL, PyAV) must see it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; free space there, check its permissions, "
                        "or choose another output folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_writable(path: Path, name: str, folder: bool = False) -> None:
    """Refuse a file, or a `folder`, that could not be written after hours of work. Leaves nothing behind.

    Raises:
        UserError: naming `name`, what asked for the path, and what is in the way.
    """
    wanted, other = ("folder", "file") if folder else ("file", "folder")
    path = path.absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if there == path and there.is_dir() != folder:
        raise UserError(f"{name}: {path} is a {other}; name a {wanted}.")
    try:
        with tempfile.TemporaryFile(dir=there.parent if there == path and not folder else there):
            pass
    except OSError as error:
        raise UserError(f"{name}: {short(str(path))} cannot be written ({error.strerror}); name a {wanted} "
                        "in a place that you can write to.") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; reads all of it (about a second per GB)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one flat YAML file of parameters.

    Raises:
        UserError: the file is missing, unreadable, empty, not a mapping, or not plain YAML (`parse_yaml`).
    """
    path = project_path(path) if str(path).startswith("~") else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"{short(str(path))}: {reason}; name a YAML file with one 'key: value' per "
                        "line.") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: expected keys and values, found {found}; write one 'key: value' per line.")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """Return the plain values in a text of YAML: texts, decimal numbers, true, false, null, lists, mappings.

    What YAML would decide silently is refused: a repeated key, a number that is not decimal (0123, 0x1f,
    1:30, 1_000), a date, a tag, an alias, deep nesting.

    Raises:
        UserError: naming `where`, and the line and key if possible.
    """
    loader: _StrictLoader | None = None
    try:
        loader = _StrictLoader(text)
        loader.name = where
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark and "\n" in text.strip() else ""
        reason = printable(" ".join((getattr(error, "problem", None) or str(error)).split())[:400])
        raise UserError(f"{where}{line}: {reason}." if isinstance(error, _Refused) else
                        f"{where}{line}: this is not plain YAML ({reason}).") from error
    finally:
        if loader is not None:
            loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that builds only plain values, and only from what looks like them."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refused("this is not plain YAML: an alias (& or *); write the value at every place", event)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"this is not plain YAML: the tag {short(event.tag)}; leave it out", event)
        if self._depth > DEEPEST:
            raise _refused("too many levels of lists and mappings", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind in ("timestamp", "merge", "value"):
            raise _refused(f"YAML reads {short(node.value)} as a {kind}; put quotes around it", node)
        if kind == "int" and not re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,40})", node.value):
            raise _refused(_undecimal(node.value), node)
        if kind == "float" and re.search("[_:]", node.value):
            raise _refused(f"{short(node.value)} is not a decimal number; write it as one, or put quotes "
                           "around text", node)
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key must be a plain word", key_node)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _refused(f"the key {short(key)} occurs twice", key_node)
            seen.add(key)
        whole = {}
        content = super().construct_mapping(node, deep=True)
        for (key_node, _), (key, value) in zip(node.value, content.items()):
            line = f"{self.name} line {key_node.start_mark.line + 1}"
            key = check_texts(key, f"{line}, a key")
            whole[key] = check_texts(value, f"{line}, {key}")
        return whole


class _Refused(yaml.constructor.ConstructorError):
    """YAML that we do not take; the reason is a sentence of ours."""


def _refused(reason: str, at: yaml.Node | yaml.Event) -> yaml.YAMLError:
    return _Refused(None, None, reason, at.start_mark)


def _undecimal(text: str) -> str:
    """Explain an integer of YAML 1.1 that is not written in decimal digits."""
    if len(text) > 40:
        return f"the number {short(text)} is too long"
    try:
        value = yaml.SafeLoader("").construct_yaml_int(yaml.ScalarNode("", text))
    except ValueError:
        return f"{text} is not a decimal number; write it as one, or put quotes around text"
    digits = text.replace("_", "").lstrip("+-0") or "0"
    other = f" or {digits}" if digits.isdecimal() and digits != str(value) else ""
    return f"YAML reads {text} as {value}: write {value}{other}, or put quotes around text"


def read_json(path: Path, remedy: str, mend: bool = False) -> Any:
    """Return the plain values in a JSON file (`parse_json`).

    Raises:
        UserError: naming the file, what is wrong with it and `remedy`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from error
    return parse_json(text, str(path), remedy, mend)


def parse_json(text: str, where: str, remedy: str, mend: bool = False) -> Any:
    """Return the plain values in a text of JSON.

    What Python's reader lets through and a later step cannot use is refused: NaN and infinity, a number
    beyond a double's range, a repeated key, half a character, deep nesting.

    Args:
        mend: escape halves of characters and control characters instead (`printable`).

    Raises:
        UserError: naming `where`, what is wrong and `remedy`.
    """
    def refuse(reason: str) -> Any:
        raise UserError(f"{where}: {reason}; {remedy}")

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= 40 else refuse(f"the number {short(digits)} is too long")

    def fraction(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(f"{short(digits)} is too large")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) == len(pairs):
            return found
        names = [name for name, _ in pairs]
        return refuse(f"the key {short(next(n for n in names if names.count(n) > 1))} occurs twice")

    try:
        value = json.loads(text, parse_int=integer, parse_float=fraction, object_pairs_hook=mapping,
                           parse_constant=lambda token: refuse(f"contains {token}, which is not JSON"))
    except UserError:
        raise
    except RecursionError:
        refuse("nests too many levels of lists and objects")
    except ValueError as error:
        refuse(f"is not JSON, probably truncated ({error})")
    return check_texts(value, where, controls=True, mend=mend)


def whole_text(text: str, where: str, controls: bool = False) -> str:
    """Join every surrogate pair in `text`, as JSON and YAML escape them, into the character it encodes.

    Args:
        controls: let control characters pass, as messages of libraries have them.

    Raises:
        UserError: naming `where`. Half a pair is not a character, and no file can hold it. A control
            character other than a tab or a line's end can command a terminal.
    """
    try:
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        half = next(character for character in _paired(text) if "\ud800" <= character <= "\udfff")
        raise UserError(
            f"{where}: {short(text)} holds {half!a}, half of a character, which cannot be written as "
            "UTF-8; write the whole character, or leave it out."
        ) from None
    if not controls and (found := _CONTROLS.search(whole)):
        raise UserError(f"{where}: {short(text)} holds {found[0]!a}, a control character; leave it "
                        "out.")
    return whole


def printable(text: str) -> str:
    """`text` with control characters and halves of characters escaped, so that every file can hold it and no
    terminal obeys it. Tabs and line ends stay.
    """
    whole = _paired(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], whole)


def without_places(text: str, root: Path | None = None) -> str:
    """`text` without what its paths say of this machine: those of libraries begin at their package, those of
    the project (`root`) in its folder, others of this user at `~`. What is published passes through here.
    """
    if "/" not in text:
        return text
    for pattern, replacement in _PLACES:
        text = pattern.sub(replacement, text)
    home = Path(os.path.expanduser("~"))
    for folder, itself, inside in ((root or project_root(), ".", ""), (home, "~", "~/")):
        for place in sorted({str(folder), str(folder.resolve())}, key=len, reverse=True):
            if len(Path(place).parts) > 1:
                text = re.sub(rf"(?<![\w.]){re.escape(place)}/", inside, text)
                text = re.sub(rf"(?<![\w.]){re.escape(place)}(?![\w.-])", itself, text)
    return text


def _paired(text: str) -> str:
    """Join the surrogate pairs in `text`; keep unpaired halves."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def check_texts(value: Any, where: str, controls: bool = False, mend: bool = False, level: int = 0) -> Any:
    """Apply `whole_text`, or `printable` to `mend` them, to every string in a plain value, including items
    and keys of lists and mappings.

    Raises:
        UserError: naming the path below `where`; or more than `DEEPEST` levels.
    """
    if isinstance(value, str):
        return printable(value) if mend else whole_text(value, where, controls)
    if level > DEEPEST:
        raise UserError(f"{where[:200]}: there are more than {DEEPEST} levels of lists and mappings; write "
                        "plain values.")
    if isinstance(value, list):
        return [check_texts(item, f"{where}[{i}]", controls, mend, level + 1)
                for i, item in enumerate(value)]
    if isinstance(value, dict):
        whole = {check_texts(key, f"{where}, a key", controls, mend, level + 1): item
                 for key, item in value.items()}
        return {key: check_texts(item, f"{where}, {key}", controls, mend, level + 1)
                for key, item in whole.items()}
    return value
