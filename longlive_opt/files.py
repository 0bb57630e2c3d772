"""File handling: project paths, atomic writes, strict YAML, and text that can be written. Needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

HOME_VARIABLE = "LONGLIVE_OPT_HOME"
_PACKAGE = Path(__file__).resolve().parent


def project_root() -> Path:
    """The project's folder: the clone that holds this package. Where the package was installed without a
    clone, $LONGLIVE_OPT_HOME or the current folder, and outputs/ goes there.
    """
    if (_PACKAGE.parent / "params").is_dir() and (_PACKAGE.parent / "notebooks").is_dir():
        return _PACKAGE.parent
    return Path(os.environ.get(HOME_VARIABLE) or Path.cwd())


def project_path(path: str | Path) -> Path:
    """Resolve `path` from the project's folder if relative: JupyterLab and papermill start elsewhere. Without
    a clone, what the folder lacks is taken from the files that were installed with the package: presets,
    notebooks and the tiny model's weights.
    """
    own = project_root() / path
    if own.exists() or Path(path).is_absolute():
        return own
    return next((found for folder in _shipped_folders() if (found := folder / path).exists()), own)


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; reads all of it (about a second per GB)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one flat YAML file of parameters.

    Raises:
        UserError: the file is missing, unreadable, not YAML, empty, not a mapping, repeats a key, or contains
            text that cannot be written.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"{path}: {reason}; name a YAML file with one 'key: value' per line.") from error
    try:
        loader = _StrictLoader(text)
        loader.name = str(path)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: this is not plain YAML ({reason}).") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: expected keys and values, found {found}; write one 'key: value' per line.")
    return content


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key; YAML itself would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        content = super().construct_mapping(node, deep=True)
        for (key_node, _), (key, value) in zip(node.value, content.items()):
            line = f"{self.name} line {key_node.start_mark.line + 1}"
            check_texts(key, f"{line}, a key")
            content[key] = check_texts(value, f"{line}, {key}")
        return content


def whole_text(text: str, where: str) -> str:
    """Join every surrogate pair in `text`, as JSON and YAML escape them, into the character it encodes.

    Raises:
        UserError: naming `where`. Half a pair is not a character, and no file can hold it.
    """
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        half = next(character for character in _paired(text) if "\ud800" <= character <= "\udfff")
        raise UserError(
            f"{where}: {text!a} holds {half!a}, half of a character, which cannot be written as UTF-8; "
            "write the whole character, or leave it out."
        ) from None


def _paired(text: str) -> str:
    """Join the surrogate pairs in `text`; keep unpaired halves."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def check_texts(value: Any, where: str) -> Any:
    """Apply `whole_text` to every string in a plain value, including items and keys of lists and mappings.

    Raises:
        UserError: naming the path below `where`.
    """
    if isinstance(value, str):
        return whole_text(value, where)
    if isinstance(value, list):
        return [check_texts(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        whole = {check_texts(key, f"{where}, a key"): item for key, item in value.items()}
        return {key: check_texts(item, f"{where}, {key}") for key, item in whole.items()}
    return value
