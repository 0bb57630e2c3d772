"""Checks of the transformer with recorded weights: single calls, whole rollouts, and a merged adapter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.attention import make_attention
from ..models.dit import CausalDiT, TextContext
from ..models.specs import DiTConfig
from ..models.weights import open_lora
from ..streaming.kv_cache import CacheGeometry, RollingKVCache
from ..streaming.sampler import EagerForward, Sampler, SamplingPlan
from .comparison import Comparison, Tensors, below


def dit_config(config: Mapping[str, Any]) -> DiTConfig:
    """Read the transformer's sizes from one entry of a manifest's `configs`."""
    names = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_dim", "text_len")
    return DiTConfig(**{name: config[name] for name in names})


def build_dit(config: Mapping[str, Any], weights: Tensors) -> CausalDiT:
    """Build a transformer in float32 with the recorded weights."""
    dit = CausalDiT(dit_config(config))
    dit.load_state_dict(dict(weights))
    return dit.eval()


def make_rolling_cache(dit: CausalDiT, config: Mapping[str, Any], batch: int, relative_rope: bool = False,
                       ) -> RollingKVCache:
    """Make the reference cache for one entry of a manifest's `configs`."""
    sizes = dit.config
    geometry = CacheGeometry(sizes.num_layers, sizes.num_heads, sizes.head_dim, config["latent_h"] // 2,
                             config["latent_w"] // 2, config["window"], config["sink"], relative_rope)
    return RollingKVCache(geometry, make_attention("cpu"), batch, dit.device, dit.dtype)


def sampling_plan(config: Mapping[str, Any], global_sink: bool = True) -> SamplingPlan:
    """Make the sampler's plan from one entry of a manifest's `configs`."""
    return SamplingPlan(
        tuple(config["steps"]),
        config["shift"],
        0,
        config["block"],
        config["window"],
        config["sink"],
        global_sink,
    )


def check_forward(
    comparison: Comparison, recorded: Tensors, weights: Tensors, config: Mapping[str, Any]
) -> None:
    """Check consecutive calls with a cache: their results and intermediate tensors."""
    dit = build_dit(config, weights)
    outputs: dict[str, Tensor] = {}
    _record_intermediates(dit, outputs)
    text = dit.embed_text(recorded["context"])
    cache = make_rolling_cache(dit, config, config["batch"])
    start = 0
    for call in range(len(config["timesteps"])):
        x, t = recorded[f"call{call}.x"], recorded[f"call{call}.t"]
        frames = x.shape[2]
        cache.begin(start, frames)
        flow = dit(x, t, text, cache.layers)
        cache.end()
        start += frames
        outputs["patch_embedding"] = outputs["patch_embedding"][-1:]
        ours = {"flow": flow, **outputs, **_cache_tensors(cache, text)}
        for name, value in below(recorded, f"call{call}.").items():
            if name in ours:
                same_size = ours[name].numel() == value.numel()
                comparison.add(
                    f"call{call}.{name}", ours[name].reshape(value.shape) if same_size else ours[name], value
                )


def _record_intermediates(dit: CausalDiT, outputs: dict[str, Tensor]) -> None:
    block = dit.blocks[0]

    def keep_output(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(name, inputs[0])

    dit.text_embedding.register_forward_hook(keep_output("text_embedding"))
    dit.patch_embedding.register_forward_hook(keep_output("patch_embedding"))
    dit.time_embedding.register_forward_hook(keep_output("time_embedding"))
    dit.time_embedding.register_forward_hook(keep_input("sinusoid"))
    dit.time_projection.register_forward_hook(keep_output("time_projection"))
    block.self_attn.q.register_forward_hook(keep_input("block0.self_attn.input"))
    block.self_attn.norm_q.register_forward_hook(keep_output("block0.self_attn.norm_q"))
    block.self_attn.o.register_forward_hook(keep_output("block0.self_attn.output"))
    block.cross_attn.q.register_forward_hook(keep_input("block0.cross_attn.input"))
    block.cross_attn.o.register_forward_hook(keep_output("block0.cross_attn.output"))
    block.ffn.register_forward_hook(keep_input("block0.ffn.input"))
    block.ffn.register_forward_hook(keep_output("block0.ffn.output"))
    block.register_forward_hook(keep_output("block0.output"))
    dit.head.head.register_forward_hook(keep_input("head.linear_input"))
    dit.head.head.register_forward_hook(keep_output("head.output"))


def _cache_tensors(cache: RollingKVCache, text: TextContext) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        filled = cache.pointers[1] * cache.geometry.tokens_per_frame
        tensors[f"cache_k.layer{i}"], tensors[f"cache_v.layer{i}"] = (
            layer.key[:, :filled],
            layer.value[:, :filled],
        )
        tensors[f"cross_k.layer{i}"], tensors[f"cross_v.layer{i}"] = text.keys[i], text.values[i]
    return tensors


def check_stream(
    comparison: Comparison,
    recorded: Tensors,
    weights: Tensors,
    inputs: Tensors,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Check a whole rollout with the prompt switches of `options`, using the sampler of every run."""
    dit = build_dit(config, weights)
    plan = sampling_plan(config, options.get("global_sink", True))
    sampler = Sampler(plan, EagerForward(dit))
    cache = make_rolling_cache(dit, config, inputs["noise"].shape[0], bool(options.get("infinity")))
    switches = list(options.get("switches", []))
    batch = inputs["noise"].shape[0]
    texts = [
        dit.embed_text(inputs["prompt_embeds"][i : i + 1].expand(batch, -1, -1))
        for i in range(len(switches) + 1)
    ]
    segment, latents = 0, inputs["noise"][:, :0]
    tokens_per_frame = cache.geometry.tokens_per_frame
    for block in range(config["num_blocks"]):
        start = block * plan.block_frames
        if segment < len(switches) and start >= switches[segment]:
            segment += 1
            if start:
                sampler.recache(cache, texts[segment], start, latents[:, -plan.window:])
                _add_cache(comparison, f"recache{segment - 1}", cache, recorded, tokens_per_frame)
        noise = inputs["noise"][:, start:start + plan.block_frames]
        step_noise = inputs["step_noise"][block].unflatten(1, (batch, plan.block_frames))
        estimates = sampler.denoise(cache, texts[segment], start, noise, step_noise)
        if "x0_steps" in recorded:
            comparison.add(f"x0_steps[{block}]", torch.stack(estimates), recorded["x0_steps"][block])
        sampler.run_pass(cache, texts[segment], start, estimates[-1], plan.context_noise)
        latents = torch.cat([latents, estimates[-1]], dim=1)
        _add_cache(comparison, f"after_block{block}", cache, recorded, tokens_per_frame)
    _add_cache(comparison, "final", cache, recorded, tokens_per_frame)
    comparison.add("latents", latents, recorded["latents"])


def _add_cache(
    comparison: Comparison, moment: str, cache: RollingKVCache, recorded: Tensors, tokens: int
) -> None:
    for name, value in below(recorded, f"{moment}.").items():
        if name == "pointers":
            comparison.add(f"{moment}.pointers", torch.tensor(cache.pointers) * tokens, value)
        elif name.startswith(("k.layer", "v.layer")):
            layer = cache.layers[int(name.rsplit("layer", 1)[1])]
            ours = layer.key if name.startswith("k.") else layer.value
            comparison.add(f"{moment}.{name}", ours, value)


def check_lora(comparison: Comparison, recorded: Tensors, weights: Tensors, config: Mapping[str, Any],
          lora: Mapping[str, Any]) -> None:
    """Check that the merged adapter gives the same results as the separate adapter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file(below(recorded, "lora."), path)
        adapter = open_lora(path, build_dit(config, weights), lora["alpha"])
        merged = {name: adapter.merge(name, weight) for name, weight in weights.items()}
    for name, tensors in (("flow_base", weights), ("flow_lora", merged), ("flow_lora_merged", merged)):
        dit = build_dit(config, tensors)
        cache = make_rolling_cache(dit, config, recorded["x"].shape[0])
        cache.begin(0, recorded["x"].shape[2])
        flow = dit(recorded["x"], recorded["t"], dit.embed_text(recorded["context"]), cache.layers)
        comparison.add(name, flow, recorded[name])
    if "merged_example" in recorded:
        comparison.add("merged_example", merged["blocks.0.self_attn.q.weight"], recorded["merged_example"])
