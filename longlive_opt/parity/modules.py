"""Checks around the transformer: schedule, VAE, text encoder, and keys of the full-size modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

import torch
from torch import Tensor, nn

from ..models.dit import CausalDiT
from ..models.specs import DiTConfig, TextEncoderConfig, VAEConfig
from ..models.text import UMT5Encoder, distance_bucket
from ..models.vae import StreamingDecoder, WanVAE, decode_chunked, latent_statistics
from ..streaming.sampler import FlowSchedule
from .comparison import Comparison, Tensors, below

LORA_RANK = 256


def check_scheduler(comparison: Comparison, recorded: Tensors, config: Mapping[str, Any]) -> None:
    """Check the noise levels and the arithmetic on them, in float32 and bfloat16."""
    schedule = FlowSchedule(config["shift"])
    comparison.add("sigmas", schedule.sigmas, recorded["sigmas"])
    comparison.add("timesteps", schedule.timesteps / 1000, recorded["timesteps"] / 1000)
    comparison.add(
        "warped_steps", torch.tensor(schedule.warped_steps(config["steps"])), recorded["warped_steps"]
    )
    t = recorded["t"]
    for prefix, dtype in (("", torch.float32), ("bf16_", torch.bfloat16)):
        if f"{prefix}x0_from_flow" not in recorded:
            continue
        flow, noisy, clean, noise = (recorded[name].to(dtype) for name in ("flow", "xt", "clean", "noise"))
        comparison.add(
            f"{prefix}x0_from_flow", schedule.x0_from_flow(flow, noisy, t), recorded[f"{prefix}x0_from_flow"]
        )
        comparison.add(f"{prefix}noised", schedule.add_noise(clean, noise, t), recorded[f"{prefix}noised"])


def check_vae(comparison: Comparison, recorded: Tensors, config: Mapping[str, Any]) -> None:
    """Check the decoder by latent, streamed and in chunks, and the encoder if its weights are recorded."""
    vae = WanVAE(VAEConfig(config["dim"], tuple(config["dim_mult"]), config["num_res_blocks"]))
    missing, unexpected = vae.load_state_dict(below(recorded, "weights."), strict=False)
    encodes = not missing
    if unexpected or any(not name.startswith(("encoder.", "conv1.")) for name in missing):
        raise KeyError(f"weights {[*unexpected, *missing][0]!r} missing or unexpected")
    latents = recorded["latents"]
    batch, count, _, height, width = latents.shape
    mean, inverse_std = latent_statistics(latents.device, latents.dtype)
    comparison.add("mean", mean.flatten(), recorded["mean"])
    comparison.add("std", 1 / inverse_std.flatten(), recorded["std"])

    outputs: dict[str, Tensor] = {}
    for name, module in vae.decoder.named_modules():
        if any(key.startswith(f"decoder.{name}.latent") for key in recorded):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: outputs.update({name: output[0]})
            )
    scaled = latents.transpose(1, 2) / inverse_std + mean
    history, parts = vae.init_history(batch, height, width, latents.device, latents.dtype), []
    for i in range(count):
        pixels, history = vae.decode(scaled[:, :, i:i + 1], history, first=i == 0)
        parts.append(pixels)
        for name, output in outputs.items():
            if f"decoder.{name}.latent{i}" in recorded:
                comparison.add(f"decoder.{name}.latent{i}", output, recorded[f"decoder.{name}.latent{i}"])
    comparison.add("decode_raw", torch.cat(parts, dim=2), recorded["decode_raw"])

    decoder = StreamingDecoder(vae, batch, height, width, chunk_latents=3)
    frames = torch.cat([decoder.push(part)[0] for part in latents.split(3, dim=1)], dim=1)
    if "decode_pixel" in recorded:
        comparison.add("decode_pixel", frames, recorded["decode_pixel"])
    if "decode_chunked3_pixel" in recorded:
        comparison.add(
            "decode_chunked3_pixel", decode_chunked(vae, latents, 3), recorded["decode_chunked3_pixel"]
        )
    if encodes:
        comparison.add("encode", vae.encode(recorded["clip"]), recorded["encode"])


def check_t5(comparison: Comparison, recorded: Tensors, config: Mapping[str, Any]) -> None:
    """Check the text encoder and its distance buckets."""
    encoder = UMT5Encoder(TextEncoderConfig(
        vocab_size=config["vocab"], dim=config["dim"], dim_attn=config["dim_attn"], dim_ffn=config["dim_ffn"],
        num_heads=config["num_heads"], num_layers=config["num_layers"], num_buckets=config["num_buckets"],
        text_len=config["seq_len"]))
    encoder.load_state_dict(below(recorded, "weights."))
    hidden = encoder(recorded["ids"], recorded["mask"])
    comparison.add("hidden", hidden, recorded["hidden"])
    buckets = distance_bucket(torch.arange(-300, 301), config["num_buckets"], 128)
    comparison.add("bucket_of_distance", buckets, recorded["bucket_of_distance"])
    length = recorded["pos_bias_block0"].shape[-1]
    position = torch.arange(length)
    bias = encoder.blocks[0].pos_embedding(
        distance_bucket(position - position[:, None], config["num_buckets"], 128)
    )
    comparison.add("pos_bias_block0", bias, recorded["pos_bias_block0"])
    comparison.add("prompt_embeds", hidden * recorded["mask"][..., None], recorded["prompt_embeds"])


def check_keys(comparison: Comparison, path: Path) -> None:
    """Check that the full-size modules, on the meta device, have exactly the listed names and shapes."""
    inventory = json.loads(path.read_text(encoding="utf-8"))
    ours = full_size_inventory(path.stem.removeprefix("keys_"))
    for name in sorted(inventory.keys() | ours.keys()):
        same = inventory.get(name) == ours.get(name)
        comparison.errors[f"{name} {ours.get(name)}"] = 0.0 if same else float("inf")


def full_size_inventory(part: str) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the full-size "dit", "vae", "umt5" or "lora" (as PEFT saves it at rank
    256).
    """
    build = {"vae": lambda: WanVAE(VAEConfig()), "umt5": lambda: UMT5Encoder(TextEncoderConfig())}
    with torch.device("meta"):
        module = build.get(part, lambda: CausalDiT(DiTConfig()))()
    if part != "lora":
        return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    inventory = {}
    for name, linear in module.blocks.named_modules():
        if isinstance(linear, nn.Linear):
            prefix = f"base_model.model.blocks.{name}.lora_"
            inventory[f"{prefix}A.weight"] = [LORA_RANK, linear.in_features]
            inventory[f"{prefix}B.weight"] = [linear.out_features, LORA_RANK]
    return inventory
