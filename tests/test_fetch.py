"""The download command against a hub made of dictionaries; the network is never touched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import longlive_opt
from longlive_opt.errors import UserError
from longlive_opt.fetch import FETCHED, HubFile, HuggingFaceHub, fetch, main, plan
from longlive_opt.models.specs import MODELS, WAN_REPO
from longlive_opt.models.weight_files import resolve_weights

REVISION = "0123abcd"
LONGLIVE_REPO = "Efficient-Large-Model/LongLive-1.3B"


class DictHub:
    """A hub of `contents[repo][path]`; small files have no SHA-256 there either."""

    def __init__(self) -> None:
        self.contents: dict[str, dict[str, bytes]] = {
            LONGLIVE_REPO: {"models/longlive_base.pt": b"base" * 100, "models/lora.pt": b"lora" * 50,
                            "README.md": b"not ours"},
            WAN_REPO: {"config.json": b"{}", "Wan2.1_VAE.pth": b"vae" * 40,
                       "models_t5_umt5-xxl-enc-bf16.pth": b"t5" * 70,
                       "google/umt5-xxl/tokenizer.json": b"tok", "google/umt5-xxl/spiece.model": b"spm" * 9,
                       "diffusion_pytorch_model.safetensors": b"not ours"}}
        self.sent: dict[str, bytes] = {}
        self.log: list[str] = []

    def files(self, repo: str) -> tuple[str, dict[str, HubFile]]:
        def sha256(data: bytes) -> str | None:
            return hashlib.sha256(data).hexdigest() if len(data) > 2 else None

        contents = self.contents[repo]
        return REVISION, {path: HubFile(len(data), sha256(data)) for path, data in contents.items()}

    def download(self, repo: str, revision: str, path: str, folder: Path) -> Path:
        assert revision == REVISION
        self.log.append(path)
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(self.sent.get(path, self.contents[repo][path]))
        return place


@pytest.fixture
def hub() -> DictHub:
    return DictHub()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_layout_is_what_the_loader_reads(hub, tmp_path):
    """A file put elsewhere than `resolve_weights` looks for it would be fetched and never found."""
    fetch(tmp_path, hub, plan(hub))
    assert names(tmp_path) == [
        "Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", "Wan2.1-T2V-1.3B/config.json",
        "Wan2.1-T2V-1.3B/google/umt5-xxl/spiece.model", "Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json",
        "Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth", "fetched.json", "longlive_base.pt", "lora.pt"]
    assert resolve_weights(tmp_path, MODELS["longlive-1.3b"]).kind == "files"


@pytest.mark.parametrize("name", FETCHED)
def test_every_model_is_found_where_it_was_fetched(hub, tmp_path, name):
    """A model whose sources and places differ would be fetched, 17 GB of it, and never found."""
    checkpoint = MODELS[name].checkpoint
    for source in checkpoint.sources:
        if not source.path.endswith("/"):
            hub.contents.setdefault(source.repo, {}).setdefault(source.path, b"some")
    fetch(tmp_path, hub, plan(hub, "all", name))
    files = resolve_weights(tmp_path, MODELS[name])
    assert all(getattr(files, part) is not None for part in checkpoint.files)


def test_a_model_of_the_project_is_not_fetched(hub):
    """The tiny model lies in the repository; asking the hub for it would end in a KeyError."""
    with pytest.raises(UserError, match="model: 'tiny' cannot be fetched; choose one of longlive-1.3b"):
        plan(hub, "all", "tiny")


@pytest.mark.parametrize("what, count", [("dit", 3), ("vae", 1), ("text", 3), ("all", 7)])
def test_parts(hub, what, count):
    """Whoever wants the 0.5 GB VAE must not get 20 GB."""
    assert len(plan(hub, what)) == count


def test_second_run_fetches_only_what_is_missing(hub, tmp_path):
    """Running the command again after a failure must not start from nothing."""
    fetch(tmp_path, hub, plan(hub))
    (tmp_path / "lora.pt").unlink()
    hub.log.clear()
    fetch(tmp_path, hub, plan(hub))
    assert hub.log == ["models/lora.pt"]


def test_an_interrupted_run_keeps_what_has_arrived(hub, tmp_path):
    """Files that are in place stay; the partial one stays where the client resumes it."""
    hub.download = _interrupted(hub.download, after=2)
    assert main([str(tmp_path)], hub) == 130
    assert {"longlive_base.pt", "lora.pt"} <= set(names(tmp_path))
    assert (tmp_path / ".fetch").is_dir()


def _interrupted(download, after: int):
    def stop(repo, revision, path, folder):
        nonlocal after
        if not after:
            raise KeyboardInterrupt
        after -= 1
        return download(repo, revision, path, folder)
    return stop


@pytest.mark.parametrize("name", ["google/umt5-xxl/../../../../escaped/evil.pth", "google/umt5-xxl/..\\evil",
                                  "google/umt5-xxl/../x", "google/umt5-xxl/a\0b"])
def test_a_path_outside_the_folder_is_refused(hub, tmp_path, name, caplog):
    """A hub, or a mirror of one, that writes where it likes. Nothing is fetched, not even the rest."""
    hub.contents[WAN_REPO][name] = b"evil"
    folder = tmp_path / "a" / "b" / "c"
    assert main([str(folder)], hub) == 1
    assert "would leave the folder; do not use this hub, and check HF_ENDPOINT" in caplog.text
    assert names(tmp_path) == [] and not hub.log


def test_what_broke_off_is_removed_and_is_no_progress(hub, tmp_path, monkeypatch):
    """A dead partial file that counts as 17 GB which need no room, or stays for ever. A dry run removes
    nothing.
    """
    dead = tmp_path / ".fetch" / "x" / ".cache" / "huggingface" / "download" / "a.1234.incomplete"
    dead.parent.mkdir(parents=True)
    dead.write_bytes(b"x" * 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert main([str(tmp_path), "--what", "vae", "--dry-run"], hub) == 1  # 120 bytes more are needed
    assert dead.exists()
    assert main([str(tmp_path), "--what", "vae"], hub) == 1
    assert not dead.exists()


def test_the_revision_of_each_file_is_recorded(hub, tmp_path):
    """Weights of which nobody can say which version they are: the hub's current one is fetched."""
    fetch(tmp_path, hub, plan(hub, "dit"))
    record = json.loads((tmp_path / "fetched.json").read_text())
    assert record["lora.pt"] == {"repo": LONGLIVE_REPO, "revision": REVISION, "path": "models/lora.pt",
                                 "bytes": 200, "sha256": hashlib.sha256(b"lora" * 50).hexdigest()}
    (tmp_path / "lora.pt").unlink()
    later = [dataclasses.replace(item, revision="later") for item in plan(hub, "dit")]
    download = hub.download
    hub.download = lambda repo, revision, path, folder: download(repo, REVISION, path, folder)
    fetch(tmp_path, hub, later)
    record = json.loads((tmp_path / "fetched.json").read_text())
    assert record["lora.pt"]["revision"] == "later"
    assert record["longlive_base.pt"]["revision"] == REVISION, "it was not fetched again"


@pytest.mark.parametrize("arrived, expected", [(b"short", "has 5 bytes instead of the hub's 200"),
                                               (b"x" * 200, "the hub's SHA-256")])
def test_damaged_download_is_removed(hub, tmp_path, arrived, expected):
    """A wrong file must never reach its final place, nor be resumed from."""
    hub.sent["models/lora.pt"] = arrived
    with pytest.raises(UserError, match=expected):
        fetch(tmp_path, hub, plan(hub, "dit"))
    assert names(tmp_path) == ["fetched.json", "longlive_base.pt"]


def test_a_different_file_of_the_user_is_kept(hub, tmp_path):
    """Someone's own lora.pt in the folder must not be replaced by the official one."""
    (tmp_path / "lora.pt").write_bytes(b"mine" * 50)
    with pytest.raises(UserError, match="the hub's SHA-256.*move it away"):
        fetch(tmp_path, hub, plan(hub, "dit"))
    assert (tmp_path / "lora.pt").read_bytes() == b"mine" * 50 and not hub.log


def test_full_disk_is_noticed_first(hub, tmp_path, monkeypatch):
    """Better now than after an hour."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="1.07 GB are needed, .* has 10 B free"):
        fetch(tmp_path / "not" / "there", hub, plan(hub))
    assert not hub.log


def test_dry_run_shows_sizes_and_writes_nothing(hub, tmp_path, caplog):
    """`--dry-run` that creates a folder or hashes files is none."""
    caplog.set_level(logging.INFO)
    assert main([str(tmp_path / "new"), "--what", "dit", "--dry-run"], hub) == 0
    assert "400 B  to fetch  longlive_base.pt" in caplog.text
    assert not (tmp_path / "new").exists() and not hub.log


def test_without_a_network(tmp_path, caplog, monkeypatch):
    """One sentence and no traceback; a dry run still tells the recorded sizes."""
    caplog.set_level(logging.INFO)
    hub = HuggingFaceHub()
    hub._hub = SimpleNamespace(HfApi=lambda: SimpleNamespace(model_info=_unreachable))
    assert main([str(tmp_path), "--dry-run"], hub) == 1
    assert "(no route to host)" in caplog.text and "Traceback" not in caplog.text
    assert "5.68 GB  recorded  longlive_base.pt" in caplog.text
    sources = MODELS["longlive-1.3b"].checkpoint.sources
    assert sum(source.approx_bytes for source in sources) == pytest.approx(20.4e9, rel=0.01)


def _unreachable(*args: object, **kwargs: object) -> None:
    raise ConnectionError("no route to host\nlong story")


def test_client_answers_are_understood(tmp_path):
    """The real client's listing: a size for every file, a SHA-256 for those in large-file storage only."""
    large = SimpleNamespace(rfilename="a.pt", size=7, lfs=SimpleNamespace(sha256="ff"))
    small = SimpleNamespace(rfilename="b.json", size=2, lfs=None)
    info = SimpleNamespace(sha=REVISION, siblings=[large, small])
    hub = HuggingFaceHub()
    hub._hub = SimpleNamespace(HfApi=lambda: SimpleNamespace(model_info=lambda repo, files_metadata: info))
    assert hub.files("x/y") == (REVISION, {"a.pt": HubFile(7, "ff"), "b.json": HubFile(2, None)})


def test_repository_without_the_file(hub):
    """A renamed file upstream must be named, not end in a KeyError."""
    del hub.contents[LONGLIVE_REPO]["models/lora.pt"]
    with pytest.raises(UserError, match="has no models/lora.pt at revision 0123abcd"):
        plan(hub)


def test_unwritable_folder(hub, tmp_path, caplog):
    """A file in the way of the folder gives a sentence as well."""
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")], hub) == 1
    assert "name a folder that you can write to" in caplog.text


def test_help_needs_no_torch():
    """torch takes seconds to import, and people fetch on machines that have none."""
    code = "import sys, longlive_opt.fetch; sys.exit(bool({'torch', 'huggingface_hub'} & set(sys.modules)))"
    root = Path(longlive_opt.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
