"""A model so small that a test can stream many blocks of it: 20 to 50 ms each."""

from __future__ import annotations

import contextlib
from types import MappingProxyType
from typing import Any, Iterator

import pytest
import torch

from longlive_opt import config
from longlive_opt.config import ExperimentConfig
from longlive_opt.models.specs import MODELS, DiTConfig, ModelSpec, TextEncoderConfig, VAEConfig
from longlive_opt.optimizations import build_pipeline
from longlive_opt.streaming.pipeline import Pipeline

_TEXT = TextEncoderConfig(vocab_size=384, dim=16, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1,
                          text_len=32)
_DIT = DiTConfig(dim=48, num_heads=2, num_layers=2, ffn_dim=64, freq_dim=32, text_dim=_TEXT.dim,
                 text_len=_TEXT.text_len)
MICRO = ModelSpec("micro", "micro", MODELS["tiny"].checkpoint, _DIT, VAEConfig(dim=2, num_res_blocks=1),
                  _TEXT,
                  height=32, width=48, full_size=False)


@contextlib.contextmanager
def micro_model() -> Iterator[None]:
    """Make the model known as `micro` and pin torch to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "MODELS", MappingProxyType({**config.MODELS, "micro": MICRO}))
        yield
    torch.set_num_threads(threads)


def micro_config(**keys: Any) -> ExperimentConfig:
    """A preset on the micro model in float32; 16 x 16 pixels make one token a frame."""
    return ExperimentConfig.from_mapping({
        "model": "micro", "weights": "random", "model_dtype": "float32", "warmup_blocks": 16,
        "video_latent_frames": 6 * keys.get("block_frames", 3), **keys})


def micro_pipeline(**keys: Any) -> Pipeline:
    """A pipeline with the optimizations that `keys` switch on."""
    return build_pipeline(micro_config(**keys))
