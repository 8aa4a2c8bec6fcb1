"""From logits to a token, in a stated order. The twin of ref_numpy/sampling.py.

Rows of logits are filtered at once, where they are; nothing but `sample_token` is read back from the device.
"""

from collections.abc import Sequence
from math import inf

import torch
from jaxtyping import Bool, Float, Float64, Integer
from torch import Tensor

from ref_numpy.config import SamplingConfig


def penalise_repetition(
    logits: Float64[Tensor, "*B V"], seen: Bool[Tensor, "*B V"], penalty: float
) -> Float64[Tensor, "*B V"]:
    """x / penalty where x > 0, x penalty elsewhere, for each token seen."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def forbid(logits: Float64[Tensor, "*B V"], forbidden: Integer[Tensor, "N"]) -> Float64[Tensor, "*B V"]:
    """Rules tokens out."""
    return logits.index_fill(-1, forbidden, -inf)


def keep_top_k(logits: Float64[Tensor, "*B V"], k: int) -> Float64[Tensor, "*B V"]:
    """The k largest logits, and what is equal to the last of them."""
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -inf)


def keep_top_p(logits: Float64[Tensor, "*B V"], p: float) -> Float64[Tensor, "*B V"]:
    """The fewest of the likeliest tokens whose probabilities add up to p or more; equals by their ids."""
    falling, order = logits.sort(descending=True, stable=True)
    weights = (falling - falling[..., :1]).exp()
    cumulative = weights.cumsum(-1)
    goes = cumulative - weights >= p * cumulative[..., -1:]
    return torch.full_like(logits, -inf).scatter(-1, order, falling.masked_fill(goes, -inf))


def keep_min_p(logits: Float64[Tensor, "*B V"], p: float) -> Float64[Tensor, "*B V"]:
    """Tokens with at least p times the probability of the likeliest."""
    return logits.masked_fill((logits - logits.amax(-1, keepdim=True)).exp() < p, -inf)


def allowed_logits(
    logits: Float[Tensor, "*B V"],
    seen: Bool[Tensor, "*B V"] | None,
    forbidden: Integer[Tensor, "N"] | None,
    config: SamplingConfig,
) -> Float64[Tensor, "*B V"]:
    """Before the temperature: less likely what was seen, ruled out what is forbidden."""
    x = logits.to(torch.float64)
    if seen is not None and config.repetition_penalty != 1:
        x = penalise_repetition(x, seen, config.repetition_penalty)
    return x if forbidden is None else forbid(x, forbidden)


def likely_logits(x: Float64[Tensor, "*B V"], config: SamplingConfig) -> Float64[Tensor, "*B V"]:
    """At a temperature above 0: what is left to be drawn of what is allowed."""
    x = x / config.temperature
    if config.top_k:
        x = keep_top_k(x, config.top_k)
    if config.top_p < 1:
        x = keep_top_p(x, config.top_p)
    if config.min_p > 0:
        x = keep_min_p(x, config.min_p)
    return x


def draw(logits: Float64[Tensor, "*B V"], u: Float64[Tensor, "*B"] | float) -> Integer[Tensor, "*B"]:
    """The least token whose cumulative probability exceeds u, a number in [0, 1). NaN exceeds nothing."""
    u = torch.as_tensor(u, dtype=torch.float64, device=logits.device)
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
    return torch.searchsorted(cumulative, u[..., None] * cumulative[..., -1:], right=True)[..., 0]


def choose(
    logits: Float[Tensor, "*B V"],
    seen: Bool[Tensor, "*B V"] | None,
    forbidden: Integer[Tensor, "N"] | None,
    config: SamplingConfig,
    u: Float64[Tensor, "*B"] | float,
) -> Integer[Tensor, "*B"]:
    """The next token of each row; V where its logits are not numbers. Where repetition is penalised, it needs
    what was seen."""
    x = allowed_logits(logits, seen, forbidden, config)
    if config.temperature == 0:  # the first of equals
        return torch.where(x.amax(-1).isfinite(), x.argmax(-1), x.shape[-1])
    return draw(likely_logits(x, config), u)


def forbidden_tokens(
    config: SamplingConfig, vocab_size: int, device: torch.device | str = "cpu"
) -> Integer[Tensor, "N"] | None:
    """The config's forbidden tokens. Raises ValueError where none is left, or one does not exist."""
    if not config.forbidden:
        return None
    for token in config.forbidden:
        if not 0 <= token < vocab_size:
            raise ValueError(f"forbidden token {token} is not in the vocabulary of {vocab_size}")
    if len(set(config.forbidden)) == vocab_size:
        raise ValueError(f"all {vocab_size} tokens are forbidden, so none can be chosen")
    return torch.tensor(config.forbidden, device=device)


def seen_tokens(texts: Sequence[Sequence[int]], vocab_size: int) -> Bool[Tensor, "B V"]:
    """Which tokens each text has."""
    seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
    for row, text in zip(seen, texts, strict=True):
        row[torch.tensor(text, dtype=torch.long)] = True
    return seen


def filtered_logits(
    logits: Float[Tensor, "V"], seen: Sequence[int], config: SamplingConfig
) -> Float64[Tensor, "V"]:
    """The logits of what may be drawn; at temperature 0 those of the likeliest token alone.

    Raises ValueError where every token is forbidden, or one that does not exist, and for logits that are not
    numbers.
    """
    x = allowed_logits(logits, *_rules(logits, seen, config), config)
    _require_numbers(bool(logits.amax().isfinite() & x.amax().isfinite()))
    if config.temperature == 0:
        return x.masked_fill(torch.arange(x.numel(), device=x.device) != x.argmax(), -inf)
    return likely_logits(x, config)


def sample_token(logits: Float[Tensor, "V"], seen: Sequence[int], config: SamplingConfig, u: float) -> int:
    """The next token after those seen, u being a uniform number in [0, 1). Raises as filtered_logits."""
    token = int(choose(logits, *_rules(logits, seen, config), config, u))
    _require_numbers(token < logits.numel())
    return token


def _require_numbers(they_are: bool) -> None:
    if not they_are:
        raise ValueError("the logits are not numbers, so no token can be chosen")


def _rules(logits: Tensor, seen: Sequence[int], config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    size, device = logits.numel(), logits.device
    return seen_tokens([seen], size)[0].to(device), forbidden_tokens(config, size, device)
