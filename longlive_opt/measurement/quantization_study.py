"""A study of 8-bit formats for K, V and linear layers: what each costs in exactness and saves in time.

The truth is the reference pipeline in float32. Every combination makes the same blocks, each from the truth's
past (teacher-forced), so errors do not accumulate across blocks. An error is the root mean square of the
difference of the latents, divided by that of the truth's. The ratio divides it by the error of the reference
pipeline in the model's dtype: 1 is as exact as bfloat16. The stream is long enough for the window to turn,
and ends with a block after a prompt switch.

The model is built once and keeps all its weights, so combinations share them; memory is therefore counted,
not measured. A pass is timed at the full window and captured in a CUDA graph, as the presets do. No compiler
takes part, so times cover only denoising. `notebooks/91_quantization.ipynb` shows the results.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..config import LINEAR_LAYERS, ExperimentConfig, notebook_parameters
from ..errors import UserError
from ..files import atomic_path, project_path
from ..kernels import linear8
from ..kernels.attention8 import attention8
from ..models.attention import make_attention
from ..models.dit import TextContext
from ..models.specs import VAE_TEMPORAL_STRIDE
from ..optimizations.fused_kernels import FusedForward, PlainProducts
from ..optimizations.quantized_kv_cache import QuantizedKVCache, check_kernels, choose_tile
from ..optimizations.quantized_linears import QuantizedProducts, check_linears, linears_of
from ..optimizations.ring_cache import rotate_complex
from ..optimizations.static_kv_cache import StaticKVCache
from ..streaming.kv_cache import KVCache
from ..streaming.pipeline import Pipeline, build_reference, cache_geometry, float32_twin
from ..streaming.sampler import StreamNoise
from . import environment
from .fidelity import full_float32, release
from .result import plain_json

KV_FORMATS = {"bf16": "K and V as they are", "int8_bf16": "K int8, V bf16", "int8_fp8": "K int8, V e4m3",
              "fp8_fp8": "K and V e4m3"}
LINEAR_FORMATS = {None: "as they are", "int8": "int8", "fp8": "e4m3"}
TABLE_FILE = "table.json"
OWN_KEYS = ("blocks", "every_combination", "output_dir")
"""Parameters of the notebook that are not keys of a preset."""


@dataclass(frozen=True)
class Combination:
    """Formats of a pass: `cache` from `KV_FORMATS`; `form` for the linear layers named in `layers`."""

    cache: str
    form: str | None = None
    layers: tuple[str, ...] = ()

    @property
    def linears(self) -> str:
        """Describe the linear layers in words."""
        if self.form is None:
            return LINEAR_FORMATS[None]
        left = [name for name in LINEAR_LAYERS if name not in self.layers]
        but = f", not {left[0]}" if len(left) == 1 else f", {', '.join(self.layers)} alone" if left else ""
        return f"{LINEAR_FORMATS[self.form]}{but}"


def combinations(every: bool) -> list[Combination]:
    """All formats of K and V with all formats of the linear layers, with int8 except for one layer, and with
    one layer alone in e4m3. Unless `every`, the last two kinds use only one format of K and V.
    """
    found = []
    for cache in KV_FORMATS:
        found += [Combination(cache)]
        found += [Combination(cache, form, LINEAR_LAYERS) for form in linear8.FORMATS]
        if every or cache == "fp8_fp8":
            found += [Combination(cache, "int8", tuple(n for n in LINEAR_LAYERS if n != left))
                      for left in LINEAR_LAYERS]
            found += [Combination(cache, "fp8", (alone,)) for alone in LINEAR_LAYERS]
    return found


@dataclass(frozen=True)
class Stream:
    """The input of every combination: each block's noise in the model's dtype, the encoded prompts, and the
    block at which the second prompt takes over.
    """

    noise: list[tuple[Tensor, Tensor]]
    prompts: list[Tensor]
    switch: int

    @classmethod
    def of(cls, pipeline: Pipeline, prompts: Sequence[str], blocks: int) -> Stream:
        """Use the first two prompts, the second one for the last block."""
        noise = StreamNoise(pipeline.sampler.plan, pipeline.latent_shape, pipeline.config.seed,
                            pipeline.device, pipeline.dtype)
        return cls([noise.next_block() for _ in range(blocks)],
                   [pipeline.text_encoder.encode([prompt]) for prompt in prompts[:2]], blocks - 1)


@torch.no_grad()
def play(pipeline: Pipeline, cache: KVCache, stream: Stream,
         past: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
    """Yield the clean latents [B, F, C, H, W] of consecutive blocks.

    Args:
        past: clean latents of each block that replace the pipeline's own after it has made them; None keeps
            the stream on its own past.
    """
    sampler, made = pipeline.sampler, []
    texts = [pipeline.embed_text(prompt.to(pipeline.dtype)) for prompt in stream.prompts]
    for block, noise in enumerate(stream.noise):
        text, start = texts[-1 if block >= stream.switch else 0], block * sampler.plan.block_frames
        if block == stream.switch and len(texts) > 1:
            seen = torch.cat(made, 1)[:, -sampler.plan.window:]
            sampler.recache(cache, text, start, seen)
        latents = sampler.denoise(cache, text, start, *(part.to(pipeline.dtype) for part in noise))[-1]
        yield latents
        made.append((latents if past is None else past[block]).to(pipeline.dtype))
        sampler.clean_pass(cache, text, start, made[-1])


def forced_errors(pipeline: Pipeline, cache: KVCache, stream: Stream, truth: Sequence[Tensor]) -> list[float]:
    """Relative RMS error of each block's latents, with every block from the truth's past. `cache` ends in the
    state after the last block's clean pass.
    """
    return [((latents.float() - true).square().mean() / true.square().mean()).sqrt().item()
            for latents, true in zip(play(pipeline, cache, stream, truth), truth, strict=True)]


def milliseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Mean time per call when all `calls` run in sequence; on CUDA, the median over replays of a graph."""
    for call in calls:
        call()
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) * 1000 / len(calls)
    torch.cuda.synchronize(device)
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:]) / len(calls)


class QuantizationStudy:
    """The steps of the notebook, in order: `open`, `build`, `measure`, tables and chart, `save`."""

    def __init__(self, config: ExperimentConfig, blocks: int, every_combination: bool | None, folder: Path):
        """Raises UserError if the stream is too short for the window to turn before the switch."""
        least = config.window_blocks + 2
        if blocks < least:
            raise UserError(f"blocks: {blocks} are too few for a window of {config.window_blocks} blocks "
                            f"to turn and a switch after that; write {least} or more.")
        self.config, self.blocks, self.folder = config, blocks, folder
        every = config.device.startswith("cuda") if every_combination is None else every_combination
        self.combinations = combinations(every)
        self.rows: list[dict[str, Any]] = []
        self.calls: dict[str, dict[str, float]] = {"linear layers": {}, "attention": {}}

    @classmethod
    def open(cls, namespace: Mapping[str, Any]) -> QuantizationStudy:
        """Create a study from a notebook's globals: keys of a preset, and `OWN_KEYS`. On a CPU, which
        emulates the kernels, pictures have half the model's height and width unless a size is given.
        """
        parameters = notebook_parameters(namespace)
        own = {key: parameters.pop(key) for key in OWN_KEYS}
        config = ExperimentConfig.from_mapping({"name": "quantization", **parameters})
        if config.device == "cpu" and config.height is None and config.width is None:
            model = config.model_config()
            config = dataclasses.replace(config, height=model.height // 2, width=model.width // 2)
        return cls(config, own["blocks"], own["every_combination"], project_path(own["output_dir"]))

    @torch.no_grad()
    def build(self) -> pd.DataFrame:
        """Load the model, make the truth with its float32 twin (as in `fidelity`), release the twin, and
        measure the reference against the truth.

        Raises:
            UserError: weights are missing, or the kernels do not run here; the message says why.
        """
        config = self.config
        pipeline = build_reference(config)
        if pipeline.device.type == "cuda":
            capability, dit = torch.cuda.get_device_capability(pipeline.device), pipeline.model.dit
            check_kernels(dit.head_dim, capability)
            for form in linear8.FORMATS:
                check_linears(form, dit.dim, dit.ffn_dim, capability)
        self.stream = Stream.of(pipeline, config.prompts, self.blocks)
        twin = float32_twin(pipeline)
        with full_float32():
            self.truth = [latents.clone() for latents in play(twin, twin.make_cache(), self.stream)]
        del twin
        release(pipeline.device)
        self.pipeline = pipeline
        self.own_errors = forced_errors(pipeline, pipeline.make_cache(), self.stream, self.truth)
        if not statistics.mean(self.own_errors):
            raise UserError("model_dtype: the reference pipeline has no error of its own in float32; write "
                            "bfloat16.")
        self.plain = [PlainProducts(block) for block in pipeline.dit.blocks]
        return pd.DataFrame({"error of the reference, %": [100 * error for error in self.own_errors],
                             "after a prompt switch": [block >= self.stream.switch
                                                       for block in range(self.blocks)]}).round(3)

    def measure(self) -> None:
        """Measure error, time and bytes of every combination, and the time of single calls."""
        for number, combination in enumerate(self.combinations, 1):
            print(f"{number} of {len(self.combinations)}: {combination.cache}, linear layers "
                  f"{combination.linears}", flush=True)
            self.rows.append(self._row(combination))

    def table(self) -> pd.DataFrame:
        """Return all combinations, the most exact first."""
        rows = [{
            "K, V": KV_FORMATS[row["cache"]], "linear layers": row["linears"],
            "error, %": 100 * row["error"], "worst block, %": 100 * max(row["errors"]),
            "ratio to the reference's": row["ratio"], "ms per pass": row["pass_ms"],
            "denoising, ms per video frame": row["ms_per_frame"], "weights, GB": row["linear_bytes"] / 1e9,
            "K and V, GB": row["cache_bytes"] / 1e9,
        } for row in sorted(self.rows, key=lambda row: row["ratio"])]
        return pd.DataFrame(rows).round(3)

    def calls_table(self) -> pd.DataFrame:
        """Return ms of single calls: linear layers by format, and attention over the full window."""
        rows = [{"call": call, "ms": ms, "of": kind} for kind, calls in self.calls.items()
                for call, ms in calls.items()]
        return pd.DataFrame(rows).round(4)

    def conclusion(self) -> str:
        """Name the fastest combination within each error limit."""
        lines = []
        for limit in (1.1, 1.2, 1.6, 2.0):
            good = [row for row in self.rows if row["ratio"] <= limit]
            if good:
                best = min(good, key=lambda row: row["ms_per_frame"])
                lines.append(f"Up to {limit} times the reference's error, the fastest is {best['cache']} "
                             f"with linear layers {best['linears']}: {best['ms_per_frame']:.2f} ms per video "
                             f"frame, ratio {best['ratio']:.2f}.")
        return "\n".join(lines) or "No combination is within twice the reference's error."

    def save(self) -> Path:
        """Write everything as JSON; return the file."""
        path = self.folder / TABLE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        machine = environment.environment(self.pipeline.device,
                                             attention_backend=self.pipeline.attention_backend)
        result = plain_json({"parameters": self.config.to_dict(), "blocks": self.blocks,
                             "weights": self.pipeline.weights, "environment": machine,
                             "reference_errors": self.own_errors, "rows": self.rows, "calls": self.calls})
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @torch.no_grad()
    def _row(self, combination: Combination) -> dict[str, Any]:
        pipeline, products = self._applied(combination)
        cache = pipeline.make_cache()
        errors = forced_errors(pipeline, cache, self.stream, self.truth)
        full, keys_only = self._pass_ms(pipeline, cache)
        plan = pipeline.sampler.plan
        frames = plan.block_frames * VAE_TEMPORAL_STRIDE
        self._time_calls(combination, pipeline, cache, products)
        error = statistics.mean(errors)
        return {
            **dataclasses.asdict(combination), "linears": combination.linears, "errors": errors,
            "error": error, "ratio": error / statistics.mean(self.own_errors),
            "worst_ratio": max(a / b for a, b in zip(errors, self.own_errors, strict=True)),
            "pass_ms": full, "keys_only_ms": keys_only,
            "ms_per_frame": (len(plan.denoising_steps) * full + keys_only) / frames,
            "linear_bytes": self._linear_bytes(combination, products), "cache_bytes": cache.nbytes,
        }

    def _applied(self, combination: Combination) -> tuple[Pipeline, Sequence[Any]]:
        """Return the pipeline with these formats, and its linear layers. The replaced layers are kept."""
        pipeline = self.pipeline
        geometry = cache_geometry(pipeline.config, pipeline.model)
        rest = (1, pipeline.device, pipeline.dtype, rotate_complex)
        if combination.cache == "bf16":
            make_cache = partial(StaticKVCache, geometry, make_attention(pipeline.attention_backend), *rest)
        else:
            tile = choose_tile(geometry, combination.cache, pipeline.device)
            read = partial(attention8, tile=tile)
            make_cache = partial(QuantizedKVCache, geometry, combination.cache, read, *rest)
        products: Sequence[Any] = self.plain
        if combination.form is not None:
            products = [QuantizedProducts(block, plain, combination.form, combination.layers)
                        for block, plain in zip(pipeline.dit.blocks, self.plain, strict=True)]
        sampler = dataclasses.replace(pipeline.sampler, trim_recache=True)
        sampler = sampler.with_forward(FusedForward(pipeline.dit, products))
        return dataclasses.replace(pipeline, sampler=sampler, make_cache=make_cache), products

    def _pass_ms(self, pipeline: Pipeline, cache: KVCache) -> tuple[float, float]:
        """Return the times of a denoising pass over the full window and of a clean pass."""
        sampler, noise = pipeline.sampler, self.stream.noise[-1][0]
        text: TextContext = pipeline.embed_text(self.stream.prompts[-1].to(pipeline.dtype))
        timestep, start = sampler.timesteps[0], self.blocks * sampler.plan.block_frames
        cache.begin(start, noise.shape[1])
        times = [milliseconds([partial(sampler.forward, noise, timestep, text, cache, keys_only=keys_only)],
                              pipeline.device) for keys_only in (False, True)]
        cache.end()
        return times[0], times[1]

    def _time_calls(self, combination: Combination, pipeline: Pipeline, cache: KVCache,
                    products: Sequence[Any]) -> None:
        """Time each layer and format once, over the weights of all blocks, so that the L2 cache does not hold
        them. The feed-forward is timed as a whole, with GELU and the rounding between its layers.
        """
        tokens, dim = cache.geometry.tokens_per_frame * pipeline.sampler.plan.block_frames, pipeline.model.dit
        device, found = pipeline.device, self.calls["linear layers"]
        if combination.form is None:
            q = torch.randn(1, tokens, dim.num_heads, dim.head_dim, device=device).to(pipeline.dtype)
            cache.begin(self.blocks * pipeline.sampler.plan.block_frames, pipeline.sampler.plan.block_frames)
            self.calls["attention"][KV_FORMATS[combination.cache]] = milliseconds(
                [partial(layer.read, q) for layer in cache.layers], device)
            cache.end()
        if combination.layers not in ((), LINEAR_LAYERS):
            return
        for position, name in enumerate((*LINEAR_LAYERS, "feed_forward")):
            key = f"{name.replace('_', '-')}, {LINEAR_FORMATS[combination.form]}"
            if key in found:
                continue
            inputs = dim.ffn_dim if name == "down" else dim.dim
            x: Any = torch.randn(1, tokens, inputs, device=device).to(pipeline.dtype)
            if combination.form is not None:
                x = linear8.quantize_rows(x, combination.form)
            if combination.form is None or name == "feed_forward":
                calls = [getattr(own, name) for own in products]
            else:
                calls = [own.linears[position] for own in products]
            found[key] = milliseconds([partial(call, x) for call in calls], device)

    def _linear_bytes(self, combination: Combination, products: Sequence[Any]) -> int:
        """Bytes of the layers that `LINEAR_LAYERS` names, in the formats of a combination."""
        plain = sum(parameter.nbytes for block in self.pipeline.dit.blocks
                    for name, linears in linears_of(block).items() if name not in combination.layers
                    for linear in linears for parameter in linear.parameters())
        return plain + sum(linear.nbytes for own in products for linear in getattr(own, "linears", ()))
