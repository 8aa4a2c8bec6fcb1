"""The command that repeats a run: its preset, and a flag for each setting that differs from it."""

import os
import shlex
import subprocess
from dataclasses import fields
from typing import Any

from torch_impl.training.config import RunConfig
from torch_impl.training.flags import dashed
from torch_impl.training.presets import PRESETS


def as_typed(arguments: list[str]) -> str:
    """A command line as this system's shell takes it, whatever characters are in it."""
    return subprocess.list2cmdline(arguments) if os.name == "nt" else shlex.join(arguments)


def arguments_of(config: RunConfig) -> list[str]:
    """What train_gpu.py has to be given for this config. The vocabulary of the model is its tokenizer's."""
    preset = PRESETS.get(config.preset, PRESETS["cpu"])  # one may have gone since
    flags = [preset.preset]
    for part in ("run", "tokenizer", "start", "training", "model"):
        usual, wanted = getattr(preset, part), getattr(config, part)
        for field in fields(wanted):
            value = getattr(wanted, field.name)
            if value != getattr(usual, field.name) and (part, field.name) != ("model", "vocab_size"):
                flags += _flag(dashed(field.name), value)
    return flags


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *value]
    return [f"--{name}", str(value)]


def command_of(config: RunConfig, processes: int = 1, on_a_machine: int = 1) -> str:
    """The command that repeats a run, among as many processes."""
    return as_typed([*program(processes, on_a_machine), *arguments_of(config)])


def program(processes: int, on_a_machine: int) -> list[str]:
    """How a command begins that trains among so many processes, with HOST for where machines meet."""
    if processes == 1:
        return ["python", "train_gpu.py"]
    among = ["--nproc-per-node", str(on_a_machine)]
    if processes > on_a_machine:
        nodes = str(processes // on_a_machine)
        among = ["--nnodes", nodes, *among, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    return ["torchrun", *among, "train_gpu.py"]
