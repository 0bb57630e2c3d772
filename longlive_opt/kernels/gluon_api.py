"""The Gluon names that our kernels use. `triton.experimental` renames them between Triton releases.

Kernels import from here and never from `triton.experimental`. Known to work: Triton 3.6, 3.7 and 3.8. Renamed
objects have their newest name here: `barrier` is `thread_barrier` in Triton 3.6. A jit function looks up its
globals when it is compiled, so an alias works as well as the builtin.

Raises (on import):
    NotAvailable: Triton has another version or lacks a name.
"""

from __future__ import annotations

import re

import triton

from ..errors import NotAvailable

KNOWN = ((3, 6), (3, 7), (3, 8))
_REMEDY = ("The Gluon kernels are known to work with Triton 3.6 to 3.8; install a PyTorch with one of "
           "these ('make install'), or do without them: kv_read_path: dequantize for use_quantized_kv, "
           "use_fused_vae: false, attention_backend: auto.")


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
    raise NotAvailable(f"Gluon differs in this Triton {triton.__version__} ({error}). {_REMEDY}") from error

__all__ = ["TensorDescriptor", "barrier", "fence_async_shared", "gl", "gluon", "mbarrier", "tma",
           "warpgroup_mma", "warpgroup_mma_wait"]
