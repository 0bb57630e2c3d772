"""The transformer over all blocks of a clip at once, exactly as block-by-block inference would have computed
it.

A *clip* is a list of blocks of latent frames. Block 0 is the attention sink, the first block of the video;
the others follow one another from any later place of the same video on. Inference sees each block twice:
noisy, while it is denoised, and clean, when its keys and values are left in the cache. Training needs both
for all blocks at once: `encode_context` is the clean half, which fills a `Context` with rotated keys and
values, and `predict` the noisy half, which reads it. That is teacher forcing (arXiv:1406.1078) with one noise
level per block, as in diffusion forcing (arXiv:2407.01392) and CausVid (arXiv:2412.07772).

Which clean blocks a block attends to follows from window and sink alone and is the same for every clip of a
batch. So no masks are needed: the keys of a block are put together by concatenation, blocks with equally many
keys share one call of dense attention, and nothing is computed that a mask would throw away. The modules are
those of inference; only their layer caches are others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.dit import CausalDiT, TextContext, TimeContext, modulate
from ..models.rope import rope_angles
from ..sampler import SamplingPlan

Sees = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ClipLayout:
    """Which clean blocks of a clip see which; counts in blocks.

    Args:
        blocks: blocks of the clip, the sink included.
        past: blocks in the window beside the sink and the block itself.
        block_frames: latent frames of a block.
        recached: 0, or the block at which a new prompt took over: the clean blocks before it were computed
            together, in one bidirectional pass, by the recache of the prompt switch.
        keeps_sink: the recache left the sink as the old prompt made it (the window was full).
    """

    blocks: int
    past: int
    block_frames: int = 3
    recached: int = 0
    keeps_sink: bool = True

    def clean(self, block: int) -> tuple[int, ...]:
        """Clean blocks that the clean pass of `block` attends to, itself included."""
        if block < self.recached and (block or not self.keeps_sink):
            return tuple(range(self.recached))
        return (*self.noisy(block), block)

    def noisy(self, block: int) -> tuple[int, ...]:
        """Clean blocks that the denoising passes of `block` attend to beside the block itself."""
        return tuple(i for i in range(block) if i == 0 or i >= block - self.past)


def window_past(plan: SamplingPlan) -> int:
    """Blocks of the window beside the sink and the block that is denoised.

    Raises:
        ValueError: sink and window are not whole blocks, or the sink is not one block.
    """
    if plan.window % plan.block_frames or plan.sink != plan.block_frames:
        raise ValueError(f"training wants a sink of one block and a window of whole blocks, got {plan}")
    return plan.window // plan.block_frames - 2


@dataclass
class Context:
    """Rotated keys and values of clean blocks: per layer one [B, tokens of a block, N, D] for each block."""

    keys: list[list[Tensor]] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, layers: int) -> Context:
        return cls([[] for _ in range(layers)], [[] for _ in range(layers)])

    @property
    def blocks(self) -> int:
        return len(self.keys[0])


class ClipLayer:
    """One layer's share of a pass over blocks of a clip; the `LayerCache` of training.

    `sees[j]` names the blocks that new block j attends to, counted through the stored blocks and on through
    the new ones.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], rotation: tuple[Tensor, Tensor], sees: Sees,
                 keep: bool):
        self.keys, self.values = keys, values
        self.rotation, self.sees, self.keep = rotation, sees, keep

    def store(self, k: Tensor, v: Tensor) -> None:
        self._pools(k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._pools(k, v)
        queries = self._split(rotate(q, *self.rotation))
        out: dict[int, Tensor] = {}
        for length in sorted({len(seen) for seen in self.sees}):
            members = [j for j, seen in enumerate(self.sees) if len(seen) == length]
            grouped = (torch.stack(parts, dim=1) for parts in (
                [queries[j] for j in members],
                [torch.cat([keys[i] for i in self.sees[j]], dim=1) for j in members],
                [torch.cat([values[i] for i in self.sees[j]], dim=1) for j in members]))
            heads = F.scaled_dot_product_attention(*(t.flatten(0, 1).transpose(1, 2) for t in grouped))
            parts = heads.transpose(1, 2).unflatten(0, (-1, len(members))).unbind(1)
            out.update(zip(members, parts))
        return torch.cat([out[j] for j in range(len(self.sees))], dim=1)

    def _pools(self, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        keys = [*self.keys, *self._split(rotate(k, *self.rotation))]
        values = [*self.values, *self._split(v)]
        if self.keep:
            self.keys[:], self.values[:] = keys, values
        return keys, values

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(1, (len(self.sees), -1)).unbind(1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """RoPE of x [B, L, N, D] by angles [B, L, 1, D/2], in float32; the result has the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotation(dit: CausalDiT, positions: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [B, F * tokens, 1, D/2], for latent frames at `positions` [B, F]; the angles
    are float64, as in inference.
    """
    _, patch_height, patch_width = dit.config.patch_size
    angles = rope_angles(
        dit.config.head_dim, positions.flatten(), height // patch_height, width // patch_width
    )
    angles = angles.view(len(positions), -1, 1, angles.shape[-1])
    return angles.cos().float(), angles.sin().float()


def run_blocks(dit: CausalDiT, latents: Tensor, timesteps: Tensor, positions: Tensor, text: TextContext,
               context: Context, sees: Sequence[Sequence[int]], keep: bool) -> Tensor | None:
    """One pass over `len(sees)` blocks of a clip.

    Args:
        latents: [B, F, C, H, W].
        timesteps, positions: [B, F]; positions in latent frames of the video.
        keep: leave the keys and values of these blocks in `context` and return nothing; else return the flow,
            as latents.
    """
    turns = rotation(dit, positions, *latents.shape[-2:])
    sees = tuple(map(tuple, sees))
    layers = [ClipLayer(k, v, turns, sees, keep) for k, v in zip(context.keys, context.values)]
    x, time = latents.transpose(1, 2), dit.embed_time(timesteps)
    if keep:
        _store_keys(dit, x, time, text, layers)
        return None
    return dit.forward_embedded(x, time, text, layers).transpose(1, 2)


def _store_keys(dit: CausalDiT, x: Tensor, time: TimeContext, text: TextContext,
                layers: Sequence[ClipLayer]) -> None:
    """The pass of `forward_embedded` without what serves the flow alone: the last block after its keys and
    values, and the head."""
    tokens = dit.patchify(x)
    *inner, (last, layer, _, _) = zip(dit.blocks, layers, text.keys, text.values, strict=True)
    for block, inner_layer, key, value in inner:
        tokens = block(tokens, time.blocks, inner_layer, key, value)
    shift, scale = (last.modulation + time.blocks)[:, :, :2].split(1, dim=2)
    layer.store(*last.self_attn.key_value(modulate(last.norm1(tokens), shift, scale)))


def encode_context(dit: CausalDiT, latents: Tensor, positions: Tensor, sink_text: TextContext,
                   text: TextContext, layout: ClipLayout, blocks: int, context_noise: float = 0.0) -> Context:
    """The clean pass over the first `blocks` blocks of clips [B, F, C, H, W] at `positions` [B, F].

    `sink_text` is the prompt under which the sink was made; `text` the prompt of all else.
    """
    context = Context.empty(len(dit.blocks))
    size, first = layout.block_frames, 0
    if not layout.recached or layout.keeps_sink:
        first = 1
        extend_context(dit, latents[:, :size], positions[:, :size], sink_text, context, layout, context_noise)
    if blocks > first:
        part = slice(first * size, blocks * size)
        extend_context(dit, latents[:, part], positions[:, part], text, context, layout, context_noise)
    return context


def extend_context(dit: CausalDiT, latents: Tensor, positions: Tensor, text: TextContext, context: Context,
                   layout: ClipLayout, context_noise: float = 0.0) -> None:
    """The clean pass over the next blocks of a clip, after those that `context` holds."""
    sees = [layout.clean(context.blocks + j) for j in range(latents.shape[1] // layout.block_frames)]
    run_blocks(dit, latents, torch.full_like(positions, context_noise, dtype=torch.float32), positions, text,
               context, sees, keep=True)


def predict(dit: CausalDiT, noisy: Tensor, timesteps: Tensor, positions: Tensor, text: TextContext,
            context: Context, layout: ClipLayout, blocks: Sequence[int]) -> Tensor:
    """Flow of the noisy `blocks` of clips, each given the clean blocks before it, [B, F, C, H, W].

    `noisy`, `timesteps` and `positions` hold the frames of these blocks only.
    """
    sees = [(*layout.noisy(block), context.blocks + j) for j, block in enumerate(blocks)]
    flow = run_blocks(dit, noisy, timesteps, positions, text, context, sees, keep=False)
    assert flow is not None
    return flow
