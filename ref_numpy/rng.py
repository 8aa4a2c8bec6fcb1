"""Random numbers that are a pure function of (seed, purpose, step, stream, index).

Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3)
turns a 128-bit counter and a 64-bit key into 128 random bits. Nothing is stored between calls, so a run
draws the same numbers in NumPy and in PyTorch, on one device or on eight, uninterrupted or resumed.

How the bits of a draw are addressed. No two draws of a step share an address, so none share their bits. (What
is drawn once, dates and an encoder's example, has the address of what step 0 draws for that purpose.)

    key      = (seed mod 2^32, seed div 2^32)
    counter  = (block, stream, step, purpose)      four 32-bit words, block counting from 0

Not here: a generator object with a state; draws that depend on what was drawn before.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt32, UInt64
from numpy import ndarray as Array

# What a random number is for: the last word of the counter.
INIT, DATA, DROPOUT, SAMPLE, MASK = 0, 1, 2, 3, 4

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # multipliers of the two lanes
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments: fractions of the golden ratio, of sqrt 3
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


class Key(NamedTuple):
    """The address of a stream of random numbers."""

    seed: int  # of the run, 64 bits
    purpose: int  # INIT, DATA, DROPOUT, SAMPLE or MASK
    step: int = 0  # optimizer step, or position of a sampled token
    stream: int = 0  # parameter, dropout site, ...: whatever the purpose counts


def philox(counter: UInt64[Array, "4 N"], key: tuple[int, int]) -> UInt64[Array, "4 N"]:
    """Philox 4x32-10: ten rounds over N counters; all words are 32 bits wide and held in 64.

    One round, with (hi, lo) the two halves of a 64-bit product:
        hi0, lo0 = M0 * c0 ;  hi1, lo1 = M1 * c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0,  lo1,  hi0 ^ c3 ^ k1,  lo0
    and after each round the key grows by (W0, W1) mod 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _M0 * c0, _M1 * c2
        c0 = (product1 >> _32) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> _32) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _W0) % 2**32, (k1 + _W1) % 2**32
    return np.stack([c0, c1, c2, c3])


def random_bits(key: Key, blocks: UInt64[Array, "N"]) -> UInt32[Array, "N 4"]:
    """The four 32-bit words of each numbered block of a stream. Raises ValueError above 2^32 blocks."""
    if blocks.size and blocks.max() >= 2**32:
        raise ValueError(f"block {blocks.max()} of a random stream is asked for, but a stream has 2**32")
    counter = np.empty((4, blocks.size), np.uint64)
    counter[0] = blocks
    counter[1] = key.stream
    counter[2] = key.step
    counter[3] = key.purpose
    return philox(counter, (key.seed % 2**32, key.seed >> 32)).T.astype(np.uint32)


def uniform(key: Key, n: int) -> Float64[Array, "n"]:
    """The first n numbers of a stream, uniform in [0, 1): each is 53 bits of two words, times 2^-53.

    u = (floor(a / 2^5) * 2^26 + floor(b / 2^6)) * 2^-53 for words (a, b); exact in float64, two to a block.
    """
    words = random_bits(key, np.arange(-(-n // 2), dtype=np.uint64)).reshape(-1, 2)[:n]
    return ((words[:, 0] >> 5) * 2.0**26 + (words[:, 1] >> 6)) * 2.0**-53


def normal(key: Key, n: int) -> Float64[Array, "n"]:
    """The first n numbers of a stream, standard normal (Box and Muller 1958), two to a block.

    r = sqrt(-2 ln(1 - u1)), z1 = r cos(2 pi u2), z2 = r sin(2 pi u2), for a block's uniforms (u1, u2).
    """
    pairs = uniform(key, n + n % 2).reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log(1.0 - pairs[:, 0]))
    angle = 2.0 * np.pi * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:n]
