"""Weights files of strangers: opened lazily, checked from the first bytes on, explained in one sentence.

Torch pickles are opened with `weights_only=True` and nothing else: a file that holds anything but tensors is
refused before any of it runs. Tensors stay in the file (memory-mapped) until they are read.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple

import safetensors
import torch
from torch import Tensor

from ..errors import UserError
from .weight_files import check_start, remedy

LISTED_NAMES = 20
# The dtypes that can be weights, as safetensors and as torch call them.
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The errors that torch.load was seen to raise on damaged files.
DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
           AttributeError, AssertionError)


class Header(NamedTuple):
    """Shape and dtype of a stored tensor (of another object: no shape and its type)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES.values()


@dataclass(frozen=True)
class Checkpoint:
    """An open weights file: `headers` by name, and `read` for one tensor on the CPU (perhaps a view)."""

    path: Path
    headers: Mapping[str, Header]
    read: Callable[[str], Tensor]


def open_checkpoint(path: Path, containers: tuple[str | None, ...] = (None,)) -> Checkpoint:
    """Open a safetensors file or a torch pickle without reading its tensors.

    The wrapper prefix `model.` and FSDP's `_fsdp_wrapped_module.` are removed from the names.

    Args:
        containers: keys under which a pickle may keep its tensors, the preferred one first; None stands for
            the file itself being the flat dictionary, as every safetensors file is.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    check_start(path)
    if path.suffix == ".safetensors":
        if None not in containers:
            raise UserError(f"{path}: a safetensors file has no key {containers[0]}; use the torch file.")
        headers, read = _open_safetensors(path)
    else:
        tensors = _select(_load_pickle(path), path, containers)
        headers = {name: _header(value) for name, value in tensors.items()}
        read = tensors.__getitem__
    stored: dict[str, str] = {}
    for name in headers:
        plain = name.replace("_fsdp_wrapped_module.", "").removeprefix("model.")
        if plain in stored:
            raise UserError(f"{path}: {stored[plain]} and {name} name one tensor; the file is inconsistent.")
        stored[plain] = name
    return Checkpoint(path, {plain: headers[name] for plain, name in stored.items()},
                      lambda plain: read(stored[plain]))


def raise_problems(path: Path, problems: Mapping[str, list[str]]) -> None:
    """Raise one UserError that lists the names under every kind of problem, if there are any."""
    found = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{path}: does not fit the model; {'; '.join(found)}. Choose `model` and `weights` "
                        "that belong together.")


def listed(names: Iterable[str]) -> str:
    """At most 20 names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


def _open_safetensors(path: Path) -> tuple[dict[str, Header], Callable[[str], Tensor]]:
    try:
        file = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged, cut short or no safetensors file ({error}); "
                        f"{remedy(path)}.") from error
    headers = {}
    for name in file.keys():
        tensor = file.get_slice(name)
        dtype = tensor.get_dtype()
        headers[name] = Header(tuple(tensor.get_shape()), FLOAT_DTYPES.get(dtype, dtype))
    return headers, file.get_tensor


def _load_pickle(path: Path) -> Any:
    try:
        # The format of torch before 1.6 is no zip archive and cannot be memory-mapped; it is read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGED as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(f"{path}: it asks for {refused[1]}, which is no tensor and could run code; the "
                            "file was refused and nothing of it was run.") from error
        reason = re.split(r"\.\s|\n", str(error))[0]  # what follows is torch's advice to switch the check off
        raise UserError(f"{path}: damaged, cut short or no torch file ({reason}); "
                        f"{remedy(path)}.") from error


def _select(content: Any, path: Path, containers: tuple[str | None, ...]) -> Mapping[str, Any]:
    """The dictionary of tensors inside what a pickle held."""
    if isinstance(content, Mapping):
        for key in containers:
            tensors = content if key is None else content.get(key)
            if (isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
                    and any(isinstance(value, Tensor) for value in tensors.values())):
                return tensors
        found = f"a dictionary with the keys {listed(map(repr, content)) or '(none)'}"
    else:
        found = f"an object of type {type(content).__name__}"
    expected = " or ".join("a flat dictionary of named tensors" if key is None else f"the key {key!r}"
                           for key in containers)
    raise UserError(f"{path}: holds {found}, expected {expected}.")


def _header(value: Any) -> Header:
    if isinstance(value, Tensor):
        return Header(tuple(value.shape), str(value.dtype).removeprefix("torch."))
    return Header((), type(value).__name__)
