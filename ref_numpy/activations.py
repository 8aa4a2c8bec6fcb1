"""Elementwise nonlinearities: ReLU, GELU (exact and tanh), SiLU.

Each y = f(x) is followed by its backward, dx = dy f'(x). The cache of all four is x itself.
Not here: gated units (they are part of the feed-forward layer).
"""

from math import erf, pi, sqrt

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


def relu_forward(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Array]:
    """y = max(x, 0)."""
    return np.maximum(x, 0), x


def relu_backward(dy: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """dx = dy where x > 0, else 0. At x = 0, where no derivative exists, 0 is taken (as PyTorch does)."""
    return np.where(x > 0, dy, 0)


def _normal_cdf(x: Array) -> Array:
    """Phi(x) = (1 + erf(x / sqrt 2)) / 2. NumPy has no erf: Python's is called per element, in float64."""
    return 0.5 * (1.0 + np.frompyfunc(erf, 1, 1)(x / sqrt(2.0)).astype(x.dtype))


def gelu_forward(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Array]:
    """y = x Phi(x), Phi the cumulative distribution of the standard normal (Hendrycks & Gimpel 2016)."""
    return x * _normal_cdf(x), x


def gelu_backward(dy: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """dx = dy (Phi(x) + x phi(x)), with phi(x) = Phi'(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    density = np.exp(-0.5 * x * x) / sqrt(2.0 * pi)
    return dy * (_normal_cdf(x) + x * density)


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
    """1 / (1 + exp(-x)), written by tanh, which does not overflow for large negative x."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def silu_forward(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Array]:
    """y = x sigmoid(x) (Elfwing et al. 2017)."""
    return x * _sigmoid(x), x


def silu_backward(dy: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """dx = dy s (1 + x (1 - s)), s = sigmoid(x), from s' = s (1 - s)."""
    s = _sigmoid(x)
    return dy * s * (1.0 + x * (1.0 - s))
