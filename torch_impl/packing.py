"""Conversations packed side by side into sequences of one length. The twin of ref_numpy/packing.py."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from ref_numpy.config import TrainConfig
from ref_numpy.loss import IGNORE
from ref_numpy.masks import PADDING
from ref_numpy.rng import DATA, Key
from torch_impl.rng import uniform
from torch_impl.train import sequences_at_once
from torch_impl.training.ranks import ALONE, Ranks
from torch_impl.transformer import Transformer


class Packed(NamedTuple):
    """What the model reads, and last what it is to write; (P, T) each, in a batch (M, B, T)."""

    ids: Tensor
    documents: Tensor  # conversations of a sequence are numbered from 0; PADDING where there is none
    targets: Tensor  # the next token of the same conversation where it counts, else IGNORE


def assign_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which lengths go into which row, of which each holds `room`: by best fit, in falling order."""
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # what is left of each row, and the row: sorted
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        found = bisect_left(by_room, (length, -1))
        if found == len(by_room):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = by_room.pop(found)
        rows[row].append(number)
        insort(by_room, (left - length, row))
    return rows


def pack(
    conversations: Sequence[tuple[Integer[Tensor, "_"], Bool[Tensor, "_"]]],
    context_length: int,
    device: torch.device | str = "cpu",
) -> Packed:
    """Sequences of context_length that hold all conversations: their ids, and which of them count.

    Raises ValueError for a conversation of fewer than 2 tokens, or more than context_length + 1.
    """
    for number, (ids, _) in enumerate(conversations, 1):
        if not 2 <= len(ids) <= context_length + 1:
            raise ValueError(f"conversation {number} has {len(ids)} tokens, not 2 to {context_length + 1}")
    rows = assign_rows([len(ids) - 1 for ids, _ in conversations], context_length)
    packed = [
        torch.full((len(rows), context_length), filling, dtype=torch.int32)
        for filling in (0, PADDING, IGNORE)
    ]
    ids_in, documents_in, targets_in = packed
    for row, numbers in enumerate(rows):
        start = 0
        for document, number in enumerate(numbers):
            ids, counts = conversations[number]
            place = slice(start, start + len(ids) - 1)
            ids_in[row, place] = ids[:-1].int()
            documents_in[row, place] = document
            targets_in[row, place] = ids[1:].masked_fill(~counts[1:], IGNORE).int()
            start = place.stop
    return Packed(*(part.to(device) for part in packed))


def sample_packed(packed: Packed, step: int | Integer[Tensor, ""], config: TrainConfig) -> Packed:
    """The batch of a step, gathered where the sequences lie; step may be a tensor."""
    device = step.device if isinstance(step, Tensor) else "cpu"
    u = uniform(Key(config.seed, DATA, step), config.batch_size, device)
    rows = (u * len(packed.ids)).long().to(packed.ids.device)
    return Packed(*(part[rows].view(config.micro_batches, -1, part.shape[1]).long() for part in packed))


@torch.no_grad()
def evaluate_packed(
    model: Transformer,
    packed: Packed,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean loss over the tokens that count, in nats, without dropout.

    With max_tokens, of the first sequences that have about so many, padding included. Several processes
    divide the batches among them.
    """
    n, T = packed.ids.shape
    if max_tokens is not None:
        n = min(n, max(max_tokens // T, 1))
    total, count = 0.0, 0
    batch_size = batch_size or sequences_at_once(T)
    batches = zip(*(part[:n].split(batch_size) for part in packed), strict=True)
    for batch, counts in ranks.dealt(batches):
        ids, documents, targets = (part.long() for part in batch)
        loss = model.loss((ids, documents, targets), count=1)
        if counts:
            total += loss.item()
            count += int((targets != IGNORE).sum())
    total, count = ranks.sums(total, count)
    return total / count
