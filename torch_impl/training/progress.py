"""How far a run is: what training.json keeps, and what is checked of it before it is believed."""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ref_numpy.config import ConfigError
from torch_impl.training.config import RunConfig, parse_json, read_config
from torch_impl.training.files import InputError, whole_folder
from torch_impl.training.history import Resumed, history, settings_before
from torch_impl.training.telemetry import Row

OWED = ("learning_rate", "grad_norm")
"""What an evaluation tells of the last step, and has to be kept where it is put off."""
_LOSS_SCALE = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


@dataclass
class Progress:
    """How far a run is, beside its weights and moments."""

    corpus: str  # sha256 of the text, which a resumed run must find again
    step: int = 0  # finished steps
    best_step: int = 0
    best_val_loss: float | None = None  # before the first evaluation, None
    no_better: int = 0  # evaluations since the best one
    loss_sum: float = 0.0  # of the steps since the last evaluation ...
    loss_count: int = 0  # ... and how many they are
    seconds: float = 0.0  # spent so far, in all sessions
    loss_scale: dict[str, float] | None = None  # of float16's GradScaler
    owed: dict[str, float | None] | None = None  # of OWED, where the last step's evaluation was put off
    processes: int = 0  # that train it now; 0 where that is not known ...
    on_a_machine: int = 0  # ... and how many of them on one machine
    resumed: list[Resumed] = field(default_factory=list)  # in their order, for the commands that repeat it

    def go_on(self, old: RunConfig, new: RunConfig, processes: int, on_a_machine: int) -> bool:
        """Remember what a --resume changes, and say whether it changes anything. What it changes before the
        first step is how the run begins."""
        before = (self.processes, self.on_a_machine) if self.processes else (processes, on_a_machine)
        change = Resumed(self.step, settings_before(old, new), *before)
        self.processes, self.on_a_machine = processes, on_a_machine
        if not change.leads_elsewhere(self):
            return False
        last = self.resumed[-1] if self.resumed else None
        if last is not None and last.step == self.step and not last.ended_in(old):  # nothing was done with it
            change = self.resumed.pop().and_then(change, new)
        if self.step and change.leads_elsewhere(self):
            self.resumed.append(change)
        return True

    def forget_best(self, rows: list[Row]) -> None:
        """This step is to be the best so far, and evaluated again, with what is known of it besides."""
        self.best_val_loss, self.no_better = None, 0
        for row in rows:
            if row["step"] == self.step:
                self.owed = {name: row[name] for name in OWED}
                self.loss_sum, self.loss_count = row["train_loss"] or 0.0, int(row["train_loss"] is not None)

    @property
    def next_row(self) -> int:
        """The step of the first evaluation that is still to be written."""
        return self.step if self.best_val_loss is None or self.owed is not None else self.step + 1

    def is_weary(self, patience: int, steps: int) -> bool:
        """Whether so many evaluations in a row were no better that the run ends before its last step; a
        patience of 0 has no end."""
        return 0 < patience <= self.no_better and self.owed is None and self.step < steps


def load_progress(folder: Path) -> Progress:
    """training.json of a checkpoint. Raises InputError where it is missing, damaged or foreign."""
    path = whole_folder(folder) / "training.json"
    try:
        values = parse_json(path.read_bytes())
        del values["format_version"]
        unnamed = {"owed": None, "no_better": 0, "resumed": [], "processes": 0, "on_a_machine": 0}
        values = unnamed | values  # which older ones do not name
        _check_progress(values)
        values["resumed"] = [Resumed(**each) for each in values["resumed"]]
        history(read_config(folder), values["resumed"])
    except FileNotFoundError as error:
        raise InputError(f"{folder} is incomplete: no {path.name}") from error
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from error
    return Progress(**values)


def _check_progress(values: dict[str, Any]) -> None:
    if set(values) != {field.name for field in fields(Progress)}:
        raise ConfigError("values are missing or unknown")
    whole = all(
        type(values[name]) is int and 0 <= values[name] < 2**63
        for name in ("step", "best_step", "no_better", "loss_count", "processes", "on_a_machine")
    )
    objects = ("loss_scale", _LOSS_SCALE), ("owed", set(OWED))
    known = all(
        value is None or (isinstance(value, dict) and set(value) == names)
        for value, names in ((values[name], names) for name, names in objects)
    )
    if not whole or not known or not isinstance(values["corpus"], str):
        raise ConfigError("a value is of the wrong kind")
    best = values["best_val_loss"]
    numbers = [0.0 if best is None else best, values["loss_sum"], values["seconds"]]
    numbers += (values["loss_scale"] or {}).values()
    owed = (values["owed"] or {}).values()
    if not all(_is_number(number) for number in numbers) or not all(
        number is None or type(number) is float for number in owed
    ):
        raise ConfigError("a value is no number")
    _check_resumed(values["resumed"], values["step"])


def _check_resumed(listed: Any, step: int) -> None:
    if not isinstance(listed, list) or not all(
        isinstance(each, dict)
        and {name: type(value) for name, value in each.items()}
        == {"step": int, "before": dict, "processes": int, "on_a_machine": int}
        for each in listed
    ):
        raise ConfigError("a value is of the wrong kind")
    if not all(1 <= each["on_a_machine"] <= each["processes"] for each in listed):
        raise ConfigError("resumed: on_a_machine is not between 1 and processes")
    steps = [1, *(each["step"] for each in listed), step]
    if listed and steps != sorted(steps):
        raise ConfigError("resumed: the steps are not in their order")


def _is_number(value: Any) -> bool:
    """Whether it is what a float can be; JSON's integers have no end."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
