"""A linear layer and the cross entropy of what it makes, a few places at a time.

The logits of a large vocabulary are the largest array of a training step: they are made here for some places,
used for these places' loss and gradients, and forgotten. The gradients are therefore those of the forward
pass, and the backward pass only scales them. It is linear_forward and then cross_entropy_forward.

Shapes: C features, V vocabulary; the leading axes of x (batch, time) are places, all treated alike.
Not here: a bias, which no output projection of this family has.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray as Array

from ref_numpy.linear import linear_backward, linear_forward
from ref_numpy.loss import IGNORE, cross_entropy_backward, cross_entropy_forward


class LinearCrossEntropyCache(NamedTuple):
    dx: Array  # of a loss whose own gradient is 1
    dweight: Array


def linear_cross_entropy_forward(
    x: Float[Array, "*places C"],
    weight: Float[Array, "V C"],
    targets: Integer[Array, "*places"],
    label_smoothing: float = 0.0,
    count: int | None = None,
    at_once: int = 256,
) -> tuple[np.floating, LinearCrossEntropyCache]:
    """loss = cross_entropy(x W^T, targets), for at_once places after the other; see ref_numpy/loss.py.

    The shares of the chunks add up, since each is divided by the count of all. Raises ValueError for a target
    that is neither a token nor IGNORE, and for at_once below 1. (As in Liger Kernel, Hsu et al. 2024.)
    """
    if at_once < 1:
        raise ValueError(f"{at_once} places at once are none; it must be at least 1")
    rows, t = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if count is None:
        count = int((t != IGNORE).sum())
    loss, dx, dweight = x.dtype.type(0), np.empty_like(rows), np.zeros_like(weight)
    for start in range(0, t.size, at_once):
        chunk = slice(start, start + at_once)
        logits, product = linear_forward(rows[chunk], weight, None)
        share, softmax = cross_entropy_forward(logits, t[chunk], label_smoothing, count)
        dx[chunk], dweight_of_chunk, _ = linear_backward(cross_entropy_backward(1.0, softmax), product)
        loss, dweight = loss + share, dweight + dweight_of_chunk
    return loss, LinearCrossEntropyCache(dx.reshape(x.shape), dweight)


def linear_cross_entropy_backward(
    dloss: float | Float[Array, ""], cache: LinearCrossEntropyCache
) -> tuple[Float[Array, "*places C"], Float[Array, "V C"]]:
    """Gradients of x and W: those of the forward pass, times dloss."""
    return dloss * cache.dx, dloss * cache.dweight
