"""Absolute positions: a vector for each place in the sequence, to be added to the token embedding.

Shapes: T time, C width, N longest sequence (the context length). Places are 0 to T - 1, or one row of them
for each of B sequences.
Not here: rotary positions (rope.py) and distances (alibi.py), which act inside attention.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray as Array
from numpy.typing import DTypeLike


def sinusoidal_positions(
    places: Integer[Array, "*B T"], width: int, dtype: DTypeLike
) -> Float[Array, "*B T C"]:
    """PE(t, 2i) = sin(t / 10000^(2i/C)), PE(t, 2i+1) = cos(t / 10000^(2i/C)) (Vaswani et al. 2017, 3.5).

    Computed in float64, then rounded to dtype. Of an odd width the last feature is a sine without its cosine.
    """
    features = np.arange(width)
    frequency = 10000.0 ** (-2.0 * (features // 2) / width)  # features 2i and 2i+1 share one
    angle = places[..., None] * frequency  # (B, T, C)
    return np.where(features % 2 == 0, np.sin(angle), np.cos(angle)).astype(dtype)


class LearnedPositionsCache(NamedTuple):
    places: Array
    weight: Array


def learned_positions_forward(
    places: Integer[Array, "*B T"], weight: Float[Array, "N C"]
) -> tuple[Float[Array, "*B T C"], LearnedPositionsCache]:
    """y_t = W_t, a row of a trained table. Raises ValueError for a place outside [0, N)."""
    if places.size and not (0 <= places.min() and places.max() < weight.shape[0]):
        outside = places.min() if places.min() < 0 else places.max()
        raise ValueError(f"place {outside} lies outside the context length of {weight.shape[0]}")
    return weight[places], LearnedPositionsCache(places, weight)


def learned_positions_backward(
    dy: Float[Array, "*B T C"], cache: LearnedPositionsCache
) -> Float[Array, "N C"]:
    """dW_t = sum of dy over all tokens at place t; places that no token holds get nothing."""
    dweight = np.zeros_like(cache.weight)
    np.add.at(dweight, cache.places, dy)
    return dweight
