"""Layer normalisation and RMSNorm over the last axis. The twin of ref_numpy/layernorm.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
    """y = w x / sqrt(mean(x^2) + epsilon)."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


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
