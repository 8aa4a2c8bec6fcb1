"""Rotary positions: queries and keys turn with their place. The twin of ref_numpy/rope.py."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ref_numpy.config import ModelConfig


class Rotation(NamedTuple):
    """What turns the features at some places, in all heads alike: the cosine of its pair's angle for each,
    and the sine, negative for the first of a pair."""

    cos: Float[Tensor, "*B T 1 D"]
    sin: Float[Tensor, "*B T 1 D"]
    interleaved: bool

    def turn(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T D"]:
        """Each pair (a, b) becomes (a cos - b sin, b cos + a sin).

        In memory the heads of a place stay side by side, as the projections write and read them: attention
        lays out what it finds as its queries are, and it would else be copied.
        """
        cos, sin, x = self.cos.to(x.dtype), self.sin.to(x.dtype), x.transpose(1, 2)
        if self.interleaved:
            others = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            others = x.roll(x.shape[-1] // 2, dims=-1)
        return torch.addcmul(x * cos, others, sin).transpose(1, 2)


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
        interleaved = self.config.rope_layout == "interleaved"

        def by_feature(first: Tensor, second: Tensor) -> Tensor:  # of a pair
            if interleaved:
                return torch.stack([first, second], dim=-1).flatten(-2)[..., None, :]
            return torch.cat([first, second], dim=-1)[..., None, :]

        cos, sin = self.cos[places], self.sin[places]
        return Rotation(by_feature(cos, cos), by_feature(-sin, sin), interleaved)
