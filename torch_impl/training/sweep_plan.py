"""Which runs a sweep is made of: one for each combination of the varied settings, and for each seed."""

import argparse
import csv
import hashlib
import itertools
import re
import time
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, NoReturn

from ref_numpy.config import ConfigError, ModelConfig, TrainConfig
from torch_impl.training.command_line import Request, parse
from torch_impl.training.config import RunSettings, StartSettings, TokenizerSettings
from torch_impl.training.files import InputError
from torch_impl.training.flags import check_text, dashed
from torch_impl.training.repeating import as_typed

_NOT_VARIED = {"out", "resume", "cache", "profile", "no-profile"}
_LONGEST = 120  # characters of a folder's name
_SWITCHES = {
    dashed(field.name)
    for part in (ModelConfig, TrainConfig, RunSettings, TokenizerSettings, StartSettings)
    for field in fields(part)
    if field.type is bool
}
_DESCRIPTION = """\
Train one model for each combination of some settings, and for each seed, one
after another, and compare them in a table. A sweep that was stopped goes on
with the same command and --out.

  python train_gpu.py sweep cpu --vary learning_rate=1e-3,4e-3 --vary n_layer=2,4
  python train_gpu.py sweep cpu --vary bias=true,false --seeds 3 --steps 500

PRESET and all other flags are those of train_gpu.py, and hold for all runs."""


class Trial(NamedTuple):
    """A run of the sweep."""

    name: str  # of its folder
    settings: dict[str, str]  # that are varied, as they were typed
    seed: int
    arguments: list[str]  # for train_gpu.py
    request: Request  # what that makes of them


class Plan(NamedTuple):
    """What the command line asks for."""

    folder: Path
    trials: list[Trial]
    command: str  # that goes on with it


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def make_plan(arguments: list[str]) -> Plan:
    """Raises InputError on a mistake, in any of the runs; exits after --help."""
    parser = _Parser(
        "train_gpu.py sweep",
        usage="train_gpu.py sweep [PRESET] --vary NAME=VALUE,VALUE... [--seeds N] [--out FOLDER] [FLAGS]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=VALUE,VALUE...",
        help='a flag and its values; true and false for a switch, "..." around a value with a comma; again '
        "for another flag",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each combination, from --seed on (1)")
    parser.add_argument("--out", default="", help="folder of the sweep (runs/sweep-DATE-TIME)")
    own, rest = parser.parse_known_args(arguments)
    varied = dict(map(_values, own.vary))
    if len(varied) < len(own.vary):
        raise InputError("--vary names a setting twice; give all its values at once")
    if own.seeds < 1:
        raise InputError(f"--seeds {own.seeds}, but there must be 1 at least")
    if not varied and own.seeds == 1:
        raise InputError("nothing to compare: give --vary NAME=VALUE,VALUE or --seeds; see sweep --help")
    if "seed" in varied and own.seeds > 1:
        raise InputError("--vary seed and --seeds both name seeds; leave one of them out")
    check_text("--out", own.out)
    folder = Path(own.out or f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    trials = [
        _trial(rest, dict(zip(varied, values, strict=True)), number)
        for values in itertools.product(*varied.values())
        for number in range(own.seeds)
    ]
    if len({trial.name.casefold() for trial in trials}) < len(trials):
        raise InputError("two values differ in characters alone that no folder can be named by; rename them")
    again = [arg for name in own.vary for arg in ("--vary", name)]
    again += ["--seeds", str(own.seeds)] * (own.seeds > 1)
    command = as_typed(["python", "train_gpu.py", "sweep", *rest, *again, "--out", str(folder)])
    return Plan(folder, trials, command)


def _values(vary: str) -> tuple[str, list[str]]:
    """A setting and its values."""
    name, equals, listed = vary.partition("=")
    values = [value.strip() for value in next(csv.reader([listed], skipinitialspace=True), [])]
    if not equals or not name.strip() or not values or not all(values):
        raise InputError(f"--vary {vary}: write it as NAME=VALUE,VALUE, such as learning_rate=1e-4,3e-4")
    if len(set(values)) < len(values):
        raise InputError(f"--vary {vary}: a value stands there twice")
    name = dashed(name.strip().removeprefix("--"))
    if name in _NOT_VARIED:
        raise InputError(f"--vary {vary}: {name} is no setting of a model or its training")
    return name, values


def _trial(base: list[str], settings: dict[str, str], number: int) -> Trial:
    """A run with the settings and the seed of that number. Raises InputError where it cannot be trained."""
    typed = {name.replace("-", "_"): value for name, value in settings.items()}
    arguments = [*base, *(_flag(*setting) for setting in settings.items())]
    request, mistake = _parsed(arguments)
    if request is None:
        shown = " ".join(f"{name}={value}" for name, value in typed.items())
        to_blame = "" if _parsed(base)[1] == mistake else f"--vary {shown}: "
        raise InputError(to_blame + mistake)
    if request.resume:
        raise InputError("a sweep goes on with the same command and its --out; leave out --resume")
    if "seed" not in settings:
        arguments.append(f"--seed={request.config.training.seed + number}")
        request = parse(arguments)
    for file in (request.config.run.train_file, request.config.run.valid_file):
        if file and not Path(file).is_file():
            raise InputError(f"cannot read {file}: no such file")
    seed = request.config.training.seed
    parts = typed if "seed" in typed else typed | {"seed": str(seed)}
    name = re.sub(r"[^\w.+=,-]", "_", ",".join(f"{key}={value}" for key, value in parts.items()))
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Trial(name, typed, seed, arguments, request)


def _parsed(arguments: list[str]) -> tuple[Request | None, str]:
    """What the arguments ask for, or what is wrong with them."""
    try:
        return parse(arguments), ""
    except (InputError, ConfigError) as error:
        return None, str(error)


def _flag(name: str, value: str) -> str:
    if name not in _SWITCHES:
        return f"--{name}={value}"
    if value.lower() not in ("true", "false"):
        raise InputError(f"--vary {name}={value}: it is a switch; write true or false")
    return f"--{name}" if value.lower() == "true" else f"--no-{name}"
