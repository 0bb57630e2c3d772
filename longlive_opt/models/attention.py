"""Scaled-dot-product attention on token-major tensors with an explicitly chosen kernel."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention_bf16 import attention_bf16

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `auto` to the backend that will run: cuDNN for half precision on CUDA, `efficient` for float32
    on CUDA, and PyTorch's only choice on the CPU (called `cpu`). `gluon`, the project's own kernel, is an
    optimization and must be requested. Every run's environment records the result.
    `ExperimentConfig.validate` refuses combinations that cannot run.
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "cpu"
    return "efficient" if dtype == torch.float32 else "cudnn"


def make_attention(backend: str) -> Attention:
    """Build `attention(q, k, v)` for q [B, L, N, D] and k, v [B, T, N, D]: no mask, scale 1/sqrt(D), result
    [B, L, N, D]. A pinned backend that cannot run raises; there is no silent fallback.
    """
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    if backend == "cpu":
        return attention
    if backend == "gluon":
        return attention_bf16
    kernel = _BACKENDS[backend]

    def pinned_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return attention(q, k, v)

    return pinned_attention
