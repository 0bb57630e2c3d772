"""Mark functions that torch.compile turns into few kernels after a call of `use_compiler`.

The marked functions are small, mostly element-wise, and shared by many layers: the halves of a transformer
block around attention, the norms of the VAE, and the drawing of an object. With `dynamic` their first axis
may change without recompiling. All other shapes take only a few values. By default, as in tests and on the
CPU, the functions run uncompiled.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Callable, ParamSpec, TypeVar

import torch
from torch import Tensor

from ...kernels import torch_internals

P = ParamSpec("P")
R = TypeVar("R")

RECOMPILE_LIMIT = 64

_backend: str | None = None
_functions: list[Callable[[], None]] = []


def use_compiler(backend: str | None) -> None:
    """From now on, compile all `compilable` functions of this process with `backend`: inductor, or aot_eager
    to find graph breaks. None switches compilation off.
    """
    global _backend
    if backend != _backend:
        for forget in _functions:
            forget()
    _backend = backend
    if backend is not None:
        torch_internals.allow_recompiles(RECOMPILE_LIMIT)


def compiling() -> bool:
    """Whether `use_compiler` has switched compilation on."""
    return _backend is not None


def compilable(dynamic: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function that `use_compiler` compiles as one full graph.

    Args:
        dynamic: leave the length of the first tensor's first axis open, in all tensors that share it.
    """
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        compiled: Callable[P, R] | None = None

        def forget() -> None:
            nonlocal compiled
            compiled = None

        _functions.append(forget)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal compiled
            if _backend is None:
                return function(*args, **kwargs)
            if compiled is None:
                compiled = torch.compile(function, fullgraph=True, backend=_backend,
                                         dynamic=None if dynamic else False)
            if dynamic:
                _open_first_axis(args)
            return compiled(*args, **kwargs)

        return call

    return decorate


def _open_first_axis(args: tuple[Any, ...]) -> None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    for tensor in tensors:
        if len(tensor) == len(tensors[0]):
            torch_internals.leave_open(tensor, 0)
