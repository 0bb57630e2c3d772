"""Download official weights:
`python -m longlive_opt.fetch DIR [--model NAME] [--what all|dit|vae|text|tiny_vae] [--dry-run]`.

Creates the layout that `longlive_opt.models.weight_files.resolve_weights(DIR, model)` reads. For
LongLive-1.3B:

    DIR/longlive_base.pt  DIR/lora.pt
    DIR/Wan2.1-T2V-1.3B/  config.json  Wan2.1_VAE.pth  models_t5_umt5-xxl-enc-bf16.pth  google/umt5-xxl/

Other models have their own transformer and share the Wan 2.1 folder. `longlive_opt.models.specs` names their
files and sources. The tiny VAEs, which the key `vae` chooses, fit all of these models. `--what tiny_vae`
fetches them, `all` does not: DIR/taew2_1.pth and DIR/lighttaew2_1.pth.

Files are downloaded to DIR/.fetch and moved into place after their size and SHA-256 match the hub's. After an
interruption, run the same command again: finished files are kept, and the interrupted file starts again.
Existing files are checked and never overwritten. Needs no torch.

No revision is pinned: the current one of each repository is fetched. DIR/fetched.json records it for every
file, with size and SHA-256.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Sequence

from .errors import UserError
from .files import atomic_path, file_sha256, read_json
from .models.specs import FETCH_COMMAND, LONGLIVE, MODELS, TINY_VAES, Source

logger = logging.getLogger(__name__)

STAGING = ".fetch"
RECORD = "fetched.json"
PARTIAL = ".incomplete"
SPARE_BYTES = 1 << 30
FETCHED = tuple(name for name, spec in MODELS.items() if spec.checkpoint.sources)
PARTS = ("all", "dit", "vae", "text", "tiny_vae")


@dataclass(frozen=True)
class HubFile:
    """Size and SHA-256 as the hub states them; `sha256` is None outside large-file storage."""

    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class Download:
    """One file to fetch: its source, its destination relative to DIR, and its expected size and hash."""

    repo: str
    revision: str
    path: str
    target: str
    file: HubFile


class Hub(Protocol):
    """The methods needed from a model hub; tests use a fake one."""

    def files(self, repo: str) -> tuple[str, dict[str, HubFile]]:
        """The current revision of `repo` and its files by path."""

    def download(self, repo: str, revision: str, path: str, folder: Path) -> Path:
        """Download one file to `folder` and return its path."""


class HuggingFaceHub:
    """The Hugging Face hub through its own client, which retries.

    Raises:
        UserError: huggingface_hub is not installed (on construction), or the client reports an error (later).
    """

    def __init__(self) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import errors
        except ImportError as error:
            raise UserError("fetch: a package is missing; run 'pip install huggingface_hub'.") from error
        self._hub = huggingface_hub
        # The client changed its HTTP library twice; errors.HTTPError is the base class of either one.
        self._errors = (OSError, errors.EntryNotFoundError, errors.HTTPError)

    def files(self, repo: str) -> tuple[str, dict[str, HubFile]]:
        try:
            info = self._hub.HfApi().model_info(repo, files_metadata=True)
        except self._errors as error:
            raise _hub_error(repo, error) from error
        return info.sha, {file.rfilename: HubFile(file.size, file.lfs.sha256 if file.lfs else None)
                          for file in info.siblings}

    def download(self, repo: str, revision: str, path: str, folder: Path) -> Path:
        try:
            return Path(self._hub.hf_hub_download(repo, path, revision=revision, local_dir=folder))
        except self._errors as error:
            raise _hub_error(f"{repo}/{path}", error) from error


def _hub_error(what: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return UserError(f"fetch: could not get {what} from the Hugging Face hub ({reason}); check the network "
                     "and the free space, then run again: finished files are kept; or place the files by "
                     f"hand as shown by '{FETCH_COMMAND} --help'.")


def _sources(what: str, model: str) -> list[Source]:
    if what == "tiny_vae":
        return [spec.source for spec in TINY_VAES.values()]
    return [source for source in MODELS[model].checkpoint.sources if what in ("all", source.part)]


def plan(hub: Hub, what: str = "all", model: str = LONGLIVE) -> list[Download]:
    """Ask the hub for every file of the part `what` of `model`.

    Raises:
        UserError: `what` or `model` is unknown, the hub cannot be reached, or a repository lacks a file.
    """
    if model not in FETCHED:
        raise UserError(f"model: {model!r} cannot be fetched; choose one of {', '.join(FETCHED)}.")
    if what not in PARTS:
        raise UserError(f"what: {what!r} is unknown; choose one of {', '.join(PARTS)}.")
    sources = _sources(what, model)
    listings = {repo: hub.files(repo) for repo in dict.fromkeys(source.repo for source in sources)}
    downloads = []
    for source in sources:
        revision, files = listings[source.repo]
        is_folder = source.path.endswith("/")
        paths = sorted(p for p in files if p == source.path or is_folder and p.startswith(source.path))
        if not paths:
            raise UserError(f"fetch: {source.repo} has no {source.path} at revision {revision}; look for it "
                            f"on the repository's page and place it as DIR/{source.target}.")
        for path in paths:
            target = source.target + path.removeprefix(source.path)
            if ".." in target.split("/") or "\\" in target or "\0" in target:
                raise UserError(f"fetch: {source.repo} lists {path!a}, which would leave the folder; do not "
                                "use this hub, and check HF_ENDPOINT.")
            downloads.append(Download(source.repo, revision, path, target, files[path]))
    return downloads


def missing_in(folder: Path, downloads: Sequence[Download]) -> list[Download]:
    """Log all sizes and return the downloads that are not in `folder` yet.

    Raises:
        UserError: the disk has too little free space.
    """
    missing = [item for item in downloads if not (folder / item.target).exists()]
    for item in downloads:
        state = "to fetch" if item in missing else "present"
        logger.info("%10s  %-8s  %s", _size(item.file.nbytes), state, item.target)
    staged = sum(path.stat().st_size for path in (folder / STAGING).rglob("*")
                 if path.is_file() and path.suffix != PARTIAL)
    needed = sum(item.file.nbytes for item in missing) - staged + SPARE_BYTES
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if missing and free < needed:
        raise UserError(f"fetch: {_size(needed)} are needed, but the disk of {folder} has {_size(free)} "
                        "free; free some space or name a folder on another disk.")
    return missing


def _remove_partial(staging: Path) -> None:
    """Remove files that broke off: the hub's client starts them again under another name."""
    for path in staging.rglob(f"*{PARTIAL}") if staging.is_dir() else ():
        path.unlink(missing_ok=True)


def fetch(folder: Path, hub: Hub, downloads: Sequence[Download]) -> list[Path]:
    """Download every missing file to `folder`, check the existing ones, and return all paths.

    Raises:
        UserError: no network, too little space, an existing file that differs, or a download that fails its
            check.
    """
    _remove_partial(folder / STAGING)
    missing = missing_in(folder, downloads)
    for item in downloads:
        if item not in missing:
            logger.info("checking %s", item.target)
            problem = _mismatch(folder / item.target, item.file)
            if problem:
                raise UserError(f"fetch: {folder / item.target} {problem}, so it is not the official file; "
                                "move it away and run again.")
            _record(folder, item, new=False)
    for item in missing:
        logger.info("fetching %s from %s", item.target, item.repo)
        staging = folder / STAGING / item.repo.replace("/", "--")
        arrived = hub.download(item.repo, item.revision, item.path, staging)
        problem = _mismatch(arrived, item.file)
        if problem:
            arrived.unlink()
            raise UserError(f"fetch: the download of {item.target} {problem}; it was removed, run again.")
        (folder / item.target).parent.mkdir(parents=True, exist_ok=True)
        os.replace(arrived, folder / item.target)
        _record(folder, item)
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    return [folder / item.target for item in downloads]


def _record(folder: Path, item: Download, new: bool = True) -> None:
    """Write to `RECORD` where a file comes from. A file that was there before (not `new`) keeps its entry, or
    gets that of the revision with which it was compared.
    """
    known: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        known = read_json(folder / RECORD, "delete it")
    known = known if isinstance(known, dict) else {}
    if not new and item.target in known:
        return
    known[item.target] = {"repo": item.repo, "revision": item.revision, "path": item.path,
                          "bytes": item.file.nbytes, "sha256": item.file.sha256}
    with atomic_path(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _mismatch(path: Path, expected: HubFile) -> str | None:
    """Describe what is wrong with the file; None if nothing is."""
    nbytes = path.stat().st_size
    if nbytes != expected.nbytes:
        return f"has {nbytes} bytes instead of the hub's {expected.nbytes}"
    if expected.sha256 is not None and file_sha256(path) != expected.sha256:
        return "does not have the hub's SHA-256"
    return None


def _size(nbytes: int) -> str:
    if nbytes < 1e4:
        return f"{nbytes} B"
    return f"{nbytes / 1e6:.2f} MB" if nbytes < 1e8 else f"{nbytes / 1e9:.2f} GB"


def main(argv: Sequence[str] | None = None, hub: Hub | None = None) -> int:
    """Run the command line. Exit codes: 0 done, 1 failed with one sentence, 130 interrupted."""
    parser = argparse.ArgumentParser(prog=FETCH_COMMAND, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="destination folder")
    parser.add_argument("--model", choices=FETCHED, default=LONGLIVE,
                        help="model to fetch (default: %(default)s)")
    parser.add_argument("--what", choices=PARTS, default="all",
                        help="part to fetch; all leaves out the tiny VAEs (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only show sizes and check free space")
    args = parser.parse_args(argv)
    folder = args.folder.expanduser()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        hub = hub or HuggingFaceHub()
        try:
            downloads = plan(hub, args.what, args.model)
        except UserError:
            if args.dry_run:
                _log_recorded_sizes(args.what, args.model)
            raise
        if args.dry_run:
            missing_in(folder, downloads)
        else:
            fetch(folder, hub, downloads)
            logger.info("done; use it with weights: %s", folder)
    except UserError as error:
        logger.error("error: %s", error)
        return 1
    except OSError as error:
        logger.error("error: fetch: %s (%s); name a folder that you can write to.", folder, error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; run the same command again: finished files are kept, the interrupted one "
                     "starts again.")
        return 130
    return 0


def _log_recorded_sizes(what: str, model: str) -> None:
    for source in _sources(what, model):
        size = "unknown" if source.approx_bytes is None else _size(source.approx_bytes)
        logger.info("%10s  recorded  %s", size, source.target)


if __name__ == "__main__":
    sys.exit(main())
