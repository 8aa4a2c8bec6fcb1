"""Elementwise nonlinearities: ReLU, GELU (exact and tanh), SiLU.

Each y = f(x) is followed by its backward, dx = dy f'(x). The cache is x itself, and GELU's Phi(x) beside it.
Not here: gated units (they are part of the feed-forward layer).
"""

from functools import cache
from math import erfc, factorial, pi, sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import DTypeLike


class GeluCache(NamedTuple):
    x: Array
    cdf: Array  # Phi(x)


def relu_forward(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Array]:
    """y = max(x, 0)."""
    return np.maximum(x, 0), x


def relu_backward(dy: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """dx = dy where x > 0, else 0. At x = 0, where no derivative exists, 0 is taken (as PyTorch does)."""
    return np.where(x > 0, dy, 0)


_NODES_PER_UNIT = 128
_FARTHEST = 8.5  # below -8.5 x Phi(x) is less than 1e-16, and taken to be 0; above, Phi is 1 in float64
_LAST_NODE = round(_FARTHEST * _NODES_PER_UNIT)


@cache
def _taylor_of_normal_cdf(order: int, dtype: DTypeLike) -> Array:
    """Phi^(k)(a) / k! in row k, from 0 to order, for each node a from -8.5 to 8.5.

    Phi' = phi, the density, whose derivatives are phi^(k) = (-1)^k He_k phi with the Hermite polynomials
    He_0 = 1, He_(k+1)(a) = a He_k(a) - k He_(k-1)(a).
    """
    a = np.arange(-_LAST_NODE, _LAST_NODE + 1) / _NODES_PER_UNIT
    density = np.exp(-0.5 * a * a) / sqrt(2.0 * pi)
    rows = [np.array([0.5 * erfc(-node / sqrt(2.0)) for node in a])]  # 1 + erf would cancel for negative a
    hermite, before = np.ones_like(a), np.zeros_like(a)
    for k in range(1, order + 1):
        rows.append((-1) ** (k - 1) * hermite * density / factorial(k))
        hermite, before = a * hermite - (k - 1) * before, hermite
    terms = np.stack(rows).astype(dtype)
    terms[:, 0] = 0  # whose node stands for all that is below
    return terms


def _normal_cdf(x: Array) -> Array:
    """Phi(x) = (1 + erf(x / sqrt 2)) / 2, by the Taylor series around the nearest node.

    NumPy has no erf, and Python's, called number by number, takes six times as long as all the rest of a
    training step. No node is further than 1/256: a series of order 5 is off by 1e-17, one of order 2 by 4e-9,
    less than float32 rounds.
    """
    order = 5 if x.dtype == np.float64 else 2
    inside = np.clip(x, -_FARTHEST, _FARTHEST)
    node = np.rint(inside * _NODES_PER_UNIT)
    d = inside - node / _NODES_PER_UNIT
    with np.errstate(invalid="ignore"):  # d is NaN where x is, and any node will do
        place = node.astype(np.intp) + _LAST_NODE
    terms = _taylor_of_normal_cdf(order, x.dtype)
    y = terms[order].take(place, mode="clip")
    for k in reversed(range(order)):  # Horner's scheme
        y = y * d + terms[k].take(place, mode="clip")
    return y


def gelu_forward(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], GeluCache]:
    """y = x Phi(x), Phi the cumulative distribution of the standard normal (Hendrycks & Gimpel 2016)."""
    cdf = _normal_cdf(x)
    return x * cdf, GeluCache(x, cdf)


def gelu_backward(dy: Float[Array, "*shape"], kept: GeluCache) -> Float[Array, "*shape"]:
    """dx = dy (Phi(x) + x phi(x)), with phi(x) = Phi'(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    x, cdf = kept
    density = np.exp(-0.5 * x * x) / sqrt(2.0 * pi)
    return dy * (cdf + x * density)


def gelu_tanh_forward(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Array]:
    """y = x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3): the approximation GPT-2 uses."""
    u = sqrt(2.0 / pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + np.tanh(u)), x


def gelu_tanh_backward(dy: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """dx = dy (sum of both terms), by the product rule and tanh' = 1 - tanh^2.

    (1) through the factor x/2:  (1 + tanh u) / 2
    (2) through tanh u:          x/2 (1 - tanh^2 u) u',  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
    """
    tanh_u = np.tanh(sqrt(2.0 / pi) * (x + 0.044715 * x * x * x))
    du = sqrt(2.0 / pi) * (1.0 + 3 * 0.044715 * x * x)
    through_factor = 0.5 * (1.0 + tanh_u)  # (1)
    through_tanh = 0.5 * x * (1.0 - tanh_u * tanh_u) * du  # (2)
    return dy * (through_factor + through_tanh)


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)). By tanh it would lose its digits where x is negative."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives 0, the limit
        return 1.0 / (1.0 + np.exp(-x))


def silu_forward(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Array]:
    """y = x sigmoid(x) (Elfwing et al. 2017)."""
    return x * _sigmoid(x), x


def silu_backward(dy: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """dx = dy s (1 + x (1 - s)), s = sigmoid(x), from s' = s (1 - s)."""
    s = _sigmoid(x)
    return dy * s * (1.0 + x * (1.0 - s))
