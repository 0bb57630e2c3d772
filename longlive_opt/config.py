"""What can be configured: the flat preset that names one experiment.

A preset speaks the vocabulary of the log; its keys are the parameters of the notebooks.
`ExperimentConfig.from_mapping` is the door: an unknown key, a wrong type or an impossible combination stops
here, before anything is built. This module imports no torch, so that command lines can refuse a preset at
once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Mapping, Sequence

from .errors import UserError
from .files import whole_text
from .models.specs import MODELS, ROPE_POSITIONS, ModelSpec

BASELINE = "baseline"
STUDIES = ("ablation", "quantization")
"""Presets that take others apart: measured and shown, never recommended."""
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
KV_QUANTIZATIONS = ("int8", "fp8")
KV_READ_PATHS = ("fused", "dequantize")
LINEAR_QUANTIZATIONS = ("int8", "fp8")
LINEAR_LAYERS = ("qkv", "query", "up", "down")
DTYPES = ("bfloat16", "float32")
ATTENTION_BACKENDS = ("auto", "cudnn", "gluon", "flash", "efficient", "math")
OBJECTIVES = ("latency", "switch", "memory")
REHEARSED_BLOCKS = 4
"""After warm-up, in the rehearsal: two prompt switches, each with the block behind it."""
_FIXED_CACHES = ("use_static_kv", "use_quantized_kv")
# What cannot do without one of other flags: which they are, and why.
NEEDS: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType({
    "use_fused_kernels": (_FIXED_CACHES, "its kernels write into a cache of fixed memory, and the reference "
                                         "cache has none"),
    "use_quantized_linears": (("use_fused_kernels",), "the fused norms round its activations to 8 bit on the "
                                                      "way"),
    "vae_offload_ahead": (("use_vae_offload",), "it is a way to move what lies in host memory"),
    "use_torch_compile": (_FIXED_CACHES, "the reference cache changes its shapes in Python"),
})
RUN_KEYS = ("campaign", "run", "output_dir")
"""What a notebook is told beside its configuration."""


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment, flat: exactly the keys of `params/*.yaml` and of the notebooks' parameters cell.

    Frames in `local_attn_size`, `sink_size`, `block_frames` and `switch_frame_indices` are latent frames.
    """

    name: str = BASELINE
    title: str = "Baseline"
    hypothesis: str = ""

    model: str = "tiny"
    weights: str = "weights/tiny"
    lora_alpha: float = 256.0
    device: str = "cpu"
    model_dtype: str = "bfloat16"
    height: int | None = None
    width: int | None = None
    seed: int = 0

    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    timestep_shift: float = 5.0
    context_noise: int = 0
    block_frames: int = 3
    local_attn_size: int = 12
    sink_size: int = 3
    global_sink: bool = True
    relative_rope: bool = False
    attention_backend: str = "auto"

    use_cuda_graphs: bool = False
    capture_recache: bool = True
    use_torch_compile: bool = False
    compile_mode: str = "default"
    use_static_kv: bool = False
    use_quantized_kv: bool = False
    kv_quantization: str = "int8"
    kv_read_path: str = "fused"
    use_async_vae: bool = False
    use_prompt_cache: bool = False
    use_fused_kernels: bool = False
    use_quantized_linears: bool = False
    linear_quantization: str = "int8"
    linear_layers: tuple[str, ...] = LINEAR_LAYERS
    use_text_offload: bool = False
    use_vae_offload: bool = False
    vae_offload_ahead: bool = False
    use_early_decode: bool = False
    vae_chunk_latents: int | None = None
    vae_channels_last: bool | None = None
    cudnn_benchmark: bool | None = None
    gpu_memory_limit_gb: float | None = None
    prompt_cache_mb: int = 1024
    prompt_cache_dir: str | None = None

    prompts: tuple[str, ...] = (
        "a large red square with the letter A pulses and a small blue circle orbits, on a dotted grey ground",
        "a large white star with the letter A pulses and a small blue circle orbits, on a dotted grey ground",
        "a large white star with the letter A pulses and a small red circle orbits, on a striped teal ground")
    prompts_file: str | None = None
    switch_frame_indices: tuple[int, ...] | None = None
    video_latent_frames: int = 18
    video_width: int | None = None
    video_crf: int = 23

    fidelity_blocks: int = 6
    warmup_blocks: int = 5
    measure_blocks: int = 4
    num_switches: int = 1
    playback_fps: float = 25.0
    objective: str = "latency"
    max_error_ratio: float | None = None
    target_ms_per_frame: float = 40.0

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> ExperimentConfig:
        """Check a flat mapping (a preset, a profile on top, parameters from the command line) and build the
        config.

        Raises:
            UserError: naming the key, the value and the remedy.
        """
        if not isinstance(mapping, Mapping):
            raise UserError(f"preset: expected keys and values, found {type(mapping).__name__} {mapping!r}; "
                            "write one 'key: value' per line.")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = [key for key in mapping if key not in fields]
        if unknown:
            raise UserError(
                "preset: " + "; ".join(unknown_key(str(key), list(fields)) for key in unknown) + "."
            )
        values = {key: coerce(key, value, str(fields[key].type)) for key, value in mapping.items()}
        if values.get("prompts_file") is not None:
            values["prompts"] = ()  # those of the file are used, and no others are to stand in a result
        config = cls(**values)
        config.validate()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON- and YAML-ready values, in the order of the fields."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def model_config(self) -> ModelSpec:
        return MODELS[self.model].with_size(self.height, self.width)

    @property
    def window_blocks(self) -> int:
        """Blocks until the attention window is full."""
        return -(-self.local_attn_size // self.block_frames)

    @property
    def latents_per_vae_call(self) -> int:
        """Latent frames that the VAE decodes in one call."""
        return self.vae_chunk_latents or (self.block_frames if self.use_torch_compile else 1)

    @property
    def vae_is_channels_last(self) -> bool:
        """Whether the VAE's weights and activations have their channels last."""
        if self.vae_channels_last is not None:
            return self.vae_channels_last
        return self.use_torch_compile or self.device == "cpu"

    @property
    def times_convolutions(self) -> bool:
        """Whether cuDNN times its kernels for the VAE's convolutions; on the CPU only where it is asked for,
        and refused there when the pipeline is built.
        """
        if self.cudnn_benchmark is not None:
            return self.cudnn_benchmark
        return self.use_torch_compile and self.device != "cpu"

    @property
    def vae_switches(self) -> tuple[str, ...]:
        """The keys by which the VAE's calls differ from the baseline's on this device."""
        differs = {"vae_channels_last": self.vae_is_channels_last != (self.device == "cpu"),
                   "vae_chunk_latents": self.latents_per_vae_call > 1,
                   "cudnn_benchmark": self.times_convolutions}
        return tuple(key for key, is_on in differs.items() if is_on)

    @property
    def max_blocks(self) -> int | None:
        """Blocks that one stream can hold: absolute rotary positions end at latent frame 1023; None is no
        limit.
        """
        return None if self.relative_rope else ROPE_POSITIONS // self.block_frames

    def validate(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: naming the key, the value and the remedy.
        """
        def one_of(key: str, allowed: tuple[str, ...]) -> None:
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"{key}: {getattr(self, key)!r} is unknown; choose one of {', '.join(allowed)}."
                )

        def at_least(key: str, least: float) -> None:
            if getattr(self, key) < least:
                raise UserError(f"{key}: {getattr(self, key)} is too small; it must be at least {least}.")

        one_of("model", tuple(MODELS))
        one_of("model_dtype", DTYPES)
        one_of("compile_mode", COMPILE_MODES)
        one_of("kv_quantization", KV_QUANTIZATIONS)
        one_of("kv_read_path", KV_READ_PATHS)
        one_of("linear_quantization", LINEAR_QUANTIZATIONS)
        one_of("attention_backend", ATTENTION_BACKENDS)
        one_of("objective", OBJECTIVES)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device: {self.device!r} is unknown; write cpu, cuda or cuda:N.")
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", self.name):
            raise UserError(
                f"name: {self.name!r} cannot name a folder; use letters, digits, '_', '-' or a later '.'."
            )
        self.model_config()
        if not self.linear_layers or not set(self.linear_layers) <= set(LINEAR_LAYERS):
            raise UserError(f"linear_layers: {list(self.linear_layers)} must name at least one of "
                            f"{', '.join(LINEAR_LAYERS)}, and no other.")
        self._validate_sampling(at_least)
        self._validate_inputs()
        self._validate_combinations()
        for key, least in (
            ("seed", 0),
            ("video_latent_frames", 1),
            ("fidelity_blocks", 2),
            ("warmup_blocks", self.window_blocks),
            ("measure_blocks", 2),
            ("num_switches", 0),
            ("video_crf", 0),
            ("prompt_cache_mb", 0),
        ):
            at_least(key, least)
        for key, most in (("seed", 2**63 - 1), ("video_crf", 51), ("playback_fps", 1000)):
            if getattr(self, key) is not None and getattr(self, key) > most:
                raise UserError(f"{key}: {getattr(self, key)} is too large; it can be at most {most}.")
        for key in ("playback_fps", "target_ms_per_frame", "lora_alpha", "timestep_shift",
                    "max_error_ratio"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise UserError(f"{key}: {getattr(self, key)} must be greater than 0.")
        frames, block = self.video_latent_frames, self.block_frames
        if frames % block:
            nearest = [str(n) for n in (frames // block * block, (frames // block + 1) * block) if n]
            raise UserError(
                f"video_latent_frames: {frames} is not a multiple of block_frames {block}; use "
                f"{' or '.join(nearest)}."
            )
        for key, least in (("video_width", 16), ("vae_chunk_latents", 1), ("gpu_memory_limit_gb", 0.1)):
            if getattr(self, key) is not None:
                at_least(key, least)
        self._validate_length()

    @property
    def video_blocks(self) -> int:
        """Blocks of the video that is shown."""
        return self.video_latent_frames // self.block_frames

    @property
    def blocks_in_measurement(self) -> int:
        """Blocks of the longest stream of a measurement: rehearsal, steady state, or prompt switches at every
        second block. One more follows where decoding overlaps it (`Measurement`).
        """
        measured = max(self.measure_blocks, 2 * self.num_switches) + self.use_async_vae
        return self.warmup_blocks + max(measured, REHEARSED_BLOCKS)

    def _validate_length(self) -> None:
        """Refuse a stream past the last rotary position; the key that asks for most of it is named."""
        longest = max(self.blocks_in_measurement, self.video_blocks)
        if self.max_blocks is None or longest <= self.max_blocks:
            return
        asks = {"measure_blocks": self.measure_blocks, "num_switches": 2 * self.num_switches,
                "warmup_blocks": self.warmup_blocks}
        key = "video_latent_frames" if longest == self.video_blocks else max(asks, key=lambda key: asks[key])
        raise UserError(
            f"{key}: {getattr(self, key)} makes a stream of {longest} blocks, but absolute rotary positions "
            f"end after {self.max_blocks}; use a smaller one or set relative_rope: true."
        )

    def _validate_sampling(self, at_least: Any) -> None:
        steps = self.denoising_steps
        if not steps:
            raise UserError(
                "denoising_steps: the list is empty; give at least one, such as [1000, 750, 500, 250]."
            )
        if any(not 0 < s <= 1000 for s in steps) or any(a <= b for a, b in zip(steps, steps[1:])):
            raise UserError(f"denoising_steps: {list(steps)} must fall strictly and lie in 1..1000, "
                            "such as [1000, 750, 500, 250].")
        at_least("block_frames", 1)
        at_least("sink_size", 0)
        if not 0 <= self.context_noise < 1000:
            raise UserError(
                f"context_noise: {self.context_noise} is no timestep; choose 0..999 (LongLive uses 0)."
            )
        if self.local_attn_size == -1:
            raise UserError(
                "local_attn_size: -1 (global attention) needs memory that grows with the video and is not "
                "offered; 21 attends the same keys as LongLive's global mode in normal generation."
            )
        if self.local_attn_size < self.sink_size + self.block_frames:
            raise UserError(
                f"local_attn_size: {self.local_attn_size} is smaller than sink_size {self.sink_size} + "
                f"block_frames {self.block_frames}; use at least {self.sink_size + self.block_frames}."
            )

    def _validate_combinations(self) -> None:
        """Refuse values that are right alone and cannot go together, on whatever machine."""
        for key, (others, reason) in NEEDS.items():
            if getattr(self, key) and not any(getattr(self, other) for other in others):
                raise UserError(f"{key}: {reason}; switch on {' or '.join(others)} as well.")
        backend, on_cpu, half = self.attention_backend, self.device == "cpu", self.model_dtype != "float32"
        if on_cpu and backend not in ("auto", "math", "gluon"):
            raise UserError(f"attention_backend: {backend!r} runs on CUDA only; use auto with device: cpu.")
        if backend in ("cudnn", "gluon", "flash") and not half:
            raise UserError(
                f"attention_backend: {backend!r} has no float32 kernel; use auto or model_dtype: bfloat16."
            )
        if self.use_quantized_kv and self.kv_read_path == "fused" and not (on_cpu or half):
            raise UserError("kv_read_path: 'fused' attends in bfloat16 on CUDA, and model_dtype is float32; "
                            "use model_dtype: bfloat16 or kv_read_path: dequantize.")
        if self.use_quantized_linears and not (on_cpu or half):
            raise UserError("use_quantized_linears: its products give bfloat16 on CUDA, and model_dtype is "
                            "float32; use model_dtype: bfloat16.")

    def _validate_inputs(self) -> None:
        if self.prompts_file is None and not self.prompts:
            raise UserError("prompts: the list is empty; give at least one prompt, or set prompts_file.")
        for i, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise UserError(f"prompts: entry {i} is empty; write some text or remove it.")
        if self.switch_frame_indices is not None and self.prompts_file is None:
            check_switches(self.switch_frame_indices, len(self.prompts), "switch_frame_indices")
            check_switches_fit(self.switch_frame_indices, self.video_blocks, self.block_frames)


def check_baseline(config: ExperimentConfig) -> None:
    """Refuse what would be run under the baseline's name with optimizations: every other run of its campaign
    would be compared with it. A config in Python, of which nothing is stored, may have this name.

    Raises:
        UserError: naming the flags and the remedy.
    """
    switched_on = [key for key, value in config.to_dict().items() if key.startswith("use_") and value]
    switched_on += [key for key in config.vae_switches if getattr(config, key) is not None]
    switched_on += ["attention_backend"] if config.attention_backend == "gluon" else []
    if config.name == BASELINE and switched_on:
        given = sorted({json.dumps(getattr(config, key)) for key in switched_on})
        raise UserError(f"{', '.join(switched_on)}: {' and '.join(given)} under the name {BASELINE!r}, with "
                        "which all other runs are compared; leave it out, run presets without the baseline "
                        "and its repetitions, or choose another name (papermill: -p name mine).")


def unknown_key(key: str, known: list[str]) -> str:
    """What to say of `key`, with the known key that it resembles most."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (
        f" (did you mean {close[0]!r}?)" if close else " (README lists the keys)"
    )


def coerce(key: str, value: Any, kind: str) -> Any:
    """Check `value` against the annotation `kind`; lists become tuples, integers are accepted for floats.

    Raises:
        UserError: naming `key`, the value and, for a wrong type, what to write.
    """
    base = kind.removesuffix(" | None")
    if value is None:
        if kind != base:
            return None
        raise UserError(f"{key}: it is empty; write a value of type {base}.")
    if base.startswith("tuple["):
        element = base[len("tuple["):].split(",")[0]
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
            raise UserError(f"{key}: {value!r} is not a list; write [a, b, ...].")
        return tuple(coerce(f"{key}[{i}]", item, element) for i, item in enumerate(value))
    if base == "float" and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**53:
            raise UserError(f"{key}: {str(value)[:24]}... is too large; it must be at most {2**53}.")
        return float(value)
    expected = {"int": int, "float": float, "str": str, "bool": bool}[base]
    if type(value) is not expected:
        hint = _type_hint(value, base)
        raise UserError(f"{key}: {value!r} is of type {type(value).__name__}, expected {base}; {hint}.")
    if base == "str":
        return whole_text(value, key)
    if base == "float" and (value != value or value in (float("inf"), float("-inf"))):
        raise UserError(f"{key}: {value} is not a finite number.")
    return value


def _type_hint(value: Any, base: str) -> str:
    """What to write in place of `value`, which is not of type `base`."""
    if base == "bool":
        return "write true or false"
    if base == "str":
        booleans = "YAML reads bare yes, no, on and off as booleans: " if isinstance(value, bool) else ""
        return f"{booleans}put quotes around it"
    text = value.strip() if isinstance(value, str) else str(value)
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
    """Check that `indices` (latent frames) rise and are one fewer than the prompts.

    Raises:
        UserError: naming `where`, the value and the remedy.
    """
    if len(indices) != prompts - 1:
        raise UserError(
            f"{where}: {len(indices)} switch frames for {prompts} prompts; {prompts} prompts need "
            f"{prompts - 1}."
        )
    if any(f < 0 for f in indices) or any(a >= b for a, b in zip(indices, indices[1:])):
        raise UserError(f"{where}: {list(indices)} must rise strictly and not be negative.")


def check_switches_fit(indices: Sequence[int], blocks: int, block_frames: int) -> None:
    """Check that a video of `blocks` blocks serves every switch: each takes effect at the next block
    boundary, at most one a boundary.

    Raises:
        UserError: naming the first latent frame that comes too late.
    """
    boundary = -1
    for frame in indices:
        boundary = max(boundary + 1, -(-frame // block_frames))
        if boundary >= blocks:
            raise UserError(
                f"switch_frame_indices: {frame} takes effect at latent frame {boundary * block_frames}, past "
                f"the end of the video ({blocks * block_frames} latent frames); switch earlier or make the "
                "video longer (video_latent_frames)."
            )


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among a notebook's globals: every public name with a plain value.

    papermill injects unknown names with no more than a warning; here they reach the config, which refuses
    them.
    """
    shell = {"In", "Out"}
    return {name: value for name, value in namespace.items() if not name.startswith("_") and name not in shell
            and (value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)))}
