"""What plays ends before the interpreter does.

A thread that still compiles at that time fails, since the pools of its compiler are gone, or ends the process
from within C++. Ours therefore end before any pool is shut down, which is earlier than `atexit`.
"""

from __future__ import annotations

import atexit
import concurrent.futures.process  # noqa: F401 - what it has done at exit comes after what is asked for later
import concurrent.futures.thread  # noqa: F401
import contextlib
import threading
import weakref
from typing import Protocol


class Ending(Protocol):
    """Something with threads of its own."""

    def end_threads(self) -> None:
        """Return when none of them runs any more."""


_running: weakref.WeakSet[Ending] = weakref.WeakSet()


def end_at_exit(one: Ending) -> None:
    """Have `one` end its threads before the interpreter ends, if it is still there."""
    _running.add(one)


def _end_all() -> None:
    for one in list(_running):
        with contextlib.suppress(Exception):  # the others end as well
            one.end_threads()


getattr(threading, "_register_atexit", atexit.register)(_end_all)
