"""Record parts of a training step as CUDA graphs.

A step of a small model launches thousands of kernels, and each ends before the host launches the next, so the
device waits for the host (`--stage bench --no-graphs` shows both times). A recorded graph costs the host one
launch. It includes the gradients but not the optimizer, whose learning rate changes.
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
    """Records a function on its first call with a key and replays its kernels on every call with that key.

    A function may draw from `generator` and leave gradients on `parameters`. It must not depend on the host:
    it reads no tensor value and copies nothing from host memory. Inputs with the same key have the same
    shapes. Without `enabled` the function is called directly.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], generator: torch.Generator, enabled: bool):
        self.parameters, self.generator, self.enabled = list(parameters), generator, enabled
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle() if enabled else None

    def __call__(self, key: Hashable, function: Function, *inputs: Tensor) -> list[Tensor]:
        """Return `function(*inputs)` and replace the current gradients by its own. The gradients are valid
        until the next call, the result permanently.
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
        # Graphs share their memory, so the next replay may overwrite the results of this one.
        return [output.clone() for output in recording.outputs]

    def _record(self, function: Function, inputs: Sequence[Tensor]) -> _Recording:
        inputs = [t.detach().clone() for t in inputs]
        numbers = self.generator.get_state()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # compile, choose kernels and fill tables
            for _ in range(WARM_CALLS):
                function(*inputs)
                self._forget_gradients()
        torch.cuda.current_stream().wait_stream(side_stream)
        self.generator.set_state(numbers)  # so that the replay draws the same numbers as a call
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
