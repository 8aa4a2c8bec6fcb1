"""Masks: which keys a query may look at. True where it may; several are combined with &.

Shapes: B batch, T query length, S key length.
Not here: additive scores (see alibi.py), the attention that reads a mask (see attention.py).
"""

import numpy as np
from jaxtyping import Bool, Integer
from numpy import ndarray as Array

PADDING = -1  # the document number of a place that holds no token


def causal_mask(length: int, before: int = 0) -> Bool[Array, "T S"]:
    """mask[t, s] = (s <= t'): a token sees itself and what came before.

    The queries are the last T = length of S = before + T tokens; t' = before + t is the place of query t.
    """
    return np.tril(np.ones((length, before + length), dtype=bool), k=before)


def window_mask(length: int, window: int, before: int = 0) -> Bool[Array, "T S"]:
    """mask[t, s] = (t' - window < s <= t'): itself and window - 1 before it (Beltagy et al. 2020, 3.1)."""
    age = np.arange(before, before + length)[:, None] - np.arange(before + length)  # how far behind its query
    return (age >= 0) & (age < window)


def padding_mask(present: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """mask[b, 0, 0, s] = present[b, s]: nobody looks at a place that holds no token."""
    return present[:, None, None, :]


def document_mask(documents: Integer[Array, "B S"], before: int = 0) -> Bool[Array, "B 1 T S"]:
    """mask[b, 0, t, s] = (documents[b, t] = documents[b, s], and not PADDING).

    Documents packed into one sequence do not see each other, and a place that holds no token sees nothing.
    The queries are the places from `before` on.
    """
    same = documents[:, before:, None] == documents[:, None, :]
    return (same & (documents != PADDING)[:, None, :])[:, None]


def places_in_documents(documents: Integer[Array, "B T"]) -> Integer[Array, "B T"]:
    """Places counted from the start of each run of one number: a packed text stands where it stood alone."""
    T = documents.shape[1]
    begins = np.ones(documents.shape, dtype=bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return np.arange(T) - np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)
