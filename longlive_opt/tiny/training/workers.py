"""Plan the data in other processes, so that this process only has to launch kernels.

Scenes, prompts, motion and tokens of a chunk are a pure function of its number. `Planner` computes the next
few chunks in spawned processes and returns them in any order. The result does not depend on the process.
Arrays are pickled through pipes instead of shared memory, which may be small.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import connection
from typing import Callable, Generic, TypeVar

T = TypeVar("T")


class Planner(Generic[T]):
    """Results of `function(index)`. Those after the last requested index are computed ahead."""

    def __init__(self, function: Callable[[int], T], workers: Executor | None = None, ahead: int = 8):
        """Args: function: must be picklable if there are workers. workers: None computes on request."""
        self.function, self.workers, self.ahead = function, workers, ahead
        self._coming: dict[int, Future[T]] = {}

    def __call__(self, index: int) -> T:
        if self.workers is None:
            return self.function(index)
        self.expect(index)
        return self._coming.pop(index).result()

    def expect(self, index: int) -> None:
        """Start to compute `index`, which is requested next, and those that follow."""
        if self.workers is None:
            return
        wanted = range(index, index + self.ahead + 1)
        for stale in [i for i in self._coming if i not in wanted]:
            self._coming.pop(stale).cancel()
        for i in wanted:
            if i not in self._coming:
                self._coming[i] = self.workers.submit(self.function, i)

    def wait(self, index: int) -> None:
        """Wait until an expected `index` is ready."""
        if index in self._coming:
            self._coming[index].exception()


def start_workers(count: int) -> ProcessPoolExecutor | None:
    """`count` spawned processes with one thread each, or None for 0. They end with this process, even if it
    is killed.

    Spawned processes import the main module, so a script that trains must guard its start with
    `if __name__ == "__main__"`.
    """
    if not count:
        return None
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, initializer=_prepare)


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot notify its workers, and the workers keep its pipes open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
