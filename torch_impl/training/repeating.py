"""The command that repeats a run: its preset, and a flag for each setting that differs from it; and those
that follow it, where the run went on with other settings."""

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

from ref_numpy.config import ConfigError
from torch_impl.training.command_line import CHANGEABLE
from torch_impl.training.config import RunConfig
from torch_impl.training.flags import as_flag
from torch_impl.training.presets import PRESETS

_PARTS = ("run", "training")  # of a config, that have what --resume may change


@runtime_checkable
class Among(Protocol):
    """The processes that train a run."""

    processes: int
    on_a_machine: int


@dataclass(frozen=True)
class Resumed:
    """A --resume that changed settings of its run, or the number of its processes. Kept is how they were
    before: how they were after it stands in the next one, or in the last state of the run."""

    step: int  # the last before it
    before: dict[str, Any]  # the settings that it changed, as they were
    processes: int  # before
    on_a_machine: int

    def leads_elsewhere(self, now: Among) -> bool:
        """Whether there is another command from here on."""
        before, after = (self.processes, self.on_a_machine), (now.processes, now.on_a_machine)
        return bool(self.before) or before != after

    def ended_in(self, config: RunConfig) -> bool:
        """Whether the run was to end with the very step after which it goes on, which was evaluated then."""
        return "steps" in self.before and config.training.steps == self.step

    def and_then(self, later: "Resumed", new: RunConfig) -> "Resumed":
        """This one and a later one at the same step, as one."""
        now, before = _settings(new), later.before | self.before
        return replace(self, before={name: value for name, value in before.items() if value != now[name]})


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


def settings_before(old: RunConfig, new: RunConfig) -> dict[str, Any]:
    """The settings that a --resume changes, as they were."""
    now = _settings(new)
    return {name: value for name, value in _settings(old).items() if value != now[name]}


def _settings(config: RunConfig) -> dict[str, Any]:
    """Those of the parts that a --resume may change, of whose names none is there twice."""
    return {name: value for part in _PARTS for name, value in asdict(getattr(config, part)).items()}


def history(config: RunConfig, resumed: Sequence[Resumed]) -> list[RunConfig]:
    """The configs that a run has had, of which the last is given. Raises ConfigError where it cannot have had
    them."""
    configs = [config]
    for change in reversed(resumed):
        if not change.before.keys() <= CHANGEABLE:
            raise ConfigError("resumed: a setting is unknown, or not one that --resume may change")
        values = json.loads(configs[-1].to_json())
        for part in _PARTS:
            values[part] |= {name: change.before[name] for name in values[part].keys() & change.before.keys()}
        configs.append(RunConfig.from_json(json.dumps(values).encode("ascii")))
    return configs[::-1]


def resume_command(folder: str, config: RunConfig, changed: Resumed, among: Among) -> str:
    """The command that goes on with the run in a folder, and changes settings to those of the config."""
    now = _settings(config)
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
