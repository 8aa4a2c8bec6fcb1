"""Embedding: a token's vector is its row of a table.

Shapes: B batch, T time, V vocabulary, C width. Not here: sparse gradients, frozen rows.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray as Array


class EmbeddingCache(NamedTuple):
    ids: Array
    weight: Array


def embedding_forward(
    ids: Integer[Array, "B T"], weight: Float[Array, "V C"]
) -> tuple[Float[Array, "B T C"], EmbeddingCache]:
    """y_bt = W[ids_bt]. Raises ValueError for an id outside [0, V)."""
    vocab_size = weight.shape[0]
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        outside = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"token id {outside} is outside the vocabulary of {vocab_size}")
    return weight[ids], EmbeddingCache(ids, weight)


def embedding_backward(dy: Float[Array, "B T C"], cache: EmbeddingCache) -> Float[Array, "V C"]:
    """dW[v] = sum of dy_bt over all places (b, t) that hold token v. The ids have no gradient."""
    dweight = np.zeros_like(cache.weight)
    np.add.at(dweight, cache.ids, dy)  # adds once per occurrence; dweight[ids] += dy would add once per token
    return dweight
