"""Masks: which keys a query may look at. The twin of ref_numpy/masks.py."""

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from ref_numpy.masks import PADDING


def causal_mask(
    length: int, before: int = 0, device: torch.device | str | None = None
) -> Bool[Tensor, "T S"]:
    """mask[t, s] = (s <= t), for the last `length` of before + length tokens as queries."""
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)


def window_mask(
    length: int, window: int, before: int = 0, device: torch.device | str | None = None
) -> Bool[Tensor, "T S"]:
    """mask[t, s] = (t - window < s <= t), likewise."""
    return causal_mask(length, before, device).triu(before + 1 - window)


def padding_mask(present: Bool[Tensor, "B S"]) -> Bool[Tensor, "B 1 1 S"]:
    """mask[b, 0, 0, s] = present[b, s]."""
    return present[:, None, None, :]


def document_mask(documents: Integer[Tensor, "B S"], before: int = 0) -> Bool[Tensor, "B 1 T S"]:
    """mask[b, 0, t, s]: both places belong to one document, and it is not PADDING; t from `before` on."""
    same = documents[:, before:, None] == documents[:, None, :]
    return (same & (documents != PADDING)[:, None, :])[:, None]


def places_in_documents(documents: Integer[Tensor, "B T"]) -> Integer[Tensor, "B T"]:
    """Places counted from the start of each run of one number."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values
