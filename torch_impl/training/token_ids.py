"""Where the token ids of a text lie: on the device that computes, or else on the host, in their file."""

import numpy as np
import torch
from jaxtyping import Integer, UInt
from numpy import ndarray as Array
from torch import Tensor

from torch_impl.training.memory import free_memory_of, ran_out

_COPIED_AT_ONCE = 1 << 24  # ids
_SHARE = 0.5
"""The most that ids take of a device's free memory: the model needs the rest."""


def tokens_on(device: torch.device, ids: UInt[Array, "N"]) -> Integer[Tensor, "N"]:
    """A copy on the device, in a type that GPUs can index; on the CPU, and where the device has no room for
    them, the ids themselves, which are in memory only where they are read."""
    if device.type == "cpu":
        return torch.from_numpy(ids)
    dtype, free = _indexed(ids), free_memory_of(device)
    if free is not None and ids.size * dtype.itemsize > _SHARE * free:
        return torch.from_numpy(ids)
    try:
        return _copied(device, ids, dtype)
    except RuntimeError as error:  # of a device that does not tell how much is free
        if not ran_out(error):
            raise
        return torch.from_numpy(ids)


def _indexed(ids: UInt[Array, "N"]) -> torch.dtype:
    """Of the types without a sign, GPUs index uint8 alone."""
    if ids.itemsize == 2 and ids.size and ids.max() >= 2**15:
        return torch.int32
    return {1: torch.uint8, 2: torch.int16}.get(ids.itemsize, torch.int32)


def _copied(device: torch.device, ids: UInt[Array, "N"], dtype: torch.dtype) -> Integer[Tensor, "N"]:
    tokens = torch.empty(ids.size, dtype=dtype, device=device)
    for start in range(0, ids.size, _COPIED_AT_ONCE):
        part = ids[start : start + _COPIED_AT_ONCE].astype(np.int64)
        tokens[start : start + _COPIED_AT_ONCE] = torch.from_numpy(part).to(dtype).to(device)
    return tokens
