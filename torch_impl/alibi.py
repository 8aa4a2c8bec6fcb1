"""ALiBi: attention with linear biases. The twin of ref_numpy/alibi.py."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def alibi_slopes(n_head: int) -> tuple[float, ...]:
    """2^(-8 h / P), h = 1 .. P for the largest power of two P <= H; then 2^(-4 h / P), h = 1, 3, 5, ..."""
    power = 1 << (n_head.bit_length() - 1)
    between = (2.0 ** (-4 * h / power) for h in range(1, 2 * (n_head - power), 2))
    return (*(2.0 ** (-8 * h / power) for h in range(1, power + 1)), *between)


class AlibiSlopes(nn.Module):
    """Holds the slopes of all heads, which are no parameters and not saved.

    A step that made them anew would wait for their way to a GPU.
    """

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self._fill(torch.get_default_dtype(), "cpu")

    def _fill(self, dtype: torch.dtype, device: torch.device | str) -> None:
        slopes = torch.tensor(alibi_slopes(self.n_head), dtype=torch.promote_types(dtype, torch.float32))
        self.register_buffer("slopes", slopes.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AlibiSlopes":
        """A model moved to another precision has them anew: rounded ones would stay rounded."""
        super()._apply(fn, recurse)
        self._fill(self.slopes.dtype, self.slopes.device)
        return self


def alibi_bias(
    slopes: tuple[float, ...] | Float[Tensor, "H"],
    queries: int,
    keys: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "H T S"]:
    """bias[h, t, s] = -slope_h |t - s|, where the queries are the last of the places of the keys.

    Rounded once, as flash_attention does: bfloat16 has few of the distances, and not all slopes.
    """
    asking = torch.arange(keys - queries, keys, device=device)
    distance = (asking[:, None] - torch.arange(keys, device=device)).abs()
    precise = torch.promote_types(dtype, torch.float32)
    return (-torch.as_tensor(slopes, dtype=precise, device=device)[:, None, None] * distance).to(dtype)
