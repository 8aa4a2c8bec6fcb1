"""Linear layer: y = x W^T + b. The twin of ref_numpy/linear.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_WORTH_A_CALL = 2**17
"""Elements of a weight from which the gain below outweighs the cost of the call, about 15 microseconds."""


def linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "*rows O"]:
    """y = x W^T + b, with W stored as (outputs, inputs)."""
    if not torch.is_grad_enabled() and _suits_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's kernel is there for a product in float32 on the CPU, and is the faster one.

    PyTorch gives such products to MKL, which reads a matrix that meets one row with one thread, and is slow
    up to a few hundred rows. oneDNN, which it uses for bfloat16, reads with all: the products of GPT-2 take
    half the time for one row, and 0.55 of it for eight. The call has no gradient of its own.
    """
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and weight.numel() >= _WORTH_A_CALL
        and torch.backends.mkldnn.is_available()
        and not torch.compiler.is_compiling()
    )


class Linear(nn.Module):
    """Holds W and b, in the precision of the parameters; computes in the precision of its input."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)
