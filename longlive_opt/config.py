"""The preset: a flat set of keys that defines one experiment.

The preset's keys are the notebooks' parameters. Each field of `ExperimentConfig` states the type, default,
meaning, group and bounds of one key. `params/README.md`, the notebooks' parameters cells and the log's lists
of switches derive from these fields. `ExperimentConfig.from_mapping` refuses unknown keys, wrong types and
impossible combinations before anything is built. This module imports no torch, so command lines can refuse a
preset at once.
"""
from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import UserError, short
from .files import project_path, require_writable, whole_text
from .models.specs import (
    MODELS,
    MOST_LORA_ALPHA,
    ROPE_POSITIONS,
    TINY_VAES,
    VAE_SPATIAL_STRIDE,
    WAN_VAE,
    ModelSpec,
)

BASELINE = "baseline"
STUDIES = ("ablation", "compile_parts", "quantization")
"""Presets that analyse other presets: measured and shown, never recommended and not played."""
TEST_PRESET = "smoke"
"""The least that shows that everything runs. Nobody chooses it."""
LINEAR_LAYERS = ("qkv", "query", "up", "down")
REHEARSED_BLOCKS = 4
"""Rehearsed blocks after warm-up: two prompt switches, each followed by one block."""
TRACED_BLOCKS = 3
"""Steady blocks in a run's trace; a block with a prompt switch follows them."""
_FIXED_CACHES = ("use_static_kv", "use_quantized_kv")
# Key -> the keys of which at least one must be on as well, and why.
NEEDS: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType({
    "use_fused_kernels": (_FIXED_CACHES, "its kernels write into a cache of fixed memory, and the reference "
                                         "cache has none"),
    "use_quantized_linears": (("use_fused_kernels",), "the fused norms round its activations to 8 bit"),
    "use_quantized_vae": (("use_fused_vae",), "its norms and convolutions are those of the fused VAE"),
    "vae_offload_ahead": (("use_vae_offload",), "it only changes how the offloaded history moves"),
    "use_torch_compile": (_FIXED_CACHES, "the reference cache changes its shapes in Python"),
})
_INJECTED = "# Parameters"  # papermill's first line of the cell that it injects


def several_suffix(gpus: int) -> str:
    """What the name of a preset ends with when the runner measures it on several GPUs."""
    return f"_{gpus}gpus" if gpus > 1 else ""


# Notebook parameters in addition to the preset's keys: name -> default and meaning.
RUN_KEYS: Mapping[str, tuple[Any, str]] = MappingProxyType({
    "campaign": ("manual", "results go to outputs/<campaign>/<name>"),
    "run": (1, "2 for a repetition that shows the noise"),
    "output_dir": ("", "empty: outputs/<campaign>/<name>"),
})


@dataclass(frozen=True)
class Key:
    """A key's entry in the catalogue: everything except its name, type and default.

    Attributes:
        doc: the meaning, in a few words.
        group: the section of the catalogue that lists the key.
        choices: the allowed values; for a list, the allowed items, of which at least one is required.
        least, most: the smallest and the largest allowed value.
        above: an exclusive lower bound.
    """

    doc: str
    group: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None

    @property
    def comment(self) -> str:
        """The meaning and the choices, on one line."""
        if not self.choices:
            return self.doc
        *others, last = self.choices
        return f"{self.doc}: {', '.join(others)} or {last}"

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is not among the choices or is out of bounds.

        Raises:
            UserError: naming the key `name`, the value and the remedy.
        """
        if isinstance(value, tuple):
            if self.choices and (not value or not set(value) <= set(self.choices)):
                raise UserError(f"{name}: {short(list(value))} must name at least one of "
                                f"{', '.join(self.choices)}, and nothing else.")
        elif self.choices and value not in self.choices:
            raise UserError(f"{name}: {short(value)} is unknown; choose one of {', '.join(self.choices)}.")
        elif value is None:
            return
        elif self.above is not None and value <= self.above:
            raise UserError(f"{name}: {value} must be greater than {self.above}.")
        elif self.least is not None and value < self.least:
            raise UserError(f"{name}: {value} is too small; it must be at least {self.least}.")
        elif self.most is not None and value > self.most:
            raise UserError(f"{name}: {value} is too large; it must be at most {self.most}.")


def key(default: Any, doc: str, **more: Any) -> Any:
    """Define a field of `ExperimentConfig` and its catalogue entry; `more` sets the attributes of `Key`."""
    return dataclasses.field(default=default, metadata={"key": Key(doc, **more)})


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: exactly the keys of `params/*.yaml` and of the notebooks' parameters.

    `local_attn_size`, `sink_size`, `block_frames` and `switch_frame_indices` count latent frames. Keys that
    default to the model's values (`denoising_steps`, `local_attn_size`, `sink_size`) are resolved when the
    config is made, and so is the warm-up, which follows from the window.
    """

    name: str = key(BASELINE, "names the folder of the results", group="identity")
    title: str = key("Baseline", "heading of reports", group="identity")
    hypothesis: str = key("", "what is expected, in numbers, before the run", group="identity")

    model: str = key("tiny", " or ".join(MODELS), group="model and machine")
    weights: str = key("weights/tiny", "random, or a folder: weights/tiny, or one with the official files",
                       group="model and machine")
    lora_alpha: float = key(256.0, "scale of lora.pt is lora_alpha / rank", group="model and machine",
                            above=0, most=MOST_LORA_ALPHA)
    device: str = key("cpu", "cpu, cuda or cuda:N", group="model and machine")
    model_dtype: str = key("bfloat16", "of weights and activations", group="model and machine",
                           choices=("bfloat16", "float32"))
    height: int | None = key(None, "of the picture, pixels; None: the model's own", group="model and machine",
                             most=8192)
    width: int | None = key(None, "of the picture, pixels; None: the model's own", group="model and machine",
                            most=8192)
    gpus: int = key(1, "GPUs for one stream; with device: cpu, processes", group="model and machine", least=1)
    vae_ranks: str = key("split", "who decodes on several GPUs: each a band of rows, or the last one alone",
                         group="model and machine", choices=("split", "own"))
    rank_exchange: str = key("peer", "send activations, or write them to the other GPU's memory",
                             group="model and machine", choices=("collective", "peer"))
    gpu_memory_limit_gb: float | None = key(None, "GB for PyTorch on the GPU; None: all",
                                            group="model and machine", least=0.1)

    seed: int = key(0, "of the noise, and of weights drawn at random", group="sampling", least=0,
                    most=2**63 - 1)
    denoising_steps: tuple[int, ...] | None = key(None, "nominal timesteps, falling, in 1..1000; None: the "
                                                  "model's own", group="sampling")
    timestep_shift: float = key(5.0, "of the flow-matching schedule", group="sampling", above=0,
                                least=1e-3, most=1e3)
    context_noise: int = key(0, "timestep of the clean pass (LongLive uses 0)", group="sampling", least=0,
                             most=999)
    block_frames: int = key(3, "latent frames per block", group="sampling", least=1)
    local_attn_size: int | None = key(None, "attention window with its sink, latent frames; None: the "
                                      "model's own", group="sampling")
    sink_size: int | None = key(None, "attention sink, latent frames; None: the model's own",
                                group="sampling", least=0)
    global_sink: bool = key(True, "keep the sink at a prompt switch", group="sampling")
    relative_rope: bool = key(False, "LongLive's infinity variant: no length limit", group="sampling")

    attention_backend: str = key("auto", "kernel; gluon: Hopper only", group="optimizations",
                                 choices=("auto", "cudnn", "gluon", "flash", "efficient", "math"))
    use_cuda_graphs: bool = key(False, "capture and replay each kind of pass", group="optimizations")
    capture_recache: bool = key(True, "False: graphs, of whichever key, leave a recache out and take less "
                                "memory", group="optimizations")
    use_torch_compile: bool = key(False, "compile transformer and VAE; needs a static or quantized cache",
                                  group="optimizations")
    compile_mode: str = key("default", "how it is compiled", group="optimizations",
                            choices=("default", "reduce-overhead", "max-autotune"))
    use_static_kv: bool = key(False, "KV cache as a ring of fixed memory", group="optimizations")
    use_quantized_kv: bool = key(False, "8-bit KV cache; takes precedence over static", group="optimizations")
    kv_quantization: str = key("int8", "format of the 8-bit KV cache", group="optimizations",
                               choices=("int8", "fp8"))
    kv_read_path: str = key("fused", "attend on the 8-bit cache, or convert it first", group="optimizations",
                            choices=("fused", "dequantize"))
    use_async_vae: bool = key(False, "decode a block while the next is denoised", group="optimizations")
    use_prompt_cache: bool = key(False, "encode a prompt once and remember it", group="optimizations")
    use_fused_kernels: bool = key(False, "one kernel between two matrix products; needs a static or "
                                  "quantized cache", group="optimizations")
    use_fused_vae: bool = key(False, "our own kernels for the VAE's convolutions and norms; of GPUs Hopper "
                              "only", group="optimizations")
    use_quantized_vae: bool = key(False, "the VAE's largest convolutions in 8 bit; needs the fused VAE",
                                  group="optimizations")
    vae: str = key(WAN_VAE, "decoder of the latents; the tiny ones are lossy", group="optimizations",
                   choices=(WAN_VAE, *TINY_VAES))
    vae_weights: str | None = key(None, "the tiny VAE's file, or random; None: in `weights`, or random "
                                  "as they are", group="optimizations")
    use_quantized_linears: bool = key(False, "8-bit linear layers behind a norm or GELU; needs fused kernels",
                                      group="optimizations")
    linear_quantization: str = key("int8", "format of the 8-bit linear layers", group="optimizations",
                                   choices=("int8", "fp8"))
    linear_layers: tuple[str, ...] = key(LINEAR_LAYERS, "linear layers in 8 bit, one or more",
                                         group="optimizations", choices=LINEAR_LAYERS)
    use_text_offload: bool = key(False, "weights that only read prompts in host memory",
                                 group="optimizations")
    use_vae_offload: bool = key(False, "the VAE's history in host memory", group="optimizations")
    vae_offload_ahead: bool = key(False, "move the history while the VAE works; needs use_vae_offload",
                                  group="optimizations")
    use_early_decode: bool = key(False, "decode a block before its clean pass; skip that pass before a "
                                 "recache", group="optimizations")
    use_early_frames: bool = key(False, "hand out the first frames of a new prompt before decoding the rest",
                                 group="optimizations")
    vae_chunk_latents: int | None = key(None, "latent frames per VAE call; None: 1, or a block if compiled, "
                                        "fused or tiny",
                                        group="optimizations", least=1)
    vae_channels_last: bool | None = key(None, "the VAE's memory layout; None: if compiled, fused or tiny, "
                                         "and on the CPU",
                                         group="optimizations")
    cudnn_benchmark: bool | None = key(None, "cuDNN times its convolutions and takes the fastest; None: if "
                                       "compiled, fused or tiny", group="optimizations")
    prompt_cache_mb: int = key(1024, "MiB of remembered prompts", group="optimizations", least=0)
    prompt_cache_dir: str | None = key(None, "folder of prompts that outlives the run; None: memory only",
                                       group="optimizations")

    prompts: tuple[str, ...] = key((
        "a large red square with the letter A pulses and a small blue circle orbits, on a dotted grey ground",
        "a large white star with the letter A pulses and a small blue circle orbits, on a dotted grey ground",
        "a large white star with the letter A pulses and a small red circle orbits, on a striped teal ground",
    ), "one after the other in one video", group="prompts and video")
    prompts_file: str | None = key(None, ".txt or .jsonl; instead of prompts", group="prompts and video")
    switch_frame_indices: tuple[int, ...] | None = key(None, "latent frames; None: evenly spread",
                                                       group="prompts and video")
    video_latent_frames: int = key(18, "length of the video, a multiple of block_frames",
                                   group="prompts and video", least=1)
    video_width: int | None = key(None, "pixels of the mp4; None: full size", group="prompts and video",
                                  least=16)
    video_crf: int = key(23, "of the mp4; larger is smaller", group="prompts and video", least=0, most=51)
    difference_video: bool = key(True, "with the baseline's video and the difference; up to 8 MB of a report",
                                 group="prompts and video")

    fidelity_blocks: int = key(6, "blocks compared with the float32 baseline", group="measurement", least=2)
    warmup_blocks: int | None = key(None, "blocks before the first measured one; None: the window and one "
                                    "more", group="measurement")
    measure_blocks: int = key(4, "steady-state blocks", group="measurement", least=2)
    num_switches: int = key(1, "measured prompt switches", group="measurement", least=0)
    playback_fps: float = key(25.0, "frames per second of the simulated viewer", group="measurement",
                              above=0,
                              least=1e-3, most=1000)
    objective: str = key("latency", "what the decision looks at", group="measurement",
                         choices=("latency", "switch", "memory"))
    max_error_ratio: float | None = key(None, "quality gate: error / the bf16 baseline's own; None: 1.1",
                                        group="measurement", above=0)
    target_ms_per_frame: float = key(40.0, "the line to stay under, ms per video frame", group="measurement",
                                     above=0, least=1e-3,
                                     most=1e6)
    trace: bool = key(False, "afterwards, trace three steady blocks to trace.json.gz, for ui.perfetto.dev",
                      group="measurement")

    def __post_init__(self) -> None:
        spec = MODELS.get(self.model)
        if spec is None:  # `validate` refuses it
            return
        for name, own in (("denoising_steps", spec.steps), ("local_attn_size", spec.window),
                          ("sink_size", spec.sink)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, own)
        if self.warmup_blocks is None and self.block_frames > 0:
            object.__setattr__(self, "warmup_blocks", self.window_blocks + 1)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> ExperimentConfig:
        """Check a flat mapping (preset, profile and command-line parameters merged) and build the config.

        Raises:
            UserError: naming the key, the value and the remedy.
        """
        if not isinstance(mapping, Mapping):
            raise UserError(f"preset: expected keys and values, found {type(mapping).__name__} "
                            f"{short(mapping)}; write one 'key: value' per line.")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = [key for key in mapping if key not in fields]
        if unknown:
            raise UserError(
                "preset: " + "; ".join(unknown_key(str(key), list(fields)) for key in unknown) + "."
            )
        values = {key: coerce(key, _as_frames(key, value), str(fields[key].type))
                  for key, value in mapping.items()}
        if values.get("prompts_file") is not None:
            values["prompts"] = ()  # the run uses the file's prompts, so the result must not list others
        config = cls(**values)
        config.validate()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON- and YAML-ready values in field order."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def model_config(self) -> ModelSpec:
        return MODELS[self.model].with_size(self.height, self.width)

    @property
    def window_blocks(self) -> int:
        """Number of blocks that fill the attention window."""
        return -(-self.local_attn_size // self.block_frames)

    @property
    def has_tiny_vae(self) -> bool:
        """Whether a tiny VAE decodes the latents."""
        return self.vae != WAN_VAE

    @property
    def other_decoder(self) -> str:
        """What makes the frames, if it is not the Wan VAE within rounding; else empty."""
        if self.has_tiny_vae:
            return self.vae
        return "the Wan VAE in 8 bit" if self.use_quantized_vae else ""

    @property
    def _vae_is_fast(self) -> bool:
        return self.use_torch_compile or self.use_fused_vae or self.has_tiny_vae

    @property
    def denoising_ranks(self) -> int:
        """Ranks that share the transformer's passes."""
        return self.gpus - (self.gpus > 1 and self.vae_ranks == "own")

    @property
    def head_groups(self) -> int:
        """Parts into which these ranks split the attention heads."""
        return math.gcd(self.denoising_ranks, self.model_config().dit.num_heads)

    @property
    def overlaps_decoding(self) -> bool:
        """Whether a block is decoded while the next one is denoised."""
        return self.use_async_vae or (self.gpus > 1 and self.vae_ranks == "own")

    @property
    def latents_per_vae_call(self) -> int:
        """Latent frames per VAE call."""
        return self.vae_chunk_latents or (self.block_frames if self._vae_is_fast else 1)

    @property
    def vae_is_channels_last(self) -> bool:
        """Whether the VAE's weights and activations are channels last."""
        if self.vae_channels_last is not None:
            return self.vae_channels_last
        return self._vae_is_fast or self.device == "cpu"

    @property
    def times_convolutions(self) -> bool:
        """Whether cuDNN times its kernels for the VAE's convolutions. On the CPU this is true only if the key
        asks for it, and building the pipeline then refuses it.
        """
        if self.cudnn_benchmark is not None:
            return self.cudnn_benchmark
        return self._vae_is_fast and self.device != "cpu"

    @property
    def vae_switches(self) -> tuple[str, ...]:
        """The keys whose values make the VAE's calls differ from the baseline's on this device."""
        differs = {"vae_channels_last": self.vae_is_channels_last != (self.device == "cpu"),
                   "vae_chunk_latents": self.latents_per_vae_call > 1,
                   "cudnn_benchmark": self.times_convolutions}
        return tuple(key for key, is_on in differs.items() if is_on)

    @property
    def max_blocks(self) -> int | None:
        """Most blocks per stream; None means no limit. Absolute rotary positions end at latent frame 1023."""
        return None if self.relative_rope else ROPE_POSITIONS // self.block_frames

    def validate(self) -> None:
        """Refuse an invalid config.

        Raises:
            UserError: naming the key, the value and the remedy.
        """
        for field in dataclasses.fields(self):  # a config that was made in Python may hold anything
            coerce(field.name, getattr(self, field.name), str(field.type))
        for name, entry in KEYS.items():
            entry.check(name, getattr(self, name))
        if self.model not in MODELS:
            raise UserError(f"model: {short(self.model)} is unknown; choose one of {', '.join(MODELS)}.")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device: {short(self.device)} is unknown; write cpu, cuda or cuda:N.")
        check_folder_name("name", self.name)
        self.model_config()
        self._validate_sampling()
        self._validate_inputs()
        self._validate_combinations()
        self._validate_ranks()
        if self.warmup_blocks < self.window_blocks:
            raise UserError(f"warmup_blocks: {self.warmup_blocks} is too small; it must be at least "
                            f"{self.window_blocks}.")
        frames, block = self.video_latent_frames, self.block_frames
        if frames % block:
            nearest = [str(n) for n in (frames // block * block, (frames // block + 1) * block) if n]
            raise UserError(
                f"video_latent_frames: {frames} is not a multiple of block_frames {block}; use "
                f"{' or '.join(nearest)}."
            )
        self._validate_length()

    def check_places(self) -> None:
        """Refuse a folder that a run could not write to. Not a part of `validate`, since a config may be of
        another machine.

        Raises:
            UserError: naming the key.
        """
        if self.use_prompt_cache and self.prompt_cache_dir:
            require_writable(project_path(self.prompt_cache_dir), "prompt_cache_dir", folder=True)

    @property
    def video_blocks(self) -> int:
        """Blocks in the video."""
        return self.video_latent_frames // self.block_frames

    @property
    def blocks_in_measurement(self) -> int:
        """Blocks in the longest stream of a measurement: rehearsal, steady state, switches at every second
        block, or trace. One more follows where decoding overlaps denoising (`Measurement`).
        """
        measured = max(self.measure_blocks, 2 * self.num_switches, (TRACED_BLOCKS + 1) * self.trace)
        return self.warmup_blocks + max(measured + self.overlaps_decoding, REHEARSED_BLOCKS)

    def _validate_length(self) -> None:
        """Refuse a stream past the last rotary position, naming the key that requires the most blocks."""
        longest = max(self.blocks_in_measurement, self.video_blocks)
        if self.max_blocks is None or longest <= self.max_blocks:
            return
        asks = {"measure_blocks": self.measure_blocks, "num_switches": 2 * self.num_switches,
                "warmup_blocks": self.warmup_blocks}
        key = "video_latent_frames" if longest == self.video_blocks else max(asks, key=lambda key: asks[key])
        raise UserError(
            f"{key}: {getattr(self, key)} makes a stream of {longest} blocks, but absolute rotary positions "
            f"end after {self.max_blocks}; use a smaller value or set relative_rope: true."
        )

    def _validate_sampling(self) -> None:
        steps = self.denoising_steps
        if not steps:
            raise UserError(
                "denoising_steps: the list is empty; give at least one, such as [1000, 750, 500, 250]."
            )
        if any(not 0 < s <= 1000 for s in steps) or any(a <= b for a, b in zip(steps, steps[1:])):
            raise UserError(f"denoising_steps: {short(list(steps))} must fall strictly and lie in 1..1000, "
                            "such as [1000, 750, 500, 250].")
        if self.local_attn_size == -1:
            raise UserError(
                "local_attn_size: -1 (global attention) needs memory that grows with the video and is not "
                "supported; 21 attends to the same keys as LongLive's global mode in normal generation."
            )
        if self.local_attn_size < self.sink_size + self.block_frames:
            raise UserError(
                f"local_attn_size: {self.local_attn_size} is smaller than sink_size {self.sink_size} + "
                f"block_frames {self.block_frames}; use at least {self.sink_size + self.block_frames}."
            )

    def _validate_combinations(self) -> None:
        """Refuse values that are valid alone but not together, on any machine."""
        if self.use_quantized_vae and self.has_tiny_vae:
            raise UserError(f"use_quantized_vae: it rounds the Wan VAE's convolutions, and vae: {self.vae!r} "
                            f"decodes instead; switch it off or set vae: {WAN_VAE}.")
        for key, (others, reason) in NEEDS.items():
            if getattr(self, key) and not any(getattr(self, other) for other in others):
                raise UserError(f"{key}: {reason}; switch on {' or '.join(others)} as well.")
        backend, on_cpu, half = self.attention_backend, self.device == "cpu", self.model_dtype != "float32"
        if on_cpu and backend not in ("auto", "math", "gluon"):
            raise UserError(f"attention_backend: {backend!r} runs only on CUDA; use auto with device: cpu.")
        if backend in ("cudnn", "gluon", "flash") and not half:
            raise UserError(
                f"attention_backend: {backend!r} has no float32 kernel; use auto or model_dtype: bfloat16."
            )
        if self.use_quantized_kv and self.kv_read_path == "fused" and not (on_cpu or half):
            raise UserError("kv_read_path: 'fused' attends in bfloat16 on CUDA, but model_dtype is float32; "
                            "use model_dtype: bfloat16 or kv_read_path: dequantize.")
        if self.use_fused_vae and not self.vae_is_channels_last:
            raise UserError("vae_channels_last: the kernels of use_fused_vae have their channels last; leave "
                            "it out or switch use_fused_vae off.")
        if self.use_fused_vae and not (on_cpu or half):
            raise UserError("use_fused_vae: its convolutions are in bfloat16 on CUDA, and model_dtype is "
                            "float32; use model_dtype: bfloat16.")
        if self.has_tiny_vae:
            self._validate_tiny_vae()
        if self.use_quantized_linears and not (on_cpu or half):
            raise UserError("use_quantized_linears: its linear layers return bfloat16 on CUDA, but "
                            "model_dtype is float32; use model_dtype: bfloat16.")

    def _validate_tiny_vae(self) -> None:
        tiny = f"vae: {self.vae!r}"
        if self.use_fused_vae:
            raise UserError(f"use_fused_vae: its kernels are those of the Wan VAE, and {tiny} decodes "
                            f"instead; switch it off or set vae: {WAN_VAE}.")
        if self.use_vae_offload:
            raise UserError(f"use_vae_offload: it moves the Wan VAE's history (1.9 GB at 480x832), and that "
                            f"of {tiny} (67 MB) stays at its addresses; switch it off or set vae: "
                            f"{WAN_VAE}.")
        if not self.vae_is_channels_last:
            raise UserError(f"vae_channels_last: {tiny} has its channels last; leave it out or set vae: "
                            f"{WAN_VAE}.")

    def _validate_ranks(self) -> None:
        """Refuse a number of GPUs that cannot share this model's work."""
        if self.gpus == 1:
            return
        model, ranks = self.model_config(), self.denoising_ranks
        heads, tokens, more = model.dit.num_heads, model.tokens_per_frame, self.gpus - ranks
        # With twice as many ranks as groups of heads, two of them halve the queries.
        shared = [n for n in range(1, 2 * heads + 1) if n <= 2 * math.gcd(n, heads) and n + more > 1]
        allowed = [n for n in shared if not tokens % n]
        if ranks not in allowed:
            what = (f"{heads} attention heads" if ranks not in shared else
                    f"{tokens} tokens per latent frame of {model.width}x{model.height}")
            share = "" if not more else f" (with vae_ranks: own, {ranks} of them)"
            raise UserError(f"gpus: {self.gpus} do not divide{share} the {what} of model {self.model}; use "
                            f"{', '.join(str(n + more) for n in allowed) or 1}.")
        least = 3 if self.has_tiny_vae else 2  # rows of latents that a band's neighbour needs of it
        if self.vae_ranks == "split" and model.latent_height < least * self.gpus:
            raise UserError(f"gpus: {self.gpus} cannot share a picture of {model.height} rows, since a band "
                            f"has at least {VAE_SPATIAL_STRIDE * least}; use "
                            f"{model.latent_height // least} or fewer, or vae_ranks: own.")
        if self.vae_ranks == "own" and self.use_early_frames:
            raise UserError(f"use_early_frames: with gpus: {self.gpus} and vae_ranks: own, frames come a "
                            "block later as a whole; switch use_early_frames off or use vae_ranks: split.")
        if self.vae_ranks == "split" and self.has_tiny_vae and self.use_torch_compile:
            raise UserError(f"use_torch_compile: with gpus: {self.gpus}, vae: {self.vae!r} runs in bands of "
                            "rows, which exchange their edges within it, and it is compiled as one; use "
                            "use_cuda_graphs instead, or vae_ranks: own.")
        if self.vae_ranks == "split" and self.use_async_vae:
            raise UserError(f"use_async_vae: with gpus: {self.gpus}, every rank both decodes and denoises, "
                            "and two exchanges at the same time could block each other; switch use_async_vae "
                            "off or use vae_ranks: own.")

    def _validate_inputs(self) -> None:
        if self.prompts_file is None and not self.prompts:
            raise UserError("prompts: the list is empty; give at least one prompt, or set prompts_file.")
        for i, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise UserError(f"prompts: entry {i} is empty; write some text or remove it.")
        if self.switch_frame_indices is not None and self.prompts_file is None:
            check_switches(self.switch_frame_indices, len(self.prompts), "switch_frame_indices")
            check_switches_fit(self.switch_frame_indices, self.video_blocks, self.block_frames)


KEYS: Mapping[str, Key] = MappingProxyType(
    {field.name: field.metadata["key"] for field in dataclasses.fields(ExperimentConfig)})
"""The catalogue: every key of a preset, in field order."""


def keys_of(group: str) -> tuple[str, ...]:
    """The keys of one group."""
    return tuple(name for name, entry in KEYS.items() if entry.group == group)


SWITCHES = tuple(name for name in keys_of("optimizations") if getattr(ExperimentConfig, name) is False)
"""The optimizations that are on or off, all off by default."""


def preset_files(params: Path | None = None) -> dict[str, Path]:
    """The presets that runner, notebooks and player offer, name -> file: `params`/*.yaml but `TEST_PRESET`.

    Args:
        params: the folder; None: the project's.
    """
    files = sorted((params or project_path("params")).glob("*.yaml"))
    return {file.stem: file for file in files if file.stem != TEST_PRESET}


def unknown_preset(name: Any, known: Iterable[str]) -> UserError:
    """The refusal of a preset that is not among `known`."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"preset: {short(name)} is unknown; {hint}choose one of {', '.join(known) or 'none'}.")


def check_baseline(config: ExperimentConfig) -> None:
    """Refuse optimizations in a run named as the baseline: all other runs of its campaign are compared with
    it. A config made in Python may use this name, because its result is not stored.
    Raises:
        UserError: naming the flags and the remedy.
    """
    switched_on = [key for key in SWITCHES if getattr(config, key)]
    switched_on += [key for key in config.vae_switches if getattr(config, key) is not None]
    switched_on += ["attention_backend"] if config.attention_backend == "gluon" else []
    switched_on += ["vae"] if config.has_tiny_vae else []
    switched_on += ["gpus"] if config.gpus > 1 else []
    if config.name == BASELINE and switched_on:
        given = sorted({json.dumps(getattr(config, key)) for key in switched_on})
        raise UserError(f"{', '.join(switched_on)}: {' and '.join(given)} under the name {BASELINE!r}, with "
                        "which all other runs are compared; leave it out, run presets without the baseline "
                        "and its repetitions, or choose another name (papermill: -p name mine).")


def check_folder_name(key: str, name: Any) -> None:
    """Refuse a name that cannot be a folder's on every system, or would leave its folder.

    Raises:
        UserError: naming `key`, the name and the remedy.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise UserError(f"{key}: {short(name)} cannot name a folder; use up to 100 letters, digits, '_', '-' "
                        "or a later '.'.")


def unknown_key(key: str, known: list[str]) -> str:
    """Describe an unknown key and suggest the most similar known one."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {short(key)}" + (
        f" (did you mean {close[0]!r}?)" if close else " (params/README.md lists the keys)"
    )


def coerce(key: str, value: Any, kind: str) -> Any:
    """Check `value` against the annotation `kind`. Lists become tuples; floats accept integers.

    Raises:
        UserError: naming `key`, the value and, for a wrong type, the correct form.
    """
    base = kind.removesuffix(" | None")
    if value is None:
        if kind != base:
            return None
        raise UserError(f"{key}: it is empty; write a value of type {base}.")
    if base.startswith("tuple["):
        element = base[len("tuple["):].split(",")[0]
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{key}: {short(value)} is not a list; write [a, b, ...] (papermill: "
                            f"-y '{key}: [a, b]', or a file with -f).")
        return tuple(coerce(f"{key}[{i}]", item, element) for i, item in enumerate(value))
    if base == "float" and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**53:
            raise UserError(f"{key}: {short(value)} is too large; it must be at most {2**53}.")
        return float(value)
    expected = {"int": int, "float": float, "str": str, "bool": bool}[base]
    if type(value) is not expected:
        hint = _type_hint(value, base)
        raise UserError(f"{key}: {short(value)} is of type {type(value).__name__}, expected {base}; {hint}.")
    if base == "int" and abs(value) >= 2**63:
        raise UserError(f"{key}: {short(value)} is too large; it must be less than 2**63.")
    if base == "str":
        return whole_text(value, key)
    if base == "float" and (value != value or value in (float("inf"), float("-inf"))):
        raise UserError(f"{key}: {value} is not a finite number.")
    return value


def parse_switch_frames(value: Any, where: str) -> tuple[int, ...] | None:
    """Convert a number, comma-separated text or a list of latent frames to a tuple; None stays None.

    Raises:
        UserError: anything else.
    """
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else \
        value if isinstance(value, (list, tuple)) else [value]
    texts = [part.strip() if isinstance(part, str) else str(part) if type(part) is int and abs(part) < 2**63
             else "" for part in parts]
    if not all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in texts):
        raise UserError(f"{where}: {short(value)} is not a list of latent frames; write for example "
                        "40,80,120.")
    return tuple(map(int, texts))


def _as_frames(key: str, value: Any) -> Any:
    """LongLive's forms of the switch frames, one number or numbers in a text, as a list."""
    is_short = key == "switch_frame_indices" and type(value) in (int, str)
    return parse_switch_frames(value, key) if is_short else value


def _type_hint(value: Any, base: str) -> str:
    """Suggest what to write instead of `value`, which does not have type `base`."""
    if base == "bool":
        return "write true or false"
    if base == "str":
        booleans = "YAML reads bare yes, no, on and off as booleans: " if isinstance(value, bool) else ""
        return f"{booleans}put quotes around it"
    text = value.strip() if isinstance(value, str) else short(value)
    number = re.fullmatch(r"([+-]?\d+)(\.\d*)?(?:[eE]([+-]?)(\d{1,2}))?", text, re.ASCII)
    if not number or isinstance(value, bool):
        return "write a whole number, such as 4" if base == "int" else "write a number, such as 2.5"
    if base == "int":
        whole = float(text).is_integer() and abs(float(text)) < 2**53
        return f"write {int(float(text))}" if whole else "write a whole number"
    digits, fraction, sign, exponent = number.groups()
    plain = digits + (fraction or ".0") + (f"e{sign or '+'}{exponent}" if exponent else "")
    return f"write {text} without quotes" if plain == text else f"YAML reads {text} as text: write {plain}"


def check_switches(indices: tuple[int, ...], prompts: int, where: str) -> None:
    """Check that `indices` (latent frames) increase and that there is one fewer than there are prompts.

    Raises:
        UserError: naming `where`, the value and the remedy.
    """
    if len(indices) != prompts - 1:
        raise UserError(
            f"{where}: {len(indices)} switch frames for {prompts} prompts; {prompts} prompts need "
            f"{prompts - 1}."
        )
    if any(f < 0 for f in indices) or any(a >= b for a, b in zip(indices, indices[1:])):
        raise UserError(f"{where}: {short(list(indices))} must be strictly increasing and not negative.")


def check_switches_fit(indices: Sequence[int], blocks: int, block_frames: int,
                       where: str = "switch_frame_indices", longer: str = "video_latent_frames") -> None:
    """Check that every switch takes effect within a video of `blocks` blocks. Each switch takes effect at the
    next block boundary, at most one per boundary.

    Args:
        where: what gave the switches.
        longer: what makes the video longer.

    Raises:
        UserError: naming the first latent frame that is too late.
    """
    boundary = -1
    for frame in indices:
        boundary = max(boundary + 1, -(-frame // block_frames))
        if boundary >= blocks:
            raise UserError(
                f"{where}: {frame} takes effect at latent frame {boundary * block_frames}, past the end of "
                f"the video ({blocks * block_frames} latent frames); switch earlier or make the video longer "
                f"({longer})."
            )


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return a notebook's parameters from its `globals()`: what the parameters cell assigns, the one that
    assigns every name of `RUN_KEYS`, and what papermill's injected cell assigns. Other variables of the
    notebook are not read. Without such a cell (a script, a plain mapping) every public global with a plain
    value is a parameter.

    A parameters cell assigns at least one key. papermill injects unknown names and only warns about them;
    they reach the config here, which refuses them. Variables of other cells are the reader's. Without `In`,
    the sources of a notebook's cells, every plain public global is a parameter.

    Raises:
        UserError: a key has a value that is not plain, such as a Path or an array.
    """
    public = {name: value for name, value in namespace.items()
              if not name.startswith("_") and name not in ("In", "Out")}
    declared = _declared_names(namespace.get("In", ()))
    if declared is not None:
        public = {name: value for name, value in public.items() if name in declared}
    for name in {*KEYS, *RUN_KEYS} & public.keys():
        if not _is_plain(public[name]):
            raise UserError(f"{name}: a {type(public[name]).__name__} is not a plain value; write a text, a "
                            "number, a list, true, false or None.")
    return {name: value for name, value in public.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, dict)


def _declared_names(cells: Any) -> set[str] | None:
    """The names that the last parameters cell and the last injected one assign, from the sources of the cells
    that IPython has run. Without a parameters cell, those of all cells that assign a key; None without any.
    """
    declared: set[str] | None = None
    injected: set[str] = set()
    others: set[str] = set()
    for source in cells if isinstance(cells, list) else ():
        names = _assigned(source) if isinstance(source, str) else set()
        if names and source.startswith(_INJECTED):
            injected = names
        elif names >= RUN_KEYS.keys():
            declared = names
        elif names & {*KEYS, *RUN_KEYS}:
            others |= names
    return (others if declared is None else declared) | injected or None


def _assigned(source: str) -> set[str]:
    """The names that a cell assigns outside of blocks; none if it is not plain Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    targets = [target for node in body if isinstance(node, (ast.Assign, ast.AnnAssign))
               for target in getattr(node, "targets", None) or [node.target]]
    return {target.id for target in targets if isinstance(target, ast.Name)}
