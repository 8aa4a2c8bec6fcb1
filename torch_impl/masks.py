"""Masks: which keys a query may look at. The twin of ref_numpy/masks.py."""

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from ref_numpy.masks import PADDING


def causal_mask(length: int, device: torch.device | str = "cpu") -> Bool[Tensor, "T T"]:
    """mask[t, s] = (s <= t)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def window_mask(length: int, window: int, device: torch.device | str = "cpu") -> Bool[Tensor, "T T"]:
    """mask[t, s] = (t - window < s <= t)."""
    return causal_mask(length, device).triu(1 - window)


def padding_mask(present: Bool[Tensor, "B S"]) -> Bool[Tensor, "B 1 1 S"]:
    """mask[b, 0, 0, s] = present[b, s]."""
    return present[:, None, None, :]


def document_mask(documents: Integer[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """mask[b, 0, t, s]: both places belong to one document, and it is not PADDING."""
    same = documents[:, :, None] == documents[:, None, :]
    return (same & (documents != PADDING)[:, None, :])[:, None]


def places_in_documents(documents: Integer[Tensor, "B T"]) -> Integer[Tensor, "B T"]:
    """Places counted from the start of each run of one number."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values
