"""Batches: windows of a long text of tokens, at random places. The twin of ref_numpy/data.py."""

import torch
from jaxtyping import Integer
from torch import Tensor

from ref_numpy.config import TrainConfig
from ref_numpy.rng import DATA, Key
from torch_impl.rng import uniform


def sample_batch(
    tokens: Integer[Tensor, "N"], context_length: int, step: int | Integer[Tensor, ""], config: TrainConfig
) -> tuple[Integer[Tensor, "M B T"], Integer[Tensor, "M B T"]]:
    """Inputs and targets of a step, gathered where the tokens lie; step may be a tensor.

    Raises ValueError for a text of T tokens or fewer.
    """
    places = tokens.numel() - context_length
    if places < 1:
        raise ValueError(f"a text of {tokens.numel()} tokens has no window of {context_length} + 1")
    device = step.device if isinstance(step, Tensor) else "cpu"
    starts = uniform(Key(config.seed, DATA, step), config.batch_size, device) * places
    offsets = torch.arange(context_length + 1, device=tokens.device)
    windows = tokens[starts.long().to(tokens.device)[:, None] + offsets].long()  # (M B, T + 1)
    windows = windows.view(config.micro_batches, -1, context_length + 1)
    return windows[..., :-1], windows[..., 1:]
