"""The commands that repeat a run: its preset, and a flag for each setting that differs from it; and those
that follow, where the run went on with other settings (see history.py)."""

import os
import shlex
import subprocess
from dataclasses import fields

from torch_impl.training.config import RunConfig
from torch_impl.training.flags import as_flag
from torch_impl.training.history import Among, Resumed, settings_of
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
                flags += as_flag(field.name, value)
    return flags


def command_of(config: RunConfig, among: Among, out: str = "") -> str:
    """The command that repeats a run, among as many processes, in a folder of that name if it has one."""
    folder = ["--out", out] if out else []
    return as_typed([*program(among.processes, among.on_a_machine), *arguments_of(config), *folder])


def resume_command(folder: str, config: RunConfig, changed: Resumed, among: Among) -> str:
    """The command that goes on with the run in a folder, and changes settings to those of the config."""
    now = settings_of(config)
    flags = (part for name in changed.before for part in as_flag(name, now[name]))
    return as_typed([*program(among.processes, among.on_a_machine), "--resume", folder, *flags])


def program(processes: int, on_a_machine: int) -> list[str]:
    """How a command begins that trains among so many processes, with HOST for where machines meet."""
    if processes == 1:
        return ["python", "train_gpu.py"]
    nodes, rest = divmod(processes, on_a_machine)
    if nodes == 1 or rest:  # machines with different numbers of them are given different commands
        return ["torchrun", "--nproc-per-node", str(processes), "train_gpu.py"]
    among = ["--nnodes", str(nodes), "--nproc-per-node", str(on_a_machine)]
    return ["torchrun", *among, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500", "train_gpu.py"]
