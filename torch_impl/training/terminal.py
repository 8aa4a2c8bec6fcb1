"""A conversation's side of the terminal: lines that are typed, text that cannot harm, Ctrl-C."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch_impl.training.files import InputError

# Controls, which move the cursor, colour, or send keys, and those that turn the direction of text around; not
# line ends and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with every control character spelled out, as \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class Lines:
    """What is typed, or comes through a pipe, message by message."""

    def __init__(self) -> None:
        """Raises InputError where there is nothing to read from."""
        if sys.stdin is None:
            raise InputError("there is no standard input to read messages from")
        sys.stdin.reconfigure(errors="replace", newline="\n")  # a lone carriage return ends no line
        self.typed = sys.stdin.isatty() and sys.stdout.isatty()
        if self.typed:
            with suppress(ImportError):  # Windows has editing of its own
                import readline  # noqa: F401

    def read(self) -> str | None:
        """The next message, which goes on in the next line where a line ends with a backslash; None at the
        end. Raises KeyboardInterrupt."""
        lines = []
        while (line := self._line("... " if lines else "> ")) is not None:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return "\n".join(lines) if lines else None

    def _line(self, prompt: str) -> str | None:
        if self.typed:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None


class Interrupt:
    """Whether Ctrl-C was pressed."""

    pressed = False


@contextmanager
def interrupt_only_noted() -> Iterator[Interrupt]:
    """Within the block Ctrl-C raises nothing."""
    interrupt = Interrupt()

    def note(number: int, frame: object) -> None:
        interrupt.pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
