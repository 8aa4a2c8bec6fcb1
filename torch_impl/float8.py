"""A linear layer whose products are made of 8-bit floating point numbers. The twin of ref_numpy/float8.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from torch_impl.block import Block
from torch_impl.cross_block import CrossBlock
from torch_impl.linear import Linear, linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_UNIT = 16
"""CUDA's kernels take matrices whose sizes are multiples of it; others get rows and columns of zeros."""


def to_float8(x: Float[Tensor, "*shape"], to: torch.dtype) -> tuple[Tensor, Float[Tensor, ""]]:
    """The values in the format, and their scale."""
    x = x.float()
    scale = (x.abs().amax() / torch.finfo(to).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(to), scale


def float8_linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "*rows O"]:
    """y = x W^T + b with x and W in E4M3, and in the backward pass dy in E5M2."""
    y = _Float8Product.apply(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class _Float8Product(torch.autograd.Function):
    """x W^T. A kernel wants the rows of its left factor, and the columns of its right one, in one piece."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = to_float8(_filled(x), E4M3)
        w8, w_scale = to_float8(_filled(weight), E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.inputs = x.shape[1]
        y = _product(x8, w8.t(), x_scale, w_scale, x.dtype, fast=True)
        return y[: x.shape[0], : weight.shape[0]]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        rows, outputs = dy.shape
        dy8, dy_scale = to_float8(_filled(dy), E5M2)
        dx = _product(dy8, _by_columns(w8), dy_scale, w_scale, dy.dtype)
        dweight = _product(dy8.t().contiguous(), _by_columns(x8), dy_scale, x_scale, dy.dtype)
        return dx[:rows, : ctx.inputs], dweight[:outputs, : ctx.inputs]


def _filled(matrix: Tensor) -> Tensor:
    rows, columns = (-size % _UNIT for size in matrix.shape)
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix.contiguous()


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def _product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a b. Fast sums keep some fourteen bits on Hopper: plenty for a result, but not for gradients.

    By the older name: PyTorch 2.11 does not compile functional.scaled_mm, and has none on the CPU.
    """
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


def use_float8(model: nn.Module) -> None:
    """The linear layers of a model's blocks train in float8 from now on; embeddings and head do not."""
    for block in model.modules():
        if isinstance(block, Block | CrossBlock):
            for layer in block.modules():
                if isinstance(layer, Linear):
                    layer.multiply = _while_training


def _while_training(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An evaluation is of the model as it will be used, and no row's result depends on others there."""
    return float8_linear(x, weight, bias) if torch.is_grad_enabled() else linear(x, weight, bias)
