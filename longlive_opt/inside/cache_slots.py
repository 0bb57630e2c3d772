"""What lies in which slot of a KV (key-value) cache after each block, read from the cache's memory.

The preset's own sampler and cache process a schedule, as in a stream, but every pass stores labels instead of
values: which latent frame, under which prompt, in which kind of pass. A label is written in zeros and ones,
which every format of the cache holds exactly, also the 8-bit ones. So the slots are what the cache did, not
what its plan says. The transformer does not run, and the result does not depend on weights. Labels are stored
in the first layer; all layers of a cache follow one plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.quantize import dequantize_kv
from ..models.dit import LayerCache, TextContext
from ..models.specs import VAE_TEMPORAL_STRIDE
from ..optimizations.quantized_kv_cache import QuantizedLayer
from ..optimizations.static_kv_cache import StaticLayer
from ..prompts import PromptSchedule
from ..streaming.kv_cache import KVCache, RollingKVCache
from ..streaming.pipeline import Pipeline
from ..streaming.sampler import Sampler
from ..streaming.session import StreamingSession

Kind = Literal["denoising", "clean", "recache"]
KINDS: tuple[Kind, ...] = ("denoising", "clean", "recache")
_BITS = {"written": 1, "frame": 14, "prompt": 6, "kind": 2}
"""Fields of a label and their bits, the lowest bit first."""
WIDTH = sum(_BITS.values())


@dataclass(frozen=True)
class Slot:
    """The content of one slot: a latent frame's keys and values, the number of the prompt under which they
    were computed, and the pass that computed them.
    """

    frame: int
    prompt: int
    kind: Kind


@dataclass(frozen=True)
class SlotRow:
    """All slots after a block, in the order of the memory; None is an empty slot.

    `first_frame` is the block's first latent frame, `prompt` the number of its prompt.
    """

    block: int
    first_frame: int
    frames: int
    prompt: int
    switched: bool
    slots: tuple[Slot | None, ...]

    def role(self, slot: int, sink: int) -> str:
        """`sink`, `past`, `present` or `empty`."""
        content = self.slots[slot]
        if content is None:
            return "empty"
        if content.frame >= self.first_frame:
            return "present"
        return "sink" if slot < sink else "past"


@dataclass(frozen=True)
class CacheSlots:
    """The slots after every block of a schedule."""

    cache: str
    sink: int
    prompts: tuple[str, ...]
    rows: tuple[SlotRow, ...]


def stored_rows(layer: LayerCache, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `tokens` tokens of a layer's memory, [B, tokens, N, D], as they are
    stored or, in 8 bit, as float32.

    Raises:
        UserError: the layer is of an unknown kind.
    """
    if isinstance(layer, QuantizedLayer):
        return dequantize_kv(layer.stored, tokens)
    if isinstance(layer, StaticLayer):
        key, value, _, _ = layer.memory
    elif hasattr(layer, "key") and hasattr(layer, "value"):
        key, value = layer.key, layer.value
    else:
        raise UserError(f"cache: the memory of {type(layer).__name__} cannot be read; add it to stored_rows.")
    return key[:, :tokens], value[:, :tokens]


def cache_slots(pipeline: Pipeline, schedule: PromptSchedule, blocks: int) -> CacheSlots:
    """Stream labels through the cache of `pipeline`.

    Raises:
        UserError: a switch is past the end of the stream, or the stream is too long for a label.
    """
    plan = pipeline.sampler.plan
    most = 2 ** _BITS["frame"] // plan.block_frames
    if blocks > most or len(schedule.prompts) > 2 ** _BITS["prompt"]:
        raise UserError(f"blocks: {blocks} blocks and {len(schedule.prompts)} prompts do not fit into a "
                        f"label; use at most {most} blocks and {2 ** _BITS['prompt']} prompts.")
    labels = _Labels()
    inner = pipeline.sampler
    sampler = _LabelSampler(inner.plan, labels, inner.trim_recache, inner.defer_clean_pass)
    labelled = replace(pipeline, sampler=sampler, encode_prompt=labels.encode)
    session = StreamingSession(without_decoding(labelled))
    rows, tokens = [], cast(Any, session.cache).geometry.tokens_per_frame
    for chunk in session.play(schedule, blocks):
        _, values = stored_rows(session.cache.layers[0], plan.window * tokens)
        rows.append(SlotRow(chunk.block, chunk.start_frame, plan.block_frames, labels.prompts - 1,
                            chunk.switched, _read(values.float(), tokens)))
    return CacheSlots(_name(session.cache), plan.sink, schedule.prompts, tuple(rows))


def _name(cache: KVCache) -> str:
    if isinstance(cache, RollingKVCache):
        return "rolling window"
    return "8-bit ring" if isinstance(cache.layers[0], QuantizedLayer) else "static ring"


class _LatentsOnly:
    """A decoder that hands the latents on, each as often as it has frames."""

    def push(self, latents: Tensor, urgent: bool = False) -> list[Tensor]:
        return [latents.repeat_interleave(VAE_TEMPORAL_STRIDE, dim=1)]

    def flush(self) -> list[Tensor]:
        return []

    def reset(self) -> None:
        """Nothing is kept."""


def without_decoding(pipeline: Pipeline) -> Pipeline:
    """The same pipeline, whose chunks have latents instead of frames."""
    return replace(pipeline, make_vae_decoder=lambda: cast(Any, None), make_decoder=lambda *_: _LatentsOnly())


class _Labels:
    """A `Forward` that stores labels and predicts no flow; it also numbers the prompts."""

    def __init__(self) -> None:
        self.prompts = 0
        self.recaching = False

    def encode(self, prompt: str) -> TextContext:
        self.prompts += 1
        return TextContext((), ())

    def __call__(self, latents: Tensor, timestep: float, text: TextContext, cache: KVCache, *,
                 keys_only: bool = False) -> Tensor:
        kind: Kind = "recache" if self.recaching else "clean" if keys_only else "denoising"
        geometry, start = cast(Any, cache).geometry, cast(Any, cache).plan.start
        layer = cast(Any, cache.layers[0])
        (batch, frames), width = latents.shape[:2], geometry.heads * geometry.head_dim
        values = latents.new_zeros(batch, frames, geometry.tokens_per_frame, width)
        for index in range(frames):
            values[:, index, :, :WIDTH] = latents.new_tensor(_bits(start + index, self.prompts - 1, kind))
        v = values.flatten(1, 2).unflatten(-1, (geometry.heads, geometry.head_dim))
        layer.store(torch.zeros_like(v), v)
        return torch.zeros_like(latents)


@dataclass(frozen=True)
class _LabelSampler(Sampler):
    def recache(self, cache: KVCache, text: TextContext, start: int, latents: Tensor) -> None:
        labels = cast(_Labels, self.forward)
        labels.recaching = True
        try:
            super().recache(cache, text, start, latents)
        finally:
            labels.recaching = False


def _bits(frame: int, prompt: int, kind: Kind) -> list[float]:
    values = {"written": 1, "frame": frame, "prompt": prompt, "kind": KINDS.index(kind)}
    return [float(values[name] >> bit & 1) for name, width in _BITS.items() for bit in range(width)]


def _read(values: Tensor, tokens: int) -> tuple[Slot | None, ...]:
    """The labels in values [B, window * tokens, N, D]. All tokens of a slot must have the same one."""
    rows = (values[0].flatten(1)[:, :WIDTH] > 0.5).unflatten(0, (-1, tokens)).cpu()
    assert bool((rows == rows[:, :1]).all()), "a slot holds tokens of several frames"
    found: list[Slot | None] = []
    for bits in rows[:, 0].tolist():
        fields, at = {}, 0
        for name, width in _BITS.items():
            fields[name] = sum(bit << place for place, bit in enumerate(bits[at:at + width]))
            at += width
        found.append(Slot(fields["frame"], fields["prompt"], KINDS[fields["kind"]])
                     if fields["written"] else None)
    return tuple(found)
