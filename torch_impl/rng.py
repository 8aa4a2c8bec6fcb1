"""Random numbers that are a pure function of (seed, purpose, step, stream, index): Philox 4x32-10.

The twin of ref_numpy/rng.py, which says how a draw is addressed; the bits are the same. The 32-bit words are
held in int64 tensors, whose products wrap around at 64 bits, so that every device has the arithmetic needed.
A key's step and stream (and the first block) may be tensors: a compiled step then serves every step.
"""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ref_numpy.rng import Key

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

Words = tuple[Int64[Tensor, "*N"], Int64[Tensor, "*N"], Int64[Tensor, "*N"], Int64[Tensor, "*N"]]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds over N counters. A product's upper half comes down with the sign, which the mask takes off.

    A product goes on whole as the next c1 or c3: the mask of the round after takes its upper half off too.
    The words of a round are made in place, which spares half of the memory traffic.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def random_bits(key: Key, blocks: Int64[Tensor, "*N"]) -> Words:
    """The four 32-bit words of each numbered block of a stream; block numbers stay below 2^32.

    The mask takes nothing off. It keeps a compiler that knows the numbers (0, 1, 2 ...) from multiplying
    them as indices, for which Inductor writes 32 bits on CUDA: too few for Philox's factors.
    """
    counter = (
        blocks & _LOW,
        torch.zeros_like(blocks) + key.stream,
        torch.zeros_like(blocks) + key.step,
        torch.full_like(blocks, key.purpose),
    )
    return philox(counter, (key.seed & _LOW, key.seed >> 32))


def uniform(key: Key, n: int, device: torch.device | str = "cpu") -> Float64[Tensor, "n"]:
    """The first n numbers of a stream, uniform in [0, 1), 53 bits each. Needs a device with float64."""
    a, b, c, d = random_bits(key, torch.arange(-(-n // 2), device=device))
    high, low = torch.stack([a, c], 1).reshape(-1), torch.stack([b, d], 1).reshape(-1)
    return (((high >> 5) << 26) + (low >> 6))[:n].to(torch.float64) * 2.0**-53


def first_uniform(key: Key, streams: Int64[Tensor, "*B"]) -> Float64[Tensor, "*B"]:
    """The first number of each of several streams: uniform(key of that stream, 1). Their steps may differ."""
    a, b, _, _ = random_bits(key._replace(stream=streams), torch.zeros_like(streams))
    return (((a >> 5) << 26) + (b >> 6)).to(torch.float64) * 2.0**-53


def normal(key: Key, n: int, device: torch.device | str = "cpu") -> Float64[Tensor, "n"]:
    """The first n numbers of a stream, standard normal, by Box and Muller. Needs a device with float64."""
    u1, u2 = uniform(key, n + n % 2, device).reshape(-1, 2).unbind(1)
    radius = torch.sqrt(-2.0 * torch.log(1.0 - u1))
    angle = 2.0 * torch.pi * u2
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1).reshape(-1)[:n]
