"""Linear layer: y = x W^T + b. The twin of ref_numpy/linear.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

_WORTH_A_CALL = 2**17
"""Elements of a weight from which oneDNN's gain outweighs the cost of its call, about 15 microseconds."""
_WORTH_A_GRADIENT = 2**25
"""Multiplications from which it also outweighs the cost of a gradient written in Python."""


def linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "*rows O"]:
    """y = x W^T + b, with W stored as (outputs, inputs)."""
    if weight.dtype == x.dtype and not torch.compiler.is_compiling():
        with_gradient = torch.is_grad_enabled()
        if product_kernel(x.device, x.dtype, with_gradient) == "oneDNN":
            if not with_gradient and weight.numel() >= _WORTH_A_CALL:
                return _by_onednn(x, weight, bias)
            if with_gradient and x.shape[:-1].numel() * weight.numel() >= _WORTH_A_GRADIENT:
                return _ByOneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def product_kernel(device: torch.device, dtype: torch.dtype, with_gradient: bool) -> str:
    """Whose kernel computes large products: "oneDNN", called from here, or "PyTorch's choice".

    In float32 on the CPU that choice is MKL, which is made for Intel's processors, and on those is the faster
    in training and for a single row. On AMD's it reads a matrix that meets one row with one thread, where
    oneDNN reads with all: GPT-2 writes in half the time. In training MKL's kernels for AVX-512 have there
    reached from half to nine tenths of oneDNN's speed; without AVX-512 training is left to them. The
    precision is the same, and lower ones PyTorch gives to oneDNN itself.
    """
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return "PyTorch's choice"
    if "AMD" not in torch.cpu.get_capabilities().get("cpu_name", ""):
        return "PyTorch's choice"
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "oneDNN" if avx512 or not with_gradient else "PyTorch's choice"


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _ByOneDNN(torch.autograd.Function):
    """The operator of oneDNN has no gradient of its own."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad
        dx = _by_onednn(dy, weight.t(), None) if needs_dx else None
        dweight = rows.t() @ x.flatten(0, -2) if needs_dweight else None  # by MKL: long sums are its strength
        return dx, dweight, rows.sum(0) if needs_dbias else None


class Linear(nn.Module):
    """Holds W and b, in the precision of the parameters; computes in the precision of its input.

    `multiply` is linear, or another function of its signature: see torch_impl/float8.py.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.multiply = linear

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.multiply(x, self.weight.to(x.dtype), bias)
