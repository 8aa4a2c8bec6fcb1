"""A linear layer whose products are made of 8-bit floating point numbers, for training.

    y = s_x s_W x8 W8^T        dx = s_dy s_W dy8 W8        dW = s_dy s_x dy8^T x8        db = sum_r dy_r

x8 = round(x / s_x), and so for W and dy: each matrix is divided by its scale s, which takes its largest
magnitude to the largest number of the format, and rounded to the format. Inputs and weights are E4M3, with
more digits, gradients E5M2, with more range (Micikevicius et al. 2022, FP8 Formats for Deep Learning,
sections 3 and 4). The gradient passes the rounding as if it were not there. Sums are float32; a GPU's may
keep fewer bits.

A scale is of all rows together. So a row's result depends on the others, if only in its rounding: training
in float8 is not the same for any number of processes or micro-batches.

Shapes: I inputs, O outputs; the leading axes of x are rows. See ref_numpy/linear.py.
Not here: scales that are remembered from earlier steps, or that belong to rows or to blocks.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from numpy import ndarray as Array


class Format(NamedTuple):
    """An 8-bit floating point format."""

    digits: int  # of the fraction, after the leading 1
    least: int  # exponent of the smallest normal number; below it the steps stay as they are
    largest: float


E4M3 = Format(digits=3, least=-6, largest=448.0)
E5M2 = Format(digits=2, least=-14, largest=57344.0)


class Scaled(NamedTuple):
    """values * scale is the matrix."""

    values: Array  # float32, each a number of the format
    scale: np.float32


class Float8Cache(NamedTuple):
    x: Scaled
    weight: Scaled
    has_bias: bool


def round_to(x: Float32[Array, "*shape"], to: Format) -> Float32[Array, "*shape"]:
    """The nearest number of the format; a half goes to the even neighbour. |x| is to.largest at most."""
    _, exponent = np.frexp(x)  # |x| = m 2^exponent with m from 1/2 to 1
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, to.least) - to.digits)
    return np.rint(x / step) * step


def to_float8(x: Float[Array, "*shape"], to: Format) -> Scaled:
    """s = max(max|x| / largest, t) and round(x / s), computed in float32; t is the smallest normal number, so
    that zeros need no case of their own."""
    x = x.astype(np.float32)
    scale = np.maximum(np.abs(x).max(initial=0) / np.float32(to.largest), np.finfo(np.float32).tiny)
    return Scaled(round_to(x / scale, to), scale)


def float8_linear_forward(
    x: Float[Array, "*rows I"], weight: Float[Array, "O I"], bias: Float[Array, "O"] | None
) -> tuple[Float[Array, "*rows O"], Float8Cache]:
    """y = x W^T + b with x and W in E4M3."""
    x8, w8 = to_float8(x.reshape(-1, x.shape[-1]), E4M3), to_float8(weight, E4M3)
    y = (x8.values @ w8.values.T * (x8.scale * w8.scale)).astype(x.dtype)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0]), Float8Cache(x8, w8, bias is not None)


def float8_linear_backward(
    dy: Float[Array, "*rows O"], cache: Float8Cache
) -> tuple[Float[Array, "*rows I"], Float[Array, "O I"], Float[Array, "O"] | None]:
    """Gradients of x, W and b with dy in E5M2: those of a linear layer of the rounded x and W."""
    x8, w8, has_bias = cache
    rows = dy.reshape(-1, dy.shape[-1])
    dy8 = to_float8(rows, E5M2)
    dx = (dy8.values @ w8.values * (dy8.scale * w8.scale)).astype(dy.dtype)
    dweight = (dy8.values.T @ x8.values * (dy8.scale * x8.scale)).astype(dy.dtype)
    return dx.reshape(*dy.shape[:-1], -1), dweight, rows.sum(axis=0) if has_bias else None
