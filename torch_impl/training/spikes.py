"""Losses that leap: told from the noise of batches by what the last hundred or so were like."""

from math import sqrt


class SpikeWatch:
    """The recent mean of the losses and their spread, as exponential averages."""

    MEMORY = 0.98  # of a step ago: fifty steps, about
    FAR = 6.0  # standard deviations ...
    LEAST = 0.5  # ... and nats per token, that make a spike

    def __init__(self) -> None:
        self.mean = self.variance = 0.0
        self.seen = 0
        self.high = False

    def leaps(self, loss: float) -> bool:
        """Whether a spike begins with this loss: the next one begins when this one has gone.

        Nothing is a spike before fifty losses are seen.
        """
        surprise = loss - self.mean
        was_high = self.high
        self.high = self.seen >= 50 and surprise > max(self.FAR * sqrt(self.variance), self.LEAST)
        if not self.high:
            self.seen += 1
            weight = max(1.0 - self.MEMORY, 1.0 / self.seen)
            self.mean += weight * surprise
            self.variance = (1.0 - weight) * (self.variance + weight * surprise**2)
        return self.high and not was_high
