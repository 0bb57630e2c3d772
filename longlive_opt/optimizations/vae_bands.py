"""The VAE's decoder in bands of rows, one per rank.

Every rank decodes its own rows of the latents to its own rows of the picture. Before each stage, it gets the
rows that the stage needs from its neighbours, its *halo*: 2 for a residual block (two convolutions of 3 x 3),
1 for the others (of the tiny VAE 3 for a memory block). The stage runs on the band with its halo, whatever it
is made of (plain, compiled or fused), and the rows that the zero padding at the band's edge has reached are
cut off. The history of a band has halo rows too. The attention block gathers the keys and values of all rows.
Equal within rounding: a kernel may sum in another order for another height.

Why one exchange per stage. At 480x832, in work of the convolutions (the rank with the most, against an equal
share) and in exchanges per call:

| halo | exchanges | more work on 2, 3, 4, 6 ranks |
|---|---|---|
| one for the whole decoder (15 rows of latents after attention, 3 before) | 3 | 6 %, 19 %, 26 %, 39 % |
| one per stage | 21 | 1.8 %, 5 %, 7 %, 11 % |
| one per convolution | 35 | none |

On two GPUs a decoder's half takes about 35 ms per block and an exchange some 30 us, which makes 2.3, 1.3 and
1.1 ms. One halo per stage costs little more than one per convolution and leaves compiled and fused stages as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.conv3d import HEAD_ROWS
from ..models.taehv import TAEHV, Grow, MemBlock
from ..models.vae import (
    HISTORY_FRAMES,
    AttentionBlock,
    Head,
    History,
    ResidualBlock,
    StageHistory,
    StreamingDecoder,
    Upsample,
    WanVAE,
)
from ..ranks.group import Group, Kept
from ..streaming.pipeline import Pipeline

MEMORY_HALO = 3
"""Rows on either side that a memory block of the tiny VAE needs: it has three convolutions."""


def halo_of(stage: nn.Module) -> int:
    """Rows on either side that a row of the stage's output depends on."""
    if isinstance(stage, AttentionBlock):
        return 0  # it depends on all rows, and gathers them itself
    if isinstance(stage, Head):
        return HEAD_ROWS  # it needs one, but the fused kernel takes multiples of four rows
    return 2 if isinstance(stage, ResidualBlock) else 1


class Bands:
    """Which rows of the latents belong to which rank, and what the ranks exchange.

    Bands are as equal as possible. At a scale of s, a band has s times as many rows.
    The config ensures that none is smaller than the largest halo, two rows.
    """

    def __init__(self, group: Group, height: int):
        """Args: height: of the latents."""
        self.group = group
        self.edges = [round(rank * height / group.size) for rank in range(group.size + 1)]
        self.rows = [end - start for start, end in pairwise(self.edges)]
        self._kept = Kept(group.device)
        self._cut: tuple[Tensor, Tensor, tuple[int, int]] | None = None

    @property
    def own(self) -> slice:
        """This rank's rows of the latents."""
        rank = self.group.rank
        return slice(self.edges[rank], self.edges[rank + 1])

    def sides(self, halo: int) -> tuple[int, int]:
        """Halo rows above and below this rank's band; none at the picture's edges."""
        return halo * (self.group.rank > 0), halo * (self.group.rank < self.group.size - 1)

    def cut(self, whole: Tensor, halo: int) -> Tensor:
        """The band within `whole` [B, C, T, above + rows + below, W]. If the next `extended` is asked for the
        band with the same halo, it writes the halo to `whole` instead of copying the band.
        """
        above, below = self.sides(halo)
        band = whole[:, :, :, above:whole.shape[3] - below]
        self._cut = band, whole, (above, below)
        return band

    def extended(self, x: Tensor, halo: int, layout: torch.memory_format) -> Tensor:
        """x [B, C, T, rows, W] of this band, with the halo of both sides, in a memory layout."""
        sides = above, below = self.sides(halo)
        batch, channels, frames, rows, width = x.shape
        cut, self._cut = self._cut, None
        if cut is not None and cut[0] is x and cut[2] == sides and cut[1].is_contiguous(memory_format=layout):
            whole = cut[1]
        else:
            whole = torch.empty(batch, channels, frames, above + rows + below, width, dtype=x.dtype,
                                device=x.device, memory_format=layout)
            whole[:, :, :, above:above + rows] = x
        # [side, B, T, halo, W, C]: channels last, as activations usually are.
        shape = (bool(above) + bool(below), batch, frames, halo, width, channels)
        sent, received = self._kept("sent", shape, x.dtype), self._kept("received", shape, x.dtype)
        # Of each side: the neighbour, the rows that it gets, and the rows that it gives.
        places = [(self.group.rank - 1, slice(above, 2 * above), slice(0, above))] if above else []
        if below:
            places.append((self.group.rank + 1, slice(rows + above - below, rows + above),
                          slice(rows + above, None)))
        counts = [0] * self.group.size
        for message, (neighbour, given, _) in zip(sent, places, strict=True):
            counts[neighbour] = 1
            message.copy_(whole[:, :, :, given].permute(0, 2, 3, 4, 1))
        self.group.all_to_all(received, sent, counts, counts)
        for message, (_, _, taken) in zip(received, places, strict=True):
            whole[:, :, :, taken] = message.permute(0, 4, 1, 2, 3)
        return whole

    def gathered(self, x: Tensor) -> Tensor:
        """x [B, C, T, rows, W] of all bands, joined; `rows` may differ from rank to rank."""
        scale = x.shape[3] // self.rows[self.group.rank]
        most = max(self.rows) * scale
        padded = F.pad(x, (0, 0, 0, most - x.shape[3])).contiguous()
        received = self._kept("gathered", (self.group.size, *padded.shape), x.dtype)
        self.group.all_gather(received, padded)
        parts = [part[:, :, :, :rows * scale] for part, rows in zip(received, self.rows, strict=True)]
        return torch.cat(parts, dim=3)


def banded_decoders(pipeline: Pipeline, bands: Bands) -> Callable[[], StreamingDecoder]:
    """`make_vae_decoder` of a pipeline, for this rank's band."""
    make_inner, vae = pipeline.make_vae_decoder, pipeline.vae

    def make() -> StreamingDecoder:
        decoder = make_inner()
        decoder.vae = (BandedTAEHV if isinstance(vae, TAEHV) else BandedVAE)(vae, bands)
        return decoder

    return make


class BandedVAE:
    """A `WanVAE` as `StreamingDecoder` uses it: takes and returns whole pictures, and decodes this rank's
    band.
    """

    def __init__(self, vae: WanVAE, bands: Bands):
        self.conv2 = vae.conv2
        self._vae, self._bands = vae, bands
        self._plain = vae.decoder.stages()

    def init_history(self, batch: int, height: int, width: int, device: torch.device,
                     dtype: torch.dtype) -> History:
        """As `WanVAE.init_history`, for the band with the halo of each stage."""
        rows, history = self._bands.rows[self._bands.group.rank], []
        for stage in self._plain:
            extended = rows + sum(self._bands.sides(halo_of(stage)))
            for channels in stage.history_channels:
                shape = (batch, channels, HISTORY_FRAMES, extended, width)
                zeros = torch.zeros(shape, device=device, dtype=dtype)
                history.append(zeros.contiguous(memory_format=self._vae.memory_format))
            if isinstance(stage, Upsample):
                rows, width = rows * 2, width * 2
        return tuple(history)

    def decode(self, z: Tensor, history: History | list[Tensor] | StageHistory, first: bool,
               stages: Sequence[nn.Module] = ()) -> tuple[Tensor, History]:
        """As `WanVAE.decode`."""
        banded = [self._banded(stage, plain)
                  for stage, plain in zip(stages or self._plain, self._plain, strict=True)]
        pixels, kept = self._vae.decode(z[:, :, :, self._bands.own], history, first, banded)
        return self._bands.gathered(pixels), kept

    def _banded(self, stage: nn.Module, plain: nn.Module) -> BandedStage | BandedAttention:
        """A stage for bands: `plain` or, in its place, its compiled or fused form."""
        if isinstance(plain, AttentionBlock):
            return BandedAttention(plain, self._bands)
        return BandedStage(stage, plain, self._bands, self._vae.memory_format)


class BandedStage:
    """A stage that runs on the band with its halo and cuts off what the zero padding has reached."""

    def __init__(self, stage: nn.Module, plain: nn.Module, bands: Bands, layout: torch.memory_format):
        self.history_channels = plain.history_channels
        self._stage, self._bands, self._layout = stage, bands, layout
        self._halo, self._scale = halo_of(plain), 2 if isinstance(plain, Upsample) else 1

    def __call__(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        y, history = self._stage(self._bands.extended(x, self._halo, self._layout), history, first)
        return self._bands.cut(y, self._scale * self._halo), history


class BandedAttention:
    """An `AttentionBlock` for the queries of one band and the keys and values of all."""

    history_channels = ()

    def __init__(self, plain: AttentionBlock, bands: Bands):
        self._plain, self._bands = plain, bands

    def __call__(self, x: Tensor, history: History, first: bool) -> tuple[Tensor, History]:
        block, (batch, channels, frames, _, _) = self._plain, x.shape
        flat = x.transpose(1, 2).flatten(0, 1)
        q, kv = block.to_qkv(block.norm(flat)).split((channels, 2 * channels), dim=1)
        kv = self._bands.gathered(kv.unflatten(0, (batch, frames)).transpose(1, 2))
        kv = kv.transpose(1, 2).flatten(0, 1).flatten(2)
        # [B*T, 1 head, rows * W, C]; the fused attention kernels need contiguous channels.
        heads = (q.flatten(2), *kv.chunk(2, dim=1))
        q, k, v = (part.transpose(1, 2).unsqueeze(1).contiguous() for part in heads)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        y = block.proj(y.transpose(1, 2).reshape(flat.shape))
        return x + y.unflatten(0, (batch, frames)).transpose(1, 2), ()


class BandedTAEHV:
    """A `TAEHV` as `TAEHVDecoder` uses it: takes and returns whole pictures, and decodes this rank's band."""

    def __init__(self, vae: TAEHV, bands: Bands):
        self._vae, self._bands = vae, bands

    def init_history(self, batch: int, height: int, width: int, device: torch.device,
                     dtype: torch.dtype) -> History:
        """As `TAEHV.init_history`, for the band with the halo of a memory block."""
        rows, halo = self._bands.rows[self._bands.group.rank], sum(self._bands.sides(MEMORY_HALO))
        own = self._vae.init_history(batch, rows, width, device, dtype)
        return tuple(F.pad(memory, (0, 0, 0, halo)).contiguous(memory_format=torch.channels_last)
                     for memory in own)

    def __call__(self, z: Tensor, *memory: Tensor) -> Tensor:
        """As `TAEHV.forward`."""
        batch, memories, enlarge = len(z), iter(memory), None
        # [T*B, C, 1, rows, W], as `Bands` takes it.
        x = z[:, :, :, self._bands.own].permute(2, 0, 1, 3, 4).flatten(0, 1).unsqueeze(2)
        for layer in self._vae.decoder.values():
            if isinstance(layer, MemBlock):
                x = self._with_halo(x, MEMORY_HALO, 1, partial(layer, memory=next(memories)))
            elif isinstance(layer, nn.Upsample):
                enlarge = layer  # together with the next convolution: the halo has a quarter of the size
            elif isinstance(layer, nn.Conv2d):
                whole = layer if enlarge is None else nn.Sequential(enlarge, layer)
                x, enlarge = self._with_halo(x, 1, 1 if enlarge is None else 2, whole), None
            elif isinstance(layer, Grow):
                x = layer(x.squeeze(2), batch).unsqueeze(2)
            else:
                x = layer(x)
        return self._bands.gathered(x.squeeze(2).unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4))

    def _with_halo(self, x: Tensor, halo: int, scale: int, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a layer that enlarges by `scale` on frames [N, C, 1, rows, W] with their halo."""
        frames = self._bands.extended(x, halo, torch.channels_last_3d).squeeze(2)
        return self._bands.cut(layer(frames).unsqueeze(2), scale * halo)
