"""Rotary positions: queries and keys turn with their place. The twin of ref_numpy/rope.py."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ref_numpy.config import ModelConfig


class Rotation(NamedTuple):
    """The angles of some places, as cosines and sines, for all heads alike."""

    cos: Float[Tensor, "*B T 1 half"]
    sin: Float[Tensor, "*B T 1 half"]
    interleaved: bool

    def turn(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T D"]:
        """Each pair (a, b) becomes (a cos - b sin, a sin + b cos).

        In memory the heads of a place stay side by side, as the projections write and read them: attention
        lays out what it finds as its queries are, and it would else be copied.
        """
        cos, sin, x = self.cos.to(x.dtype), self.sin.to(x.dtype), x.transpose(1, 2)
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        else:
            a, b = x.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return turned.transpose(1, 2)


def rope_angles(places: Integer[Tensor, "*B T"], config: ModelConfig) -> Float[Tensor, "*B T half"]:
    """angle_ti = t / scale * base^(-2i/D) for pair i, in float64."""
    pairs = torch.arange(0, config.head_width, 2, dtype=torch.float64)
    return (places.double() / config.rope_scale)[..., None] / config.rope_base ** (pairs / config.head_width)


class RotaryPositions(nn.Module):
    """Holds the angles of all places of the context, computed once; they are no parameters and not saved."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._fill(torch.get_default_dtype(), "cpu")

    def _fill(self, dtype: torch.dtype, device: torch.device | str) -> None:
        angles = rope_angles(torch.arange(self.config.context_length), self.config)
        self.register_buffer("cos", angles.cos().to(device, dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(device, dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryPositions":
        """A model moved to another precision computes its table anew: a rounded one would stay rounded."""
        super()._apply(fn, recurse)
        self._fill(self.cos.dtype, self.cos.device)
        return self

    def forward(self, places: Integer[Tensor, "*B T"]) -> Rotation:
        """What turns the queries and keys at these places."""
        cos, sin = self.cos[places][..., None, :], self.sin[places][..., None, :]
        return Rotation(cos, sin, self.config.rope_layout == "interleaved")
