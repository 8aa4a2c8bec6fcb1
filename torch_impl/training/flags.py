"""Command line flags out of dataclasses, by tyro; a mistake is one line."""

import difflib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields, is_dataclass
from itertools import dropwhile, pairwise, takewhile
from typing import TypeVar

import tyro
from tyro import _strings

from torch_impl.training.files import InputError

T = TypeVar("T")


def _flowing(text: str) -> str:
    """Paragraphs without the line breaks that they have in the source."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))


# tyro's own keeps the break before a line that begins with no letter, as if it were one of a list; and it is
# asked before the indentation is taken away, so that all lines of a field's docstring begin with a space.
_strings.remove_single_line_breaks = _flowing

if os.environ.get("NO_COLOR"):  # see no-color.org, which tyro does not know
    tyro._experimental_options["ansi_codes"] = False


def parse_flags(default: T, arguments: list[str], program: str, description: str) -> T:
    """A dataclass like `default`, with what the arguments change; nested ones need no prefix.

    Prints the help and exits for --help. Raises InputError for arguments that do not fit.
    """
    _refuse_unknown(type(default), arguments)
    with one_line_errors():
        return tyro.cli(
            tyro.conf.OmitArgPrefixes[type(default)],
            prog=program,
            description=description,
            args=arguments,
            default=default,
        )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around tyro.cli: what it would print of a mistake becomes an InputError."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(errors.getvalue())) from None


def check_text(flag: str, text: str) -> None:
    """Raises InputError where a flag's text has bytes that are no UTF-8, which paths may have."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{flag} is not valid text: {error.reason} at character {error.start}") from error


def dashed(name: str) -> str:
    """A field's name as a flag."""
    return name.replace("_", "-")


def as_flag(name: str, value: object) -> list[str]:
    """What a command line takes for a field and its value."""
    if isinstance(value, bool):
        return [f"--{dashed(name)}" if value else f"--no-{dashed(name)}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{dashed(name)}", *map(str, values)]


def _known_flags(kind: type) -> Iterator[tuple[str, bool]]:
    """Names, and whether a value follows."""
    for field in fields(kind):
        if is_dataclass(field.type):
            yield from _known_flags(field.type)
        elif tyro.conf.Suppress not in getattr(field.type, "__metadata__", ()):
            yield dashed(field.name), field.type is not bool
            if field.type is bool:
                yield f"no-{dashed(field.name)}", False


def _refuse_unknown(kind: type, arguments: list[str]) -> None:
    known = {"help": False, **dict(_known_flags(kind))}
    for before, argument in pairwise(["", *arguments]):
        name = dashed(argument[2:].split("=")[0])
        if argument.startswith("--") and name not in known:
            near = (
                [flag for flag in known if flag.startswith(name)]
                or [flag for flag in known if "-" in flag and name == _initials(flag)]  # lr, wd
                or difflib.get_close_matches(name, known, 1)
            )
            told = f"unknown flag --{name}" + (f"; did you mean --{near[0]}?" if near else "")
            if before.startswith("--") and known.get(dashed(before[2:])):
                told += f"; a value that begins with dashes is given as {before}={argument}"
            raise InputError(told)


def _initials(flag: str) -> str:
    return "".join(word[:1] for word in flag.split("-"))


def _one_line(box: str) -> str:
    """The message out of the box that tyro draws around it, below the title and above the next rule.

    The box has colours on a terminal, and is of ASCII where the encoding is no UTF-8.
    """
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]

    def is_rule(line: str) -> bool:
        return set(line) <= set("─-╰╯")

    message = takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines[1:]))
    # Of a value too many, such as the second file of a shell's *.txt, tyro speaks as of an option.
    return re.sub("^Unrecognized options: (?!-)", "values of no flag: ", " ".join(message).removesuffix("."))
