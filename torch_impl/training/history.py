"""What a run has been through: the settings that each --resume changed, and the numbers of its processes.

A checkpoint has the settings of now. Beside them training.json keeps, for each --resume that changed any, how
they were before; so the first ones are found by going back from the last. A change after which no step was
made and nothing evaluated is one with the next. From this repeating.py writes the commands.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

from ref_numpy.config import ConfigError
from torch_impl.training.command_line import CHANGEABLE
from torch_impl.training.config import RunConfig

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
        now, before = settings_of(new), later.before | self.before
        return replace(self, before={name: value for name, value in before.items() if value != now[name]})


def settings_before(old: RunConfig, new: RunConfig) -> dict[str, Any]:
    """The settings that a --resume changes, as they were."""
    now = settings_of(new)
    return {name: value for name, value in settings_of(old).items() if value != now[name]}


def settings_of(config: RunConfig) -> dict[str, Any]:
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
