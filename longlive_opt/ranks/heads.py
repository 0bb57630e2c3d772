"""Sequence parallelism with keys and values split by heads (DeepSpeed Ulysses, arXiv:2309.14509).

Every rank has all weights. Linear layers, norms, cross-attention and feed-forward work on the rank's own
tokens. Self-attention works on all tokens of the rank's own heads, and so does the cache. Before attention,
one exchange moves queries, keys and values from tokens to heads; after it, one exchange moves the result
back. Every number is computed once, by the same arithmetic as on one GPU, so the result is equal within
rounding: matrix products with fewer rows may sum in another order.

A rank's tokens are one contiguous part of the pass. What the ranks send, part by part, is then in the order
of tokens when it arrives, and no rank has to copy it. Such a part can begin within a latent frame, so a pass
must have the same timestep in all of its frames, as it has in `sampler.Forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from .group import Group, Kept


class Exchange(Protocol):
    """What a transformer pass asks of the ranks around it."""

    size: int

    def tokens(self, x: Tensor) -> Tensor:
        """[B, L, C] of all tokens -> [B, L / size, C] of this rank."""

    def whole(self, x: Tensor) -> Tensor:
        """[B, L / size, C] of this rank -> [B, L, C] of all tokens."""

    def layers(self, layers: Sequence[Any]) -> Sequence[Any]:
        """The layers of a cache of this rank's heads, for the tokens of this rank."""


class Alone:
    """One rank: there is nothing to exchange."""

    size = 1

    def tokens(self, x: Tensor) -> Tensor:
        return x

    def whole(self, x: Tensor) -> Tensor:
        return x

    def layers(self, layers: Sequence[Any]) -> Sequence[Any]:
        return layers


class HeadExchange:
    """Moves activations between tokens and heads. N heads of D channels, M = N / size of them here.

    Results of `to_heads`, `packed_to_heads`, `to_tokens` and `whole` stay valid until the next call of the
    same method with the same shape.
    """

    def __init__(self, group: Group):
        self.group = group
        self.size = group.size
        self._kept = Kept(group.device)

    @property
    def nbytes(self) -> int:
        """Bytes of memory for messages."""
        return self._kept.nbytes

    def tokens(self, x: Tensor) -> Tensor:
        return x.chunk(self.size, dim=1)[self.group.rank]

    def whole(self, x: Tensor) -> Tensor:
        received = self._kept("whole", (self.size, *x.shape), x.dtype)
        self.group.all_gather(received, x.contiguous())
        return self._joined(received)

    def layers(self, layers: Sequence[Any]) -> Sequence[Any]:
        return [ExchangedLayer(layer, self) for layer in layers]

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of this rank's tokens, [B, L / size, N, D] -> of all tokens, [B, L, M, D]. One message
        per rank.
        """
        batch, tokens, heads, dim = q.shape
        sent = self._kept("sent", (self.size, batch, tokens, 3, heads // self.size, dim), q.dtype)
        for part, x in enumerate((q, k, v)):
            sent[:, :, :, part] = x.unflatten(2, (self.size, -1)).movedim(2, 0)
        received = self.packed_to_heads(sent.flatten(3))
        return received.unflatten(-1, (3, -1, dim)).unbind(2)

    def packed_to_heads(self, sent: Tensor) -> Tensor:
        """[size, B, L / size, 3 M D], with the part of each rank's heads first -> [B, L, 3 M D]."""
        received = self._kept("heads", sent.shape, sent.dtype)
        self.group.all_to_all(received, sent)
        return self._joined(received)

    def to_tokens(self, attended: Tensor) -> Tensor:
        """[B, L, M, D] of all tokens -> [B, L / size, N, D] of this rank's."""
        batch, tokens, heads, dim = attended.shape
        parts = attended.unflatten(1, (self.size, -1)).movedim(1, 0).contiguous()
        received = self._kept("tokens", parts.shape, attended.dtype)
        self.group.all_to_all(received, parts)
        # [heads' rank, B, tokens, M, D] -> [B, tokens, N, D]
        return received.movedim(0, 2).reshape(batch, tokens // self.size, heads * self.size, dim)

    def _joined(self, parts: Tensor) -> Tensor:
        """[size, B, l, C] -> [B, size * l, C], a view for one video."""
        return parts.transpose(0, 1).flatten(1, 2)


class ExchangedLayer:
    """One layer of a cache of this rank's heads, as a transformer block with this rank's tokens sees it."""

    def __init__(self, layer: Any, exchange: HeadExchange):
        self._layer = layer
        self._exchange = exchange

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._exchange.to_tokens(self._layer.attend(*self._exchange.to_heads(q, k, v)))
