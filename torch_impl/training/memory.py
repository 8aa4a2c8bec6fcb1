"""What a run needs of memory, at least, and what is said when there is no more.

Linux and macOS promise memory that they do not have, and kill the process that comes to use it: a model that
can never fit is refused before. Windows and GPUs keep their promises, and so does `ulimit -v`, so there the
allocation itself fails.
Not here: what other processes take.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ref_numpy.config import ModelConfig
from torch_impl.attention import products_pay
from torch_impl.training.config import RunConfig
from torch_impl.training.costs import parameter_count
from torch_impl.training.counting import in_bytes
from torch_impl.training.device import Place
from torch_impl.training.files import InputError
from torch_impl.training.footprint import (
    Kernels,
    TrainingBytes,
    kv_cache_bytes,
    process_bytes,
    training_bytes,
)
from torch_impl.training.memory_limits import group_limits, own_limits
from torch_impl.training.ranks import ALONE, Ranks

_FILLED = 0.75  # of the memory that is free, by --batch-size auto


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
    size = {"bfloat16": 2, "float16": 2, "float8": 1}.get(config.run.precision, 4)  # of float8, some have 2
    half = size < 4  # whose attention may be by products, which keep the least
    kernels = Kernels(size, recomputed=config.run.checkpoint_activations, by_products=half)
    return training_bytes(model, training, kernels).peak * ranks.local_size


class OutOfMemory(MemoryError):
    """A training step found no room. The message is one line: what needed how much, and what would fit."""


@contextmanager
def accounted(config: RunConfig, place: Place, ranks: Ranks) -> Iterator[None]:
    """Within the block, memory that runs out raises OutOfMemory. Then there is some again, for the report:
    where OpenBLAS finds none, it ends the process."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold all tensors of the step
        raise OutOfMemory(_needs(config, place, ranks)) from error


def ran_out(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of a GPU, whose libraries take some of their own."""
    signs = "out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def memory_of(device: torch.device, processes: int = 1) -> int | None:
    """The memory of a device, used or not, that so many processes like this one may take together, in bytes:
    all of it, or what the limits on them leave; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None
    most = [limit.most for limit in group_limits()] + [limit.most * processes for limit in own_limits()]
    if (machine := machine_memory()) is not None:
        most.append(machine)
    return max(min(most), 0) if most else None


def machine_memory() -> int | None:
    """All that the machine has, in bytes; None where the system does not tell."""
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fewest_micro_batches(config: RunConfig, place: Place, room: int | float, ranks: Ranks) -> int | None:
    """Of the numbers that divide the batch, the smallest whose step needs no more than `room` bytes in one of
    the processes; None where even single sequences need more."""
    rows = config.training.batch_size
    counts = (m for m in range(1, rows + 1) if rows % m == 0 and rows // m % ranks.size == 0)
    return next((m for m in counts if step_bytes(config, place, m, ranks).peak <= room), None)


def step_bytes(config: RunConfig, place: Place, micro_batches: int, ranks: Ranks) -> TrainingBytes:
    """What a step needs in one process, by parts; a sharded one holds its part of all but the activations."""
    training = replace(config.training, micro_batches=micro_batches)
    on_cpu = place.device.type == "cpu"  # float8 keeps somewhat less than is counted here
    keys = config.model.kv_heads * config.model.head_width * config.model.context_length
    sequences = training.batch_size // micro_batches // ranks.size
    by_products = products_pay(place.device, place.dtype, sequences * keys)
    kernels = Kernels(place.dtype.itemsize, on_cpu, config.run.checkpoint_activations, by_products)
    return process_bytes(config.model, training, kernels, ranks.size, config.run.shard)


def fitted(config: RunConfig, place: Place, ranks: Ranks) -> RunConfig:
    """The config with as few micro-batches as memory that is free has room for: --batch-size auto.

    By the account, which counts the least that is needed: so three quarters of the room are filled. Processes
    of one machine that compute on its CPU share its memory, and all take the smallest answer of any.
    """
    processes = ranks.local_size if place.device.type == "cpu" else 1
    free = free_memory_of(place.device, processes)
    if free is None:
        raise InputError(
            f"--batch-size auto: how much memory {place.device} has is not known here; give a number, and "
            "--micro-batches"
        )
    room = _FILLED * free / processes
    fewest = fewest_micro_batches(config, place, room, ranks)
    if fewest is None:
        needed = step_bytes(config, place, config.training.batch_size // ranks.size, ranks).peak
        raise InputError(
            f"--batch-size auto: a single sequence needs {in_bytes(needed)} at least, and of "
            f"{in_bytes(free)} that are free {_FILLED:.0%} may be filled: reduce --d-model, --n-layer or "
            "--context-length"
        )
    micro_batches = ranks.largest(fewest)
    return replace(config, training=replace(config.training, micro_batches=micro_batches))


def free_memory_of(device: torch.device, processes: int = 1) -> int | None:
    """The memory of a device that nobody uses and that so many processes like this one may take together, in
    bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    total = memory_of(device)
    if device.type != "cpu" or total is None:
        return None
    free = [limit.most - limit.held for limit in group_limits()]
    free += [(limit.most - limit.held) * processes for limit in own_limits()]
    told = Path("/proc/meminfo")  # of Linux, which lends much of its memory to copies of files
    lines = told.read_text(encoding="ascii").splitlines() if told.exists() else []
    available = dict(line.split(":", 1) for line in lines).get("MemAvailable")
    free.append(int(available.split()[0]) * 1024 if available else total // 2)
    return max(min(free), 0)


def peak_memory(device: torch.device) -> int | None:
    """The most that this process has held so far, of a GPU's memory or else of the machine's, in bytes; None
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _needs(config: RunConfig, place: Place, ranks: Ranks) -> str:
    room = _room(place.device, ranks)
    training, context = config.training, config.model.context_length
    held = step_bytes(config, place, training.micro_batches, ranks)
    parts = ", ".join(f"{name} {in_bytes(part)}" for name, part in held._asdict().items() if name != "peak")
    message = (
        f"out of memory with batch_size {training.batch_size} in {training.micro_batches} micro_batches and "
        f"context_length {context}; a step needs {in_bytes(held.peak)} at least: {parts}"
    )
    recompute = "" if config.run.checkpoint_activations else "; or use --checkpoint-activations"
    if room is not None:
        message += f"; there are {in_bytes(room)}"
    # What has just failed did not fit, whatever was counted: so less than that, by a tenth at least.
    fewest = fewest_micro_batches(config, place, 0.9 * min(room or held.peak, held.peak), ranks)
    if fewest is None or fewest <= training.micro_batches:
        return f"{message}. Reduce --d-model, --n-layer or --context-length{recompute}"
    return (
        f"{message}. The largest batch that fits, with the same result: --micro-batches {fewest}, "
        f"{training.batch_size // fewest // ranks.size} at a time{recompute}"
    )


def _room(device: torch.device, ranks: Ranks) -> int | None:
    """What one process can have of a device's memory, in bytes. On a GPU that others use too: what is free
    and what the process has itself."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    together = memory_of(device, ranks.local_size)
    return together and together // ranks.local_size


def refuse_what_cannot_fit(config: RunConfig, device: torch.device, ranks: Ranks) -> None:
    """Raises InputError for a run that needs more memory than the machine has, or lets it take."""
    present = memory_of(torch.device("cpu"), ranks.local_size)
    needed = needed_bytes(config, device, ranks)
    if present is not None and needed > present:
        raise InputError(
            f"{parameter_count(config.model):,} parameters and their training need {in_bytes(needed)} of "
            f"memory at least, but {_present(present)}: reduce --d-model, --n-layer, --batch-size or "
            "--context-length, or raise --micro-batches"
        )


def _present(limit: int) -> str:
    """What memory there is, of which no more than `limit` is for this process."""
    machine = machine_memory() or limit
    has = f"this machine has {in_bytes(machine)}"
    if limit >= machine:
        return has
    return f"{has}, and a limit on this process (its container's, or ulimit -v) leaves it {in_bytes(limit)}"


def refuse_context_beyond_memory(folder: Path, model: ModelConfig, size: int) -> None:
    """Raises InputError where what a model keeps for each place of its context, which no tensor of its files
    vouches for, is more than the machine has: a table of positions, and keys and values of so many bytes."""
    limit = memory_of(torch.device("cpu"))
    # In float64, as they are computed: a cosine and a sine of each pair, or a number of each feature.
    table = {"rope": 8 * model.head_width, "sinusoidal": 8 * model.d_model}.get(model.positions, 0)
    needed = model.context_length * (table + kv_cache_bytes(model, size).token)
    if limit is not None and needed > limit:
        raise InputError(
            f"{folder / 'config.json'}: context_length {model.context_length} takes {in_bytes(needed)}, but "
            f"{_present(limit)}; make it smaller there"
        )
