"""Attention among the blocks of clips with a fixed pattern of which block sees which.

Blocks that see equally many blocks share one call of dense attention. A few slices copy their keys together,
because neighbouring blocks see neighbouring blocks. The gradient is summed by the same slices in a fixed
order.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Sees = tuple[tuple[int, ...], ...]
Kept = dict[tuple[int, str], Tensor]
"""Gathered keys and values by group, kept from an earlier call in which only the new blocks differ."""


class Run(NamedTuple):
    """`count` queries from `first` on. Their block number `part` is `source` + 0, 1, 2, ..., or with `same`
    always `source`. `stored` says which tensor holds it.
    """

    part: int
    first: int
    count: int
    stored: bool
    source: int
    same: bool


class Group(NamedTuple):
    """Query blocks `first` to `last` (exclusive) of the order. Each sees `length` blocks."""

    first: int
    last: int
    length: int
    runs: tuple[Run, ...]


@cache
def grouped(sees: Sees, stored: int) -> tuple[tuple[int, ...], tuple[Group, ...]]:
    """The order of query blocks in which groups are contiguous, and the groups.

    Args:
        sees: the blocks that each query block attends to, counting `stored` blocks first and then new ones.
    """
    order = tuple(sorted(range(len(sees)), key=lambda i: len(sees[i])))
    groups, first = [], 0
    while first < len(order):
        length = len(sees[order[first]])
        last = first
        while last < len(order) and len(sees[order[last]]) == length:
            last += 1
        members = [sees[i] for i in order[first:last]]
        runs = [run for part in range(length) for run in _runs(part, [m[part] for m in members], stored)]
        groups.append(Group(first, last, length, tuple(runs)))
        first = last
    return order, tuple(groups)


def _runs(part: int, sources: list[int], stored: int) -> list[Run]:
    runs, first = [], 0
    while first < len(sources):
        here = sources[first] < stored
        best = 1
        for step in (0, 1):
            count = 1
            while (first + count < len(sources) and sources[first + count] == sources[first] + step * count
                   and (sources[first + count] < stored) == here):
                count += 1
            if count > best:
                best, same = count, step == 0
        source = sources[first] - (0 if here else stored)
        runs.append(Run(part, first, best, here, source, best > 1 and same))
        first += best
    return runs


class _Gather(torch.autograd.Function):
    """[S, B, L, N, D] stored (or None) and [Q, B, L, N, D] new blocks -> the blocks that each group sees,
    [members, B, length, L, N, D].
    """

    @staticmethod
    def forward(ctx: Any, stored: Tensor | None, new: Tensor, groups: tuple[Group, ...]) -> tuple[
            Tensor, ...]:
        ctx.groups, ctx.shapes = groups, (None if stored is None else stored.shape, new.shape)
        return tuple(_gathered(stored, new, group) for group in groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        stored, new = (grads[0].new_zeros(shape) if want else None
                       for shape, want in zip(ctx.shapes, ctx.needs_input_grad))
        for group, grad in zip(ctx.groups, grads):
            for run in group.runs:
                total = stored if run.stored else new
                if total is None:
                    continue
                part = grad[run.first:run.first + run.count, :, run.part]
                if run.same:
                    total[run.source].add_(part.sum(dim=0))
                else:
                    total[run.source:run.source + run.count].add_(part)
        return stored, new, None


def _gathered(stored: Tensor | None, new: Tensor, group: Group) -> Tensor:
    out = new.new_empty((group.last - group.first, new.shape[1], group.length, *new.shape[2:]))
    for source, is_stored in ((stored, True), (new, False)):
        _copy(source, out, [run for run in group.runs if run.stored == is_stored])
    return out


def _copy(source: Tensor | None, out: Tensor, runs: Sequence[Run]) -> None:
    for run in runs:
        assert source is not None
        count = 1 if run.same else run.count
        out[run.first:run.first + run.count, :, run.part] = source[run.source:run.source + count]


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, sees: Sees, stored_key: Tensor | None = None,
                  stored_value: Tensor | None = None, kept: Kept | None = None) -> Tensor:
    """Attention of query blocks q [Q, B, L, N, D] to the blocks that each sees, in the shape of q.

    `sees` counts the stored blocks [S, B, L, N, D] first and then k and v, which may have more than Q blocks.
    Without gradients `kept` stores the gathered copies for the next call with the same stored blocks.
    """
    if torch.is_grad_enabled():
        kept = None
    order, groups = grouped(sees, 0 if stored_key is None else len(stored_key))
    sorted_already = order == tuple(range(len(order)))
    if not sorted_already:
        q = torch.cat(slices(q, order))
    parts = []
    queries = q.split([group.last - group.first for group in groups])
    keys, values = (_seen(stored, new, groups, name, kept)
                    for stored, new, name in ((stored_key, k, "key"), (stored_value, v, "value")))
    for part in zip(queries, keys, values):
        heads = F.scaled_dot_product_attention(*(t.flatten(0, 1).transpose(1, 2) for t in part))
        parts.append(heads.transpose(1, 2))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    out = out.unflatten(0, q.shape[:2])
    if not sorted_already:
        back = tuple(sorted(range(len(order)), key=order.__getitem__))
        out = torch.cat(slices(out, back))
    return out


def _seen(stored: Tensor | None, new: Tensor, groups: tuple[Group, ...], name: str,
          kept: Kept | None) -> list[Tensor]:
    """[members, B, length * L, N, D] for every group."""
    if kept is None:
        return [t.flatten(2, 3) for t in _Gather.apply(stored, new, groups)]
    for group in groups:
        place = group.first, name
        if place in kept:
            _copy(new, kept[place], [run for run in group.runs if not run.stored])
        else:
            kept[place] = _gathered(stored, new, group)
    return [kept[group.first, name].flatten(2, 3) for group in groups]


def slices(x: Tensor, order: Sequence[int], dim: int = 0, size: int = 1) -> list[Tensor]:
    """The blocks of x listed in `order`, as few slices. A block is `size` long along `dim`."""
    return [x.narrow(dim, run.source * size, run.count * size) for run in _runs(0, list(order), 0)]
