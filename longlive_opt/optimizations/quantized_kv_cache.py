"""Quantized KV (key-value) cache: the ring of `ring_cache` in 8 bit, attended as stored.

Idea: keys and values are quantised once, when written, to the formats of Hopper's 8-bit matrix products, and
attention multiplies in 8 bit. The gain comes from the matrix products, not from bandwidth: reading the cache
takes 1 ms of a 55 ms pass. With a cast before attention (`kv_read_path: dequantize`, the variant that is
usually built first), an 8-bit cache saves memory but costs time.

`kv_quantization`: `int8` stores K in int8 with one scale per token and head, and V in e4m3, because a matrix
product takes two factors of one kind and probabilities need floating point. `fp8` stores K and V in e4m3.
e4m3 has one fixed scale, 1: it covers 0.016 to 448 in full precision and saturates beyond. The share of the
cache at either end is counted once, when the result is assembled, and reported.

Replaces: `make_cache`, and shortens the sampler's recache. It takes precedence over `use_static_kv`, the same
ring in the model's dtype. It takes half of that memory; with relative positions, the sink's raw keys stay in
full precision.

Costs: precision. On random normal data, attention has an error of 3.8 % RMS (root mean square; int8) and 5.3
% (fp8), of which storage causes 2.8 and 3.9. It does not help in passes with few keys or on GPUs before
Hopper. On the CPU the kernels are emulated: the same arithmetic, slower than float32.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, ClassVar

import torch
from torch import Tensor

from ..errors import NotAvailable, UserError
from ..kernels.attention8 import Tile, attention8, default_tile
from ..kernels.compilers import check_triton
from ..kernels.fused import store_kv
from ..kernels.quantize import FP8, allocate_kv, count_codes, dequantize_kv, gather_v, write_keys
from ..kernels.quantize import QuantizedKV as Stored
from ..models.attention import Attention, make_attention
from ..streaming.kv_cache import CacheGeometry
from ..streaming.pipeline import Pipeline, cache_geometry
from .base import Exactness, Optimization
from .ring_cache import RingKVCache, RingLayer, Rotation, rotate_complex, rotation_for

MODES = {"int8": "int8_fp8", "fp8": "fp8_fp8"}
"""`kv_quantization` -> mode of `kernels.quantize`."""
FORMATS = {"int8": "K int8, V e4m3", "fp8": "K e4m3, V e4m3"}
HEAD_DIMS = (32, 64, 128, 256)
"""Head sizes that the kernels' tiles support."""
# The copy engine needs rows of scales to begin on 16 bytes; V's columns come in groups of 16 anyway.
SLOT_GROUP = 16

Reader = Callable[[Tensor, Stored, int], Tensor]
"""(rotated q [B, L, N, D], one layer's cache, attended slots in tokens) -> attention [B, L, N, D]"""


@dataclass(frozen=True)
class QuantizedKV(Optimization):
    name: ClassVar[str] = "quantized_kv"
    exactness: ClassVar[Exactness] = "lossy"

    quantization: str = "int8"
    read_path: str = "fused"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        config, device, dtype = pipeline.config, pipeline.device, pipeline.dtype
        geometry = cache_geometry(config, pipeline.model)
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            check_kernels(geometry.head_dim, capability)
        mode, rotation = MODES[self.quantization], rotation_for(config)
        tile = choose_tile(geometry, mode, device)
        if device.type == "cuda" and tile.gluon and self.read_path == "fused":
            importlib.import_module("longlive_opt.kernels.gluon_api")  # refuses an unknown Triton
        read = (partial(attention8, tile=tile) if self.read_path == "fused"
                else partial(dequantized_attention, make_attention(pipeline.attention_backend)))

        codes = CodeCounts()

        def make_cache() -> QuantizedKVCache:
            return codes.watch(QuantizedKVCache(geometry, mode, read, 1, device, dtype, rotation))

        pipeline = dataclasses.replace(pipeline, make_cache=make_cache,
                                       sampler=dataclasses.replace(pipeline.sampler, trim_recache=True))
        formats = FORMATS[self.quantization]
        kernel = (kernel_name(tile, device) if self.read_path == "fused"
                  else f"{pipeline.attention_backend}, after a cast to {config.model_dtype}")
        done = f"{formats}; attention: {kernel}"
        if config.use_static_kv:
            done += "; use_static_kv was not applied, because this ring replaces it"
        return self.report(pipeline, done, formats=formats, kernel=kernel, e4m3=codes)


class CodeCounts:
    """A `Stats` of the newest cache as its last stream left it; the last counts outlive that cache."""

    def __init__(self) -> None:
        self._cache: Callable[[], QuantizedKVCache | None] = lambda: None
        self._found: dict[str, Any] = {}

    def watch(self, cache: QuantizedKVCache) -> QuantizedKVCache:
        """Count this cache from now on, without keeping it alive."""
        self._cache = weakref.ref(cache)
        return cache

    def summary(self) -> dict[str, Any]:
        """Shares of the e4m3 values in percent, and the head with the largest share; empty if no cache ever
        held anything.
        """
        cache = self._cache()
        counts = {} if cache is None or not cache.pointers[1] else cache.count_codes()
        if not counts:
            return self._found
        names, by_head = list(counts), torch.stack(list(counts.values()))  # [K and V of layers, kinds, heads]
        values = cache.values_per_head
        found: dict[str, Any] = {}
        for kind, key in enumerate(("saturated", "below_normal", "nan")):
            part = by_head[:, kind].double() * (100 / values)
            found[f"{key}_percent"] = part.mean().item()
            if key != "nan":
                row, head = divmod(int(part.argmax()), part.shape[1])
                found[f"worst_{key}"] = f"{names[row]}, head {head}: {part[row, head].item():.2f} %"
        self._found = found
        return found


def check_kernels(head_dim: int, capability: tuple[int, int]) -> None:
    """Check that the CUDA kernels take this model on a GPU of this compute capability.

    Raises:
        NotAvailable: the GPU is older than Hopper, or Triton or something it needs to start kernels is
            missing.
        UserError: the kernels do not support the size of the heads.
    """
    if capability < (9, 0):
        raise NotAvailable("use_quantized_kv: its kernels need compute capability 9.0 (H100) or newer, but "
                           f"this GPU has {capability[0]}.{capability[1]}; switch on use_static_kv instead.")
    check_triton("use_quantized_kv")
    if head_dim not in HEAD_DIMS:
        raise UserError(f"use_quantized_kv: the kernels take heads of {', '.join(map(str, HEAD_DIMS))} "
                        f"channels, but this model has {head_dim}; switch on use_static_kv instead.")


def choose_tile(geometry: CacheGeometry, mode: str, device: torch.device) -> Tile:
    """The fastest kernel for these sizes on this device; the CPU emulates the same tiles."""
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    shape = allocate_kv(mode, 1, SLOT_GROUP, geometry.heads, geometry.head_dim, "meta")
    return default_tile(shape, hopper)


def kernel_name(tile: Tile, device: torch.device) -> str:
    """Name the kernel that runs, for the report."""
    if device.type != "cuda":
        return f"PyTorch on the CPU, emulating tiles of {tile.block_n} keys"
    if tile.gluon:
        return f"Gluon, tiles of 128 x {tile.block_n}, {tile.num_stages} stages"
    return f"Triton, tiles of {tile.block_m} x {tile.block_n}, {tile.num_stages} stages"


def dequantized_attention(attention: Attention, q: Tensor, stored: Stored, num_keys: int) -> Tensor:
    """A `Reader` that casts the attended slots to q's dtype, then attends."""
    k, v = dequantize_kv(stored, num_keys)
    return attention(q, k.to(q.dtype), v.to(q.dtype))


class QuantizedKVCache(RingKVCache):
    """A ring in 8 bit."""

    def __init__(self, geometry: CacheGeometry, mode: str, read: Reader, batch: int, device: torch.device,
                 dtype: torch.dtype, rotation: Rotation = rotate_complex):
        """Args: mode: of `kernels.quantize`; dtype: the model's."""
        super().__init__(geometry, device, rotation)
        self.layers = [QuantizedLayer(self, mode, read, batch, dtype) for _ in range(geometry.layers)]

    @property
    def values_per_head(self) -> int:
        """Number of values stored of K, or of V, in one layer."""
        batch, _, _, head_dim = self.layers[0].stored.k.shape
        return batch * self.pointers[1] * self.geometry.tokens_per_frame * head_dim

    def count_codes(self) -> dict[str, Tensor]:
        """Apply `quantize.count_codes` to everything stored in e4m3; keys like "K of layer 0"; on the CPU."""
        tokens, counts = self.pointers[1] * self.geometry.tokens_per_frame, {}
        for number, layer in enumerate(self.layers):
            stored = layer.stored
            if stored.k.dtype == FP8:
                counts[f"K of layer {number}"] = count_codes(stored.k[:, :tokens])
            if stored.v.dtype == FP8:
                counts[f"V of layer {number}"] = count_codes(gather_v(stored.v, tokens))
        return {name: count.cpu() for name, count in counts.items()}


class QuantizedLayer(RingLayer):
    """One layer: `stored` holds rotated keys and values, one row per token."""

    def __init__(self, cache: RingKVCache, mode: str, read: Reader, batch: int, dtype: torch.dtype):
        super().__init__(cache, batch, dtype)
        geometry = cache.geometry
        slots = -(-geometry.window * geometry.tokens_per_frame // SLOT_GROUP) * SLOT_GROUP
        self.stored = allocate_kv(mode, batch, slots, geometry.heads, geometry.head_dim, cache.device)
        self._read = read

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        stored = self.stored
        return stored.k, stored.v, stored.k_scale, stored.v_scale

    def write(self, k: Tensor, v: Tensor) -> None:
        cache = self.cache
        store_kv(k, v, cache.token_slots, self.stored, cache.geometry.tokens_per_frame)

    def write_sink(self, k: Tensor) -> None:
        write_keys(self.stored, k)

    def read(self, q: Tensor) -> Tensor:
        return self._read(q, self.stored, self.cache.attended * self.cache.geometry.tokens_per_frame)
