"""The ranks that compute together, and the three collectives that they use.

All shapes are static and all results go to memory that the caller keeps, so a captured CUDA graph may contain
them. Data moves by `torch.distributed`: NCCL between GPUs, gloo between CPU processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """Some ranks of this job, numbered from 0 in their order.

    While `muted`, nothing moves: a received tensor keeps what it had, or is given what this rank sent. This
    serves to measure a stream without communication; what it computes has no meaning.
    """

    def __init__(self, members: Sequence[int], rank: int, device: torch.device, handle: Any = None):
        """Args:
            members: ranks of the job.
            rank: this process, of the job.
            handle: the process group; None is the default group.
        """
        self.members = tuple(members)
        self.size = len(self.members)
        self.rank = self.members.index(rank)
        self.device = device
        self.muted = False
        self.handle = handle

    def all_to_all(self, received: Tensor, sent: Tensor, takes: Sequence[int] | None = None,
                   gives: Sequence[int] | None = None) -> None:
        """Send part i of `sent` to rank i, and fill part i of `received` from rank i; both contiguous.

        Args:
            takes, gives: rows of each part; None: equal parts.
        """
        if self.muted:
            count = min(received.numel(), sent.numel())
            received.view(-1)[:count] = sent.view(-1)[:count]
        else:
            dist.all_to_all_single(received, sent, None if takes is None else list(takes),
                                   None if gives is None else list(gives), group=self.handle)

    def all_gather(self, received: Tensor, sent: Tensor) -> None:
        """Fill part i of `received` [size, ...] with the `sent` [...] of rank i."""
        if self.muted:
            received[self.rank] = sent
        else:
            dist.all_gather_into_tensor(received.view(-1), sent.view(-1), group=self.handle)

    def broadcast(self, x: Tensor, source: int = 0) -> None:
        """Fill x with that of rank `source`."""
        if not self.muted:
            dist.broadcast(x, self.members[source], group=self.handle)


class Kept:
    """Memory by role and shape. It is allocated once and stays at its address."""

    def __init__(self, device: torch.device):
        self._device = device
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        key = (role, *shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        return self._tensors[key]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())
