"""Text from a model, one token at a time: what follows a prompt, or the target of a source.

Shapes: T length of the prompt, S of the source.
Not here: beams, a key/value cache (every token recomputes the whole context).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Integer
from numpy import ndarray as Array

from ref_numpy.block import Params
from ref_numpy.config import ModelConfig, SamplingConfig
from ref_numpy.rng import SAMPLE, Key, uniform
from ref_numpy.sampling import sample_token
from ref_numpy.seq2seq import decode_forward, encode_forward
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


def answer(
    params: Params,
    source: Integer[Array, "S"],
    config: ModelConfig,
    n_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
) -> Iterator[int]:
    """Yields the target that an encoder-decoder writes for a source, up to its end, which is left out.

    It has at most n_tokens, and at most as many as the context is long. Token i takes its u from (seed, i).
    Raises ValueError for a source that is empty or longer than the context length.
    """
    if not 0 < source.size <= config.context_length:
        raise ValueError(f"the source has {source.size} tokens, not 1 to {config.context_length}")
    present = np.ones((1, source.size), dtype=bool)
    memory, _ = encode_forward(params, source[None], present, config)
    never = (config.begin_token, config.padding_token)
    sampling = replace(sampling, forbidden=sampling.forbidden + never)
    ids = [config.begin_token]
    for i in range(min(n_tokens, config.context_length)):
        logits, _ = decode_forward(params, np.array(ids)[None], memory, present, config)
        u = uniform(Key(seed, SAMPLE, step=i), 1)[0]
        token = sample_token(logits[0, -1], ids[1:], sampling, u)
        if token == config.end_token:
            return
        ids.append(token)
        yield token
