"""Layer normalisation and RMSNorm over the last axis. The twin of ref_numpy/layernorm.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def layernorm(
    x: Float[Tensor, "*rows C"], weight: Float[Tensor, "C"], bias: Float[Tensor, "C"] | None, epsilon: float
) -> Float[Tensor, "*rows C"]:
    """y = w (x - mean x) / sqrt(var x + epsilon) + b, with the biased variance.

    In bfloat16 and float16 PyTorch's kernel for CPUs keeps a row's mean in that precision for the backward
    pass, and sums the gradients of w and b in it. A mean of 1001.3 becomes 1000, and what comes back to x is
    that error and little else; so there it is computed in float32.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias, epsilon).to(x.dtype)


def rmsnorm(
    x: Float[Tensor, "*rows C"], weight: Float[Tensor, "C"], epsilon: float
) -> Float[Tensor, "*rows C"]:
    """y = w x / sqrt(mean(x^2) + epsilon).

    PyTorch has a kernel of its own for GPUs alone; elsewhere it differentiates the formula operation by
    operation, which takes twice as long as the gradient by hand.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return _RMSNorm.apply(x, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    """In float32 at least, whatever comes in; what is kept is the input and a number per row."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        inverse_scale = torch.rsqrt(mean_square + epsilon)
        ctx.save_for_backward(x, weight, inverse_scale)
        y = wide * inverse_scale * weight
        # Compiled by PyTorch 2.11, a result that `to` gives back as it was has no gradient.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = r (g - x_hat mean(g x_hat)) with g = dy w, and dw = sum over rows of dy x_hat."""
        x, weight, inverse_scale = ctx.saved_tensors
        dy, w = dy.to(inverse_scale.dtype), weight.to(inverse_scale.dtype)
        x_hat = x * inverse_scale
        dw_parts = dy * x_hat
        through_scale = (dw_parts @ w / x.shape[-1]).unsqueeze(-1)
        dx = torch.addcmul(dy * w, x_hat, through_scale, value=-1) * inverse_scale
        return dx.to(x.dtype), dw_parts.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype), None


class LayerNorm(nn.Module):
    """Holds w and b, in the precision of the parameters; computes in the precision of its input."""

    def __init__(self, width: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return layernorm(x, self.weight.to(x.dtype), bias, self.epsilon)


class RMSNorm(nn.Module):
    """Holds w, in the precision of the parameters; computes in the precision of its input."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        return rmsnorm(x, self.weight.to(x.dtype), self.epsilon)
