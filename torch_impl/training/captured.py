"""A training step as one CUDA graph: recorded once, and replayed without the host.

A model of a few million parameters leaves a GPU waiting for Python and for a thousand launches of kernels. A
step reads nothing back from the device, and all that changes from one to the next, the counter with its
batch, masks and learning rate, stands in tensors; so the whole of it can be recorded.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

Step = Callable[[], tuple]
_EAGER_STEPS = 3
"""Before a recording: kernels are compiled and chosen, and the optimizer's state is made."""


@runtime_checkable
class Recorder(Protocol):
    """What runs steps as they are, and makes of one a step that is replayed."""

    def run(self, step: Step) -> tuple: ...

    def record(self, step: Step) -> Step:
        """Does not run it. What the replays give is overwritten by the next."""
        ...


def captured(step: Step, recorder: Recorder) -> Step:
    """The same step, replayed from the fourth call on, with results of their own."""
    calls, replay = 0, None

    def call() -> tuple:
        nonlocal calls, replay
        calls += 1
        if calls <= _EAGER_STEPS:
            return recorder.run(step)
        if replay is None:
            replay = recorder.record(step)
        metrics = replay()
        return type(metrics)(*(metric.clone() for metric in metrics))

    return call


class CudaGraphs:
    """The recorder of CUDA. Steps before the recording run on a stream of their own, as it will (PyTorch's
    notes on CUDA graphs); the memory of what is recorded belongs to the graph from then on."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def run(self, step: Step) -> tuple:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            metrics = step()
        torch.cuda.current_stream().wait_stream(self.stream)
        return metrics

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            metrics = step()

        def replay() -> tuple:
            graph.replay()
            return metrics

        return replay
