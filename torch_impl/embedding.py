"""Embedding: a token's vector is its row of a table. The twin of ref_numpy/embedding.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn


def embedding(ids: Integer[Tensor, "B T"], weight: Float[Tensor, "V C"]) -> Float[Tensor, "B T C"]:
    """y_bt = W[ids_bt]. An id outside [0, V) raises IndexError on the CPU and is undefined on a GPU."""
    return F.embedding(ids, weight)


class Embedding(nn.Module):
    """Holds the table."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: Integer[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        return embedding(ids, self.weight)
