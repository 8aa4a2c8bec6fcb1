"""Conversations packed side by side into sequences of one length, none of which sees another.

Padding every conversation to the longest would spend most of a batch on nothing. Instead several share a
sequence: documents (masks.py) tell them apart, so that each has its own places and sees itself alone, and
what is computed of it is what it would be alone (Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination").

Shapes: n tokens of a conversation, P packed sequences, M micro-batches, B sequences in each, T context
length.
Not here: an optimal packing, epochs (sequences are drawn with replacement), a conversation that is too long
(see conversation.pieces).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from ref_numpy.config import TrainConfig
from ref_numpy.conversation import Tokens
from ref_numpy.loss import IGNORE
from ref_numpy.masks import PADDING
from ref_numpy.rng import DATA, Key, uniform


class Packed(NamedTuple):
    """What the model reads, and last what it is to write; (P, T) each, in a batch (M, B, T)."""

    ids: Array
    documents: Array  # conversations of a sequence are numbered from 0; PADDING where there is none
    targets: Array  # the next token of the same conversation where it counts, else IGNORE


def assign_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which lengths go into which row, of which each holds `room`: by best fit, in falling order.

    The longest first, equals in their order; each goes into the fullest row that still has room, the first of
    equals, or else into a new one: at most 4 rows more than 11/9 of the fewest (Johnson et al. 1974).
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # sorting keeps equals in order
        fitting = [row for row in range(len(rows)) if left[row] >= lengths[number]]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            left.append(room)
        row = min(fitting, key=left.__getitem__)
        rows[row].append(number)
        left[row] -= lengths[number]
    return rows


def pack(conversations: Sequence[Tokens], context_length: int) -> Packed:
    """Sequences of context_length that hold all conversations.

    Of n tokens the model reads n - 1, the last being only a target. Raises ValueError for a conversation of
    fewer than 2 tokens, or more than context_length + 1.
    """
    for number, (ids, _) in enumerate(conversations, 1):
        if not 2 <= ids.size <= context_length + 1:
            raise ValueError(f"conversation {number} has {ids.size} tokens, not 2 to {context_length + 1}")
    rows = assign_rows([ids.size - 1 for ids, _ in conversations], context_length)
    shape = (len(rows), context_length)
    packed = Packed(np.zeros(shape, int), np.full(shape, PADDING), np.full(shape, IGNORE))
    for row, numbers in enumerate(rows):
        start = 0
        for document, number in enumerate(numbers):
            ids, counts = conversations[number]
            place = slice(start, start + ids.size - 1)
            packed.ids[row, place] = ids[:-1]
            packed.documents[row, place] = document
            packed.targets[row, place] = np.where(counts[1:], ids[1:], IGNORE)
            start = place.stop
    return packed


def sample_packed(packed: Packed, step: int, config: TrainConfig) -> Packed:
    """The batch of a step: sequence r is number floor(u_r P), u_r uniform from (seed, step)."""
    rows = (uniform(Key(config.seed, DATA, step), config.batch_size) * len(packed.ids)).astype(np.int64)
    return Packed(*(part[rows].reshape(config.micro_batches, -1, part.shape[1]) for part in packed))
