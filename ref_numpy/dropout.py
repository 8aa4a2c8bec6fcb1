"""Dropout (Srivastava et al. 2014), inverted: kept units are scaled up while training, nothing is done after.

The mask is a pure function of where the unit stands (see rng.py), so both implementations drop the same
units, whatever the micro-batches and the number of devices.
Not here: dropping of attention weights. As in Vaswani et al. (2017, section 5.4) dropout acts on the
embeddings and on each sublayer's output, which leaves attention free to be computed by a fused kernel.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from ref_numpy.rng import DROPOUT, Key, random_bits


class DropoutKey(NamedTuple):
    """Which masks to draw: one stream of random bits per site, in which every sequence has its own place."""

    seed: int
    step: int  # optimizer step
    first_row: int = 0  # index of the batch's first sequence among all sequences of the step
    site: int = 0  # which dropout of the model: 0 embedding, 2l + 1 and 2l + 2 the sublayers of block l


class DropoutCache(NamedTuple):
    keep: Array | None  # None: nothing was dropped
    scale: float


def _threshold(p: float) -> int:
    """A unit has sixteen random bits and is dropped if their value is below this: p in steps of 2^-16."""
    return round(p * 65536)


def keep_mask(shape: tuple[int, ...], p: float, key: DropoutKey) -> Bool[Array, "*shape"]:
    """True for the units that stay. The first axis counts sequences.

    Unit u of sequence r takes half (u mod 2) of word (u div 2 mod 4) of block r ceil(n / 8) + u div 8, where
    n is the number of units of a sequence, and r its number in the step: key.first_row + its row in x. So the
    bits of a sequence do not depend on its neighbours in the batch.
    """
    rows, units = shape[0], int(np.prod(shape[1:]))
    blocks_per_row = -(-units // 8)
    first = key.first_row * blocks_per_row
    blocks = np.arange(first, first + rows * blocks_per_row, dtype=np.uint64)
    words = random_bits(Key(key.seed, DROPOUT, key.step, key.site), blocks)  # (blocks, 4)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1)  # (blocks, 4, 2): the lower half comes first
    return (halves.reshape(rows, -1)[:, :units] >= _threshold(p)).reshape(shape)


def dropout_forward(
    x: Float[Array, "B *rest"], p: float, key: DropoutKey | None
) -> tuple[Float[Array, "B *rest"], DropoutCache]:
    """y = x keep / (1 - p), p rounded to a multiple of 2^-16. Without a key (evaluation) y = x."""
    if key is None or _threshold(p) == 0:
        return x, DropoutCache(None, 1.0)
    keep = keep_mask(x.shape, p, key)
    scale = 1.0 / (1.0 - _threshold(p) / 65536)
    return x * keep * scale, DropoutCache(keep, scale)


def dropout_backward(dy: Float[Array, "B *rest"], cache: DropoutCache) -> Float[Array, "B *rest"]:
    """dx = dy keep / (1 - p): the map is linear in x."""
    keep, scale = cache
    return dy if keep is None else dy * keep * scale
