"""FlashAttention: attention tile by tile, without ever holding all scores at once.

Dao et al. 2022 (FlashAttention, algorithms 1 and 4), with the loop order of Dao 2023 (FlashAttention-2).

Shapes: B batch, H heads, T query length, S key length, D head width; R rows and N columns of a tile.
The results are those of attention.py, here with a score added by a bias, as ALiBi does. Masks are boolean,
True where a query may look at a key. A query that may look at nothing gets the zero vector, and passes no
gradient on.

What it is for. A processor computes in a small fast memory and keeps its arrays in a large slow one, and
attention spends its time moving numbers between the two. How many elements, per head, when each step of the
plain formulas reads its operands and writes its result once:

    plain, forward      4 T S + 2 (T + S) D            scores and softmax, each written and read
    plain, backward     7 T S + 4 (T + S) D            dp and ds written, p twice, dp once and ds twice read
    tiled, forward      2 T D + T + (T / R) 2 S D      q read, y and L written; k, v read per row of tiles
    tiled, backward     3 T D + T + 4 S D + (S / N) (4 T D + 2 T)

T / R and S / N are rounded up. The tiles of q, k, v, y and of the scores have to fit into the fast memory of
M elements, so R and N may be about M / (4 D), and of 4 T S there is left 8 T S D^2 / M (theorem 2 of the
first paper). With T = S = 1024, D = 64 and tiles of 128 x 128 these are 1.2 million elements in place of 4.5
forward, and 2.6 in place of 7.9 backward; and no memory for T S elements is needed. The price is arithmetic:
the backward pass computes the scores a second time. parity_tests/test_flash_attention.py counts what the
code below moves, and finds these formulas. Where a mask allows nothing in a tile, nothing is moved: half of
the tiles for a causal mask.

Not here: speed (NumPy has no fast memory to fill, so this is the plainer attention.py with more steps), a
gradient for the bias, dropout of attention weights, keys and values shared by groups of heads (repeat them).
"""

from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array


class FlashAttentionCache(NamedTuple):
    q: Array
    k: Array
    v: Array
    mask: Array  # as it was given, seen as (B, H, T, S)
    bias: Array | None
    tile: tuple[int, int]
    y: Array
    log_sum_exp: Array  # of each row of scores (B, H, T, 1); 0 where a row sees nothing


def _cuts(length: int, size: int) -> Iterator[slice]:
    """0 to length in pieces of size; the last may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _tile_scores(q: Array, k: Array, mask: Array, bias: Array | None) -> Float[Array, "B H R N"]:
    """q k^T / sqrt D + bias for one tile, -inf where the mask forbids."""
    scores = q @ k.swapaxes(-1, -2) / sqrt(q.shape[-1])
    if bias is not None:
        scores += bias  # in place: of scores' dtype, whatever the bias has
    return np.where(mask, scores, -np.inf)


def flash_attention_forward(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B H S D"],
    v: Float[Array, "B H S D"],
    mask: Bool[Array, "*#mask"],
    bias: Float[Array, "*#bias"] | None = None,
    tile: int | tuple[int, int] = 128,
) -> tuple[Float[Array, "B H T D"], FlashAttentionCache]:
    """y = p v, p = softmax over keys of (q k^T / sqrt D + bias), restricted to the keys that the mask allows.

    mask and bias broadcast to (B, H, T, S). tile is (R, N), or one number for both; every size gives one y.

    The softmax is taken while the keys come by (online; Milakov & Gimelshein 2018). For one query and the
    keys seen so far, with scores s_j:
        highest  m = max_j s_j      total  l = sum_j exp(s_j - m)      weighted  a = sum_j exp(s_j - m) v_j
    A tile that raises the highest score to m' changes the common factor: l and a are multiplied by
    exp(m - m'), then the tile's own terms are added. At the end y = a / l, one division (FlashAttention-2,
    section 3.1), and of m and l only L = m + log l is kept, for the backward pass.
    """
    B, H, T, _ = q.shape
    S = k.shape[-2]
    R, N = (tile, tile) if isinstance(tile, int) else tile
    mask = np.broadcast_to(mask, (B, H, T, S))  # a view: nothing is copied
    bias = None if bias is None else np.broadcast_to(bias, (B, H, T, S))
    y, log_sum_exp = np.empty_like(q), np.empty_like(q, shape=(B, H, T, 1))
    for rows in _cuts(T, R):
        q_rows = q[:, :, rows]  # (B, H, R, D)
        highest = np.full_like(q_rows, -np.inf, shape=(*q_rows.shape[:-1], 1))
        total = np.zeros_like(highest)
        weighted = np.zeros_like(q_rows)
        for columns in _cuts(S, N):
            allowed = mask[:, :, rows, columns]
            if not allowed.any():
                continue
            added = None if bias is None else bias[:, :, rows, columns]
            scores = _tile_scores(q_rows, k[:, :, columns], allowed, added)  # (B, H, R, N)
            before, highest = highest, np.maximum(highest, scores.max(axis=-1, keepdims=True))
            shift = _finite(highest)
            weights = np.exp(scores - shift)
            rescale = np.exp(before - shift)  # 0 at a row's first keys
            total = rescale * total + weights.sum(axis=-1, keepdims=True)
            weighted = rescale * weighted + weights @ v[:, :, columns]
        total = np.where(total == 0, 1, total)  # a row that saw nothing: 0 / 1
        y[:, :, rows] = weighted / total
        log_sum_exp[:, :, rows] = _finite(highest) + np.log(total)
    return y, FlashAttentionCache(q, k, v, mask, bias, (R, N), y, log_sum_exp)


def _finite(highest: Array) -> Array:
    """0 for the -inf of a row that has seen nothing: its scores less that are -inf, and not NaN."""
    return np.where(np.isneginf(highest), 0, highest)


def flash_attention_backward(
    dy: Float[Array, "B H T D"], cache: FlashAttentionCache
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H S D"], Float[Array, "B H S D"]]:
    """Gradients of q, k and v.

    The derivation is attention_backward's, its terms taken tile by tile. p was not kept, but with the
    log-sum-exp L of its row it follows from the scores of a tile alone:
        (0) p = exp(s - L)
        (1) dv = p^T dy
        (2) dp = dy v^T
        (3) ds = p (dp - delta), where delta = sum_j p_j dp_j is a sum over a whole row of tiles. Yet
            sum_j p_j (dy . v_j) = dy . sum_j p_j v_j = dy . y, which is known before the first tile
        (4) dq = ds k / sqrt D,  dk = ds^T q / sqrt D
    Columns are the outer loop: dk and dv of a tile are finished in the fast memory, and dq is added to.
    """
    q, k, v, mask, bias, (R, N), y, log_sum_exp = cache
    T, S, scale = q.shape[-2], k.shape[-2], 1.0 / sqrt(q.shape[-1])
    dq, dk, dv = np.zeros_like(q), np.empty_like(k), np.empty_like(v)
    delta = (dy * y).sum(axis=-1, keepdims=True)  # (3) (B, H, T, 1)
    for columns in _cuts(S, N):
        k_columns, v_columns = k[:, :, columns], v[:, :, columns]  # (B, H, N, D)
        dk_columns, dv_columns = np.zeros_like(k_columns), np.zeros_like(v_columns)
        for rows in _cuts(T, R):
            allowed = mask[:, :, rows, columns]
            if not allowed.any():
                continue
            q_rows, dy_rows = q[:, :, rows], dy[:, :, rows]  # (B, H, R, D)
            added = None if bias is None else bias[:, :, rows, columns]
            scores = _tile_scores(q_rows, k_columns, allowed, added)  # (B, H, R, N)
            p = np.exp(scores - log_sum_exp[:, :, rows])  # (0)
            dv_columns += p.swapaxes(-1, -2) @ dy_rows  # (1)
            dp = dy_rows @ v_columns.swapaxes(-1, -2)  # (2)
            ds = p * (dp - delta[:, :, rows])  # (3)
            dq[:, :, rows] += ds @ k_columns * scale  # (4)
            dk_columns += ds.swapaxes(-1, -2) @ q_rows * scale  # (4)
        dk[:, :, columns], dv[:, :, columns] = dk_columns, dv_columns
    return dq, dk, dv
