"""Attention (Vaswani et al. 2017, section 3.2.1): the scaled dot product.

Shapes: B batch, T query length, S key length, H heads, D head width.
Masks (see masks.py) are True where a query may look at a key; they broadcast to (B, H, T, S).
A query that may look at nothing gets the zero vector, and passes no gradient on.
Not here: dropout of attention weights, and anything but the plain formula: all T S scores stand in memory.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from ref_numpy.alibi import alibi_bias


class AttentionCache(NamedTuple):
    q: Array
    k: Array
    v: Array
    p: Array  # attention weights (B, H, T, S)


def attention_forward(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B H S D"],
    v: Float[Array, "B H S D"],
    mask: Bool[Array, "*#mask"],
    slopes: tuple[float, ...] | None = None,
) -> tuple[Float[Array, "B H T D"], AttentionCache]:
    """y = p v, p = softmax over keys of (q k^T / sqrt D), restricted to the keys that the mask allows.

    With slopes, one for each head, ALiBi's bias is added to the scores.
    """
    scores = q @ k.swapaxes(-1, -2) / sqrt(q.shape[-1])  # (B, H, T, S)
    if slopes is not None:
        scores = scores + alibi_bias(slopes, *scores.shape[-2:], scores.dtype)
    scores = np.where(mask, scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    highest = np.where(np.isneginf(highest), 0, highest)  # a row that sees nothing: -inf - 0, not -inf + inf
    weights = np.exp(scores - highest)  # shifted so that the largest is exp(0): cannot overflow
    total = weights.sum(axis=-1, keepdims=True)
    p = weights / np.where(total == 0, 1, total)  # (B, H, T, S); that row: 0 / 1 in place of 0 / 0
    return p @ v, AttentionCache(q, k, v, p)


def attention_backward(
    dy: Float[Array, "B H T D"], cache: AttentionCache
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H S D"], Float[Array, "B H S D"]]:
    """Gradients of q, k and v.

    With s = q k^T / sqrt D, p = softmax(s), y = p v, row by row (t a query; i, j keys):
        (1) dv = p^T dy
        (2) dp = dy v^T
        (3) ds_i = sum_j dp_j J_ji with J_ji, the derivative of p_j by s_i, being p_j (1[i=j] - p_i);
            hence ds_i = p_i (dp_i - sum_j p_j dp_j)
        (4) dq = ds k / sqrt D,  dk = ds^T q / sqrt D
    Where the mask forbids, p = 0 and so ds = 0: the mask needs no mention, nor does a constant bias.
    """
    q, k, v, p = cache
    scale = 1.0 / sqrt(q.shape[-1])
    dv = p.swapaxes(-1, -2) @ dy  # (1)
    dp = dy @ v.swapaxes(-1, -2)  # (2) (B, H, T, S)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))  # (3)
    dq = ds @ k * scale  # (4)
    dk = ds.swapaxes(-1, -2) @ q * scale  # (4)
    return dq, dk, dv
