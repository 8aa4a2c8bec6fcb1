"""What a run needs of the machine's memory, at least.

Linux and macOS promise memory that they do not have, and kill the process that comes to use it: a model that
can never fit is refused before. Windows keeps its promises, so there the allocation itself fails.
Not here: the memory of a GPU, whose allocations fail by themselves; what other processes take.
"""

import os
from dataclasses import replace

import torch

from torch_impl.training.config import RunConfig
from torch_impl.training.costs import parameter_count, training_bytes
from torch_impl.training.files import InputError
from torch_impl.training.ranks import ALONE, Ranks


def needed_bytes(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> int:
    """A lower bound on what a run takes of the machine's memory, in bytes.

    On the CPU, what a training step holds in all processes here. For a GPU, the weights, which are made here.
    """
    if device.type != "cpu" or config.run.shard:
        return 4 * parameter_count(config.model)
    model, training = config.model, config.training
    training = replace(training, batch_size=training.batch_size // ranks.size)
    if model.architecture == "encoder-decoder":  # sources and targets may be shorter by any length
        model = replace(model, context_length=2)
    size = 4 if config.run.precision in ("auto", "float32") else 2
    return training_bytes(model, training, size).peak * ranks.local_size


def refuse_what_cannot_fit(config: RunConfig, device: torch.device, ranks: Ranks) -> None:
    """Raises InputError for a run that needs more memory than the machine has."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = needed_bytes(config, device, ranks)
    if needed > present:
        raise InputError(
            f"{parameter_count(config.model):,} parameters and their training need {needed / 2**30:,.1f} GiB "
            f"of memory at least, but this machine has {present / 2**30:,.1f}: reduce --d-model, --n-layer, "
            "--batch-size or --context-length, or raise --micro-batches"
        )
