"""Losses that leap: told from the noise of batches by what the last hundred or so were like; and with them,
the gradients that do."""

from math import sqrt

import torch

from torch_impl.train import TrainState
from torch_impl.training.ranks import whole


class SpikeWatch:
    """The recent mean of the losses and their spread, as exponential averages; and now and then the sizes of
    the gradients, a number for each parameter."""

    MEMORY = 0.98  # of a step ago: fifty steps, about
    AFTER = 50  # losses
    CALM = 10  # losses without a spike, after which it has left the averages of gradients
    FAR = 6.0  # standard deviations ...
    LEAST = 0.5  # ... and nats per token, that make a spike

    def __init__(self) -> None:
        self.mean = self.variance = 0.0
        self.seen = 0
        self.high = False
        self.sizes: dict[str, float] = {}
        self.sized = 0  # losses seen by then
        self.calm = 0  # losses since the last that was high

    def leaps(self, loss: float) -> bool:
        """Whether a spike begins with this loss: the next one begins when this one has gone.

        Nothing is a spike before AFTER losses are seen.
        """
        surprise = loss - self.mean
        was_high = self.high
        self.high = self.seen >= self.AFTER and surprise > max(self.FAR * sqrt(self.variance), self.LEAST)
        self.calm = 0 if self.high else self.calm + 1
        if not self.high:
            self.seen += 1
            weight = max(1.0 - self.MEMORY, 1.0 / self.seen)
            self.mean += weight * surprise
            self.variance = (1.0 - weight) * (self.variance + weight * surprise**2)
        return self.high and not was_high

    def remember_gradients(self, state: TrainState) -> None:
        """How large they are while the loss is calm, once in AFTER losses. All processes of a run have to
        call it; so with `grown`."""
        if self.calm >= self.CALM and self.seen >= self.sized + self.AFTER:
            self.sizes, self.sized = _sizes(state), self.seen

    def grown(self, state: TrainState) -> list[tuple[str, float]]:
        """How many times as large each gradient is as when they were last remembered, the most grown first.

        Both are averages over some ten steps, the optimizer's own: nothing is kept for them, and a step that
        is read a few steps later is still in them. They are of gradients after clipping, which shrinks all
        alike. Empty where nothing is remembered yet.
        """
        sizes = _sizes(state) if self.sizes else {}
        times = [(name, size / self.sizes[name]) for name, size in sizes.items() if self.sizes.get(name)]
        return sorted(times, key=lambda named: -named[1])


def _sizes(state: TrainState) -> dict[str, float]:
    """By name, the norm of each parameter's gradient as the optimizer averages it, over some ten steps."""
    norms = {
        name: whole(torch.linalg.vector_norm(state.optimizer.state[parameter]["exp_avg"]))
        for name, parameter in state.model.named_parameters()
        if "exp_avg" in state.optimizer.state.get(parameter, {})
    }
    return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}
