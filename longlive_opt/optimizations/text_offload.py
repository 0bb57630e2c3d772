"""Text offload: weights that only read the prompt stay on the host and visit the GPU block by block.

Idea: UMT5-XXL takes 11.4 GB, four times the transformer, and works only when the prompt changes. The same
holds for the transformer's projections of the prompt to keys and values, 0.3 GB. Their weights are in
page-locked host memory. While one block runs, another stream copies the next block into one of two
alternating buffers, which are freed afterwards. The embedding table is looked up on the host. A prompt is
encoded between two blocks of video, when their activations need no memory, and never ahead.

Replaces: `encode_prompt`, `embed_text`. Costs: a prompt takes as long as all weights need over the bus (0.4 s
at 25 GB/s), unless a prompt cache has it, and the host needs the memory that the GPU saves. Bit-exact: the
same kernels on the same numbers.

Source: offloading weights layer by layer as in FlexGen (arXiv:2303.06865).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..models.dit import AttentionProjections, CausalDiT, TextContext
from ..models.text import UMT5Encoder
from ..streaming.pipeline import Pipeline, prompt_encoder
from .base import Exactness, Optimization


@dataclass(frozen=True)
class TextOffload(Optimization):
    name: ClassVar[str] = "text_offload"
    exactness: ClassVar[Exactness] = "bitwise"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        device = pipeline.device
        encoder = pipeline.text_encoder.hosted(lambda module: OffloadedEncoder(module, device))
        projections = OffloadedProjections(pipeline.dit)
        embed_text = projections.embed_text
        pipeline = dataclasses.replace(
            pipeline, text_encoder=encoder, embed_text=embed_text,
            encode_prompt=prompt_encoder(encoder, embed_text), encode_ahead=False,
            weights=pipeline.weights | {"text_encoder": encoder.report})
        done = (f"the weights of the text encoder and of the transformer's {len(projections.weights)} "
                f"projections of the prompt stay on the host, {BUFFERS} blocks at a time on {device.type}")
        return self.report(pipeline, done, hosted_projection_bytes=projections.nbytes)


BUFFERS = 2


class OffloadedEncoder(nn.Module):
    """Called like `UMT5Encoder`; runs the CPU weights of `encoder` on `device`."""

    def __init__(self, encoder: UMT5Encoder, device: torch.device):
        super().__init__()
        self.device = device
        self.encoder = encoder
        self.weights = [pack(block, pinned=device.type == "cuda") for block in encoder.blocks]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask [B, L] -> [B, L, dim] on the device."""
        buckets, padding = self.encoder.positions(mask.to(self.device))
        x = self.encoder.token_embedding(ids.cpu()).to(self.device)
        for block, weights in zip(self.encoder.blocks, visits(self.weights, self.device)):
            x = functional_call(block, unpack(weights, block), (x, buckets, padding))
        return functional_call(self.encoder.norm, {"weight": self.encoder.norm.weight.to(self.device)}, (x,))


class OffloadedProjections:
    """`CausalDiT.embed_text` with the weights of the key and value projections in host memory."""

    def __init__(self, dit: CausalDiT):
        self.dit = dit
        self.projections = [KeyValue(block.cross_attn) for block in dit.blocks]
        self.weights = [pack(module, pinned=dit.device.type == "cuda") for module in self.projections]

    @property
    def nbytes(self) -> int:
        return sum(weights.nbytes for weights in self.weights)

    @torch.no_grad()
    def embed_text(self, prompt: Tensor) -> TextContext:
        """Convert a prompt [B, L, text_dim] to the transformer's text input."""
        visiting = zip(self.projections, visits(self.weights, self.dit.device))
        return self.dit.embed_text(prompt, (partial(functional_call, module, unpack(weights, module))
                                            for module, weights in visiting))


class KeyValue(nn.Module):
    """`AttentionProjections.key_value` as a module with only the parts it uses."""

    def __init__(self, attention: AttentionProjections):
        super().__init__()
        self.k, self.v, self.norm_k, self.head_dim = (attention.k, attention.v, attention.norm_k,
                                                      attention.head_dim)

    forward = AttentionProjections.key_value


def visits(weights: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Copy equally sized tensors from host memory to `device` one by one; each is valid until the one after
    the next is requested.
    """
    if device.type != "cuda":
        yield from weights
        return
    running, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    # Made on the stream that uses them last, so they may be freed at the end.
    buffers = [torch.empty_like(weights[0], device=device) for _ in range(BUFFERS)]
    copying.wait_stream(running)
    arrived = []
    for index in range(len(weights) + 1):
        if index < len(weights):
            with torch.cuda.stream(copying):
                # The last user of this buffer was launched before the last `wait_stream`.
                buffers[index % BUFFERS].copy_(weights[index], non_blocking=True)
                arrived.append(copying.record_event())
        if index:
            running.wait_event(arrived[index - 1])
            yield buffers[(index - 1) % BUFFERS]
            copying.wait_stream(running)


def pack(block: nn.Module, pinned: bool) -> Tensor:
    """Move all parameters of `block` into one flat tensor and make them views of it; return the tensor."""
    parameters = list(block.parameters())
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, pin_memory=pinned)
    for parameter, part in zip(parameters, _split(flat, parameters)):
        part.copy_(parameter)
        parameter.data = part
    return flat


def unpack(flat: Tensor, block: nn.Module) -> dict[str, Tensor]:
    """The parameters of `block` as views of `flat`, by name."""
    named = dict(block.named_parameters())
    return dict(zip(named, _split(flat, list(named.values()))))


def _split(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters)]
