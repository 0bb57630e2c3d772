"""Ceilings: how fast this machine runs every operator of a block when it runs alone, at the model's shapes.

Each shape is timed with every kernel that this machine has for it: cuBLAS, cuDNN's convolutions with its
search and PyTorch's attention back ends, and the project's own kernels where they run. The fastest one is the
ceiling. On a GPU the calls are replayed from a CUDA graph, so launching costs nothing. On a CPU that other
processes use as well, a ceiling may come out too low. Inputs are random normal numbers. Norms only move
bytes: their ceiling is the speed of a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NotAvailable, UserError
from ..kernels import conv3d, linear8
from ..kernels.attention8 import attention8, default_tile
from ..kernels.quantize import allocate_kv, write_kv
from ..models.attention import make_attention
from ..models.vae import HISTORY_FRAMES, IMAGE_CHANNELS
from ..optimizations.fused_vae import check_device
from ..optimizations.quantized_kv_cache import MODES, SLOT_GROUP
from .quantization_study import milliseconds
from .work import Operator

COPIED_BYTES = {"cuda": 2**28, "cpu": 2**24}
_IN_A_GRAPH = 10
_LEAST_CALLS, _MOST_CALLS, _LONG_ENOUGH_MS = 5, 30, 60.0
Candidates = Iterator[tuple[str, Callable[[], object]]]
"""(name of the kernel, call) of everything that computes one operator."""


@dataclass(frozen=True)
class Ceiling:
    """The fastest kernel for one operator: its name, and ms per call."""

    kernel: str
    ms: float


def measure_ceilings(operators: Sequence[Operator], device: torch.device, dtype: torch.dtype
                     ) -> dict[tuple[str, tuple[int, ...], str], Ceiling]:
    """The ceiling of each distinct operator, by `Operator.key`. Norms have none (`copy_gb_per_s`). A kernel
    that cannot run a shape is named and left out.

    Raises:
        UserError: no kernel can run an operator.
    """
    found: dict[tuple[str, tuple[int, ...], str], Ceiling] = {}
    for operator in operators:
        if operator.kind == "norm" or operator.key in found:
            continue
        timed = []
        for name, call in _candidates(operator, device, dtype):
            try:
                timed.append(Ceiling(name, _ms(call, device)))
            except (RuntimeError, ValueError) as error:
                why = (str(error).splitlines() or [""])[0]
                print(f"ceilings: {name} cannot run {operator.kind} {operator.shape}: {why}")
        if not timed:
            raise UserError(f"ceilings: no kernel of this machine can run {operator.kind} {operator.shape}; "
                            "choose another model, size or dtype.")
        found[operator.key] = min(timed, key=lambda ceiling: ceiling.ms)
    return found


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a copy on the device, in GB (1e9)."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _ms(lambda: target.copy_(source), device) / 1e6


def _ms(call: Callable[[], object], device: torch.device) -> float:
    """ms per call; the least of a few on the CPU, which other processes use as well."""
    if device.type == "cuda":
        return milliseconds([call] * _IN_A_GRAPH, device)
    call()
    times: list[float] = []
    while len(times) < _LEAST_CALLS or len(times) < _MOST_CALLS and sum(times) < _LONG_ENOUGH_MS:
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def _candidates(operator: Operator, device: torch.device, dtype: torch.dtype) -> Candidates:
    if operator.kind == "linear":
        return _linears(operator, device, dtype)
    if operator.kind == "convolution":
        return _convolutions(operator, device, dtype)
    return _attentions(operator, device, dtype)


def _linears(operator: Operator, device: torch.device, dtype: torch.dtype) -> Candidates:
    rows, inputs, outputs = operator.shape
    x = torch.randn(1, rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
    bias = torch.randn(outputs, device=device, dtype=dtype)
    if not operator.stored:
        yield "cuBLAS" if device.type == "cuda" else "PyTorch", partial(F.linear, x, weight, bias)
        return
    left, right = (linear8.quantize_rows(part, operator.stored) for part in (x, weight[None]))
    scale = right.scale[0].t().contiguous()
    yield f"{operator.stored} product", partial(linear8.linear, left, right.values[0], scale, bias)


def _attentions(operator: Operator, device: torch.device, dtype: torch.dtype) -> Candidates:
    queries, keys, heads, head_dim = operator.shape
    q, k, v = (torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype)
               for tokens in (queries, keys, keys))
    if operator.stored:
        slots = -(-keys // SLOT_GROUP) * SLOT_GROUP
        stored = allocate_kv(MODES[operator.stored], 1, slots, heads, head_dim, device)
        write_kv(stored, k, v, torch.zeros(1, dtype=torch.int32, device=device), keys)
        hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
        tile = default_tile(stored, hopper)
        name = f"8-bit attention, {'Gluon' if tile.gluon else 'Triton'}"
        yield name, partial(attention8, q, stored, keys, tile)
        return
    if device.type != "cuda":
        yield "PyTorch", partial(make_attention("cpu"), q, k, v)
        return
    half = dtype != torch.float32
    # Heads as wide as the VAE's have no kernel in cuDNN's and flash's back ends.
    backends = ["efficient"] if not half or head_dim > 128 else ["cudnn", "flash", "efficient"]
    if half and head_dim == 128 and torch.cuda.get_device_capability(device)[0] == 9:
        backends.append("gluon")
    for backend in backends:
        yield backend, partial(make_attention(backend), q, k, v)


def _convolutions(operator: Operator, device: torch.device, dtype: torch.dtype) -> Candidates:
    inputs, outputs, frames, height, width, time_taps, space = operator.shape

    def frames_of(count: int) -> Tensor:
        x = torch.randn(1, inputs, count, height, width, device=device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last_3d)

    weight = torch.randn(outputs, inputs, time_taps, space, space, device=device, dtype=dtype)
    weight = (weight / (inputs * time_taps * space**2)**0.5).contiguous(memory_format=torch.channels_last_3d)
    bias = torch.randn(outputs, device=device, dtype=dtype)
    x = frames_of(frames + time_taps - 1)
    padding = (0, space // 2, space // 2)

    def library() -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return F.conv3d(x, weight, bias, padding=padding)

    yield "cuDNN" if device.type == "cuda" else "PyTorch", library
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    try:
        check_device(device)
    except NotAvailable:
        return
    new, past = frames_of(frames), frames_of(HISTORY_FRAMES)
    if outputs == IMAGE_CHANNELS and inputs % 96 == 0:
        yield "own convolution", partial(conv3d.convolve_head, conv3d.head_plan(weight, bias), new, past)
    elif conv3d.supported(inputs, outputs) and (time_taps, space) == (3, 3):
        yield "own convolution", partial(conv3d.convolve, conv3d.causal_plan(weight, bias), new, past)
    elif conv3d.supported(inputs, outputs) and (time_taps, space) == (3, 1):
        yield "own convolution", partial(conv3d.convolve, conv3d.frames_plan(weight, bias), new, past)
    elif conv3d.supported(inputs, outputs) and (time_taps, space) == (1, 3):  # it enlarges the picture itself
        small = new[..., ::2, ::2].contiguous(memory_format=torch.channels_last_3d)
        yield "own convolution", partial(conv3d.convolve, conv3d.picture_plan(weight[:, :, 0], bias), small)
