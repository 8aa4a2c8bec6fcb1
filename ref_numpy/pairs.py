"""Pairs of a source and a target: what an encoder-decoder learns from, by teacher forcing.

Shapes: P pairs, M micro-batches, B pairs in each; S the longest source in tokens, T the longest target and
one more: begin before it when it is read, end after it when it is written. U = T + 1, both of them.
Not here: batches of pairs of like length, epochs (pairs are drawn with replacement).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer
from numpy import ndarray as Array

from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.loss import IGNORE
from ref_numpy.rng import DATA, Key, uniform


class Pairs(NamedTuple):
    """Sequences of one length each, filled up with the padding token."""

    source: Array  # (P, S)
    target: Array  # (P, U), begin and end included


class PairBatch(NamedTuple):
    """What the model reads, and last what it is to write."""

    source: Array  # (M, B, S)
    present: Array  # (M, B, S), False where the source is padding
    target_in: Array  # (M, B, T): begin, t_1, ..., t_n
    target_out: Array  # (M, B, T): t_1, ..., t_n, end; IGNORE where target_in is past its end


def padded(rows: Sequence[Integer[Array, "_"]], filling: int) -> Integer[Array, "P S"]:
    """The rows one below the other, each filled up to the longest."""
    lengths = np.array([len(row) for row in rows])
    filled = np.full((len(rows), lengths.max()), filling)
    filled[np.arange(filled.shape[1]) < lengths[:, None]] = np.concatenate(rows)  # row by row
    return filled


def make_pairs(
    sources: Sequence[Integer[Array, "_"]], targets: Sequence[Integer[Array, "_"]], config: ModelConfig
) -> Pairs:
    """Pairs out of the ids of texts. Raises ValueError where there are none, for an empty source, and for one
    that is longer than the context length, which a target has to be shorter than."""
    limit = config.context_length
    if not len(sources):
        raise ValueError("there are no pairs to learn from")
    for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1):
        if not 0 < len(source) <= limit:
            raise ValueError(f"the source of pair {number} has {len(source)} tokens, not 1 to {limit}")
        if len(target) >= limit:
            raise ValueError(f"the target of pair {number} has {len(target)} tokens, not 0 to {limit - 1}")
    begin, end = [config.begin_token], [config.end_token]
    whole = [np.concatenate([begin, target, end]).astype(np.int64) for target in targets]
    return Pairs(padded(sources, config.padding_token), padded(whole, config.padding_token))


def teacher_forced(
    source: Integer[Array, "*batch S"], target: Integer[Array, "*batch U"], config: ModelConfig
) -> PairBatch:
    """At every place of the target the model sees the true tokens before it, and is to write the next one."""
    following = target[..., 1:]
    target_out = np.where(following == config.padding_token, IGNORE, following)
    return PairBatch(source, source != config.padding_token, target[..., :-1], target_out)


def sample_pairs(pairs: Pairs, model_config: ModelConfig, step: int, config: TrainConfig) -> PairBatch:
    """The batch of a step: pair r is number floor(u_r P), u_r uniform from (seed, step)."""
    rows = (uniform(Key(config.seed, DATA, step), config.batch_size) * len(pairs.source)).astype(np.int64)
    source, target = (
        side[rows].reshape(config.micro_batches, -1, side.shape[1]).astype(np.int64) for side in pairs
    )
    return teacher_forced(source, target, model_config)
