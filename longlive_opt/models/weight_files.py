"""Find the files of a weights folder and check their first bytes. Needs no torch, so a command line can
refuse a folder at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable

from ..errors import UserError
from ..files import atomic_path, file_sha256, project_path
from .specs import FETCH_COMMAND, LONGLIVE, MODELS, TINY_VAES, ModelSpec

TINY_WEIGHTS = "weights/tiny"
PARTS = ("dit", "lora", "vae", "text", "tokenizer")
DIGESTS_FILE = "outputs/.sha256.json"
"""SHA-256 of large files that were already read, in the project's folder: {path: [identity, digest]}."""
KEPT_FROM_BYTES = 2**28  # reading a smaller file takes less than a second
# The project's own layout, a plain copy of the hub's repositories, and the folders from the models' READMEs.
FOLDERS = ("", "models", "longlive_models/models", "wan_models", "checkpoints", "chunkwise")
SHARDS = ("*.index.json", "*-00001-of-*")
JOIN_SHARDS = ("python -c \"import glob; from safetensors.torch import load_file, save_file; "
               "save_file({name: tensor for file in glob.glob('*-of-*.safetensors') for name, tensor in "
               "load_file(file).items()}, 'NAME.safetensors')\", with NAME as in the name that is missing")
_PLACES = tuple(dict.fromkeys(place for spec in MODELS.values() for place in spec.checkpoint.files.values()))


@dataclass(frozen=True)
class WeightFiles:
    """The files of one weights folder; without `root` the weights are random.

    `containers` are the keys that may hold the transformer's tensors in its torch file
    (`specs.CheckpointFiles`).
    """

    root: Path | None = None
    dit: Path | None = None
    lora: Path | None = None
    vae: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    containers: tuple[str | None, ...] = (None,)

    @property
    def kind(self) -> str:
        """`random` or `files`. Only their SHA-256 shows whether files are the official ones."""
        return "random" if self.root is None else "files"

    def sha256(self, parts: Iterable[str] = PARTS) -> dict[str, str]:
        """SHA-256 of the files of `parts`. A file is read once, at about a second per GB, and again if its
        size, times or inode change.
        """
        paths = {part: getattr(self, part) for part in parts}
        return {part: known_sha256(path) for part, path in paths.items() if path and path.is_file()}


def known_sha256(path: Path) -> str:
    """SHA-256 of a file, computed only if the file is new or has changed. Digests of large files are stored
    in `DIGESTS_FILE`; if that is impossible, the file is read each time.
    """
    path = path.resolve()
    identity = _identity(path)
    if identity[0] < KEPT_FROM_BYTES:
        return _read_sha256(path, identity)
    store, kept = project_path(DIGESTS_FILE), {}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(store.read_text(encoding="utf-8"))
    kept = kept if isinstance(kept, dict) else {}
    if (known := kept.get(str(path))) and known[0] == list(identity):
        return known[1]
    digest = _read_sha256(path, identity)
    if identity == _identity(path):  # nobody wrote to it in the meantime
        with contextlib.suppress(UserError, ValueError), atomic_path(store) as temporary:
            temporary.write_text(json.dumps({**kept, str(path): [identity, digest]}), encoding="utf-8")
    return digest


def _identity(path: Path) -> tuple[int, int, int, int]:
    """Values that change when a file is written, moved into place or replaced: size, both times, inode."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@functools.lru_cache(maxsize=64)
def _read_sha256(path: Path, identity: tuple[int, int, int, int]) -> str:
    return file_sha256(path)


def resolve_weights(weights: str | Path, model: ModelSpec, parts: Iterable[str] = PARTS) -> WeightFiles:
    """Find the files of `model` in `weights`: "random", or a folder filled by `longlive_opt.fetch` or by the
    model's own README. Parts that the model does not have, such as an adapter, are left out.

    A relative folder starts at the project's. If a `.safetensors` file and a torch file have the same stem,
    the `.safetensors` file is used.

    Raises:
        UserError: the folder does not exist, its parent is the weights folder, or a part is missing; names
            every missing file and the command to get it.
    """
    if str(weights) == "random":
        return WeightFiles()
    root = project_path(weights)
    places = {part: model.checkpoint.files[part] for part in parts if part in model.checkpoint.files}
    outer = _outer(root, places.values())
    if outer:
        raise UserError(f"weights: {str(weights)!r} is inside the weights folder; name its parent, "
                        f"{outer}.")
    if not root.is_dir():
        raise UserError(f"weights: {str(weights)!r} is neither 'random' nor a folder; name one, or "
                        f"{remedy(root, model=model)} first.")
    found = {part: _find(root, place) for part, place in places.items()}
    names = [Path(places[part]) for part, path in found.items() if path is None]
    if names:
        if is_tiny(root) or _is_safetensors(root):
            names = [name.with_suffix(".safetensors") if name.suffix else name for name in names]
        lacks = f"weights: {root} lacks {', '.join(map(str, names))}"
        if shard := _shard(root, names):
            raise UserError(f"{lacks}; it holds shards ({shard.name}), which are not read: join them into "
                            f"one file, in {shard.parent}: {JOIN_SHARDS}.")
        raise UserError(f"{lacks}; {remedy(root, root, model)}.")
    return WeightFiles(root, **found, containers=model.checkpoint.containers)


def _shard(root: Path, names: Iterable[Path]) -> Path | None:
    """A file of a model that was saved in several, where one of `names` was looked for; None without any."""
    places = dict.fromkeys(root / folder / name.parent for name in names for folder in FOLDERS)
    return next((path for place in places for pattern in SHARDS for path in sorted(place.glob(pattern))),
                None)


def check_weights(weights: str | Path, model: ModelSpec) -> WeightFiles:
    """Return the files of `weights` if they exist, are complete and, according to their headers, fit `model`.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if str(weights) != "random":
        _check_size(weights, model)
    files = resolve_weights(weights, model)
    if files.root is None:
        return files
    for path in (files.dit, files.lora, files.vae, files.text, files.tokenizer / "tokenizer.json"):
        if path is not None:
            check_start(path)
    return files


def tiny_vae_file(name: str, vae_weights: str | None, weights: str | Path) -> Path | None:
    """Find the file of the tiny VAE `name`; None if its weights are random.

    Args:
        vae_weights: "random", the file, or a folder that holds it. None looks in `weights`; a model of random
            weights, and the project's tiny model, whose latents no published decoder knows, get a random one.

    Raises:
        UserError: the file does not exist, is another tiny VAE's, or its first bytes are not those of
            weights.
    """
    place = str(weights if vae_weights is None else vae_weights)
    path, wanted = project_path(place), TINY_VAES[name].source.target
    if place == "random" or vae_weights is None and is_tiny(path):
        return None
    found = _find(path, wanted) if path.is_dir() else path
    if found is None or not found.exists():
        raise UserError(f"vae: {name!r} needs {wanted}, and {place!r} is no such file or folder that "
                        f"holds it; run '{_tiny_vae_command('DIR')}' and set vae_weights: DIR, or set "
                        "vae_weights: random.")
    if found.stem in TINY_VAES.keys() - {name}:
        raise UserError(f"vae: {name!r} with {found}, which expects latents of another scale; set vae: "
                        f"{found.stem}, or name another file as vae_weights.")
    check_start(found)
    return found


def _tiny_vae_command(folder: Path | str) -> str:
    return f"{FETCH_COMMAND} {folder} --what tiny_vae"


def _check_size(weights: str | Path, model: ModelSpec) -> None:
    """Refuse a transformer of another size. Torch files are not checked: reading their shapes needs torch."""
    path = _find(project_path(weights), model.checkpoint.files["dit"])
    if path is None or path.suffix != ".safetensors" or not path.is_file() or not path.stat().st_size:
        return
    header = safetensors_header(path) or {}
    dims = [tensor["shape"][0] for name, tensor in header.items()
            if name.endswith("patch_embedding.weight") and tensor.get("shape")]
    if dims and dims[0] != model.dit.dim:
        official = ", ".join(spec.name for spec in MODELS.values() if spec.checkpoint.sources)
        raise UserError(f"weights: {str(weights)!r} holds a transformer of {dims[0]} channels, but model: "
                        f"{model.name!r} has {model.dit.dim}; use {TINY_WEIGHTS} with tiny, the official "
                        f"files with {official}, or random with any.")


def check_start(path: Path) -> None:
    """Refuse a weights file whose size or first bytes are wrong.

    Raises:
        UserError: naming the file, what is wrong with it and the remedy.
    """
    problem = _problem(path)
    if problem:
        raise UserError(f"weights: {path} {problem}; {remedy(path)}.")


def _problem(path: Path) -> str | None:
    if path.is_dir():
        return "is a folder instead of a file"
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not weights (see 'git lfs pull')"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights"
    if path.suffix == ".safetensors":
        return None if safetensors_header(path) else "is damaged, cut short or not a safetensors file"
    if start.startswith(b"PK\x03\x04"):
        return None if _is_zip(path) else "is cut short"
    return None if start.startswith(b"\x80") or path.suffix == ".json" else "is not a torch file"


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # raised for some ends of a file, although it is a question
        return False


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """`shape` and `data_offsets` of every tensor by name, or None if the file is incomplete. The first 8
    bytes give the length of this JSON header, and the tensors fill the rest of the file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        rest = path.stat().st_size - 8 - length
        try:
            header = json.loads(file.read(length) if rest >= 0 else b"")
            header.pop("__metadata__", None)
            end = max(tensor["data_offsets"][1] for tensor in header.values())
            is_plain = all(type(size) is int and size >= 0 for tensor in header.values()
                           for size in tensor["shape"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
    return header if end == rest and is_plain else None


def is_tiny(path: Path) -> bool:
    """Whether `path` is, or is inside, the folder of weights that comes with the project."""
    return project_path(TINY_WEIGHTS) in (path, *path.parents)


def remedy(path: Path, folder: Path | str = "DIR", model: ModelSpec | None = None) -> str:
    """The remedy if `path`, a weights folder or a file in one (`folder`, if known), is missing or damaged.
    Fetching an official model brings torch files. These are ignored where a safetensors file exists, and do
    not fit in the folder of a small model.
    """
    if path.stem in TINY_VAES:
        return f"run '{_tiny_vae_command(folder)}'"
    if is_tiny(path):
        if model is not None and model.checkpoint.sources:
            fetch = f"{FETCH_COMMAND} DIR --model {model.name}"
            return f"name the folder of {model.name}'s weights, such as one that '{fetch}' filled"
        return f"run 'git checkout {TINY_WEIGHTS}'"
    deepest = max(len(Path(place).parts) for place in _PLACES)
    around = (path, *path.parents[:deepest + 1])
    if path.suffix == ".safetensors" or any(map(_is_safetensors, around)):
        return f"copy it again from its source, such as {TINY_WEIGHTS}"
    if model is not None and not model.checkpoint.sources:
        return f"use {TINY_WEIGHTS}, which comes with the project"
    default = model is None or model.name == LONGLIVE
    return f"run '{FETCH_COMMAND} {folder}{'' if default else f' --model {model.name}'}'"


def _is_safetensors(root: Path) -> bool:
    """Whether the weights in `root` are only safetensors files, as training writes them."""
    found = [_find(root, name) for name in _PLACES if Path(name).suffix]
    return {path.suffix for path in found if path} == {".safetensors"}


def _outer(root: Path, places: Iterable[str]) -> Path | None:
    """The folder around `root` that holds more of `places` than `root` does; None if there is none."""
    places = tuple(places)
    held = {folder: sum(_find(folder, place) is not None for place in places)
            for folder in (root, *root.parents)}
    most = max(held, key=lambda folder: held[folder])
    return None if most == root else most


def _find(root: Path, name: str) -> Path | None:
    for folder in FOLDERS:
        path = root / folder / name
        for candidate in (path.with_suffix(".safetensors"), path):
            if candidate.exists():
                return candidate
    return None
