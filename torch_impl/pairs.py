"""Pairs of a source and a target: what an encoder-decoder learns from. The twin of ref_numpy/pairs.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.loss import IGNORE
from ref_numpy.rng import DATA, Key
from torch_impl.rng import uniform
from torch_impl.seq2seq import Seq2Seq
from torch_impl.train import sequences_at_once
from torch_impl.training.ranks import ALONE, Ranks


class Pairs(NamedTuple):
    """Sequences of one length each, filled up with the padding token."""

    source: Tensor  # (P, S)
    target: Tensor  # (P, U), begin and end included


class PairBatch(NamedTuple):
    """What the model reads, and last what it is to write."""

    source: Tensor  # (M, B, S)
    present: Tensor  # (M, B, S), False where the source is padding
    target_in: Tensor  # (M, B, T)
    target_out: Tensor  # (M, B, T), IGNORE where target_in is past its end


class PairLoss(NamedTuple):
    """How well targets are written."""

    loss: float  # nats per token of a target, its end included
    exact_match: float  # part of the targets that greedy decoding writes without a mistake


def padded(rows: Sequence[Integer[Tensor, "_"]], filling: int) -> Integer[Tensor, "P S"]:
    """The rows one below the other, each filled up to the longest; in 32 bits."""
    lengths = torch.tensor([len(row) for row in rows])
    filled = torch.full((len(rows), int(lengths.max())), filling, dtype=torch.int32)
    filled[torch.arange(filled.shape[1]) < lengths[:, None]] = torch.cat(list(rows)).int()
    return filled


def make_pairs(
    sources: Sequence[Integer[Tensor, "_"]],
    targets: Sequence[Integer[Tensor, "_"]],
    config: ModelConfig,
    device: torch.device | str = "cpu",
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
    begin, end = torch.tensor([config.begin_token]), torch.tensor([config.end_token])
    whole = [torch.cat([begin, target.long(), end]) for target in targets]
    filling = config.padding_token
    return Pairs(padded(sources, filling).to(device), padded(whole, filling).to(device))


def teacher_forced(
    source: Integer[Tensor, "*batch S"], target: Integer[Tensor, "*batch U"], config: ModelConfig
) -> PairBatch:
    """At every place of the target the model sees the true tokens before it, and is to write the next one."""
    following = target[..., 1:]
    target_out = following.masked_fill(following == config.padding_token, IGNORE)
    return PairBatch(source, source != config.padding_token, target[..., :-1], target_out)


def sample_pairs(
    pairs: Pairs, model_config: ModelConfig, step: int | Integer[Tensor, ""], config: TrainConfig
) -> PairBatch:
    """The batch of a step, gathered where the pairs lie; step may be a tensor."""
    device = step.device if isinstance(step, Tensor) else "cpu"
    u = uniform(Key(config.seed, DATA, step), config.batch_size, device)
    rows = (u * len(pairs.source)).long().to(pairs.source.device)
    source, target = (side[rows].view(config.micro_batches, -1, side.shape[1]).long() for side in pairs)
    return teacher_forced(source, target, model_config)


@torch.no_grad()
def greedy_targets(
    model: Seq2Seq, source: Integer[Tensor, "B S"], present: Bool[Tensor, "B S"], length: int
) -> Integer[Tensor, "B T"]:
    """The likeliest next token, again and again, for many sources at once: length tokens of each target.

    From its end on a target is padding. generate.answer writes the same, one target at a time.
    """
    config = model.config
    memory = model.encode(source, present)
    written = torch.full((len(source), 1), config.begin_token, device=source.device)
    ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    never = torch.tensor([config.begin_token, config.padding_token], device=source.device)
    for _ in range(length):
        logits = model.decode(written, memory, present)[:, -1]
        token = logits.index_fill(1, never, -torch.inf).argmax(-1)
        ended = ended | (token == config.end_token)
        written = torch.cat([written, token.masked_fill(ended, config.padding_token)[:, None]], dim=1)
    return written[:, 1:]


@torch.no_grad()
def evaluate_pairs(
    model: Seq2Seq,
    pairs: Pairs,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> PairLoss:
    """Loss under teacher forcing, and the part of targets that greedy decoding gets wholly right.

    With max_tokens, on the first pairs that have about so many, padding included. Several processes divide
    the batches among them.
    """
    n, config = len(pairs.source), model.config
    length = pairs.source.shape[1] + pairs.target.shape[1]
    if max_tokens is not None:
        n = min(n, max(max_tokens // length, 1))
    batch_size = batch_size or sequences_at_once(length, config.vocab_size, most=256)
    total, count, right = 0.0, 0, 0
    batches = zip(*(side[:n].split(batch_size) for side in pairs), strict=True)
    for (source, target), counts in ranks.dealt(batches):
        source, present, target_in, target_out = teacher_forced(source.long(), target.long(), config)
        loss = model.loss((source, present, target_in, target_out), count=1)
        written = greedy_targets(model, source, present, target_out.shape[1])
        text = target_out.masked_fill(target_out == IGNORE, config.padding_token)
        text = text.masked_fill(text == config.end_token, config.padding_token)
        if counts:
            total += loss.item()
            count += int((target_out != IGNORE).sum())
            right += int((written == text).all(dim=1).sum())
    total, count, right = ranks.sums(total, count, right)
    return PairLoss(total / count, right / n)
