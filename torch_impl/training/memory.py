"""What a run needs of the machine's memory, at least.

Linux and macOS promise memory that they do not have, and kill the process that comes to use it: a model that
can never fit is refused before. Windows keeps its promises, so there the allocation itself fails.
Not here: the memory of a GPU, whose allocations fail by themselves; what other processes take.
"""

import os
from dataclasses import replace
from math import prod

from ref_numpy.config import ModelConfig
from ref_numpy.parameters import parameter_shapes
from torch_impl.training.config import RunConfig
from torch_impl.training.device import choose_device
from torch_impl.training.files import InputError


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters; counts one layer, however many there are."""
    one, two = (
        sum(prod(shape) for shape in parameter_shapes(replace(model, n_layer=layers)).values())
        for layers in (1, 2)
    )
    return one + (model.n_layer - 1) * (two - one)


def needed_bytes(config: RunConfig) -> int:
    """A lower bound on what a run takes of the machine's memory, in bytes.

    On the CPU: weight, gradient and two moments of each parameter in float32, and what the backward pass
    keeps of a micro-batch in the precision of the computation. For a GPU, the weights, which are made here.
    """
    model, training = config.model, config.training
    weights = 4 * parameter_count(model)
    if choose_device(config.run.device).type != "cpu":
        return weights
    # Sources and targets may be shorter than the context by any length.
    length = 2 if model.architecture == "encoder-decoder" else model.context_length
    tokens = training.batch_size // training.micro_batches * length
    # Of a layer: two norms, their two inputs, q, k, v and the heads' output; both sides of the nonlinearity.
    kept = model.n_layer * (8 * model.d_model + 2 * model.ffn_width) + model.vocab_size
    size = 4 if config.run.precision in ("auto", "float32") else 2
    return 4 * weights + size * tokens * kept


def refuse_what_cannot_fit(config: RunConfig) -> None:
    """Raises InputError for a run that needs more memory than the machine has."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = needed_bytes(config)
    if needed > present:
        raise InputError(
            f"{parameter_count(config.model):,} parameters and their training need {needed / 2**30:,.1f} GiB "
            f"of memory at least, but this machine has {present / 2**30:,.1f}: reduce --d-model, --n-layer, "
            "--batch-size or --context-length, or raise --micro-batches"
        )
