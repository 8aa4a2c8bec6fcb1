"""Elementwise nonlinearities: ReLU, GELU (exact and tanh), SiLU. The twin of ref_numpy/activations.py."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """y = max(x, 0)."""
    return F.relu(x)


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """y = x Phi(x)."""
    return F.gelu(x)


def gelu_tanh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return F.gelu(x, approximate="tanh")


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """y = x sigmoid(x)."""
    return F.silu(x)
