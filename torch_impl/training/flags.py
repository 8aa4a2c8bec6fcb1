"""Command line flags out of dataclasses, by tyro; a mistake is one line."""

import difflib
import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from typing import TypeVar

import tyro

from torch_impl.training.files import InputError

T = TypeVar("T")


def parse_flags(default: T, arguments: list[str], program: str, description: str) -> T:
    """A dataclass like `default`, with what the arguments change; nested ones need no prefix.

    Prints the help and exits for --help. Raises InputError for arguments that do not fit.
    """
    _refuse_unknown(type(default), arguments)
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[type(default)],
                prog=program,
                description=description,
                args=arguments,
                default=default,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(errors.getvalue())) from stop


def dashed(name: str) -> str:
    """A field's name as a flag."""
    return name.replace("_", "-")


def _flag_names(kind: type) -> Iterator[str]:
    for field in fields(kind):
        if is_dataclass(field.type):
            yield from _flag_names(field.type)
        elif tyro.conf.Suppress not in getattr(field.type, "__metadata__", ()):
            yield dashed(field.name)
            if field.type is bool:
                yield f"no-{dashed(field.name)}"


def _refuse_unknown(kind: type, arguments: list[str]) -> None:
    known = ["help", *_flag_names(kind)]
    for argument in arguments:
        name = dashed(argument[2:].split("=")[0])
        if argument.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(f"unknown flag --{name}" + (f"; did you mean --{near[0]}?" if near else ""))


def _one_line(box: str) -> str:
    """The message out of the box that tyro draws around it: all above the first rule."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    return " ".join(lines[:rule])
