"""Compiling Triton and Gluon kernels for a GPU that is not there.

    with compiling_for(monkeypatch, 90) as kernels:
        attention8_triton.launch(meta(1, 4680, 12, 128), ...)      # tensors on the device "meta"
    kernels[0].asm["cubin"]

What is compiled is what the launching function asks for: its tile, stages and constants, its descriptors, and
the specialisations of its arguments. Nothing is run, and tensors on "meta" have the real sizes and no memory.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any, Iterator

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide).
SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class _AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"absent sm_{self._target.arch}"  # the key of Triton's caches in this process

    def get_current_stream(self, device: str) -> int:
        return 0


def absent_gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Let PyTorch describe a GPU of this compute capability that is not there."""
    properties = SimpleNamespace(multi_processor_count=132, major=capability // 10, minor=capability % 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@contextlib.contextmanager
def compiling_for(monkeypatch: pytest.MonkeyPatch, capability: int) -> Iterator[list[Any]]:
    """Launches inside compile for this compute capability (90 is 9.0) and do no more; yields what they made,
    Triton's `CompiledKernel`s.
    """
    made: list[Any] = []

    def compile_only(kernel: Any, grid: Any) -> Any:
        return lambda *args, **options: made.append(kernel.run(*args, grid=grid, warmup=True, **options))

    with monkeypatch.context() as patch:
        absent_gpu(patch, capability)
        patch.setattr(driver, "_active", _AbsentGPU(capability))
        patch.setattr(KernelInterface, "__getitem__", compile_only)
        yield made


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def check_binary(kernel: Any, capability: int) -> None:
    """Fail unless there is machine code for the GPU and its shared memory fits."""
    assert kernel.asm["cubin"].startswith(b"\x7fELF")
    assert f".target sm_{capability}" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_BYTES[capability], f"{kernel.metadata.shared} bytes, {triton}"
