"""Attention (Vaswani et al. 2017, section 3.2): scaled dot product, and many heads of it side by side.

Shapes: B batch, T query length, S key length, C width, H heads, D = C / H head width.
Masks are boolean, True where a query may look at a key; they broadcast to (B, H, T, S).
C3 stands for 3 C: the features of q, k and v in one.
A query that may look at nothing gets the zero vector, and passes no gradient on.
Not here: additive masks, dropout of attention weights (see dropout.py), caching of keys and values.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from ref_numpy.linear import LinearCache, linear_backward, linear_forward


def causal_mask(length: int) -> Bool[Array, "T T"]:
    """mask[t, s] = (s <= t): a token sees itself and what came before."""
    return np.tril(np.ones((length, length), dtype=bool))


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
) -> tuple[Float[Array, "B H T D"], AttentionCache]:
    """y = p v, p = softmax over keys of (q k^T / sqrt D), restricted to the keys that the mask allows."""
    scores = q @ k.swapaxes(-1, -2) / sqrt(q.shape[-1])  # (B, H, T, S)
    scores = np.where(mask, scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
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
    Where the mask forbids, p = 0 and so ds = 0: the mask needs no mention.
    """
    q, k, v, p = cache
    scale = 1.0 / sqrt(q.shape[-1])
    dv = p.swapaxes(-1, -2) @ dy  # (1)
    dp = dy @ v.swapaxes(-1, -2)  # (2) (B, H, T, S)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))  # (3)
    dq = ds @ k * scale  # (4)
    dk = ds.swapaxes(-1, -2) @ q * scale  # (4)
    return dq, dk, dv


class MultiHeadAttentionCache(NamedTuple):
    qkv: LinearCache
    attention: AttentionCache
    proj: LinearCache


def multi_head_attention_forward(
    x: Float[Array, "B T C"],
    qkv_weight: Float[Array, "C3 C"],
    qkv_bias: Float[Array, "C3"] | None,
    proj_weight: Float[Array, "C C"],
    proj_bias: Float[Array, "C"] | None,
    n_head: int,
    mask: Bool[Array, "*#mask"],
) -> tuple[Float[Array, "B T C"], MultiHeadAttentionCache]:
    """Self-attention by n_head heads. One projection makes all of q, k and v; a second mixes the heads.

    The 3C rows of qkv_weight are q of all heads, then k, then v; head h owns the rows h D to (h+1) D of each.
    """
    B, T, C = x.shape
    D = C // n_head
    qkv, qkv_cache = linear_forward(x, qkv_weight, qkv_bias)  # (B, T, 3C)
    q, k, v = qkv.reshape(B, T, 3, n_head, D).transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
    heads, attention_cache = attention_forward(q, k, v, mask)  # (B, H, T, D)
    joined = heads.transpose(0, 2, 1, 3).reshape(B, T, C)  # heads side by side
    y, proj_cache = linear_forward(joined, proj_weight, proj_bias)
    return y, MultiHeadAttentionCache(qkv_cache, attention_cache, proj_cache)


def multi_head_attention_backward(
    dy: Float[Array, "B T C"], cache: MultiHeadAttentionCache
) -> tuple[
    Float[Array, "B T C"],
    Float[Array, "C3 C"],
    Float[Array, "C3"] | None,
    Float[Array, "C C"],
    Float[Array, "C"] | None,
]:
    """Gradients of x, qkv_weight, qkv_bias, proj_weight, proj_bias: the forward's lines in reverse order."""
    B, H, T, D = cache.attention.q.shape
    djoined, dproj_weight, dproj_bias = linear_backward(dy, cache.proj)
    dheads = djoined.reshape(B, T, H, D).transpose(0, 2, 1, 3)  # (B, H, T, D)
    dq, dk, dv = attention_backward(dheads, cache.attention)
    dqkv = np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * H * D)  # (B, T, 3C)
    dx, dqkv_weight, dqkv_bias = linear_backward(dqkv, cache.qkv)
    return dx, dqkv_weight, dqkv_bias, dproj_weight, dproj_bias
