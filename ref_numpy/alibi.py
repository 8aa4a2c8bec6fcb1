"""ALiBi: attention with linear biases (Press et al. 2022, section 3): a score falls with the distance.

Shapes: H heads, T query length, S key length. The T queries are the last T of S places.
Not here: learned slopes.
"""

from math import floor, log2

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import DTypeLike


def alibi_slopes(n_head: int) -> tuple[float, ...]:
    """Slope of head h, from 1: 2^(-8 h / H), where H is a power of two.

    Else, as in the paper's code: those of the next lower power P, then every second one of 2 P's, from the
    first.
    """
    power = 2 ** floor(log2(n_head))
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return tuple(slopes + between[: n_head - power])


def alibi_bias(slopes: tuple[float, ...], queries: int, keys: int, dtype: DTypeLike) -> Float[Array, "H T S"]:
    """bias[h, t, s] = -slope_h |t - s|, to be added to the scores; distances also count ahead (encoders)."""
    distance = np.abs(np.arange(keys - queries, keys)[:, None] - np.arange(keys))  # (T, S)
    return (-np.array(slopes)[:, None, None] * distance).astype(dtype)
