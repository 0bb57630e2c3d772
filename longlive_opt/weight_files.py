"""Which files a weights folder holds. Needs no torch, so that a command line can refuse a folder at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

from .errors import UserError
from .fetch import FETCH_COMMAND, WAN_FOLDER, file_sha256
from .inputs import project_path

LAYOUT = {"dit": "longlive_base.pt", "lora": "lora.pt", "vae": f"{WAN_FOLDER}/Wan2.1_VAE.pth",
          "text": f"{WAN_FOLDER}/models_t5_umt5-xxl-enc-bf16.pth",
          "tokenizer": f"{WAN_FOLDER}/google/umt5-xxl"}
# Our own layout, a plain copy of the hub's repositories, and the folders that LongLive's README asks for.
FOLDERS = ("", "models", "longlive_models/models", "wan_models")


@dataclass(frozen=True)
class WeightFiles:
    """The files of one weights folder; without `root` the weights are random."""

    root: Path | None = None
    dit: Path | None = None
    lora: Path | None = None
    vae: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None

    @property
    def kind(self) -> str:
        """`random`, or `files`: their layout is the official one, only their SHA-256 can tell if they are."""
        return "random" if self.root is None else "files"

    def sha256(self, parts: Iterable[str] = tuple(LAYOUT)) -> dict[str, str]:
        """SHA-256 of the files of `parts`; reads them, about a second per GB."""
        paths = {part: getattr(self, part) for part in parts}
        return {part: file_sha256(path) for part, path in paths.items() if path and path.is_file()}


def resolve_weights(weights: str | Path, parts: Iterable[str] = tuple(LAYOUT)) -> WeightFiles:
    """Find the files for `weights`: "random", or a folder that `longlive_opt.fetch` or LongLive filled.

    A relative folder is seen from the project's. Where a `.safetensors` file stands beside the torch file of
    the same stem, it is the one taken.

    Raises:
        UserError: no such folder, or a part is missing; names every missing file and the command to fetch it.
    """
    if str(weights) == "random":
        return WeightFiles()
    root = project_path(Path(weights).expanduser())
    if not root.is_dir():
        raise UserError(f"weights: {str(weights)!r} is neither 'random' nor a folder; get the files with "
                        f"'{FETCH_COMMAND} DIR' and write weights: DIR.")
    found = {part: _find(root, LAYOUT[part]) for part in parts}
    missing = [LAYOUT[part] for part, path in found.items() if path is None]
    if missing:
        raise UserError(f"weights: {root} lacks {', '.join(missing)}; get what is missing with "
                        f"'{FETCH_COMMAND} {root}'.")
    return WeightFiles(root, **found)


def _find(root: Path, name: str) -> Path | None:
    for folder in FOLDERS:
        path = root / folder / name
        for candidate in (path.with_suffix(".safetensors"), path):
            if candidate.exists():
                return candidate
    return None
