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

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import fused_exchange
from .group import Group, Kept
from .peers import PeerMemory


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
    """Moves activations between tokens and heads. N heads of D channels, M of them here.

    The ranks form groups of equal heads: with one rank each, M = N / size. With two, M = 2 N / size, and each
    computes attention for half of the queries; keys and values of its heads are in the caches of both. So 8
    ranks can share 12 heads. The ranks of the first halves come first, so the tokens that a rank has
    outside of attention are among its queries.

    Results of `to_heads`, `norm_to_heads`, `to_tokens` and `whole` stay valid until the next call of the
    same method with the same shape.
    """

    how = "collectives"

    def __init__(self, group: Group, head_groups: int | None = None):
        """Args: head_groups: M = N / head_groups; None: one for each rank."""
        self.group = group
        self.size = group.size
        self.head_groups = head_groups or group.size
        self._half, self._heads = divmod(group.rank, self.head_groups)
        self._kept = Kept(group.device)

    @property
    def nbytes(self) -> int:
        """Bytes of memory for messages."""
        return self._kept.nbytes

    @property
    def same_queries(self) -> range:
        """The ranks that compute attention for the same queries, in the order of their heads."""
        return range(self._half * self.head_groups, (self._half + 1) * self.head_groups)

    def tokens(self, x: Tensor) -> Tensor:
        return x.chunk(self.size, dim=1)[self.group.rank]

    def whole(self, x: Tensor) -> Tensor:
        received = self._kept("whole", (self.size, *x.shape), x.dtype)
        self.group.all_gather(received, x.contiguous())
        return _joined(received)

    def layers(self, layers: Sequence[Any]) -> Sequence[Any]:
        return [ExchangedLayer(layer, self) for layer in layers]

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of this rank's tokens, [B, L / size, N, D] -> of all tokens, [B, L, M, D]."""
        batch, tokens, heads, dim = q.shape

        def pack(parts: Sequence[Tensor]) -> None:
            for rank, part in enumerate(parts):
                own = [x.chunk(self.head_groups, 2)[rank % self.head_groups] for x in (q, k, v)]
                torch.stack(own, 2, out=part.view(batch, tokens, 3, -1, dim))

        shape = (batch, tokens, 3 * heads // self.head_groups * dim)
        packed = self._exchanged("heads", shape, q.dtype, pack)
        return _joined(packed).unflatten(-1, (3, -1, dim)).unbind(2)

    def norm_to_heads(self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> Tensor:
        """Normalise q and k of this rank's tokens as `fused_exchange.qk_norm_pack` does: [B, L / size, 3 N D]
        -> of all tokens [B, L, 3 M D].
        """
        batch, tokens, width = qkv.shape

        def pack(parts: Sequence[Tensor]) -> None:
            fused_exchange.qk_norm_pack(qkv, q_weight, k_weight, parts, self.head_groups, eps)

        return _joined(self._exchanged("heads", (batch, tokens, width // self.head_groups), qkv.dtype, pack))

    def queries(self, x: Tensor) -> Tensor:
        """The part of x [B, L, M, D] whose attention this rank computes: all tokens, or half of them."""
        halves = self.size // self.head_groups
        return x if halves == 1 else x.chunk(halves, 1)[self._half].contiguous()

    def to_tokens(self, attended: Tensor) -> Tensor:
        """[B, L, M, D] of all `queries` -> [B, L / size, N, D] of this rank's tokens."""
        batch, tokens, heads, dim = attended.shape
        parts = attended.unflatten(1, (self.head_groups, -1)).movedim(1, 0).contiguous()
        received = self._kept("tokens", parts.shape, attended.dtype)
        counts = [int(rank in self.same_queries) for rank in range(self.size)]
        self.group.all_to_all(received, parts, counts, counts)
        # [heads' rank, B, tokens, M, D] -> [B, tokens, N, D]
        return received.movedim(0, 2).reshape(batch, tokens // self.head_groups, -1, dim)

    def _exchanged(self, role: str, shape: tuple[int, ...], dtype: torch.dtype,
                   pack: Callable[[Sequence[Tensor]], None]) -> Tensor:
        """What all ranks have for this one, [size, *shape]. `pack` writes what this rank has for each."""
        sent, received = (self._kept(role + end, (self.size, *shape), dtype) for end in ("_sent", ""))
        pack(sent.unbind())
        self.group.all_to_all(received, sent)
        return received


class PeerExchange(HeadExchange):
    """A `HeadExchange` that writes to the memory of the other ranks instead of sending messages.

    All ranks wait for each other at the start of a pass and after each exchange. The two exchanges of a layer
    have memory of their own. So when a rank writes to one of them, all others have passed a point that lies
    behind their last use of it.
    """

    how = "peer memory"

    def __init__(self, group: Group, head_groups: int | None = None):
        super().__init__(group, head_groups)
        self.memory = PeerMemory(group)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.memory.nbytes

    def tokens(self, x: Tensor) -> Tensor:
        self.memory.arrive()
        return super().tokens(x)

    def whole(self, x: Tensor) -> Tensor:
        result = self.memory("whole", (self.size, *x.shape), x.dtype)
        for part in result.parts:
            part[self.group.rank].copy_(x)
        self.memory.arrive()
        return _joined(result.own)

    def to_tokens(self, attended: Tensor) -> Tensor:
        batch, tokens, heads, dim = attended.shape
        shape = (batch, tokens // self.head_groups, heads * self.head_groups, dim)
        result, first = self.memory("tokens", shape, attended.dtype), self._heads * heads
        fused_exchange.scatter_tokens(attended, [
            result.parts[rank][:, :, first:first + heads] for rank in self.same_queries])
        self.memory.arrive()
        return result.own

    def _exchanged(self, role: str, shape: tuple[int, ...], dtype: torch.dtype,
                   pack: Callable[[Sequence[Tensor]], None]) -> Tensor:
        result = self.memory(role, (self.size, *shape), dtype)
        pack([part[self.group.rank] for part in result.parts])
        self.memory.arrive()
        return result.own


def _joined(parts: Tensor) -> Tensor:
    """[size, B, l, C] -> [B, size * l, C], a view for one video."""
    return parts.transpose(0, 1).flatten(1, 2)


class ExchangedLayer:
    """One layer of a cache of this rank's heads, as a transformer block with this rank's tokens sees it."""

    def __init__(self, layer: Any, exchange: HeadExchange):
        self._layer = layer
        self._exchange = exchange

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        exchange = self._exchange
        return exchange.to_tokens(exchange.queries(self._layer.attend(*exchange.to_heads(q, k, v))))
