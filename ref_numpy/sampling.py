"""From logits to a token: what makes a token less likely, what rules it out, and the draw.

The order is that of the code in `filtered_logits`: repetition penalty, forbidden tokens, temperature, top-k,
top-p, min-p. Everything is computed in float64, so that both implementations choose the same token.

Shapes: V vocabulary. A token that is ruled out has the logit -inf, and one at least always stays.
Not here: beams, penalties that count how often a token was seen.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray as Array

from ref_numpy.config import SamplingConfig


def penalise_repetition(
    logits: Float64[Array, "V"], seen: Sequence[int], penalty: float
) -> Float64[Array, "V"]:
    """Each token seen, once: x / penalty where x > 0 (Keskar et al. 2019, section 4.1), else x penalty, as in
    Hugging Face's version: divided, a negative logit would rise."""
    penalised = logits.copy()
    ids = np.unique(np.array(seen, dtype=np.int64))
    penalised[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return penalised


def forbid(logits: Float64[Array, "V"], forbidden: Sequence[int]) -> Float64[Array, "V"]:
    """Rules tokens out. Raises ValueError where none is left, or one is no token."""
    for token in forbidden:
        if not 0 <= token < logits.size:
            raise ValueError(f"forbidden token {token} is not in the vocabulary of {logits.size}")
    allowed = logits.copy()
    allowed[np.array(forbidden, dtype=np.int64)] = -np.inf
    if np.isneginf(allowed).all():
        raise ValueError(f"all {logits.size} tokens are forbidden, so none can be chosen")
    return allowed


def keep_top_k(logits: Float64[Array, "V"], k: int) -> Float64[Array, "V"]:
    """The k largest logits (Fan, Lewis, Dauphin 2018, section 5.4), and what is equal to the last of them."""
    smallest_kept = np.sort(logits)[-min(k, logits.size)]
    return np.where(logits >= smallest_kept, logits, -np.inf)


def keep_top_p(logits: Float64[Array, "V"], p: float) -> Float64[Array, "V"]:
    """The fewest of the likeliest tokens whose probabilities add up to p or more (Holtzman et al. 2020, 3.1).

    A token stays if those before it, in falling order, equals by their ids, have not reached p yet: so the
    token that crosses p stays, and the likeliest always does.
    """
    falling = np.argsort(-logits, kind="stable")
    weights = np.exp(logits - logits.max())[falling]
    cumulative = weights.cumsum()
    stays = falling[cumulative - weights < p * cumulative[-1]]
    kept = np.full_like(logits, -np.inf)
    kept[stays] = logits[stays]
    return kept


def keep_min_p(logits: Float64[Array, "V"], p: float) -> Float64[Array, "V"]:
    """Tokens with at least p times the probability of the likeliest (Nguyen et al. 2024, section 3)."""
    share = np.exp(logits - logits.max())  # of the likeliest one's probability: the sum cancels
    return np.where(share >= p, logits, -np.inf)


def filtered_logits(
    logits: Float[Array, "V"], seen: Sequence[int], config: SamplingConfig
) -> Float64[Array, "V"]:
    """The logits of what may be drawn, in this order. At temperature 0 that is the likeliest token alone, the
    first of equals. Raises ValueError where every token is forbidden, or one that does not exist, and for
    logits that are not numbers."""
    if not np.isfinite(logits.max()):
        raise ValueError("the logits are not numbers, so no token can be chosen")
    x = logits.astype(np.float64)
    if config.repetition_penalty != 1:
        x = penalise_repetition(x, seen, config.repetition_penalty)
    if config.forbidden:
        x = forbid(x, config.forbidden)
    if config.temperature == 0:
        return np.where(np.arange(x.size) == x.argmax(), x, -np.inf)
    x = x / config.temperature
    if config.top_k:
        x = keep_top_k(x, config.top_k)
    if config.top_p < 1:
        x = keep_top_p(x, config.top_p)
    if config.min_p > 0:
        x = keep_min_p(x, config.min_p)
    return x


def draw(logits: Float64[Array, "V"], u: float) -> int:
    """The token whose slice of the cumulative distribution holds u, a number in [0, 1).

    p = softmax(logits); token = least v with p_0 + ... + p_v > u.
    """
    cumulative = np.exp(logits - logits.max()).cumsum()  # not yet divided by its last element
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def sample_token(logits: Float[Array, "V"], seen: Sequence[int], config: SamplingConfig, u: float) -> int:
    """The next token after those seen, u being a uniform number in [0, 1). Raises as filtered_logits."""
    return draw(filtered_logits(logits, seen, config), u)
