"""Text from a model, one token at a time.

Shapes: V vocabulary, T length of the prompt.
Not here: filters such as top-k, beams, a key/value cache (every token recomputes the whole context).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray as Array

from ref_numpy.block import Params
from ref_numpy.config import ModelConfig
from ref_numpy.rng import SAMPLE, Key, uniform
from ref_numpy.transformer import transformer_forward


def sample_token(logits: Float[Array, "V"], temperature: float, u: float) -> int:
    """The token whose slice of the cumulative distribution holds u, a number in [0, 1).

    p = softmax(logits / temperature); token = least v with p_0 + ... + p_v > u. At temperature 0 the
    largest logit wins, the first of equals. Computed in float64, so that both implementations agree.
    Raises ValueError for a negative temperature.
    """
    if not temperature >= 0:  # also where it is no number
        raise ValueError(f"temperature is {temperature}, but must be 0 (greedy) or more")
    logits = logits.astype(np.float64)
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / temperature)
    cumulative = weights.cumsum()
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def generate(
    params: Params,
    prompt: Integer[Array, "T"],
    config: ModelConfig,
    n_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields n_tokens that continue the prompt; each sees the last context_length tokens before it.

    Token i takes its u from (seed, i). Raises ValueError for an empty prompt.
    """
    if prompt.size == 0:
        raise ValueError("the prompt is empty, but the model needs at least one token to go on from")
    ids = list(prompt)
    for i in range(n_tokens):
        context = np.array(ids[-config.context_length :])[None]  # (1, T)
        logits, _ = transformer_forward(params, context, config)
        u = uniform(Key(seed, SAMPLE, step=i), 1)[0]
        token = sample_token(logits[0, -1], temperature, u)
        ids.append(token)
        yield token
