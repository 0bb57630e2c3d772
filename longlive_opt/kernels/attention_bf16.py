"""bf16 attention as one PyTorch operator: the Gluon kernel on Hopper for many keys, cuDNN for few keys, and
PyTorch's own attention on the CPU.

    out = attention_bf16(q, k, v)

The kernel of `attention_gluon` is faster than cuDNN for the keys of a window: 645 against 521 TFLOP/s with
18,720 keys on an H100. Cross-attention has 512 keys, too few tiles to fill its pipeline, so it uses cuDNN. A
CUDA graph can capture the operator, and a compiled region contains it as one node.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import NotAvailable, UserError

HEAD_DIM = 128
KEY_TILE, STAGES = 128, 2
FEWEST_KEYS = 1024


@torch.library.custom_op("longlive::attention_bf16", mutates_args=())
def attention_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B,L,N,D] over k, v [B,T,N,D] -> [B,L,N,D], contiguous.

    No mask, scale 1/sqrt(D). CUDA needs a Hopper GPU, bf16 tensors and D = 128; others raise ValueError.
    """
    if not q.is_cuda:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).contiguous()
    shapes = [tuple(t.shape) for t in (q, k, v)]
    fits = shapes[1] == shapes[2] and shapes[0][::2] == shapes[1][::2] and shapes[0][3] == HEAD_DIM
    if not fits or any(t.dtype != torch.bfloat16 for t in (q, k, v)):
        raise ValueError(f"q {shapes[0]} {q.dtype}, k {shapes[1]}, v {shapes[2]}: the operator takes bf16 on "
                         f"CUDA, q [B,L,N,{HEAD_DIM}] with k and v [B,T,N,{HEAD_DIM}]")
    if k.shape[1] < FEWEST_KEYS:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).contiguous()
    from . import attention_gluon

    return attention_gluon.launch(q.contiguous(), k.contiguous(), v.contiguous(), None, None, k.shape[1],
                                  KEY_TILE, STAGES)


@attention_bf16.register_fake
def _attention_bf16_fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def check_gpu(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Check that the operator can run for a model's heads.

    Raises:
        NotAvailable: the device is not a Hopper GPU.
        UserError: the kernel does not support the model's dtype or heads.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise NotAvailable("attention_backend: 'gluon' needs a Hopper GPU (compute capability 9.0, such as "
                           "an H100); use attention_backend: auto here.")
    if dtype != torch.bfloat16 or head_dim != HEAD_DIM:
        raise UserError(f"attention_backend: 'gluon' takes bfloat16 and heads of {HEAD_DIM} channels, and "
                        f"this model has {str(dtype).removeprefix('torch.')} and {head_dim}; use auto.")
