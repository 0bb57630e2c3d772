"""The causal video diffusion transformer (DiT) of LongLive-1.3B (Wan 2.1 T2V-1.3B, arXiv:2503.20314;
LongLive, arXiv:2509.22622).

The module uses a key-value (KV) cache but never builds or inspects one: each block passes q, k, v to its
`LayerCache`, which rotates, stores and attends. Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, NamedTuple, Protocol, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ranks.heads import Alone, Exchange
from .attention import Attention, make_attention
from .specs import DiTConfig

Projection = Callable[[Tensor], tuple[Tensor, Tensor]]
"""An embedded prompt [B, L, dim] -> cross-attention's keys and values, [B, L, N, D] each."""


class LayerCache(Protocol):
    """One layer's share of a KV cache during one pass."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate q and k, store k and v, attend; q, k, v and the result are [B, L, N, D]."""


@dataclass(frozen=True)
class TextContext:
    """A prompt as the transformer uses it: keys and values of every cross-attention, each [B, text_len, N,
    D].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


class TimeContext(NamedTuple):
    """The timesteps as the transformer uses them: `head` [B, F, 1, dim] and `blocks` [B, F, 6, dim]."""

    head: Tensor
    blocks: Tensor


class RMSNorm(nn.Module):
    """RMS norm over the whole vector before the split into heads: normalise in float32, round, then scale."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class AttentionProjections(nn.Module):
    """The linear layers and norms that self- and cross-attention share."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def query(self, x: Tensor) -> Tensor:
        """[B, L, dim] -> [B, L, N, D]"""
        return self.norm_q(self.q(x)).unflatten(-1, (-1, self.head_dim))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, dim] -> two of [B, L, N, D]"""
        key = self.norm_k(self.k(x)).unflatten(-1, (-1, self.head_dim))
        return key, self.v(x).unflatten(-1, (-1, self.head_dim))

    def output(self, heads: Tensor) -> Tensor:
        """[B, L, N, D] -> [B, L, dim]"""
        return self.o(heads.flatten(-2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, dim] with one shift and scale [B, F, 1, dim] per latent frame; L = F * tokens per frame."""
    framed = x.unflatten(1, (shift.shape[1], -1))
    return (framed * (1 + scale) + shift).flatten(1, 2)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y with x, y [B, L, dim] and one gate [B, F, 1, dim] per latent frame."""
    return x + (y.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)


class DiTBlock(nn.Module):
    """Self-attention over the cache, cross-attention to the prompt, feed-forward. The first and the last are
    modulated.
    """

    def __init__(self, config: DiTConfig, attention: Attention):
        super().__init__()
        self.attention = attention
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = AttentionProjections(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = AttentionProjections(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"),
                                 nn.Linear(config.ffn_dim, config.dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(
        self, x: Tensor, time: Tensor, layer: LayerCache, text_key: Tensor, text_value: Tensor
    ) -> Tensor:
        """One block: x [B, L, dim], time [B, F, 6, dim], text_key and text_value [B, text_len, N, D] -> [B,
        L, dim].
        """
        attended = layer.attend(*self.project(x, time))
        return self.finish(x, attended, time, text_key, text_value)

    def project(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute self-attention's inputs q, k and v, [B, L, N, D] each."""
        shift, scale = (self.modulation + time)[:, :, :2].split(1, dim=2)
        hidden = modulate(self.norm1(x), shift, scale)
        return self.self_attn.query(hidden), *self.self_attn.key_value(hidden)

    def finish(self, x: Tensor, attended: Tensor, time: Tensor, text_key: Tensor,
               text_value: Tensor) -> Tensor:
        """Run the rest of the block on `attended` [B, L, N, D], the result of self-attention."""
        _, _, gate_a, shift_f, scale_f, gate_f = (self.modulation + time).split(1, dim=2)
        x = add_gated(x, self.self_attn.output(attended), gate_a)
        attended = self.attention(self.cross_attn.query(self.norm3(x)), text_key, text_value)
        x = x + self.cross_attn.output(attended)
        return add_gated(x, self.ffn(modulate(self.norm2(x), shift_f, scale_f)), gate_f)


class Head(nn.Module):
    """Final modulated norm and projection to patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = nn.Linear(config.dim, patch * config.in_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, dim], time [B, F, 1, dim] -> [B, L, patch * channels]"""
        shift, scale = (self.modulation + time).split(1, dim=2)
        return self.head(modulate(self.norm(x), shift, scale))


class CausalDiT(nn.Module):
    """The transformer. Call it with noisy latents, one timestep per latent frame, a prompt and the layers of
    a cache.
    """

    def __init__(self, config: DiTConfig, attention: Attention | None = None):
        """Args: attention: the kernel of cross-attention; None uses PyTorch's default."""
        super().__init__()
        attention = attention or make_attention("cpu")
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"),
                                            nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(DiTBlock(config, attention) for _ in range(config.num_layers))
        self.head = Head(config)
        self.exchange: Exchange = Alone()

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def forward(self, x: Tensor, timestep: Tensor, text: TextContext, layers: Sequence[LayerCache]) -> Tensor:
        """Predict the flow (noise - clean).

        Args:
            x: noisy latents [B, C, F, H, W]; H and W are multiples of the patch.
            timestep: [B, F] in 0..1000, one per latent frame.
            text: the prompt, from `embed_text`.
            layers: one `LayerCache` per block, planned for these F frames. On several ranks, the timesteps of
                all frames must be equal.

        Returns:
            Flow [B, C, F, H, W] in the dtype of x.
        """
        return self.forward_embedded(x, self.embed_time(timestep), text, layers)

    def forward_embedded(self, x: Tensor, time: TimeContext, text: TextContext,
                         layers: Sequence[LayerCache]) -> Tensor:
        """Run `forward` with timesteps that are already embedded."""
        _, _, _, height, width = x.shape
        tokens = self.patchify(x)
        layers = self.exchange.layers(layers)
        for block, layer, key, value in zip(self.blocks, layers, text.keys, text.values, strict=True):
            tokens = block(tokens, time.blocks, layer, key, value)
        return self.unpatchify(self.head(tokens, time.head), height, width)

    def embed_time(self, timestep: Tensor) -> TimeContext:
        """Embed timesteps [B, F]: sinusoid in float64 (cosines first), then two small MLPs in the model's
        dtype.
        """
        half = self.config.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
        angles = timestep.double()[..., None] * 10000.0 ** -exponents
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype)
        embedded = self.time_embedding(sinusoid)
        return TimeContext(embedded[:, :, None], self.time_projection(embedded).unflatten(-1, (6, -1)))

    def embed_text(self, prompt: Tensor, projections: Iterable[Projection] | None = None) -> TextContext:
        """Compute the keys and values of every cross-attention for a prompt [B, L <= text_len, text_dim]. As
        in LongLive, missing rows are zeros and attended like the others.

        Args:
            projections: one per block, called instead of its `cross_attn.key_value`.

        Raises:
            ValueError: there are more than text_len rows, or the width is not text_dim.
        """
        _, length, width = prompt.shape
        if length > self.config.text_len or width != self.config.text_dim:
            raise ValueError(f"prompt embedding has shape {tuple(prompt.shape)}; expected [B, <= "
                             f"{self.config.text_len}, {self.config.text_dim}]")
        padded = F.pad(prompt.to(self.device, self.dtype), (0, 0, 0, self.config.text_len - length))
        embedded = self.text_embedding(padded)
        if projections is None:
            projections = (block.cross_attn.key_value for block in self.blocks)
        keys, values = zip(*(project(embedded) for project in projections))
        return TextContext(keys, values)

    def patchify(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> tokens [B, L, dim], ordered frame, row, column; on several ranks this rank's."""
        # Contiguous, or the residual stream would keep the convolution's layout through all blocks.
        return self.exchange.tokens(self.patch_embedding(x).flatten(2).transpose(1, 2)).contiguous()

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """[B, L, patch * C] -> [B, C, F, H, W]; the channel is the fastest index within a patch. On several
        ranks, L are this rank's tokens, and every rank returns the whole.
        """
        patches = self.exchange.whole(patches)
        batch = patches.shape[0]
        pt, ph, pw = self.config.patch_size
        rows, columns = height // ph, width // pw
        grid = patches.view(batch, -1, rows, columns, pt, ph, pw, self.config.in_channels)
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, self.config.in_channels, -1, height, width)
