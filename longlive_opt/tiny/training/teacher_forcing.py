"""Teacher forcing for the causal transformer: all blocks of a clip in one pass, equal to inference.

A *clip* is a list of blocks of latent frames. Block 0 is the attention sink, the first block of the video.
The others are consecutive blocks from any later place of the same video. Inference sees each block twice:
noisy while it is denoised, and clean when its keys and values enter the cache. Training needs both for all
blocks at once, so `predict_clips` processes the clean and the noisy versions together. If the clean past is
fixed and the noisy blocks change, as in a rollout, `encode_context` fills a `Context` with rotated keys and
values, and a `Denoiser` reads it. This is teacher forcing (arXiv:1406.1078) with one noise level per block,
as in diffusion forcing (arXiv:2407.01392) and CausVid (arXiv:2412.07772).

Within a pass blocks form the batch: tokens are [blocks x clips, tokens of a block, dim]. So clips of any kind
and number use the same code, compiled once. Only attention mixes blocks. Window and sink alone determine the
clean blocks that a block attends to (see `block_attention`), so the pass needs no masks and computes nothing
that a mask would discard. The modules are those of inference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.dit import CausalDiT, DiTBlock, Head, TextContext, modulate
from ...models.rope import rope_angles
from ...models.specs import ROPE_POSITIONS
from ...streaming.sampler import SamplingPlan
from .block_attention import Kept, Sees, attend_blocks, slices
from .compiling import compilable


@dataclass(frozen=True)
class ClipLayout:
    """Which blocks of a clip attend to which clean blocks. Counts are in blocks.

    Args:
        blocks: blocks of the clip, including the sink.
        past: blocks in the window without the sink and the block itself.
        block_frames: latent frames per block.
        recached: 0, or the block at which a new prompt took over. The recache of the prompt switch computed
            the clean blocks before it together, in one bidirectional pass.
        keeps_sink: the recache left the sink under the old prompt, because the window was full.
    """

    blocks: int
    past: int
    block_frames: int = 3
    recached: int = 0
    keeps_sink: bool = True

    def clean(self, block: int) -> tuple[int, ...]:
        """Clean blocks that the clean pass of `block` attends to, including itself."""
        if block < self.recached and (block or not self.keeps_sink):
            return tuple(range(self.recached))
        return (*self.noisy(block), block)

    def noisy(self, block: int) -> tuple[int, ...]:
        """Clean blocks that the denoising passes of `block` attend to in addition to the block itself."""
        return tuple(i for i in range(block) if i == 0 or i >= block - self.past)

    @property
    def sink_apart(self) -> bool:
        """Whether the sink has a clean pass of its own, under its own prompt."""
        return not self.recached or self.keeps_sink


def window_past(plan: SamplingPlan) -> int:
    """Blocks of the window without the sink and the block that is denoised.

    Raises:
        ValueError: the window is not a multiple of a block, or the sink is not one block.
    """
    if plan.window % plan.block_frames or plan.sink != plan.block_frames:
        raise ValueError(f"training needs a sink of one block and a window of whole blocks, got {plan}")
    return plan.window // plan.block_frames - 2


@dataclass
class Context:
    """Rotated keys and values of clean blocks: [blocks, B, tokens of a block, N, D] per layer, or None before
    the first block.
    """

    keys: list[Tensor | None] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def empty(cls, layers: int) -> Context:
        return cls([None] * layers, [None] * layers)

    @property
    def blocks(self) -> int:
        return 0 if self.keys[0] is None else len(self.keys[0])

    def add(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Append blocks to one layer."""
        old_key, old_value = self.keys[layer], self.values[layer]
        self.keys[layer] = key if old_key is None else torch.cat([old_key, key])
        self.values[layer] = value if old_value is None else torch.cat([old_value, value])


@dataclass(frozen=True)
class NoisyClips:
    """Clips whose `blocks` are noisy and whose other blocks are clean: the input of `predict_clips`.

    `past` [B, F, C, H, W] and `positions` [B, F] cover all blocks. Positions count latent frames of the
    video. `noisy` and `timesteps` [B, frames] cover only `blocks`. `sink_text` is the prompt of the sink,
    `text` that of all other blocks.
    """

    past: Tensor
    positions: Tensor
    noisy: Tensor
    timesteps: Tensor
    sink_text: TextContext
    text: TextContext
    layout: ClipLayout
    blocks: tuple[int, ...]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding (RoPE) of x [B, L, N, D] by angles [B, L, 1, D/2], computed in float32. The
    result has the dtype of x.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


@cache
def _rotations(head_dim: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [positions, rows * columns, D/2], of float64 angles as in inference."""
    angles = rope_angles(head_dim, torch.arange(ROPE_POSITIONS, device=device), rows, columns)
    angles = angles.view(ROPE_POSITIONS, rows * columns, -1)
    return angles.cos().float(), angles.sin().float()


def rotation(dit: CausalDiT, positions: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [B, F * tokens, 1, D/2], for latent frames at `positions` [B, F]."""
    _, patch_height, patch_width = dit.config.patch_size
    tables = _rotations(
        dit.config.head_dim, height // patch_height, width // patch_width, positions.device
    )
    cosine, sine = (table[positions].flatten(1, 2)[:, :, None] for table in tables)
    return cosine, sine


@compilable(dynamic=True)
def project_half(block: DiTBlock, x: Tensor, time: Tensor, cosine: Tensor, sine: Tensor) -> tuple[
        Tensor, Tensor, Tensor]:
    """A transformer block up to self-attention: rotated q, rotated k, and v, each [B, L, N, D]."""
    q, k, v = block.project(x, time)
    return rotate(q, cosine, sine), rotate(k, cosine, sine), v


@compilable(dynamic=True)
def key_half(block: DiTBlock, x: Tensor, time: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """`project_half` without queries."""
    shift, scale = (block.modulation + time)[:, :, :2].split(1, dim=2)
    key, value = block.self_attn.key_value(modulate(block.norm1(x), shift, scale))
    return rotate(key, cosine, sine), value


@compilable(dynamic=True)
def finish_half(block: DiTBlock, x: Tensor, attended: Tensor, time: Tensor, text_key: Tensor,
                text_value: Tensor) -> Tensor:
    """`DiTBlock.finish`, compiled once for all blocks."""
    return block.finish(x, attended, time, text_key, text_value)


@compilable(dynamic=True)
def call_head(head: Head, x: Tensor, time: Tensor) -> Tensor:
    return head(x, time)


def by_block(x: Tensor, block_frames: int) -> Tensor:
    """[B, blocks * frames, ...] -> [blocks * B, frames, ...]"""
    return x.unflatten(1, (-1, block_frames)).transpose(0, 1).flatten(0, 1)


def by_clip(x: Tensor, clips: int) -> Tensor:
    """[blocks * B, frames, ...] -> [B, blocks * frames, ...]"""
    return x.unflatten(0, (-1, clips)).transpose(0, 1).flatten(1, 2)


def take_blocks(x: Tensor, blocks: Sequence[int], block_frames: int) -> Tensor:
    """[B, frames, ...] -> the frames of `blocks`, without sending an index to the device."""
    return _joined(slices(x, blocks, dim=1, size=block_frames), dim=1)


def expand_text(text: TextContext, blocks: int) -> TextContext:
    """Repeat the prompts [B, ...] of clips for `blocks` blocks each: [blocks * B, ...]."""
    return TextContext(*(tuple(t.expand(blocks, *t.shape).flatten(0, 1) for t in part)
                         for part in (text.keys, text.values)))


def split_text(text: TextContext, sizes: Sequence[int]) -> list[TextContext]:
    """Split the prompts of a batch into consecutive parts."""
    parts = (zip(*(t.split(list(sizes)) for t in tensors)) for tensors in (text.keys, text.values))
    return [TextContext(keys, values) for keys, values in zip(*parts)]


def patchify(dit: CausalDiT, x: Tensor) -> Tensor:
    """`CausalDiT.patchify` for frames first, [B, F, C, H, W] -> [B, L, dim], as one matrix product (GEMM)."""
    _, height, width = dit.config.patch_size
    patches = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # [B, F, C, rows, h, columns, w]
    patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
    return F.linear(patches, dit.patch_embedding.weight.flatten(1), dit.patch_embedding.bias)


class Denoiser:
    """Predicts the flow of noisy blocks of clips with a fixed clean past, repeatedly at different noise
    levels, for several batches of clips in one pass.
    """

    def __init__(self, dit: CausalDiT, batches: Sequence[tuple[Tensor, TextContext, Context, ClipLayout,
                                                               Sequence[int]]]):
        """Args: batches: for each batch the positions [B, F] of the noisy frames, the prompts, the clean
        blocks before them, the layout, and the noisy blocks.
        """
        self.dit = dit
        self.clips = [len(positions) for positions, *_ in batches]
        self.contexts = [context for _, _, context, _, _ in batches]
        self.sees: list[Sees] = [tuple((*layout.noisy(block), context.blocks + j)
                                       for j, block in enumerate(blocks))
                                 for _, _, context, layout, blocks in batches]
        self.block_frames = batches[0][3].block_frames
        self.positions = torch.cat([by_block(positions, self.block_frames) for positions, *_ in batches])
        texts = [expand_text(text, len(blocks)) for _, text, _, _, blocks in batches]
        self.texts = [tuple(map(torch.cat, zip(*layer)))
                      for layer in zip(*(list(zip(text.keys, text.values)) for text in texts))]
        self.sizes = [len(sees) * clips for sees, clips in zip(self.sees, self.clips)]
        self._turns: tuple[Tensor, Tensor] | None = None
        self._kept: list[list[Kept]] = [[{} for _ in batches] for _ in dit.blocks]

    def __call__(self, noisy: Sequence[Tensor], timesteps: Sequence[Tensor]) -> list[Tensor]:
        """Flow [B, F, C, H, W] of each batch from its noisy latents and its timesteps [B, F]."""
        dit = self.dit
        height, width = noisy[0].shape[-2:]
        if self._turns is None:
            self._turns = rotation(dit, self.positions, height, width)
        latents, levels = (torch.cat([by_block(t, self.block_frames) for t in part])
                           for part in (noisy, timesteps))
        time, x = dit.embed_time(levels), patchify(dit, latents)
        for index, block in enumerate(dit.blocks):
            whole = (t.split(self.sizes) for t in project_half(block, x, time.blocks, *self._turns))
            attended = []
            for sees, clips, context, kept, *part in zip(self.sees, self.clips, self.contexts,
                                                         self._kept[index], *whole):
                heads = attend_blocks(*(t.unflatten(0, (-1, clips)) for t in part), sees,
                                      context.keys[index], context.values[index], kept)
                attended.append(heads.flatten(0, 1))
            x = finish_half(block, x, _joined(attended), time.blocks, *self.texts[index])
        flows = dit.unpatchify(call_head(dit.head, x, time.head), height, width).transpose(1, 2)
        return [by_clip(flow, clips) for flow, clips in zip(flows.split(self.sizes), self.clips)]


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def encode_context(dit: CausalDiT, latents: Tensor, positions: Tensor, sink_text: TextContext,
                   text: TextContext, layout: ClipLayout, blocks: int, context_noise: float = 0.0) -> Context:
    """The clean pass over the first `blocks` blocks of clips [B, F, C, H, W] at `positions` [B, F].

    `sink_text` is the prompt of the sink, `text` that of all other blocks.
    """
    context = Context.empty(len(dit.blocks))
    size, first = layout.block_frames, 0
    if layout.sink_apart and blocks:
        first = 1
        extend_context(dit, latents[:, :size], positions[:, :size], sink_text, context, layout, context_noise)
    if blocks > first:
        part = slice(first * size, blocks * size)
        extend_context(dit, latents[:, part], positions[:, part], text, context, layout, context_noise)
    return context


def extend_context(dit: CausalDiT, latents: Tensor, positions: Tensor, text: TextContext, context: Context,
                   layout: ClipLayout, context_noise: float = 0.0) -> None:
    """The clean pass over the next blocks of a clip, after those in `context`."""
    clips, size = len(latents), layout.block_frames
    blocks = latents.shape[1] // size
    sees = tuple(layout.clean(context.blocks + j) for j in range(blocks))
    positions = by_block(positions, size)
    time = dit.embed_time(torch.full_like(positions, context_noise, dtype=torch.float32))
    turns = rotation(dit, positions, *latents.shape[-2:])
    text, x = expand_text(text, blocks), patchify(dit, by_block(latents, size))
    *inner, last = dit.blocks
    for index, block in enumerate(inner):
        q, k, v = (t.unflatten(0, (-1, clips)) for t in project_half(block, x, time.blocks, *turns))
        attended = attend_blocks(q, k, v, sees, context.keys[index], context.values[index])
        context.add(index, k, v)
        x = finish_half(block, x, attended.flatten(0, 1), time.blocks, text.keys[index], text.values[index])
    key, value = (t.unflatten(0, (-1, clips)) for t in key_half(last, x, time.blocks, *turns))
    context.add(len(inner), key, value)


def predict_clips(dit: CausalDiT, batches: Sequence[NoisyClips], context_noise: float = 0.0) -> list[Tensor]:
    """Flow of the noisy blocks of every batch of clips, each [B, F, C, H, W]. It equals `encode_context` and
    `Denoiser` for all batches, in one pass. Clean blocks come first. The last layer computes only their keys
    and values.
    """
    parts = [_Part(batch, context_noise) for batch in batches]
    height, width = batches[0].noisy.shape[-2:]
    time = dit.embed_time(torch.cat([part.timesteps for part in parts]))
    cosine, sine = rotation(dit, torch.cat([part.positions for part in parts]), height, width)
    x = patchify(dit, torch.cat([part.latents for part in parts]))
    sizes = [len(part.latents) for part in parts]
    for index, block in enumerate(dit.blocks):
        last = index == len(dit.blocks) - 1
        whole = (t.split(sizes) for t in project_half(block, x, time.blocks, cosine, sine))
        attended = [part.attend(q, k, v, last) for part, q, k, v in zip(parts, *whole)]
        texts = [part.text(index, last) for part in parts]
        frames = time.blocks
        if last:
            x, frames = (_noisy(t, parts, sizes) for t in (x, frames))
        x = finish_half(block, x, _joined(attended), frames, *(_joined(list(t)) for t in zip(*texts)))
    patches = call_head(dit.head, x, _noisy(time.head, parts, sizes))
    flows = dit.unpatchify(patches, height, width).transpose(1, 2)
    counts = [len(part.batch.blocks) * part.clips for part in parts]
    return [by_clip(flow, part.clips) for flow, part in zip(flows.split(counts), parts)]


class _Part:
    """One batch of a pass of `predict_clips`, by block: first the clean blocks, then the noisy ones."""

    def __init__(self, batch: NoisyClips, context_noise: float):
        layout, size = batch.layout, batch.layout.block_frames
        self.batch, self.clips, self.clean = batch, len(batch.past), batch.blocks[-1]
        known = slice(self.clean * size)
        latents = torch.cat([batch.past[:, known], batch.noisy], dim=1)
        timesteps = F.pad(batch.timesteps.float(), (self.clean * size, 0), value=context_noise)
        positions = torch.cat([batch.positions[:, known], take_blocks(batch.positions, batch.blocks, size)],
                              dim=1)
        self.latents, self.timesteps, self.positions = (
            by_block(t, size) for t in (latents, timesteps, positions))
        noisy = tuple((*layout.noisy(block), self.clean + j) for j, block in enumerate(batch.blocks))
        self.sees: Sees = tuple(map(layout.clean, range(self.clean))) + noisy

    def attend(self, q: Tensor, k: Tensor, v: Tensor, noisy_only: bool) -> Tensor:
        """Self-attention of all blocks or only of the noisy ones, [blocks * B, L, N, D]."""
        q, k, v = (t.unflatten(0, (-1, self.clips)) for t in (q, k, v))
        first = self.clean if noisy_only else 0
        return attend_blocks(q[first:], k, v, self.sees[first:]).flatten(0, 1)

    def text(self, layer: int, noisy_only: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompts, [blocks * B, text_len, N, D]."""
        batch, blocks = self.batch, len(self.batch.blocks) + (0 if noisy_only else self.clean)
        apart = bool(self.clean) and batch.layout.sink_apart and not noisy_only
        key, value = (
            torch.cat([sink[None], text.expand(blocks - 1, *text.shape)]) if apart
            else text.expand(blocks, *text.shape)
            for sink, text in ((batch.sink_text.keys[layer], batch.text.keys[layer]),
                               (batch.sink_text.values[layer], batch.text.values[layer])))
        return key.flatten(0, 1), value.flatten(0, 1)


def _noisy(x: Tensor, parts: Sequence[_Part], sizes: Sequence[int]) -> Tensor:
    """The part of x, by block, that belongs to the noisy blocks."""
    return torch.cat([t[part.clean * part.clips:] for part, t in zip(parts, x.split(sizes))])
