"""From the name of a preset to a session that a player can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import STUDIES, ExperimentConfig, preset_files, unknown_preset
from ..errors import UserError
from ..files import load_yaml, project_path
from ..kernels.attention_bf16 import check_gpu
from ..models.specs import MODELS
from ..models.weight_files import TINY_WEIGHTS, check_weights, tiny_vae_file
from ..optimizations import build_pipeline, cuda_graphs
from ..streaming.pipeline import check_device
from ..streaming.session import StreamingSession

FETCHED = "checkpoints"
"""The folder into which README fetches the official weights."""


def preset_names() -> list[str]:
    """The presets that a player offers: all but the studies, which take others apart."""
    return [name for name in preset_files() if name not in STUDIES]


def model_names(device: str) -> list[str]:
    """The models that a player offers on `device`; on a CPU those that make video there in seconds."""
    return [name for name in MODELS if name == "tiny" or device != "cpu"]


def default_weights(model: str) -> str:
    """The folder of the weights of `model`: the official ones where they were fetched, else random."""
    if model == "tiny":
        return str(TINY_WEIGHTS)
    return FETCHED if project_path(FETCHED).is_dir() else "random"


def live_config(preset: str, keys: Mapping[str, Any]) -> ExperimentConfig:
    """The config of `preset` with `keys` on top. Without them: the tiny model on the CPU, in float32 there
    unless the preset's attention has none, with relative positions, since a live stream has no end.

    Raises:
        UserError: an unknown preset, or keys that cannot be.
    """
    if preset in STUDIES:
        raise UserError(f"preset: {preset!r} is a study, which is measured and not played; choose one of "
                        f"{', '.join(preset_names())}.")
    if preset not in preset_names():
        raise unknown_preset(preset, preset_names())
    asked = load_yaml(preset_files()[preset])
    model, device = keys.get("model", "tiny"), keys.get("device", "cpu")
    half = device != "cpu" or asked.get("attention_backend", "auto") not in ("auto", "math")
    given = {"model": model, "weights": default_weights(model), "device": device, "relative_rope": True,
             "model_dtype": "bfloat16" if half else "float32"}
    return ExperimentConfig.from_mapping(asked | given | keys)


def require_here(config: ExperimentConfig) -> None:
    """Refuse what this machine lacks for `config`, as far as that takes no time to say.

    Raises:
        UserError: no such device, one without what the preset needs, or weights that are missing or of
            another model.
    """
    device, model = check_device(config.device), config.model_config()
    check_weights(config.weights, model)
    if config.use_cuda_graphs:
        cuda_graphs.check_device(device)
    if config.attention_backend == "gluon" and device.type == "cuda":
        check_gpu(device, getattr(torch, config.model_dtype), model.dit.head_dim)
    if config.has_tiny_vae:
        tiny_vae_file(config.vae, config.vae_weights, config.weights)


def open_session(config: ExperimentConfig) -> StreamingSession:
    """Build the pipeline of `config` and a session on it, whose frames come to host memory.

    Raises:
        UserError: weights or device are missing, or an optimization cannot be applied here.
    """
    return StreamingSession(build_pipeline(config), host_frames=True)
