"""Text from a model, one token at a time.

Shapes: T length of the prompt.
Not here: beams, a key/value cache (every token recomputes the whole context).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Integer
from numpy import ndarray as Array

from ref_numpy.block import Params
from ref_numpy.config import ModelConfig, SamplingConfig
from ref_numpy.rng import SAMPLE, Key, uniform
from ref_numpy.sampling import sample_token
from ref_numpy.transformer import transformer_forward


def generate(
    params: Params,
    prompt: Integer[Array, "T"],
    config: ModelConfig,
    n_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
) -> Iterator[int]:
    """Yields n_tokens that continue the prompt; each sees the last context_length tokens before it.

    Token i takes its u from (seed, i). Raises ValueError for an empty prompt.
    """
    if prompt.size == 0:
        raise ValueError("the prompt is empty, but the model needs at least one token to go on from")
    ids = prompt.tolist()
    for i in range(n_tokens):
        context = np.array(ids[-config.context_length :])[None]  # (1, T)
        logits, _ = transformer_forward(params, context, config)
        u = uniform(Key(seed, SAMPLE, step=i), 1)[0]
        token = sample_token(logits[0, -1], ids, sampling, u)
        ids.append(token)
        yield token
