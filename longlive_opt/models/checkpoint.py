"""Untrusted weights files: opened lazily, checked from the first bytes, refused with a short reason.

Torch pickles are only ever opened with `weights_only=True`, so a file that holds anything but tensors is
refused before any of its code runs. Tensors stay in the memory-mapped file until they are read.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import atomic_path
from .weight_files import check_start, remedy

LISTED_NAMES = 20
# The dtypes that weights may have: safetensors' name -> torch's name.
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The errors that torch.load has raised on damaged files.
DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
           AttributeError, AssertionError, RecursionError, MemoryError, ArithmeticError, NotImplementedError,
           struct.error, zipfile.BadZipFile)


class Header(NamedTuple):
    """Shape and dtype of a stored tensor; for other objects, no shape and the type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES.values()


@dataclass(frozen=True)
class Checkpoint:
    """An open weights file: `headers` by name; `read` returns one tensor on the CPU, possibly a view."""

    path: Path
    headers: Mapping[str, Header]
    read: Callable[[str], Tensor]


def open_checkpoint(path: Path, containers: tuple[str | None, ...] = (None,)) -> Checkpoint:
    """Open a safetensors file or a torch pickle without reading its tensors.

    The wrapper prefix `model.` and FSDP's `_fsdp_wrapped_module.` are removed from the names.

    Args:
        containers: keys that may hold a pickle's tensors, in order of preference; None means that the file
            itself is the flat dictionary, as in every safetensors file.

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
            raise UserError(f"{path}: {stored[plain]} and {name} are one tensor; the file is inconsistent.")
        stored[plain] = name
    return Checkpoint(path, {plain: headers[name] for plain, name in stored.items()},
                      lambda plain: read(stored[plain]))


def raise_problems(path: Path, problems: Mapping[str, list[str]],
                   advice: str = "Choose `model` and `weights` that belong together.") -> None:
    """Raise one UserError that lists the names for each kind of problem and ends with `advice`; do nothing if
    there are none.
    """
    found = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{path}: does not fit the model; {'; '.join(found)}. {advice}")


def listed(names: Iterable[str]) -> str:
    """List at most 20 names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
                 ) -> None:
    """Write a safetensors file atomically, with the permissions of any other new file.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, temporary, dict(metadata or {}))
        except safetensors.SafetensorError as error:  # of the disk: our tensors are well-formed
            raise OSError(str(error)) from error
        temporary.chmod(mode)


def _open_safetensors(path: Path) -> tuple[dict[str, Header], Callable[[str], Tensor]]:
    try:
        file = safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError, *DAMAGED) as error:
        raise UserError(f"{path}: damaged, cut short or not a safetensors file ({error}); "
                        f"{remedy(path)}.") from error
    headers = {}
    for name in file.keys():
        tensor = file.get_slice(name)
        dtype = tensor.get_dtype()
        headers[name] = Header(tuple(tensor.get_shape()), FLOAT_DTYPES.get(dtype, dtype))
    return headers, file.get_tensor


def _load_pickle(path: Path) -> Any:
    try:
        # The format of torch before 1.6 is not a zip archive and cannot be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGED as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(f"{path}: it asks for {refused[1]}, which is not a tensor and could run code; "
                            "the file was refused and none of its code was run.") from error
        reason = re.split(r"\.\s|\n", str(error))[0]  # the rest is torch's advice to switch the check off
        raise UserError(f"{path}: damaged, cut short or not a torch file ({reason}); "
                        f"{remedy(path)}.") from error


def _select(content: Any, path: Path, containers: tuple[str | None, ...]) -> Mapping[str, Any]:
    """Return the dictionary of tensors inside a pickle's content."""
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
    if isinstance(value, Tensor) and value.is_nested:
        return Header((), "a nested tensor")
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.device.type != "cpu"):
        words = f"a tensor without plain memory, {value.layout} on {value.device}"
        return Header(tuple(value.shape), words)
    if isinstance(value, Tensor):
        return Header(tuple(value.shape), str(value.dtype).removeprefix("torch."))
    return Header((), type(value).__name__)
