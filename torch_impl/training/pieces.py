"""Pieces of unequal length, such as the bytes of tokens or the ids of words, and any of them in a row."""

import numpy as np
from jaxtyping import Int, Integer, Shaped
from numpy import ndarray as Array


class Pieces:
    """Numbered pieces, which lie in one array."""

    def __init__(self, flat: Shaped[Array, "N"], lengths: Int[Array, "P"]):
        self.flat, self.lengths = flat, lengths
        self.starts = np.cumsum(lengths) - lengths
        self.size, self.end = lengths.size, flat.size  # the arrays may have room for more

    def row(self, numbers: Integer[Array, "K"]) -> Shaped[Array, "_"]:
        """The pieces with these numbers, one after the other."""
        lengths = self.lengths[numbers]
        ends = np.cumsum(lengths)
        places = np.repeat(self.starts[numbers] - ends + lengths, lengths)  # from where to where
        places += np.arange(places.size)
        return self.flat[places]

    def add(self, flat: Shaped[Array, "N"], lengths: Int[Array, "P"], order: Int[Array, "P"]) -> None:
        """New pieces, which lie in `flat`; they take the next numbers, `order` tells which of them."""
        starts = np.cumsum(lengths) - lengths + self.end
        self.flat = _with_room(self.flat, self.end, flat.size)
        self.lengths = _with_room(self.lengths, self.size, order.size)
        self.starts = _with_room(self.starts, self.size, order.size)
        self.flat[self.end : self.end + flat.size] = flat
        self.lengths[self.size + order], self.starts[self.size + order] = lengths, starts
        self.size, self.end = self.size + order.size, self.end + flat.size


def _with_room(array: Shaped[Array, "_"], used: int, more: int) -> Shaped[Array, "_"]:
    """The array, or a copy of twice the size: so many small additions take no longer than one large one."""
    if used + more <= array.size:
        return array
    larger = np.empty(max(used + more, 2 * array.size), array.dtype)
    larger[:used] = array[:used]
    return larger
