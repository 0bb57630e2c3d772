"""A folder of recorded tensors: finds its cases and checks each one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError
from ..files import read_json
from .comparison import Case, Comparison, Tensors, below
from .modules import check_keys, check_scheduler, check_t5, check_vae
from .transformer import check_forward, check_lora, check_stream


def check_directory(directory: Path) -> Iterator[Case]:
    """Check every case found in `directory`. A VAE recorded without its encoder is only tested on decoding.

    Raises:
        UserError: no manifest, or no known case.
    """
    directory = Path(directory)
    try:
        manifest = read_json(directory / "manifest.json", "record it again")
        manifest["configs"].items()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{directory}: no readable manifest.json with 'configs' ({error}); name a folder laid out like "
            "tests/golden."
        ) from error
    found = False
    for name, check in _cases(directory, manifest):
        found = True
        comparison = Comparison(name)
        try:
            with torch.inference_mode():
                check(comparison)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory}: the file of case {name} cannot be read ({error}).") from error
        except (KeyError, RuntimeError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{directory}: case {name} does not fit its manifest: {type(error).__name__} {reason}."
            ) from error
        yield comparison.case()
    if not found:
        raise UserError(f"{directory}: manifest.json is there, but no file of a known case.")


def _cases(directory: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, Callable[[Comparison], None]]]:
    configs = manifest["configs"]

    def load(stem: str) -> Tensors:
        try:
            return load_file(directory / f"{stem}.safetensors")
        except FileNotFoundError as error:
            raise UserError(
                f"{directory}: {stem}.safetensors is missing, and another case needs it."
            ) from error

    checks: dict[str, Callable[[Comparison, Tensors], None]] = {
        "dit_forward": lambda c, t: check_forward(c, t, load("stream_weights"), configs["dit"]),
        "dit_forward_head128": lambda c, t: check_forward(c, t, below(t, "weights."), configs["dit128"]),
        "scheduler": lambda c, t: check_scheduler(c, t, configs["stream"]),
        "vae": lambda c, t: check_vae(c, t, configs["vae"]),
        "t5": lambda c, t: check_t5(c, t, configs["t5"]),
        "lora": lambda c, t: check_lora(c, t, load("stream_weights"), configs["stream"], configs["lora"]),
    }
    for path in sorted(directory.glob("*.safetensors")):
        name = path.stem
        if name in checks:
            yield name, lambda c, name=name: checks[name](c, load(name))
        elif name not in ("stream_inputs", "stream_weights"):
            options = manifest.get(name, {}).get("options")
            if options is not None:
                yield name, lambda c, name=name, options=options: check_stream(
                    c, load(name), load("stream_weights"), load("stream_inputs"), configs["stream"], options)
    for path in sorted(directory.glob("keys_*.json")):
        yield path.stem, lambda c, path=path: check_keys(c, path)
