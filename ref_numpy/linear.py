"""Linear layer: y = x W^T + b.

dx is the gradient of the loss with respect to x, here as in every file.
Shapes: I inputs, O outputs; the leading axes of x (batch, time, ...) are rows, all treated alike.
Not here: anything sparse, quantised or in place.
"""

from typing import NamedTuple

from jaxtyping import Float
from numpy import ndarray as Array


class LinearCache(NamedTuple):
    x: Array
    weight: Array
    has_bias: bool


def linear_forward(
    x: Float[Array, "*rows I"], weight: Float[Array, "O I"], bias: Float[Array, "O"] | None
) -> tuple[Float[Array, "*rows O"], LinearCache]:
    """y = x W^T + b, with W stored as (outputs, inputs) as torch.nn.Linear does; b may be None."""
    rows = x.reshape(-1, x.shape[-1])  # one large matrix product is faster than many small ones
    y = rows @ weight.T
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0]), LinearCache(x, weight, bias is not None)


def linear_backward(
    dy: Float[Array, "*rows O"], cache: LinearCache
) -> tuple[Float[Array, "*rows I"], Float[Array, "O I"], Float[Array, "O"] | None]:
    """Gradients of x, W and b.

    With y_ro = sum_i x_ri W_oi + b_o over rows r:
        (1) dx_ri = sum_o dy_ro W_oi       dx = dy W
        (2) dW_oi = sum_r dy_ro x_ri       dW = dy^T x
        (3) db_o  = sum_r dy_ro
    """
    x, weight, has_bias = cache
    dy_rows = dy.reshape(-1, dy.shape[-1])
    x_rows = x.reshape(-1, x.shape[-1])
    dx = (dy_rows @ weight).reshape(x.shape)  # (1)
    dweight = dy_rows.T @ x_rows  # (2)
    dbias = dy_rows.sum(axis=0) if has_bias else None  # (3)
    return dx, dweight, dbias
