"""Batches: windows of a long text of tokens, at random places.

Shapes: N tokens of text, M micro-batches, B sequences in each, T context length.
Not here: epochs (places are drawn with replacement), documents, padding.
"""

import numpy as np
from jaxtyping import Integer
from numpy import ndarray as Array

from ref_numpy.config import TrainConfig
from ref_numpy.rng import DATA, Key, uniform


def sample_batch(
    tokens: Integer[Array, "N"], context_length: int, step: int, config: TrainConfig
) -> tuple[Integer[Array, "M B T"], Integer[Array, "M B T"]]:
    """Inputs and targets of a step: the windows text[s : s+T] and, one token on, text[s+1 : s+T+1].

    Sequence r of the step starts at s_r = floor(u_r (N - T)), u_r uniform from (seed, step). The batch is
    then dealt out to the micro-batches in order. Raises ValueError for a text of T tokens or fewer.
    """
    places = tokens.size - context_length
    if places < 1:
        raise ValueError(f"a text of {tokens.size} tokens has no window of {context_length} + 1")
    starts = (uniform(Key(config.seed, DATA, step), config.batch_size) * places).astype(np.int64)
    windows = tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64)  # (M B, T + 1)
    windows = windows.reshape(config.micro_batches, -1, context_length + 1)
    return windows[..., :-1], windows[..., 1:]
