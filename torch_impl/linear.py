"""Linear layer: y = x W^T + b. The twin of ref_numpy/linear.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "*rows O"]:
    """y = x W^T + b, with W stored as (outputs, inputs)."""
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """Holds W and b, in the precision of the parameters; computes in the precision of its input."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)
