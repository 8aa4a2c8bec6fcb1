"""ALiBi: attention with linear biases. The twin of ref_numpy/alibi.py."""

import torch
from jaxtyping import Float
from torch import Tensor


def alibi_slopes(n_head: int) -> tuple[float, ...]:
    """2^(-8 h / P), h = 1 .. P for the largest power of two P <= H; then 2^(-4 h / P), h = 1, 3, 5, ..."""
    power = 1 << (n_head.bit_length() - 1)
    between = (2.0 ** (-4 * h / power) for h in range(1, 2 * (n_head - power), 2))
    return (*(2.0 ** (-8 * h / power) for h in range(1, power + 1)), *between)


def alibi_bias(
    slopes: tuple[float, ...],
    queries: int,
    keys: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "H T S"]:
    """bias[h, t, s] = -slope_h |t - s|, where the queries are the last of the places of the keys."""
    asking = torch.arange(keys - queries, keys, device=device)
    distance = (asking[:, None] - torch.arange(keys, device=device)).abs()
    return -torch.tensor(slopes, dtype=dtype, device=device)[:, None, None] * distance
