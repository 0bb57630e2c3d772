"""Attention over an 8-bit cache as one PyTorch operator: Triton or Gluon on CUDA, emulated elsewhere.

    out = attention8(q, cache, num_keys)

There is no mask: attention covers every slot below `num_keys`. The order of cached keys does not matter, so a
ring buffer needs no rolling. The operator allocates only its output and never synchronises. A CUDA graph can
capture it, and a compiled region (`fullgraph=True`) contains it as one node. `num_keys` is a Python int, so
each of its values (four while the window grows) has its own graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention8_reference import attention8_emulated
from .quantize import FP8, V_GROUP, QuantizedKV


class Tile(NamedTuple):
    """Launch parameters of the kernel.

    `max_registers` limits the registers per thread; 0 means no limit. With 168, three programs of 4 warps
    share a multiprocessor at the cost of a few spills. `gluon` selects the kernel of `attention_gluon`, which
    reads only `block_n` and `num_stages`. For e4m3 V, both kernels add each tile's P V to the sum in float32:
    the tensor core's FP8 accumulators keep about 14 bits, and over 147 tiles a component common to all of V
    would shrink by a tenth.
    """

    block_m: int = 64
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int = 0
    gluon: bool = False


# By (K dtype, V dtype). On an H100 the Gluon kernel is the fastest for each of these formats.
GLUON_TILES = {
    (torch.int8, FP8): Tile(num_stages=4, gluon=True),
    (FP8, FP8): Tile(num_stages=3, gluon=True),
    (torch.int8, torch.bfloat16): Tile(num_stages=3, gluon=True),
}
# Triton: 128 queries with 8 warps read the L2 cache half as often as 64 with 4, which would need 5 TB/s in
# fp8. With these stages ptxas (12.8) keeps the matrix products asynchronous.
TILES = {
    (torch.int8, FP8): Tile(128, 128, 8, 3),
    (FP8, FP8): Tile(128, 128, 8, 3),
    (torch.int8, torch.int8): Tile(128, 128, 8, 3),
    (torch.int8, torch.bfloat16): Tile(128, 128, 8, 2),
}


def attention8(q: Tensor, cache: QuantizedKV, num_keys: int, tile: Tile | None = None) -> Tensor:
    """Attention of q [B,L,N,D] over the first `num_keys` slots of an 8-bit cache -> [B,L,N,D] in q's dtype.

    q: contiguous, bf16 on CUDA (any float elsewhere); softmax scale 1/sqrt(D). `tile` None takes
    `default_tile`. Raises ValueError when shapes, dtypes or layouts do not fit.
    """
    tile = tile or default_tile(cache)
    return torch.ops.longlive.attention8(q, cache.k, cache.v, cache.k_scale, cache.v_scale, num_keys, *tile)


def default_tile(cache: QuantizedKV, hopper: bool = True) -> Tile:
    """Return the Gluon tile if its kernel fits, else the Triton tile.

    Gluon needs a Hopper GPU, heads of 128 and V in bf16 or e4m3. Its copy engine needs rows of per-token
    scales in multiples of 16 bytes, so the number of slots must be divisible by 4.
    """
    formats = (cache.k.dtype, cache.v.dtype)
    fits = cache.k.shape[3] == 128 and (cache.k.dtype == FP8 or cache.k.shape[1] % 4 == 0)
    if hopper and fits and formats in GLUON_TILES:
        return GLUON_TILES[formats]
    return TILES.get(formats, TILES[torch.int8, torch.bfloat16])


@torch.library.custom_op("longlive::attention8", mutates_args=())
def _attention8(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor | None, num_keys: int,
                block_m: int, block_n: int, num_warps: int, num_stages: int, max_registers: int,
                gluon: bool) -> Tensor:
    _check(q, k, v, k_scale, v_scale, num_keys)
    if q.is_cuda and gluon:
        from . import attention_gluon

        return attention_gluon.launch(q, k, v, k_scale, v_scale, num_keys, block_n, num_stages)
    if q.is_cuda:
        from . import attention8_triton

        return attention8_triton.launch(q, k, v, k_scale, v_scale, num_keys, block_m, block_n, num_warps,
                                        num_stages, max_registers)
    return attention8_emulated(q, k, v, k_scale, v_scale, num_keys, block_n)


@_attention8.register_fake
def _attention8_fake(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor | None, num_keys: int,
                     block_m: int, block_n: int, num_warps: int, num_stages: int, max_registers: int,
                     gluon: bool) -> Tensor:
    return torch.empty_like(q)


def _check(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor | None, num_keys: int) -> None:
    """Check shapes against the module `quantize`: a wrong one would read elsewhere instead of failing."""
    batch, _, heads, dim = q.shape
    slots = k.shape[1]
    per_head, per_token = (batch, heads), (batch, heads, slots)
    expected = {"k": (batch, slots, heads, dim), "v": (batch, slots, heads, dim),
                "k_scale": per_token if k.dtype == torch.int8 else per_head, "v_scale": per_token}
    if v.dtype == FP8:
        expected |= {"v": (batch, heads, dim, -(-slots // V_GROUP) * V_GROUP), "v_scale": per_head}
    for name, tensor in {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}.items():
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; q {tuple(q.shape)} needs {expected[name]}")
    if k.dtype not in (torch.int8, FP8) or (v_scale is None) == (v.dtype in (torch.int8, FP8)):
        given = "absent" if v_scale is None else "given"
        raise ValueError(f"k is {k.dtype}, v {v.dtype}, v_scale {given}: see the table in quantize.py")
    if not 0 < num_keys <= slots:
        raise ValueError(f"num_keys is {num_keys}; the cache has {slots} slots")
    if not all(t.is_contiguous() for t in (q, k, v, k_scale, v_scale) if t is not None):
        raise ValueError("q, k, v and their scales must be contiguous: the kernel does not support strides")
