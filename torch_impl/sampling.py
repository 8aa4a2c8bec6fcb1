"""From logits to a token, in a stated order. The twin of ref_numpy/sampling.py."""

from collections.abc import Sequence
from math import inf

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ref_numpy.config import SamplingConfig


def penalise_repetition(
    logits: Float64[Tensor, "V"], seen: Sequence[int], penalty: float
) -> Float64[Tensor, "V"]:
    """x / penalty where x > 0, x penalty elsewhere, for each token seen, once."""
    repeated = torch.zeros(logits.shape, dtype=torch.bool)
    repeated[torch.tensor(seen, dtype=torch.long)] = True
    return torch.where(repeated, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def forbid(logits: Float64[Tensor, "V"], forbidden: Sequence[int]) -> Float64[Tensor, "V"]:
    """Rules tokens out. Raises ValueError where none is left."""
    allowed = logits.index_fill(0, torch.tensor(forbidden, dtype=torch.long), -inf)
    if bool((allowed == -inf).all()):
        raise ValueError(f"all {logits.numel()} tokens are forbidden, so none can be chosen")
    return allowed


def keep_top_k(logits: Float64[Tensor, "V"], k: int) -> Float64[Tensor, "V"]:
    """The k largest logits, and what is equal to the last of them."""
    smallest_kept = logits.topk(min(k, logits.numel())).values[-1]
    return logits.masked_fill(logits < smallest_kept, -inf)


def keep_top_p(logits: Float64[Tensor, "V"], p: float) -> Float64[Tensor, "V"]:
    """The fewest of the likeliest tokens whose probabilities add up to p or more; equals by their ids."""
    falling, order = logits.sort(descending=True, stable=True)
    weights = (falling - falling[0]).exp()
    cumulative = weights.cumsum(0)
    goes = cumulative - weights >= p * cumulative[-1]
    return torch.full_like(logits, -inf).scatter(0, order, falling.masked_fill(goes, -inf))


def keep_min_p(logits: Float64[Tensor, "V"], p: float) -> Float64[Tensor, "V"]:
    """Tokens with at least p times the probability of the likeliest."""
    return logits.masked_fill((logits - logits.max()).exp() < p, -inf)


def filtered_logits(
    logits: Float[Tensor, "V"], seen: Sequence[int], config: SamplingConfig
) -> Float64[Tensor, "V"]:
    """The logits of what may be drawn, on the CPU; at temperature 0 those of the likeliest token alone."""
    x = logits.to("cpu", torch.float64)
    if config.repetition_penalty != 1:
        x = penalise_repetition(x, seen, config.repetition_penalty)
    if config.forbidden:
        x = forbid(x, config.forbidden)
    if config.temperature == 0:
        first = int((x == x.max()).nonzero()[0])
        return x.masked_fill(torch.arange(x.numel()) != first, -inf)
    x = x / config.temperature
    if config.top_k:
        x = keep_top_k(x, config.top_k)
    if config.top_p < 1:
        x = keep_top_p(x, config.top_p)
    if config.min_p > 0:
        x = keep_min_p(x, config.min_p)
    return x


def draw(logits: Float64[Tensor, "V"], u: float) -> int:
    """The least token whose cumulative probability exceeds u, a number in [0, 1)."""
    cumulative = (logits - logits.max()).exp().cumsum(0)
    return int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))


def sample_token(logits: Float[Tensor, "V"], seen: Sequence[int], config: SamplingConfig, u: float) -> int:
    """The next token after those seen, u being a uniform number in [0, 1)."""
    return draw(filtered_logits(logits, seen, config), u)
