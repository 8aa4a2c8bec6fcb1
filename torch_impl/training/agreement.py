"""What the processes of a run agree on before its first step: each reads what its own machine has."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields

from torch import Tensor

from torch_impl.training.command_line import Request
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError
from torch_impl.training.flags import dashed
from torch_impl.training.ranks import Ranks

_FILES = ("train_file", "valid_file")
"""They may lie elsewhere on each machine: what is in them is compared when it is read."""


def require_same_flags(request: Request, ranks: Ranks) -> None:
    """Raises InputError where processes were started with other settings: each would train a model of its
    own, of which the others have a part or the gradients."""
    first, *others = ranks.gathered(_settings(request))
    for rank, other in enumerate(others, 1):
        for name in first:
            if other[name] != first[name]:
                raise InputError(
                    f"--{dashed(name)} is {other[name]} in process {rank}, and {first[name]} in process 0; "
                    "start all of them with the same flags"
                )


def _settings(request: Request) -> dict[str, object]:
    config = request.config
    settings = {
        field.name: getattr(part, field.name)
        for part in (config.model, config.training, config.run)
        for field in fields(part)
        if field.name not in _FILES
    }
    given = {"resume": request.resume, "init_from": request.init_from}
    settings |= {name: "left out" if folder is None else "given" for name, folder in given.items()}
    return settings | ({"batch_size": "auto"} if request.fit else {})


def refuse_uneven(request: Request, ranks: Ranks) -> None:
    """Raises InputError for a batch that does not divide among the processes."""
    config = request.config.training
    micro_batches = 1 if request.fit else config.micro_batches
    rows, unit = config.batch_size // micro_batches, micro_batches * ranks.size
    if rows % ranks.size:
        larger = f"--batch-size {-(-config.batch_size // unit) * unit}, "  # which a resumed run has settled
        raise InputError(
            f"batch_size {config.batch_size} in {micro_batches} micro_batches is {counted(rows, 'sequence')} "
            f"at a time, which do not divide among {ranks.size} processes; "
            f"use {'' if request.resume else larger}"
            "other --micro-batches or another --nproc-per-node"
        )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of their names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode("utf-8"))
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()
