"""Weight-only quantisation: a trained matrix in 8 or 4 bits per weight, symmetric, by its largest magnitude.

Shapes: O outputs (channels), I inputs, g group size along the inputs, G = ceil(I / g) groups in a row; the
leading axes of x are rows. Absmax quantisation as in Dettmers et al. 2022 (LLM.int8(), section 2), with a
scale per channel, or per group of g inputs as in Frantar et al. 2023 (GPTQ, section 5).

    s_og = max(max_i |W_oi| / L, t)  over the inputs i of group g,    L = 127 (8 bits) or 7 (4 bits)
    q_oi = round(W_oi / s_og)        from -L to L; a half goes to the even neighbour
    W_oi ~ q_oi s_og                 off by s_og / 2 at most (and the rounding of the dtype itself)

t is the smallest normal number: groups of zeros or of subnormal numbers need no case of their own.
-128 and -8 are never used, so that -W quantises to -q.
Not here: gradients (the weights are trained already), zero points, calibration, quantised activations.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8, UInt8
from numpy import ndarray as Array

from ref_numpy.linear import linear_forward

LIMITS = {8: 127, 4: 7}  # L by the number of bits


class Quantised(NamedTuple):
    """A matrix (O, I) in few bits."""

    values: Array  # 8 bits: int8 (O, I); 4 bits: uint8 (O, ceil(I / 2)), see pack
    scales: Array  # (O, G), in the dtype that the matrix had
    bits: int  # 8 or 4
    group_size: int  # g; the last group of a row is what is left
    inputs: int  # I, which the packed values do not tell


def quantise(weight: Float[Array, "O I"], bits: int, group_size: int = 0) -> Quantised:
    """q and s of a matrix. A group size of 0 (or above I) is one group per row: a scale per output channel.

    Where g does not divide I the last group of a row is smaller. Raises ValueError for bits other than 8 or
    4, for a negative group size, and for a weight that is no finite number.
    """
    if bits not in LIMITS:
        raise ValueError(f"bits is {bits}, but must be 8 or 4")
    if group_size < 0:
        raise ValueError(f"group_size is {group_size}, but must be 0 (one scale per channel) or more")
    if not np.isfinite(weight).all():
        raise ValueError("a weight is no finite number")
    outputs, inputs = weight.shape
    g = min(group_size or inputs, inputs)
    padded = np.pad(weight, ((0, 0), (0, -inputs % g)))  # zeros change no group's maximum
    groups = padded.reshape(outputs, -1, g)  # (O, G, g)
    scales = np.maximum(np.abs(groups).max(axis=-1) / LIMITS[bits], np.finfo(weight.dtype).tiny)  # (O, G)
    values = np.rint(groups / scales[..., None]).astype(np.int8)
    values = values.reshape(outputs, -1)[:, :inputs]  # (O, I)
    return Quantised(pack(values) if bits == 4 else values, scales, bits, g, inputs)


def pack(values: Int8[Array, "O I"]) -> UInt8[Array, "O J"]:
    """Two 4-bit numbers to a byte, J = ceil(I / 2), each in two's complement.

    Byte j of a row holds column j in its low half and column j + J in its high half (0 where I is odd and the
    last column has no partner). So the unpacked columns lie one after the other, and need not be interleaved.
    """
    half = -(-values.shape[1] // 2)
    nibbles = np.pad(values, ((0, 0), (0, values.shape[1] % 2))).view(np.uint8) & 15
    return nibbles[:, :half] | nibbles[:, half:] << 4


def unpack(packed: UInt8[Array, "O J"], inputs: int) -> Int8[Array, "O {inputs}"]:
    """The numbers that were packed. A shift to the left and back to the right repeats the sign bit."""
    signed = packed.view(np.int8)
    low, high = (signed << 4) >> 4, signed >> 4
    return np.concatenate([low, high], axis=1)[:, :inputs]


def dequantise(quantised: Quantised) -> Float[Array, "O I"]:
    """W_oi = q_oi s_og, in the dtype of the scales."""
    values, scales, bits, g, inputs = quantised
    if bits == 4:
        values = unpack(values, inputs)
    return values * np.repeat(scales, g, axis=1)[:, :inputs]


def quantised_linear(
    x: Float[Array, "*rows I"], quantised: Quantised, bias: Float[Array, "O"] | None
) -> Float[Array, "*rows O"]:
    """y = x W^T + b with the dequantised W; b is not quantised, and may be None."""
    return linear_forward(x, dequantise(quantised), bias)[0]
