"""Absolute positions: a vector for each place in the sequence, to be added to the token embedding.

Shapes: T time, C width, N longest sequence (the context length).
Not here: relative or rotary positions, which act inside attention.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import DTypeLike


def sinusoidal_positions(length: int, width: int, dtype: DTypeLike) -> Float[Array, "T C"]:
    """PE(t, 2i) = sin(t / 10000^(2i/C)), PE(t, 2i+1) = cos(t / 10000^(2i/C)) (Vaswani et al. 2017, 3.5).

    Computed in float64, then rounded to dtype. Of an odd width the last feature is a sine without its cosine.
    """
    features = np.arange(width)
    frequency = 10000.0 ** (-2.0 * (features // 2) / width)  # features 2i and 2i+1 share one
    angle = np.arange(length)[:, None] * frequency  # (T, C)
    return np.where(features % 2 == 0, np.sin(angle), np.cos(angle)).astype(dtype)


class LearnedPositionsCache(NamedTuple):
    weight: Array


def learned_positions_forward(
    weight: Float[Array, "N C"], length: int
) -> tuple[Float[Array, "T C"], LearnedPositionsCache]:
    """y_t = W_t, the first rows of a trained table. Raises ValueError for a length above N."""
    if length > weight.shape[0]:
        raise ValueError(f"a sequence of {length} is longer than the context length of {weight.shape[0]}")
    return weight[:length], LearnedPositionsCache(weight)


def learned_positions_backward(dy: Float[Array, "T C"], cache: LearnedPositionsCache) -> Float[Array, "N C"]:
    """dW_t = dy_t; the rows beyond the sequence get nothing."""
    dweight = np.zeros_like(cache.weight)
    dweight[: dy.shape[0]] = dy
    return dweight
