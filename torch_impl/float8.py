"""A linear layer whose products are made of 8-bit floating point numbers. The twin of ref_numpy/float8.py."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from torch_impl.block import Block
from torch_impl.cross_block import CrossBlock
from torch_impl.linear import Linear, linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_UNIT = 16
"""What rows, inputs and outputs have to be multiples of, for CUDA's kernels."""


def to_float8(x: Float[Tensor, "*shape"], to: torch.dtype) -> tuple[Tensor, Float[Tensor, ""]]:
    """The values in the format, and their scale."""
    x = x.float()
    scale = (x.abs().amax() / torch.finfo(to).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(to), scale


def float8_linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "*rows O"]:
    """y = x W^T + b with x and W in E4M3, and in the backward pass dy in E5M2.

    Where rows, inputs or outputs are no multiples of 16 it is an ordinary linear layer.
    """
    rows = x.flatten(0, -2).contiguous()
    if any(size % _UNIT for size in (*rows.shape, *weight.shape)):
        return linear(x, weight, bias)
    y = _Float8Product.apply(rows, weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class _Float8Product(torch.autograd.Function):
    """x W^T. A kernel wants the rows of its left factor, and the columns of its right one, in one piece."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (w8, w_scale) = to_float8(x, E4M3), to_float8(weight, E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return _product(x8, w8.t(), x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        dy8, dy_scale = to_float8(dy.contiguous(), E5M2)
        dx = _product(dy8, _by_columns(w8), dy_scale, w_scale, dy.dtype)
        dweight = _product(dy8.t().contiguous(), _by_columns(x8), dy_scale, x_scale, dy.dtype)
        return dx, dweight


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def _product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """A fast sum keeps some fourteen bits on Hopper, which is plenty for a result, but not for gradients."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


def use_float8(model: nn.Module) -> None:
    """The linear layers of a model's blocks compute in float8 from now on; embeddings and head do not."""
    for block in model.modules():
        if isinstance(block, Block | CrossBlock):
            for layer in block.modules():
                if isinstance(layer, Linear):
                    layer.multiply = float8_linear
