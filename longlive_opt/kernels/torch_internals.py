"""The private PyTorch interfaces that the project uses, each behind one function.

Known to work: PyTorch 2.10 to 2.14. With another version, or if the interface is missing, the function raises
NotAvailable. Nothing else in the project uses these names.
"""

from __future__ import annotations

import functools
import re
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..errors import NotAvailable

OLDEST, NEWEST = (2, 10), (2, 14)
_SHARED = "Memory that several GPUs can write to (rank_exchange: peer)"


@functools.cache
def private(path: str, purpose: str, version: str = torch.__version__) -> Any:
    """Return torch's attribute at `path`, such as "_dynamo.config".

    Args:
        path: dotted path below `torch`.
        purpose: the beginning of the error message: what needs the attribute.
        version: PyTorch's version.

    Raises:
        NotAvailable: this version is not known to work, or lacks it.
    """
    release = re.match(r"(\d+)\.(\d+)", version)
    known = release is not None and OLDEST <= tuple(map(int, release.groups())) <= NEWEST
    found: Any = torch
    try:
        for name in path.split(".") if known else ():
            found = getattr(found, name)
    except AttributeError:
        known = False
    if not known:
        raise NotAvailable(
            f"{purpose} needs torch.{path}, which is private and known to work with PyTorch {OLDEST[0]}."
            f"{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, and this is {version}; install one of these "
            "('make install').")
    return found


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor,
              use_fast_accum: bool) -> Tensor:
    """Multiply 8-bit a [M,K] and b [K,N], scaled per row of a [M,1] and per column of b [1,N], and add bias
    [N] -> [M,N] in the bias's dtype.
    """
    product = private("_scaled_mm", "An 8-bit linear layer")
    return product(a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=bias.dtype,
                   use_fast_accum=use_fast_accum)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of x [M,K] times weight [N,K] plus bias [N] in one kernel: GELU's tanh form on CUDA, its exact
    form on the CPU.
    """
    product = private("_addmm_activation", "GELU in a product's epilogue (use_fused_kernels)")
    return product(bias, x, weight.t(), use_gelu=True)


def name_symmetric_group(name: str, group: Any, store: Any) -> None:
    """Let a `torch.distributed.ProcessGroup` share memory by `symmetric_tensors`, under a name that was not
    used before in this process.

    Args:
        store: a `torch.distributed.Store` that all ranks of the group use.
    """
    # The group's own name would not do: PyTorch remembers the store of the first group of that name, and a
    # process that starts its ranks again has another group of the same name.
    private("_C._distributed_c10d._register_process_group", _SHARED)(name, group)
    _symmetric_memory().set_group_info(name, group.rank(), group.size(), store)


def symmetric_tensors(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
                      ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    """Allocate a tensor on each rank of a group, at the same time, which all of its ranks can write to.

    Returns:
        This rank's tensor, those of all ranks, and an object that must live as long as they are used.
    """
    memory = _symmetric_memory()
    strides = torch.empty(shape, device="meta").stride()
    own = memory.empty_strided_p2p(shape, strides, dtype, device)
    handle = memory.rendezvous(own, name)
    return own, tuple(handle.get_buffer(rank, shape, dtype) for rank in range(handle.world_size)), handle


def _symmetric_memory() -> Any:
    return private("_C._distributed_c10d._SymmetricMemory", _SHARED)


def expand_segments() -> None:
    """Let the GPU's allocator grow its segments instead of adding fixed ones."""
    change = private("cuda.memory._set_allocator_settings", "gpu_memory_limit_gb")
    with warnings.catch_warnings():
        # The function that the warning recommends instead is as private as this one.
        warnings.filterwarnings("ignore", message=".*_set_allocator_settings is deprecated")
        change("expandable_segments:True")


def compile_lock() -> AbstractContextManager[Any]:
    """The lock that torch.compile holds while it compiles. A thread that calls compiled functions holds it as
    well: PyTorch's flag for symbolic tracing is that of all threads, and the call would be refused.
    """
    return private("_dynamo.convert_frame.compile_lock", "Decoding in another thread (use_async_vae)")


def compiled_graphs() -> int:
    """How many graphs torch.compile has compiled in this process."""
    return private("_dynamo.utils.counters", "Counting what is compiled during a measurement")[
        "stats"]["unique_graphs"]


def compile_seconds() -> float:
    """Seconds that torch.compile has spent in this process."""
    times = private("_dynamo.utils.compilation_time_metrics", "The time of compilation")
    return sum(times.get("_compile.compile_inner", []))


def many_recompiles(limit: int) -> Any:
    """A context in which torch.compile may specialise a function `limit` times."""
    return private("_dynamo.config", "use_torch_compile").patch(recompile_limit=limit)


def allow_recompiles(limit: int) -> None:
    """Let torch.compile specialise a function `limit` times, from now on in this process."""
    private("_dynamo.config", "Compiled training").recompile_limit = limit


def leave_open(tensor: Tensor, axis: int) -> None:
    """Let the length of an axis vary between calls without recompiling."""
    private("_dynamo.maybe_mark_dynamic", "Compiled training")(tensor, axis)
