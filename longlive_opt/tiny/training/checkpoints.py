"""Save the state of a training stage: resumable bit by bit, and small enough to copy between machines.

A checkpoint is a folder `<stage>-<step>` with safetensors files of at most 15 MB and a `state.json`. It is
written under another name and renamed when complete. Then older checkpoints are deleted. `weights.*` are the
float32 weights, `average.*` their average in bfloat16, and `exact.*` the optimizer's moments and the float32
average. A stage can continue from the average alone, an eighth of the size. It then logs a warning, resets
the moments and warms the learning rate up again. `pack` copies only this part.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import UserError

FILE_BYTES = 15_000_000
EXACT = "exact"


def save_checkpoint(folder: Path, stage: str, step: int, groups: Mapping[str, Mapping[str, Tensor]],
                    state: Mapping[str, Any]) -> Path:
    """Write a checkpoint and delete the stage's older ones. `groups` maps the stem of a file to its tensors.
    """
    final = folder / f"{stage}-{step:07d}"
    fresh = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for group, tensors in groups.items():
            for number, part in enumerate(_parts(tensors)):
                save_file(part, fresh / f"{group}.{number}.safetensors")
        (fresh / "state.json").write_text(json.dumps({**state, "step": step}), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)
    except OSError as error:
        raise UserError(
            f"cannot write {final}: {error.strerror or error}; free space there, or choose another --out."
        ) from error
    for old in checkpoints(folder, stage):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path, stage: str) -> list[Path]:
    """The stage's complete checkpoints, newest last."""
    return sorted(path for path in folder.glob(f"{stage}-*") if (path / "state.json").is_file())


def load_checkpoint(folder: Path, stage: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest checkpoint's groups (on the CPU) and state, or None if the stage has none.

    Raises:
        UserError: a file of the checkpoint is damaged.
    """
    found = checkpoints(folder, stage)
    if not found:
        return None
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        for path in sorted(found[-1].glob("*.safetensors")):
            groups.setdefault(path.name.split(".")[0], {}).update(load_file(path))
        return groups, json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    except Exception as error:  # safetensors and json raise different errors for damaged files
        raise UserError(f"{found[-1]}: cannot be read ({error}); delete that folder to train the stage "
                        "again.") from error


def pack(folder: Path, stages: Sequence[str], to: Path) -> list[Path]:
    """Copy `average.*` and `state.json` of each stage's newest checkpoint, to continue elsewhere. Replaces
    the copies of an earlier call. Returns the copies.
    """
    copies = []
    for stage in stages:
        for old in to.glob(f"{stage}-*"):
            shutil.rmtree(old)
        for source in checkpoints(folder, stage)[-1:]:
            target = to / source.name
            target.mkdir(parents=True)
            for path in sorted([*source.glob("average.*"), source / "state.json"]):
                copies.append(Path(shutil.copy2(path, target)))
    return copies


def _parts(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > FILE_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    return parts


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, under the rest of their names."""
    return {
        name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")
    }


def generator_state(generator: torch.Generator) -> list[int]:
    """JSON-ready state of a generator (16 bytes on CUDA, 5 kB on the CPU)."""
    return generator.get_state().tolist()


def restore_generator(generator: torch.Generator, state: list[int]) -> None:
    generator.set_state(torch.tensor(state, dtype=torch.uint8))
