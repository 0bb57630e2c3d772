"""Watch the transformer's passes while they run: each layer's output, and its queries and attended keys.

A replayed CUDA graph has no layers to watch, so watched passes run without graphs. Their kernels are the
preset's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor

from ..errors import UserError
from ..optimizations.cuda_graphs import GraphedForward
from ..optimizations.fused_kernels import FusedForward
from ..optimizations.ring_cache import RingKVCache
from ..optimizations.torch_compile import CompiledForward
from ..streaming.kv_cache import KVCache, RollingKVCache
from ..streaming.sampler import EagerForward, Forward
from .cache_slots import stored_rows


def without_graphs(forward: Forward) -> Forward:
    """The same passes, launched kernel by kernel."""
    while isinstance(forward, GraphedForward):
        forward = forward.inner
    return forward


@contextlib.contextmanager
def layer_outputs(forward: Forward, note: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `note(layer, x)` with the residual stream x [B, L, dim] after each layer while the body runs.

    Raises:
        UserError: the layers of this kind of pass cannot be watched.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(forward, EagerForward):
            for number, block in enumerate(forward.dit.blocks):
                handle = block.register_forward_hook(
                    lambda module, inputs, x, number=number: note(number, x))
                stack.callback(handle.remove)
        elif isinstance(forward, FusedForward):
            for number, block in enumerate(forward._blocks):
                stack.enter_context(_wrapped(
                    block, "finish", lambda result, number=number: note(number, result[0])))
        elif isinstance(forward, CompiledForward):
            layers = len(forward.dit.blocks)
            count = iter(range(10**9))
            stack.enter_context(_wrapped(forward, "_finish", lambda x: note(next(count) % layers, x)))
        else:
            raise UserError(f"passes: the layers of {type(forward).__name__} cannot be watched; add it to "
                            "layer_outputs.")
        yield


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, then: Callable[[Any], None]) -> Iterator[None]:
    """Call `then` with each result of the owner's method while the body runs."""
    inner = getattr(owner, name)
    own = name in vars(owner)

    def watched(*arguments: Any, **keys: Any) -> Any:
        result = inner(*arguments, **keys)
        then(result)
        return result

    setattr(owner, name, watched)
    try:
        yield
    finally:
        setattr(owner, name, inner) if own else delattr(owner, name)


@contextlib.contextmanager
def attended(cache: KVCache, note: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `note(layer, q, k)` in every attention over the cache while the body runs: rotated queries
    q [B, L, N, D], and the attended keys k [B, T, N, D] in the order of the memory, 8-bit ones as float32.

    Raises:
        UserError: the attention of this kind of cache cannot be watched.
    """
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(cache.layers):
            if isinstance(cache, RollingKVCache):
                name, wrapper = "_attention", _watch_attention
            elif isinstance(cache, RingKVCache):
                name, wrapper = "read", _watch_read
            else:
                raise UserError(f"cache: the attention of {type(cache).__name__} cannot be watched; add it "
                                "to attended.")
            own = vars(layer).get(name)
            setattr(layer, name, wrapper(cast(Any, layer), getattr(layer, name), number, note))
            stack.callback(setattr, layer, name, own) if own is not None else \
                stack.callback(delattr, layer, name)
        yield


def _watch_attention(layer: Any, inner: Callable[..., Tensor], number: int,
                     note: Callable[[int, Tensor, Tensor], None]) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        note(number, q, k)
        return inner(q, k, v)

    return attention


def _watch_read(layer: Any, inner: Callable[..., Tensor], number: int,
                note: Callable[[int, Tensor, Tensor], None]) -> Callable[..., Tensor]:
    def read(q: Tensor) -> Tensor:
        cache = layer.cache
        keys, _ = stored_rows(layer, cache.attended * cache.geometry.tokens_per_frame)
        note(number, q, keys)
        return inner(q)

    return read
