"""Load weights into modules: official ones with the LoRA (low-rank adapter) merged, or seeded random ones.

A module is built on the meta device and then filled tensor by tensor on its final device in its final dtype.
So neither host nor device ever holds a second copy of the model. Names, shapes and dtypes are checked from
the files' headers before any tensor is read.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, TypedDict

import torch
from torch import Tensor, nn

from ..errors import UserError, short
from .checkpoint import Checkpoint, listed, open_checkpoint, raise_problems
from .dit import CausalDiT
from .specs import MOST_LORA_ALPHA, DiTConfig, TextEncoderConfig, TinyVAESpec, VAEConfig
from .taehv import TAEHV, Grow, encoder_shapes
from .text import TextEncoder, UMT5Encoder, load_tokenizer
from .vae import WanVAE
from .weight_files import WeightFiles, remedy

logger = logging.getLogger(__name__)

LORA_ALPHA = 256.0
WINDOW_TOKENS = 18_720
"""Keys in the full window of LongLive-1.3B at 480 x 832: 12 latent frames of 1,560 tokens."""
KEYS_THAT_COUNT = 30
_DRAWN_AT_ONCE = 2**24
LORA_NAME = re.compile(r"base_model\.model\.(?P<target>.+)\.lora_(?P<half>[AB])\.weight")


class WeightsReport(TypedDict):
    """A report of the loaded weights for the results. `files` maps a part to its file's name and bytes."""

    kind: str
    seed: int | None
    files: dict[str, dict[str, Any]]
    tensors: int
    parameters: int
    dtype: str
    lora_targets: int
    lora_ranks: list[int]
    lora_alpha: float | None
    seconds: float


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter (arXiv:2106.09685) that changes each target weight W to W + alpha / rank * B @ A.

    `targets` maps a weight's name to the names of its A [rank, in] and B [out, rank], and to the rank.
    """

    checkpoint: Checkpoint
    targets: Mapping[str, tuple[str, str, int]]
    alpha: float

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """Return the merged weight in float32 on the weight's device; if `name` is no target, the weight."""
        if name not in self.targets:
            return weight
        name_a, name_b, rank = self.targets[name]
        a, b = (self.checkpoint.read(half).to(weight.device).float() for half in (name_a, name_b))
        return torch.addmm(weight.float(), b, a, alpha=self.alpha / rank)


def open_lora(path: Path, module: nn.Module, alpha: float) -> LoRA:
    """Open a PEFT (parameter-efficient fine-tuning) adapter and match it with the weights of `module`.

    Raises:
        UserError: naming every tensor that is not a LoRA half, lacks its other half or target, has rank 0,
        or does not fit; or `alpha` is out of range.
    """
    if not 0 < alpha <= MOST_LORA_ALPHA:
        raise UserError(f"lora_alpha: {alpha} must be greater than 0 and at most {MOST_LORA_ALPHA:g}.")
    checkpoint = open_checkpoint(path, ("generator_lora", None))
    shapes = _shapes(module)
    halves: dict[str, dict[str, str]] = {}
    strangers, alone, untargeted, empty, misshapen = [], [], [], [], []
    for name, header in checkpoint.headers.items():
        match = LORA_NAME.fullmatch(name)
        if match and header.is_float and len(header.shape) == 2:
            halves.setdefault(f"{match['target']}.weight", {})[match["half"]] = name
        else:
            strangers.append(f"{name} ({header.dtype} {list(header.shape)})")
    targets = {}
    for target, names in halves.items():
        if len(names) < 2:
            alone += names.values()
        elif target not in shapes:
            untargeted.append(target)
        else:
            a, b = (checkpoint.headers[names[half]].shape for half in "AB")
            targets[target] = (names["A"], names["B"], a[0])
            if not a[0]:
                empty.append(target)
            elif (b[0], a[1]) != shapes[target] or b[1] != a[0]:
                misshapen.append(f"{target} {list(shapes[target])} with A {list(a)} and B {list(b)}")
    raise_problems(path, {"not LoRA tensors": strangers, "without their other half": alone,
                          "targets that the model lacks": untargeted, "of rank 0": empty,
                          "of the wrong shape": misshapen})
    return LoRA(checkpoint, targets, alpha)


def fill_(module: nn.Module, checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype,
          lora: LoRA | None = None) -> None:
    """Fill `module`, on any device (meta included), with the checkpoint's values on `device` in `dtype`.

    The LoRA is merged in float32, and the sum is rounded once.

    Raises:
        UserError: names, shapes or dtypes do not fit (before anything is read), or a value is NaN or
        infinite.
    """
    check_headers(checkpoint, module)
    tensors, sums = {}, []
    for name in checkpoint.headers:
        stored = checkpoint.read(name)
        tensor = stored.to(device)
        if lora is not None:
            tensor = lora.merge(name, tensor)
        tensor = tensor.to(dtype).contiguous()
        if tensor.data_ptr() == stored.data_ptr():  # on the CPU: still a view of the file
            tensor = tensor.clone()
        tensors[name] = tensor
        sums.append(tensor.sum(dtype=torch.float32))  # not finite as soon as one value is not
    bad = [name for name, finite in zip(tensors, torch.stack(sums).isfinite().tolist()) if not finite]
    if bad:
        raise UserError(_not_finite(bad, checkpoint, lora, dtype))
    _assign(module, tensors, device)


def _not_finite(names: list[str], checkpoint: Checkpoint, lora: LoRA | None, dtype: torch.dtype) -> str:
    """Which file has the NaN or infinity that is in the weights `names`; or neither, and their sum has it."""
    own, halves, sums = [], [], []
    for name in names:
        adapted = lora is not None and name in lora.targets
        found = [half for half in lora.targets[name][:2] if not _is_finite(lora.checkpoint.read(half))] \
            if adapted else []
        halves += found
        if not adapted or not _is_finite(checkpoint.read(name).to(dtype)):
            own.append(name)
        elif not found:
            sums.append(name)
    words = [f"{path}: NaN or infinity in {listed(bad)}; {remedy(path)}."
             for path, bad in ((checkpoint.path, own), (lora and lora.checkpoint.path, halves)) if bad]
    if sums:
        words.append(f"{lora.checkpoint.path}: merged with lora_alpha {lora.alpha:g}, it makes infinity in "
                     f"{listed(sums)}; set a smaller lora_alpha, or use the adapter of this model.")
    return " ".join(words)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def check_headers(checkpoint: Checkpoint, module: nn.Module, **advice: str) -> None:
    """Refuse a checkpoint whose names, shapes or dtypes are not those of `module`; `advice` as in
    `raise_problems`.
    """
    shapes, headers = _shapes(module), checkpoint.headers
    if prefix := _surplus_prefix(headers, shapes):
        raise UserError(f"{checkpoint.path}: its names fit the model but for the prefix {short(prefix)}; "
                        "save its tensors again under names without it.")
    common = [name for name in shapes if name in headers]
    raise_problems(checkpoint.path, {
        "missing": [name for name in shapes if name not in headers],
        "unexpected": [name for name in headers if name not in shapes],
        "of the wrong shape": [f"{name} {list(headers[name].shape)} instead of {list(shapes[name])}"
                               for name in common if headers[name].shape != shapes[name]],
        "of an unusable dtype": [f"{name} ({headers[name].dtype})"
                                 for name in common if not headers[name].is_float]}, **advice)


def _surplus_prefix(names: Collection[str], wanted: Collection[str]) -> str:
    """What to remove from the beginning of `names` to have all that are `wanted`; empty if that is nothing,
    or not enough.
    """
    first = next(iter(wanted))
    prefixes = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
    return next((prefix for prefix in sorted(prefixes, key=len)
                 if all(prefix + name in names for name in wanted)), "")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def random_init_(module: nn.Module, seed: int, device: torch.device | str, dtype: torch.dtype,
                 keep_on: str | None = None, window_tokens: int = WINDOW_TOKENS) -> None:
    """Fill `module`, on any device (meta included), with seeded random values on `device`. If `keep_on` is
    given, each tensor moves to that device before the next is drawn.

    Values are drawn in float32 and rounded to `dtype`, so modules with one seed hold the same model in
    float32 and bfloat16. `seed` and a tensor's name seed its own stream, so the order does not matter. CPU
    and CUDA draw different values.

    The weights make attention selective: it looks unequally at a few dozen of its keys, and the result
    matters. So changes of the prompt, the attention sink or the recache show in the frames, as with trained
    weights, and noise common to all presets does not hide the error of an optimization.

    Args:
        window_tokens: keys in a full attention window. The norms of queries and keys grow with it.
    """
    generator = torch.Generator(device=device)
    config = getattr(module, "config", None)
    text_head_dim = config.dim_attn // config.num_heads if isinstance(module, UMT5Encoder) else 1
    tensors = {}
    for name, shape in _shapes(module).items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:7], "big"))
        tensor = torch.empty(shape, device=device, dtype=dtype)
        scales = _random_scales(name, shape, window_tokens, text_head_dim)
        for part, (mean, std) in zip(tensor.view(-1).chunk(len(scales)), scales, strict=True):
            for piece in part.split(_DRAWN_AT_ONCE):
                drawn = torch.empty(piece.shape, device=device, dtype=torch.float32)
                piece.copy_(drawn.normal_(mean, std, generator=generator))
        tensors[name] = tensor.to(keep_on or device)
    _assign(module, tensors, keep_on or device)


def attention_norm(window_tokens: int) -> float:
    """Mean of the random weights of the query and key norms, q. Normalised queries and keys have elements of
    size q, so their logits have the standard deviation s = q^2. Of n keys, about n exp(-s^2) then count; q =
    ln(n / 30)^(1/4) leaves 30 for any n. Fewer than 30 e keys are treated as 30 e, so q is at least 1, the
    weight of an untrained norm.
    """
    return math.log(max(window_tokens / KEYS_THAT_COUNT, math.e)) ** 0.25


def _random_scales(name: str, shape: tuple[int, ...], window_tokens: int,
                   text_head_dim: int) -> list[tuple[float, float]]:
    """Mean and standard deviation of a random tensor by its role, or of its equal consecutive parts."""
    fan = torch.Size(shape[1:]).numel()
    if name.endswith(".bias"):
        return [(0.0, 0.02)]
    if name == "head.modulation":
        return [(0.0, 0.1)]
    if name.endswith(".modulation"):  # shift, scale and gate of self-attention, and of the feed-forward
        return [(0.0, 0.1), (0.0, 0.1), (0.25, 0.05)] * 2
    if name.endswith((".norm_q.weight", ".norm_k.weight")):
        q = attention_norm(window_tokens)
        return [(q, 0.1 * q)]
    if name.endswith(".gamma") or len(shape) == 1:
        return [(1.0, 0.1)]
    if name == "token_embedding.weight":
        return [(0.0, 1.0)]
    if name.endswith(".pos_embedding.embedding.weight"):
        return [(0.0, 0.5)]
    if name.endswith(".attn.q.weight"):  # UMT5 does not divide its logits by sqrt(D)
        return [(0.0, (fan * text_head_dim) ** -0.5)]
    return [(0.0, _GAINS.get(_role(name), 1.0) * fan**-0.5)]


_GAINS = {"time_projection": 0.4, "attention output": 2.0, "vae branch": 0.5, "vae head": 0.7}
"""Standard deviation times the square root of the fan-in, for matrices and convolutions; all others have 1.
Attention's output is an average and therefore small, but has to matter.
"""


def _role(name: str) -> str:
    """The key in `_GAINS` for a matrix or convolution; empty for most."""
    if name.startswith("time_projection."):
        return "time_projection"
    if name.endswith((".self_attn.o.weight", ".cross_attn.o.weight")):
        return "attention output"
    if name.endswith((".residual.6.weight", ".proj.weight")):
        return "vae branch"
    return "vae head" if name.startswith("decoder.head.") else ""


def _assign(module: nn.Module, tensors: dict[str, Tensor], device: torch.device | str) -> None:
    """Make `tensors` the parameters of `module` for inference: evaluation mode, no gradients."""
    module.load_state_dict(tensors, strict=True, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left:
        raise RuntimeError(f"{type(module).__name__}: the buffers {listed(left)} are not in the checkpoint "
                           "and were built on the meta device; compute them when they are used.")
    module.to(device).eval().requires_grad_(False)


def load_dit(config: DiTConfig, files: WeightFiles, device: torch.device | str, dtype: torch.dtype,
             seed: int = 0, lora_alpha: float = LORA_ALPHA,
             window_tokens: int = WINDOW_TOKENS) -> tuple[CausalDiT, WeightsReport]:
    """Load the transformer for inference: from `files` with the LoRA merged, or random from `seed`.

    `window_tokens` is for random weights (`random_init_`).

    Raises:
        UserError: a file is missing, unreadable, unsafe, or does not fit the config.
    """
    with torch.device("meta"):
        module = CausalDiT(config)
    return module, _load(module, "dit", files, device, dtype, seed, files.containers, lora_alpha,
                         window_tokens=window_tokens)


def load_vae(config: VAEConfig, files: WeightFiles, device: torch.device | str, dtype: torch.dtype,
             seed: int = 0) -> tuple[WanVAE, WeightsReport]:
    """Load the VAE like `load_dit`."""
    with torch.device("meta"):
        module = WanVAE(config)
    return module, _load(module, "vae", files, device, dtype, seed)


def load_tiny_vae(spec: TinyVAESpec, path: Path | None, device: torch.device | str, dtype: torch.dtype,
                  seed: int = 0) -> tuple[TAEHV, WeightsReport]:
    """Load a tiny VAE's decoder, channels last, from its published file or, without one, random from `seed`.

    Raises:
        UserError: the file is unreadable, unsafe, or not one of this structure.
    """
    started = time.perf_counter()
    with torch.device("meta"):
        module = TAEHV(spec)
    if path is None:
        random_init_(module, seed, device, dtype)
    else:
        checkpoint = _without_encoder(open_checkpoint(path), module)
        check_headers(checkpoint, module, advice=f"Name {spec.source.target} as `vae_weights`, or choose "
                                                 "another `vae`.")
        fill_(module, checkpoint, device, dtype)
    used = {} if path is None else {"tiny_vae": path}
    return module.use_channels_last(), _report("tiny_vae", module, used, seed, dtype, started)


def _without_encoder(checkpoint: Checkpoint, module: TAEHV) -> Checkpoint:
    """The decoder's tensors of a tiny VAE's file. Of a layer that was trained to make more frames than the
    model wants, the last ones, as published.
    """
    headers = {name: header for name, header in checkpoint.headers.items()
               if header.shape != encoder_shapes().get(name)}
    kept = {}
    for index, layer in module.decoder.items():
        name = f"decoder.{index}.conv.weight"
        if isinstance(layer, Grow) and name in headers:
            stored, (outputs, *rest) = headers[name].shape, layer.conv.weight.shape
            if stored[1:] == (*rest,) and stored[0] > outputs and not stored[0] % rest[0]:
                headers[name], kept[name] = headers[name]._replace(shape=(outputs, *rest)), outputs

    def read(name: str) -> Tensor:
        tensor = checkpoint.read(name)
        return tensor[-kept[name]:] if name in kept else tensor

    return Checkpoint(checkpoint.path, headers, read)


def open_text_encoder(config: TextEncoderConfig, files: WeightFiles, device: torch.device | str,
                      dtype: torch.dtype, seed: int = 0, sha256: str | None = None) -> TextEncoder:
    """Open the text encoder and its tokenizer (for random weights, the byte-level stand-in); the weights are
    loaded at their first use.

    Args:
        sha256: of the weights' file; None computes it from the file.

    Raises:
        UserError: the tokenizer is missing or does not fit the config; when loading, as in `load_dit`.
    """
    tokenizer = load_tokenizer(files.tokenizer or "bytes", config.text_len)
    drawn = f"seed {seed} on {torch.device(device).type}"
    weights = drawn if files.root is None else sha256 or files.sha256(("text",))["text"]

    def load(keep_on: str | None) -> tuple[UMT5Encoder, WeightsReport]:
        with torch.device("meta"):
            module = UMT5Encoder(config)
        return module, _load(module, "text", files, device, dtype, seed, keep_on=keep_on)

    return TextEncoder(config, tokenizer, f"{weights}, {dtype}", load)


def _load(module: nn.Module, part: str, files: WeightFiles, device: torch.device | str, dtype: torch.dtype,
          seed: int, containers: tuple[str | None, ...] = (None,), lora_alpha: float = LORA_ALPHA,
          keep_on: str | None = None, window_tokens: int = WINDOW_TOKENS) -> WeightsReport:
    """Fill `module` from `files` or, if they are random, from `seed`; it ends up on `device` or `keep_on`."""
    started = time.perf_counter()
    used: dict[str, Path] = {}
    lora = None
    if files.root is None:
        random_init_(module, seed, device, dtype, keep_on, window_tokens)
    else:
        path = getattr(files, part)
        if path is None:
            raise UserError(f"weights: {files.root} was resolved without the part {part!r}; add it.")
        used[part] = path
        if part == "dit" and files.lora is not None:
            used["lora"] = files.lora
            lora = open_lora(files.lora, module, lora_alpha)
        fill_(module, open_checkpoint(path, containers), keep_on or device, dtype, lora)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return _report(part, module, used, seed, dtype, started, lora)


def _report(part: str, module: nn.Module, used: Mapping[str, Path], seed: int, dtype: torch.dtype,
            started: float, lora: LoRA | None = None) -> WeightsReport:
    """Describe weights that are loaded; without `used` files they are random."""
    kind = "files" if used else "random"
    report = WeightsReport(
        kind=kind,
        seed=None if used else seed,
        files={key: {"name": path.name, "bytes": path.stat().st_size} for key, path in used.items()},
        tensors=len(module.state_dict()),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        lora_targets=len(lora.targets) if lora else 0,
        lora_ranks=sorted({rank for _, _, rank in lora.targets.values()}) if lora else [],
        lora_alpha=lora.alpha if lora else None,
        seconds=time.perf_counter() - started)
    logger.info("%s: %s weights in %.1f s", part, kind, report["seconds"])
    return report
