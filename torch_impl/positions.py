"""Absolute positions, to be added to the token embedding. The twin of ref_numpy/positions.py."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def sinusoidal_positions(
    length: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Float[Tensor, "T C"]:
    """PE(t, 2i) = sin(t / 10000^(2i/C)), PE(t, 2i+1) = cos(t / 10000^(2i/C)), computed in float64."""
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    places = torch.arange(length, dtype=torch.float64)[:, None]
    angle = places / 10000.0 ** (pairs / width)  # (T, ceil(C / 2))
    table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]
    return table.to(device=device, dtype=dtype)


def learned_positions(weight: Float[Tensor, "N C"], length: int) -> Float[Tensor, "T C"]:
    """y_t = W_t. Raises ValueError for a length above N."""
    if length > weight.shape[0]:
        raise ValueError(f"a sequence of {length} is longer than the context length of {weight.shape[0]}")
    return weight[:length]


class LearnedPositions(nn.Module):
    """Holds the table."""

    def __init__(self, context_length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context_length, width))

    def forward(self, length: int) -> Float[Tensor, "T C"]:
        return learned_positions(self.weight, length)


class SinusoidalPositions(nn.Module):
    """Holds the table, computed once; it is no parameter and is not saved."""

    def __init__(self, context_length: int, width: int) -> None:
        super().__init__()
        table = sinusoidal_positions(context_length, width, torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SinusoidalPositions":
        """A model moved to another precision computes its table anew: a rounded one would stay rounded."""
        super()._apply(fn, recurse)
        self.table = sinusoidal_positions(*self.table.shape, self.table.dtype, self.table.device)
        return self

    def forward(self, length: int) -> Float[Tensor, "T C"]:
        return self.table[:length]
