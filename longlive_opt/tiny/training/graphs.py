"""Pieces of a training step as CUDA graphs.

A step of a small model launches thousands of kernels, and each is done before the next is launched: the
device waits for the host (`--stage bench --no-graphs` shows both). What is recorded once and replayed costs
the host one launch. Gradients are part of it; the optimizer is not, since its learning rate changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

Function = Callable[..., Sequence[Tensor]]

WARM_CALLS = 2


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    gradients: Sequence[Tensor | None]


class Recorder:
    """Calls functions on tensors, from the second time on by replaying what the first call launched.

    A function may draw from `generator`, leave gradients on `parameters`, and must ask the host for nothing:
    no value of a tensor, no copy from its memory. Its inputs keep their shapes as long as its key is the
    same. Without `enabled` it is simply called.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], generator: torch.Generator, enabled: bool):
        self.parameters, self.generator, self.enabled = list(parameters), generator, enabled
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle() if enabled else None

    def __call__(self, key: Hashable, function: Function, *inputs: Tensor) -> list[Tensor]:
        """What `function(*inputs)` returns; its gradients replace those there are. They are valid until the
        next call, the result for good.
        """
        if not self.enabled:
            return list(function(*inputs))
        if key not in self._recordings:
            self._recordings[key] = self._record(function, inputs)
        recording = self._recordings[key]
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.graph.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients):
            parameter.grad = gradient
        # Graphs share their memory: the next one to be replayed may write where this one left its results.
        return [output.clone() for output in recording.outputs]

    def _record(self, function: Function, inputs: Sequence[Tensor]) -> _Recording:
        inputs = [t.detach().clone() for t in inputs]
        numbers = self.generator.get_state()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # compiles, picks kernels and fills tables
            for _ in range(WARM_CALLS):
                function(*inputs)
                self._forget_gradients()
        torch.cuda.current_stream().wait_stream(side_stream)
        self.generator.set_state(numbers)  # the replay draws what a call would have drawn
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = list(function(*inputs))
        gradients = [parameter.grad for parameter in self.parameters]
        self._forget_gradients()
        return _Recording(graph, inputs, outputs, gradients)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
