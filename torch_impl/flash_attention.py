"""Fused attention, and where a pattern's path is chosen. The twin of ref_numpy/flash_attention.py.

The tiles are the kernels': scaled_dot_product_attention knows the causal order of itself, flex_attention
compiles a kernel for windows, ALiBi, documents and padding. flex_attention trains on CUDA only; elsewhere
scaled_dot_product_attention is given the mask, for a block of queries at a time. No path holds T x S scores
or masks: memory is linear in the context.

Shapes: B batch, H heads, K key/value heads, T query length, S key length, D head width.
"""

from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_impl.attention import fused_attention

if TYPE_CHECKING:  # its import takes seconds, and only CUDA trains with it
    from torch.nn.attention.flex_attention import BlockMask

QUERIES_AT_ONCE = 256
_FLEX_TILE = 128  # queries and keys of a tile that flex_attention may skip

HAS_TRITON = find_spec("triton") is not None
"""Asked once: torch.compile does not see into find_spec, and would leave out all that leads to it."""


class AttentionPattern(NamedTuple):
    """Which keys a query may look at, all conditions together, and how its scores are biased."""

    causal: bool = False  # no key after the query
    window: int = 0  # only the last so many keys, the query's own counted; 0: no limit
    alibi_slopes: Float[Tensor, "H"] | None = None  # slope |t - s| is taken from a head's scores
    documents: Integer[Tensor, "B T"] | None = None  # only keys with the query's own number
    key_mask: Bool[Tensor, "B S"] | None = None  # only keys that are True: no padding
    mask: Bool[Tensor, "*#mask"] | None = None  # any other; broadcasts to (B, H, T, S)


class Path(StrEnum):
    """The ways to compute attention, under the names that a run reports."""

    FULL = "scaled_dot_product_attention"
    CAUSAL = "scaled_dot_product_attention, causal"
    BLOCKS = "scaled_dot_product_attention, masked, by blocks of queries"
    FLEX = "flex_attention"


def choose_path(pattern: AttentionPattern, device: torch.device, dtype: torch.dtype, head_width: int) -> Path:
    """The best path for a pattern. Of its tensors it matters only whether they are there."""
    conditions = (pattern.alibi_slopes, pattern.documents, pattern.key_mask, pattern.mask)
    if pattern.window == 0 and all(condition is None for condition in conditions):
        return Path.CAUSAL if pattern.causal else Path.FULL
    if pattern.mask is None and _depends_on_query(pattern) and _flex_trains(device, dtype, head_width):
        return Path.FLEX
    return Path.BLOCKS


def _depends_on_query(pattern: AttentionPattern) -> bool:
    """Padding alone is one row of a mask for all queries, and needs no kernel of its own."""
    conditions = (pattern.alibi_slopes, pattern.documents, pattern.mask)
    return pattern.causal or any(condition is not None for condition in conditions)


def _flex_trains(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether flex_attention has a forward and a backward kernel: for CUDA only, of which PyTorch for Windows
    comes without the compiler. Its products begin at a width of 16, and its sums are in float32.
    """
    return device.type == "cuda" and HAS_TRITON and dtype != torch.float64 and head_width >= 16


def flash_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    pattern: AttentionPattern,
    queries_at_once: int = QUERIES_AT_ONCE,
) -> Float[Tensor, "B H T D"]:
    """y = p v, p = softmax over the keys that the pattern allows of (q k^T / sqrt D + bias); 0 without any.

    Query head h looks at key/value head h // (H / K). queries_at_once bounds the memory of the path by
    blocks, and changes no result. Nothing is read back from the device. Raises ValueError for a window
    without causal order, for positions (causal, ALiBi, documents) where T is not S, and for K that does not
    divide H.
    """
    H, T, K, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    has_positions = pattern.causal or pattern.alibi_slopes is not None or pattern.documents is not None
    if pattern.window and not pattern.causal:
        raise ValueError(f"a window of {pattern.window} keys needs causal order")
    if has_positions and T != S:
        raise ValueError(f"positions count for {T} queries and {S} keys: give as many of each, or a mask")
    if H % K:
        raise ValueError(f"{K} key/value heads do not divide {H} heads")
    path = choose_path(pattern, q.device, q.dtype, q.shape[-1])
    if path is Path.FLEX:
        return _flex(q, k, v, pattern)
    if path is Path.BLOCKS:
        return _by_blocks(q, k, v, pattern, queries_at_once)
    return fused_attention(q, k, v, is_causal=path is Path.CAUSAL)


@no_type_check  # flex_attention traces it into its kernel, where a check has no place
def _allows(pattern: AttentionPattern, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Whether query t of sequence b and head h may look at key s, for index tensors that broadcast."""
    allowed = s <= t if pattern.causal else s >= 0
    if pattern.window:
        allowed = allowed & (t - s < pattern.window)
    if pattern.documents is not None:
        allowed = allowed & (pattern.documents[b, t] == pattern.documents[b, s])
    if pattern.key_mask is not None:
        allowed = allowed & pattern.key_mask[b, s]
    if pattern.mask is not None:
        allowed = allowed & pattern.mask[b, h, t, s]
    return allowed


# The path by blocks of queries.


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, queries_at_once: int) -> Tensor:
    """Attention of a block of queries at a time, over the keys that the causal order and the window leave it.

    Each block makes its mask again in the backward pass: kept, they would be the T x S that is not wanted.
    """
    (B, H, T, _), S = q.shape, k.shape[2]
    if pattern.mask is not None:
        pattern = pattern._replace(mask=pattern.mask.expand(B, H, T, S))  # a view
    size = queries_at_once if _depends_on_query(pattern) else T
    if T <= size:
        return _block(q, k, v, pattern, 0, 0, k.numel())
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = max(start - pattern.window + 1, 0) if pattern.window else 0
        last = stop if pattern.causal else S
        parts = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        blocks.append(
            checkpoint(
                _block,
                *parts,
                pattern,
                start,
                first,
                k.numel(),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(blocks, dim=2)


def _block(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, start: int, first: int, elements: int
) -> Tensor:
    """Attention of the queries from start on, over the keys from first on; all keys have so many elements.

    A row without keys is let see everything, and then replaced by 0, as in torch_impl/attention.py.
    """
    B, H, T, _ = q.shape
    b = torch.arange(B, device=q.device)[:, None, None, None]
    h = torch.arange(H, device=q.device)[:, None, None]
    t = torch.arange(start, start + T, device=q.device)[:, None]
    s = torch.arange(first, first + k.shape[2], device=q.device)
    allowed = _allows(pattern, b, h, t, s)  # (B or 1, H or 1, T or 1, S)
    can_be_blind = pattern.key_mask is not None or pattern.mask is not None
    if can_be_blind:
        sees_something = allowed.any(dim=-1, keepdim=True)
        allowed = allowed | ~sees_something
    if pattern.alibi_slopes is not None:
        slopes = pattern.alibi_slopes.to(torch.promote_types(q.dtype, torch.float32))
        # Of four axes: given three, the CPU falls back on the plain formulas.
        bias = (slopes[h] * -(t - s).abs()).to(q.dtype)[None]  # (1, H, T, S)
        allowed = torch.where(allowed, bias, -torch.inf)
    y = fused_attention(q, k, v, allowed, elements=elements)
    return torch.where(sees_something, y, 0.0) if can_be_blind else y


# The path by flex_attention.


def _flex(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """One kernel, compiled for the pattern; it gives 0 and no gradient for a row without keys of itself."""
    from torch.nn.attention.flex_attention import flex_attention

    slopes = None if pattern.alibi_slopes is None else pattern.alibi_slopes.float()  # as the scores are
    add_bias = lambda score, b, h, t, s: score - slopes[h] * (t - s).abs()  # noqa: E731 (traced, not called)
    kernel = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
    return kernel(
        q,
        k,
        v,
        score_mod=None if slopes is None else add_bias,
        block_mask=_block_mask(pattern, q.shape[2], k.shape[2], q.device),
        enable_gqa=q.shape[1] != k.shape[1],
    )


_compiled = cache(torch.compile)  # in a model that is compiled whole, the kernel is compiled with it


def _block_mask(pattern: AttentionPattern, T: int, S: int, device: torch.device) -> "BlockMask":
    """Which tiles flex_attention may skip, and in which it need not ask for each score.

    create_block_mask would find out from all T x S pairs. For these patterns it follows from the first and
    last position, and the lowest and highest document, of the rows and columns of a tile.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:  # how many in each row, and which
        which = tiles.int().argsort(dim=-1, descending=True, stable=True)
        return tiles.sum(dim=-1, dtype=torch.int32), which.int()

    possible, certain = _tiles(pattern, T, S, device)
    return BlockMask.from_kv_blocks(
        *ordered(possible & ~certain),
        *ordered(certain),
        BLOCK_SIZE=_FLEX_TILE,
        mask_mod=lambda b, h, t, s: _allows(pattern, b, h, t, s),
        seq_lengths=(T, S),
    )


def _tiles(
    pattern: AttentionPattern, T: int, S: int, device: torch.device
) -> tuple[Bool[Tensor, "#B 1 R N"], Bool[Tensor, "#B 1 R N"]]:
    """Of each tile, whether it may allow anything, and whether it surely allows everything."""
    t = torch.arange(0, T, _FLEX_TILE, device=device)[:, None]  # first query of a tile
    s = torch.arange(0, S, _FLEX_TILE, device=device)
    reach = _FLEX_TILE - 1
    possible = (t >= 0) & (s >= 0)
    certain = (t + reach < T) & (s + reach < S)
    if pattern.causal:
        possible, certain = possible & (s <= t + reach), certain & (s + reach <= t)
    if pattern.window:
        possible = possible & (t - (s + reach) < pattern.window)
        certain = certain & (t + reach - s < pattern.window)
    possible, certain = possible[None, None], certain[None, None]
    if pattern.documents is not None:
        tiles = _in_tiles(pattern.documents)  # (B, 1, tiles, 128)
        low, high = tiles.amin(-1), tiles.amax(-1)
        low_t, high_t, low_s, high_s = low[..., None], high[..., None], low[..., None, :], high[..., None, :]
        possible = possible & (low_t <= high_s) & (low_s <= high_t)
        certain = certain & (low_t == high_s) & (low_s == high_t)
    if pattern.key_mask is not None:
        tiles = _in_tiles(pattern.key_mask)
        possible = possible & tiles.any(-1)[:, :, None]
        certain = certain & tiles.all(-1)[:, :, None]
    return possible, certain


def _in_tiles(values: Tensor) -> Tensor:
    """(B, S) as (B, 1, tiles, 128), the last value repeated to fill the last tile."""
    missing = -values.shape[1] % _FLEX_TILE
    filled = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)
    return filled.unflatten(1, (-1, _FLEX_TILE))[:, None]
