"""Layer normalisation (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang & Sennrich 2019), over the last axis.

Shapes: C features; the leading axes are rows. The variance is the biased one (ddof 0) and epsilon stands
inside the root. Not here: statistics over any other axis, in place, running averages.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


class NormCache(NamedTuple):
    x_hat: Array  # normalised input
    inverse_scale: Array  # r = 1 / sqrt(var x + epsilon), or 1 / sqrt(mean(x^2) + epsilon); one per row
    weight: Array
    has_bias: bool


def layernorm_forward(
    x: Float[Array, "*rows C"], weight: Float[Array, "C"], bias: Float[Array, "C"] | None, epsilon: float
) -> tuple[Float[Array, "*rows C"], NormCache]:
    """y = w x_hat + b, x_hat = (x - mean x) / sqrt(var x + epsilon); b may be None."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    inverse_scale = 1.0 / np.sqrt(variance + epsilon)
    x_hat = centred * inverse_scale
    y = weight * x_hat
    if bias is not None:
        y = y + bias
    return y, NormCache(x_hat, inverse_scale, weight, bias is not None)


def layernorm_backward(
    dy: Float[Array, "*rows C"], cache: NormCache
) -> tuple[Float[Array, "*rows C"], Float[Array, "C"], Float[Array, "C"] | None]:
    """Gradients of x, w and b.

    Write r = inverse_scale and g = dy w for the gradient of x_hat. x reaches x_hat three ways:
        (1) directly:           r g
        (2) through the mean:  -r mean(g)              as the mean grows by 1/C of x_j, and x_hat falls by r/C
        (3) through the scale: -r x_hat mean(g x_hat)  as the derivative of r by x_j is -r^2 x_hat_j / C
    so dx = r (g - mean(g) - x_hat mean(g x_hat)), and dw = sum over rows of dy x_hat, db of dy.
    """
    x_hat, inverse_scale, weight, has_bias = cache
    g = dy * weight
    through_mean = g.mean(axis=-1, keepdims=True)  # (2)
    through_scale = x_hat * (g * x_hat).mean(axis=-1, keepdims=True)  # (3)
    dx = inverse_scale * (g - through_mean - through_scale)  # (1) + (2) + (3)
    rows = tuple(range(dy.ndim - 1))
    return dx, (dy * x_hat).sum(axis=rows), dy.sum(axis=rows) if has_bias else None


def rmsnorm_forward(
    x: Float[Array, "*rows C"], weight: Float[Array, "C"], epsilon: float
) -> tuple[Float[Array, "*rows C"], NormCache]:
    """y = w x_hat, x_hat = x / sqrt(mean(x^2) + epsilon). No mean is subtracted and there is no bias."""
    inverse_scale = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    x_hat = x * inverse_scale
    return weight * x_hat, NormCache(x_hat, inverse_scale, weight, False)


def rmsnorm_backward(
    dy: Float[Array, "*rows C"], cache: NormCache
) -> tuple[Float[Array, "*rows C"], Float[Array, "C"]]:
    """dx = r (g - x_hat mean(g x_hat)), dw = sum over rows of dy x_hat: layer norm's without term (2)."""
    x_hat, inverse_scale, weight, _ = cache
    g = dy * weight
    through_scale = x_hat * (g * x_hat).mean(axis=-1, keepdims=True)  # (3)
    dx = inverse_scale * (g - through_scale)  # (1) + (3)
    return dx, (dy * x_hat).sum(axis=tuple(range(dy.ndim - 1)))
