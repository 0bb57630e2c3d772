"""The names of Gluon that our kernels use: `triton.experimental` renames them between releases of Triton.

Kernels import from here and from nowhere in `triton.experimental`. Known to work: Triton 3.6, 3.7 and 3.8.
What was renamed in between has its newest name here: `barrier`, which Triton 3.6 calls `thread_barrier`. An
alias is as good as the builtin itself inside a jit function, which looks its globals up when it is compiled.

Raises (on import):
    NotAvailable: another Triton is installed, or this one lacks a name.
"""

from __future__ import annotations

import re

import triton

from ..errors import NotAvailable

KNOWN = ((3, 6), (3, 7), (3, 8))
_REMEDY = ("The Gluon kernels of use_quantized_kv are known to work with Triton 3.6 to 3.8; install a "
           "PyTorch that brings one of these ('make install'), or set kv_read_path to dequantize.")


def check_version(version: str) -> None:
    """Raise NotAvailable unless Triton `version` is known to work."""
    release = re.match(r"(\d+)\.(\d+)", version)
    if not release or tuple(map(int, release.groups())) not in KNOWN:
        raise NotAvailable(f"This is Triton {version}. {_REMEDY}")


check_version(triton.__version__)
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
except (ImportError, AttributeError) as error:
    raise NotAvailable(f"This Triton {triton.__version__} has another Gluon ({error}). {_REMEDY}") from error

__all__ = ["TensorDescriptor", "barrier", "fence_async_shared", "gl", "gluon", "mbarrier", "tma",
           "warpgroup_mma", "warpgroup_mma_wait"]
