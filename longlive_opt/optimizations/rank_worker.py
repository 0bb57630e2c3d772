"""The main function of every rank but 0, started by `ranks.processes.Family`. Not for use by hand."""

from __future__ import annotations

import dataclasses
from multiprocessing.connection import Connection
from types import MappingProxyType

import torch

from .. import config as catalogue
from ..config import ExperimentConfig
from ..ranks.processes import run_rank
from . import build_rank
from .several_gpus import Follower, Team


def own_config(config: ExperimentConfig, device: torch.device) -> ExperimentConfig:
    """The preset without what only rank 0 does: prompts, and the order of decoding and denoising."""
    return dataclasses.replace(config, device=str(device), use_prompt_cache=False,
                               prompt_cache_dir=None, use_text_offload=False, use_async_vae=False)


@torch.no_grad()
def serve(rank: int, device: torch.device, orders: Connection) -> None:
    """Build this rank's pipeline when rank 0 says so, and obey until rank 0 hangs up."""
    follower: Follower | None = None
    while True:
        name, *arguments = orders.recv()
        if name == "build":
            config, model = arguments
            # It may have been defined at run time, as in a notebook.
            catalogue.MODELS = MappingProxyType({**catalogue.MODELS, config.model: catalogue.MODELS.get(
                config.model, model)})
            follower = None
            team = Team(config, rank, device)
            follower = Follower(build_rank(own_config(config, device), team.exchange), team, orders.send)
        else:
            getattr(follower, name)(*arguments)


if __name__ == "__main__":
    run_rank(serve)
