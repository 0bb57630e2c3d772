"""Compare this implementation with recorded tensors: `python -m longlive_opt.parity DIR`.

DIR holds safetensors files and a `manifest.json` whose `configs` give every size, window and switch frame;
each file that is there is checked, one line a case with its largest absolute error.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import UserError
from .kv_cache import CacheGeometry, RollingKVCache
from .model_config import DiTConfig, TextEncoderConfig, VAEConfig
from .models.attention import make_attention
from .models.dit import CausalDiT, TextContext
from .models.text import UMT5Encoder, distance_bucket
from .models.vae import StreamingDecoder, WanVAE, decode_chunked, latent_statistics
from .models.weights import open_lora
from .sampler import EagerForward, Sampler, SamplingPlan
from .scheduler import FlowSchedule

LIMIT = 1e-4
TARGET = 2e-5
LORA_RANK = 256

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One compared case: the largest absolute error, the tensor that has it, and how many tensors were
    compared.
    """

    name: str
    error: float
    worst: str
    tensors: int

    @property
    def passed(self) -> bool:
        return self.error <= LIMIT

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAIL"
        note = " (above the target of 2e-05)" if self.passed and self.error > TARGET else ""
        return (f"{verdict:4} {self.name:38} max error {self.error:.1e} at {self.worst}, {self.tensors} "
                f"tensors{note}")


class Comparison:
    """Collects errors of one case."""

    def __init__(self, name: str):
        self.name = name
        self.errors: dict[str, float] = {}

    def add(self, what: str, ours: Tensor, recorded: Tensor) -> None:
        """Compare two tensors; another shape or a NaN counts as an infinite error."""
        if tuple(ours.shape) != tuple(recorded.shape):
            self.errors[f"{what} (shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)})"] = float(
                "inf"
            )
            return
        error = (ours.double() - recorded.double()).abs().max().item() if recorded.numel() else 0.0
        self.errors[what] = error if error == error else float("inf")

    def case(self) -> Case:
        if not self.errors:
            return Case(self.name, float("inf"), "nothing to compare", 0)
        worst = max(self.errors, key=lambda what: self.errors[what])
        return Case(self.name, self.errors[worst], worst, len(self.errors))


def check_directory(directory: Path) -> Iterator[Case]:
    """Check every case found in `directory`. A VAE recorded without its encoder is only decoded.

    Raises:
        UserError: no manifest, or no known case.
    """
    directory = Path(directory)
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        manifest["configs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
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
        "dit_forward": lambda c, t: _dit_forward(c, t, load("stream_weights"), configs["dit"]),
        "dit_forward_head128": lambda c, t: _dit_forward(c, t, _below(t, "weights."), configs["dit128"]),
        "scheduler": lambda c, t: _scheduler(c, t, configs["stream"]),
        "vae": lambda c, t: _vae(c, t, configs["vae"]),
        "t5": lambda c, t: _t5(c, t, configs["t5"]),
        "lora": lambda c, t: _lora(c, t, load("stream_weights"), configs["stream"], configs["lora"]),
    }
    for path in sorted(directory.glob("*.safetensors")):
        name = path.stem
        if name in checks:
            yield name, lambda c, name=name: checks[name](c, load(name))
        elif name not in ("stream_inputs", "stream_weights"):
            options = manifest.get(name, {}).get("options")
            if options is not None:
                yield name, lambda c, name=name, options=options: _stream(
                    c, load(name), load("stream_weights"), load("stream_inputs"), configs["stream"], options)
    for path in sorted(directory.glob("keys_*.json")):
        yield path.stem, lambda c, path=path: _keys(c, path)


def _below(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}


def dit_config(config: Mapping[str, Any]) -> DiTConfig:
    """The transformer's sizes from one entry of a manifest's `configs`."""
    names = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_dim", "text_len")
    return DiTConfig(**{name: config[name] for name in names})


def build_dit(config: Mapping[str, Any], weights: Tensors) -> CausalDiT:
    """A transformer in float32 with the recorded weights."""
    dit = CausalDiT(dit_config(config))
    dit.load_state_dict(dict(weights))
    return dit.eval()


def make_rolling_cache(dit: CausalDiT, config: Mapping[str, Any], batch: int, relative_rope: bool = False,
                       ) -> RollingKVCache:
    """The reference cache for one entry of a manifest's `configs`."""
    sizes = dit.config
    geometry = CacheGeometry(sizes.num_layers, sizes.num_heads, sizes.head_dim, config["latent_h"] // 2,
                             config["latent_w"] // 2, config["window"], config["sink"], relative_rope)
    return RollingKVCache(geometry, make_attention("cpu"), batch, dit.device, dit.dtype)


def sampling_plan(config: Mapping[str, Any], global_sink: bool = True) -> SamplingPlan:
    return SamplingPlan(
        tuple(config["steps"]),
        config["shift"],
        0,
        config["block"],
        config["window"],
        config["sink"],
        global_sink,
    )


def _dit_forward(
    comparison: Comparison, recorded: Tensors, weights: Tensors, config: Mapping[str, Any]
) -> None:
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
        for name, value in _below(recorded, f"call{call}.").items():
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


def _stream(
    comparison: Comparison,
    recorded: Tensors,
    weights: Tensors,
    inputs: Tensors,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """A whole rollout with the prompt switches of `options`, through the sampler that every run uses."""
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
    for name, value in _below(recorded, f"{moment}.").items():
        if name == "pointers":
            comparison.add(f"{moment}.pointers", torch.tensor(cache.pointers) * tokens, value)
        elif name.startswith(("k.layer", "v.layer")):
            layer = cache.layers[int(name.rsplit("layer", 1)[1])]
            ours = layer.key if name.startswith("k.") else layer.value
            comparison.add(f"{moment}.{name}", ours, value)


def _scheduler(comparison: Comparison, recorded: Tensors, config: Mapping[str, Any]) -> None:
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


def _vae(comparison: Comparison, recorded: Tensors, config: Mapping[str, Any]) -> None:
    vae = WanVAE(VAEConfig(config["dim"], tuple(config["dim_mult"]), config["num_res_blocks"]))
    missing, unexpected = vae.load_state_dict(_below(recorded, "weights."), strict=False)
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


def _t5(comparison: Comparison, recorded: Tensors, config: Mapping[str, Any]) -> None:
    encoder = UMT5Encoder(TextEncoderConfig(
        vocab_size=config["vocab"], dim=config["dim"], dim_attn=config["dim_attn"], dim_ffn=config["dim_ffn"],
        num_heads=config["num_heads"], num_layers=config["num_layers"], num_buckets=config["num_buckets"],
        text_len=config["seq_len"]))
    encoder.load_state_dict(_below(recorded, "weights."))
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


def _lora(comparison: Comparison, recorded: Tensors, weights: Tensors, config: Mapping[str, Any],
          lora: Mapping[str, Any]) -> None:
    """The adapter merged into the weights must give what the separate adapter gives."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file(_below(recorded, "lora."), path)
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


def _keys(comparison: Comparison, path: Path) -> None:
    """Key inventories of the full-size modules, on the meta device: names and shapes must be exactly those.
    """
    inventory = json.loads(path.read_text(encoding="utf-8"))
    ours = full_size_inventory(path.stem.removeprefix("keys_"))
    for name in sorted(inventory.keys() | ours.keys()):
        same = inventory.get(name) == ours.get(name)
        comparison.errors[f"{name} {ours.get(name)}"] = 0.0 if same else float("inf")


def full_size_inventory(part: str) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the full-size "dit", "vae", "umt5" or, as PEFT saves it at rank 256,
    "lora".
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m longlive_opt.parity", description=__doc__)
    parser.add_argument("directory", type=Path, help="folder with manifest.json and recorded tensors")
    arguments = parser.parse_args(argv)
    try:
        cases = []
        for case in check_directory(arguments.directory):
            print(case, flush=True)
            cases.append(case)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [case.name for case in cases if not case.passed]
    print(
        f"{len(cases) - len(failed)} of {len(cases)} cases within {LIMIT:g}"
        + (f"; failed: {failed}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
