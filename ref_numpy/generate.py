"""Text from a model, one token at a time: what follows a prompt, or the target of a source.

Shapes: T length of a prompt, B prompts, S length of a source.
Not here: beams (see beam.py), stop conditions (the caller stops asking), a cache for targets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Integer
from numpy import ndarray as Array

from ref_numpy.block import Params
from ref_numpy.config import ModelConfig, SamplingConfig
from ref_numpy.kv_cache import advance, empty_cache
from ref_numpy.masks import PADDING
from ref_numpy.rng import SAMPLE, Key, uniform
from ref_numpy.sampling import sample_token
from ref_numpy.seq2seq import decode_forward, encode_forward
from ref_numpy.transformer import transformer_forward


def context_start(length: int, context_length: int) -> int:
    """Where the context of the next token begins in a text of `length` tokens.

    At 0 while the text fits. Then it moves on by half a context at a time, so that the cache is filled anew
    once in that many tokens, and not with each: a token sees between half a context and a whole one.
    """
    step = max(context_length // 2, 1)
    return -(-max(length - context_length, 0) // step) * step


def generate(
    params: Params,
    prompt: Integer[Array, "T"],
    config: ModelConfig,
    n_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
) -> Iterator[int]:
    """Yields n_tokens that continue the prompt.

    Token i takes its u from (seed, i). Raises ValueError for an empty prompt, or a model that is no decoder.
    """
    for tokens in generate_batch(params, [prompt], config, n_tokens, sampling, seed):
        yield tokens[0]


def generate_batch(
    params: Params,
    prompts: Sequence[Integer[Array, "_"]],
    config: ModelConfig,
    n_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    streams: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Yields the next token of each prompt, n_tokens times: what each would give alone.

    Token i of prompt b takes its u from (seed, i, streams[b]), by default from stream 0. Shorter texts have
    padding before them. Raises ValueError where there are no prompts or one is empty, for a token outside the
    vocabulary, a number of streams that is not that of the prompts, a model that is no decoder, and logits
    that are not numbers.
    """
    if config.architecture != "decoder":
        raise ValueError(f"an {config.architecture} does not continue a text; only a decoder does")
    if not prompts:
        raise ValueError("there are no prompts, but the model needs at least one to go on from")
    if any(prompt.size == 0 for prompt in prompts):
        raise ValueError("the prompt is empty, but the model needs at least one token to go on from")
    if streams is not None and len(streams) != len(prompts):
        raise ValueError(f"{len(streams)} streams for {len(prompts)} prompts: each needs one")
    texts, streams = [prompt.tolist() for prompt in prompts], streams or [0] * len(prompts)
    past = empty_cache(config, len(texts), params["token_embedding.weight"].dtype)
    starts = None
    for i in range(n_tokens):
        before, starts = starts, [context_start(len(text), config.context_length) for text in texts]
        if starts == before:
            new, documents = np.array([text[-1:] for text in texts]), _append(documents)
        else:  # at first, and when the oldest tokens of a text fall out of sight
            new, documents = _padded([text[start:] for text, start in zip(texts, starts, strict=True)])
            past = past._replace(length=0)
        logits, _ = transformer_forward(params, new, config, documents=documents, past=past)  # (B, T, V)
        past = advance(past, new.shape[1])
        tokens = []
        for text, stream, row in zip(texts, streams, logits[:, -1], strict=True):
            u = uniform(Key(seed, SAMPLE, step=i, stream=stream), 1)[0]
            tokens.append(sample_token(row, text, sampling, u))
            text.append(tokens[-1])
        yield tokens


def _padded(contexts: list[list[int]]) -> tuple[Integer[Array, "B T"], Integer[Array, "B T"] | None]:
    """Contexts in one array, padding before the shorter ones, and which places are padding, if any are."""
    longest = max(map(len, contexts))
    ids = np.array([[0] * (longest - len(context)) + context for context in contexts])
    missing = np.array([longest - len(context) for context in contexts])
    documents = np.where(np.arange(longest) < missing[:, None], PADDING, 0)
    return ids, documents if missing.any() else None


def _append(documents: Integer[Array, "B T"] | None) -> Integer[Array, "B S"] | None:
    """One token more of each text."""
    return None if documents is None else np.pad(documents, ((0, 0), (0, 1)))


def answer(
    params: Params,
    source: Integer[Array, "S"],
    config: ModelConfig,
    n_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    stream: int = 0,
) -> Iterator[int]:
    """Yields the target that an encoder-decoder writes for a source, up to its end, which is left out.

    It has at most n_tokens, and at most as many as the context is long. Token i takes its u from (seed, i,
    stream). Raises ValueError for a source that is empty or longer than the context length, a model that is
    no encoder-decoder, or logits that are not numbers.
    """
    if config.architecture != "encoder-decoder":
        raise ValueError(f"this {config.architecture} does not answer; only an encoder-decoder does")
    if not 0 < source.size <= config.context_length:
        raise ValueError(f"the source has {source.size} tokens, not 1 to {config.context_length}")
    present = np.ones((1, source.size), dtype=bool)
    memory, _ = encode_forward(params, source[None], present, config)
    never = (config.begin_token, config.padding_token)
    sampling = replace(sampling, forbidden=sampling.forbidden + never)
    ids = [config.begin_token]
    for i in range(min(n_tokens, config.context_length)):
        logits, _ = decode_forward(params, np.array(ids)[None], memory, present, config)
        u = uniform(Key(seed, SAMPLE, step=i, stream=stream), 1)[0]
        token = sample_token(logits[0, -1], ids[1:], sampling, u)
        if token == config.end_token:
            return
        ids.append(token)
        yield token
