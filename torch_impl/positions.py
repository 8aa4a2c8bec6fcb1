"""Absolute positions, to be added to the token embedding. The twin of ref_numpy/positions.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn


def sinusoidal_positions(
    places: Integer[Tensor, "*B T"], width: int, dtype: torch.dtype
) -> Float[Tensor, "*B T C"]:
    """PE(t, 2i) = sin(t / 10000^(2i/C)), PE(t, 2i+1) = cos(t / 10000^(2i/C)), computed in float64."""
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=places.device)
    angle = places.double()[..., None] / 10000.0 ** (pairs / width)  # (B, T, ceil(C / 2))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width].to(dtype)


def learned_positions(
    places: Integer[Tensor, "*B T"], weight: Float[Tensor, "N C"]
) -> Float[Tensor, "*B T C"]:
    """y_t = W_t. A place outside [0, N) raises IndexError on the CPU and is undefined on a GPU."""
    return F.embedding(places, weight)


class LearnedPositions(nn.Module):
    """Holds the table."""

    def __init__(self, context_length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context_length, width))

    def forward(self, places: Integer[Tensor, "*B T"]) -> Float[Tensor, "*B T C"]:
        return learned_positions(places, self.weight)


class SinusoidalPositions(nn.Module):
    """Holds the table, computed once; it is no parameter and is not saved."""

    def __init__(self, context_length: int, width: int) -> None:
        super().__init__()
        table = sinusoidal_positions(torch.arange(context_length), width, torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SinusoidalPositions":
        """A model moved to another precision computes its table anew: a rounded one would stay rounded."""
        super()._apply(fn, recurse)
        length, width = self.table.shape
        table = sinusoidal_positions(torch.arange(length), width, self.table.dtype)
        self.table = table.to(self.table.device)
        return self

    def forward(self, places: Integer[Tensor, "*B T"]) -> Float[Tensor, "*B T C"]:
        return self.table[places]
