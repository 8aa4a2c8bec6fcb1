"""Position-wise feed-forward layer: widen, bend, narrow. The twin of ref_numpy/ffn.py."""

from jaxtyping import Float
from torch import Tensor, nn

from torch_impl.activations import gelu, gelu_tanh, relu, silu
from torch_impl.linear import Linear

ACTIVATIONS = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}


class FFN(nn.Module):
    """y = W2 f(W1 x + b1) + b2, at each position alone."""

    def __init__(self, width: int, hidden: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.up = Linear(width, hidden, bias)
        self.down = Linear(hidden, width, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.down(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    """y = W2 (silu(Wg x + bg) * (W1 x + b1)) + b2."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias)
        self.up = Linear(width, hidden, bias)
        self.down = Linear(hidden, width, bias)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.down(silu(self.gate(x)) * self.up(x))
