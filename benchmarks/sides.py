"""Sides of a comparison: models in training, step by step. Here torch_impl; its peers are in peers.py."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from torch_impl.data import sample_batch
from torch_impl.float8 import use_float8
from torch_impl.train import evaluate, start, train_steps
from torch_impl.training.captured import CudaGraphs
from torch_impl.training.config import RunConfig
from torch_impl.transformer import initialised


class Side(NamedTuple):
    """A model in training: its steps, one by one, and its loss on the held-out text so far."""

    steps: Iterator[None]
    held_out_loss: Callable[[], float]


def torch_side(
    train: np.ndarray,
    valid: np.ndarray,
    _: str,
    config: RunConfig,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    compiled: bool = False,
    float8: bool = False,
    cuda_graph: bool = False,
) -> Side:
    """torch_impl, driven as a run drives it."""
    model = initialised(config.model, config.training.seed, dtype, device)
    if float8:
        use_float8(model)
    tokens = torch.from_numpy(train).to(device)
    sample = partial(sample_batch, tokens, config.model.context_length)

    def steps() -> Iterator[None]:
        state = start(model, config.training, compiled)
        if cuda_graph:
            state.recorder = CudaGraphs()
        for step, metrics in enumerate(train_steps(state, sample, config.training)):
            if step % config.run.log_every == 0:
                metrics.loss.item()
            yield

    return Side(steps(), lambda: evaluate(model, torch.from_numpy(valid).to(device)))
