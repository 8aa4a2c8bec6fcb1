"""Rotary positions (Su et al. 2021, section 3.4.2): queries and keys turn with their place.

A score then depends on how far apart two tokens are, and not on where they are. The paper pairs features 2i
and 2i + 1 (interleaved), Hugging Face's Llama i and i + D/2 (half): the same for a permuted head.
Shapes: B batch, H heads, T time, D head width, an even number.
Not here: absolute positions (see positions.py), scalings other than linear, heads turned in part.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray as Array

from ref_numpy.config import ModelConfig


class RopeCache(NamedTuple):
    cos: Array  # of the angles, (T, D/2), or (B, 1, T, D/2) where sequences have places of their own
    sin: Array
    layout: str


def rope_angles(places: Integer[Array, "*B T"], config: ModelConfig) -> Float[Array, "*B T half"]:
    """angle_ti = t / scale * base^(-2i/D) for pair i, in float64.

    A scale above 1 is linear position interpolation (Chen et al. 2023): that much longer a text keeps within
    the angles that a model was trained on.
    """
    pairs = np.arange(config.head_width // 2)
    frequency = config.rope_base ** (-2.0 * pairs / config.head_width)
    return (places / config.rope_scale)[..., None] * frequency


def _split_pairs(x: Array, layout: str) -> tuple[Array, Array]:
    """The first and the second features of all pairs: i and i + D/2, or 2i and 2i + 1."""
    half = x.shape[-1] // 2
    return (x[..., :half], x[..., half:]) if layout == "half" else (x[..., 0::2], x[..., 1::2])


def _join_pairs(a: Array, b: Array, layout: str) -> Array:
    if layout == "half":
        return np.concatenate([a, b], axis=-1)
    return np.stack([a, b], axis=-1).reshape(*a.shape[:-1], 2 * a.shape[-1])


def rope_forward(
    x: Float[Array, "B H T D"], places: Integer[Array, "*B T"], config: ModelConfig
) -> tuple[Float[Array, "B H T D"], RopeCache]:
    """Each pair (a, b) turns counter-clockwise: (a cos - b sin, a sin + b cos), by the angle of its place."""
    angle = rope_angles(places, config)
    angle = angle[..., None, :, :] if places.ndim == 2 else angle  # all heads alike: (B, 1, T, D/2)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    a, b = _split_pairs(x, config.rope_layout)
    y = _join_pairs(a * cos - b * sin, a * sin + b * cos, config.rope_layout)
    return y, RopeCache(cos, sin, config.rope_layout)


def rope_backward(dy: Float[Array, "B H T D"], cache: RopeCache) -> Float[Array, "B H T D"]:
    """The gradient turns back: the transpose of a rotation is the rotation by the opposite angle."""
    cos, sin, layout = cache
    da, db = _split_pairs(dy, layout)
    return _join_pairs(da * cos + db * sin, db * cos - da * sin, layout)
