"""Dropout with masks that are a pure function of where a unit stands. The twin of ref_numpy/dropout.py."""

import functools
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ref_numpy.dropout import DropoutKey
from ref_numpy.rng import DROPOUT, Key
from torch_impl.rng import random_bits


def _threshold(p: float) -> int:
    """Sixteen random bits below this drop a unit."""
    return round(p * 65536)


def keep_mask(
    shape: tuple[int, ...], p: float, key: DropoutKey, device: torch.device | str | None = None
) -> Bool[Tensor, "*shape"]:
    """True for the units that stay; the first axis counts sequences. One random block serves eight units."""
    rows, units = shape[0], math.prod(shape[1:])
    blocks_per_row = -(-units // 8)
    blocks = torch.arange(rows * blocks_per_row, device=device) + key.first_row * blocks_per_row
    bits = random_bits(Key(key.seed, DROPOUT, key.step, key.site), blocks)
    halves = [half for word in bits for half in (word & 0xFFFF, word >> 16)]
    # By way of one byte for eight units, which is all that compiled kernels write of a mask and read again.
    stays = [(half >= _threshold(p)).to(torch.uint8) << unit for unit, half in enumerate(halves)]
    packed = functools.reduce(torch.bitwise_or, stays)
    keep = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1  # (blocks, 8)
    return keep.bool().reshape(rows, -1)[:, :units].reshape(shape)


def dropout(x: Float[Tensor, "B *rest"], p: float, key: DropoutKey | None) -> Float[Tensor, "B *rest"]:
    """y = x keep / (1 - p), p rounded to a multiple of 2^-16. Without a key (evaluation) y = x."""
    if key is None or _threshold(p) == 0:
        return x
    scale = 1.0 / (1.0 - _threshold(p) / 65536)
    return x * keep_mask(tuple(x.shape), p, key, x.device) * scale
