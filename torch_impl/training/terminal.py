"""A program's side of the terminal: typed lines, characters that it lacks, Ctrl-C, readers that leave."""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from torch_impl.training.files import InputError


def show_what_can_be_shown() -> None:
    """From now on stdout replaces what it cannot encode, such as a character that a terminal lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not None, nor what somebody put in its place
        sys.stdout.reconfigure(errors="replace")


def lead_nowhere(stream: Any) -> None:
    """Nobody reads a stream any more: what is written to it, or waits for the interpreter's last flush, is
    lost from now on, and fails no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Lines:
    """What is typed, or comes through a pipe, message by message."""

    def __init__(self) -> None:
        """Raises InputError where there is nothing to read from, or to answer on."""
        if sys.stdin is None:
            raise InputError("there is no standard input to read messages from")
        if sys.stdout is None:
            raise InputError("there is no standard output to write answers to")
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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)  # the disk of a log, or a slow reader: that may pass


class _Lasting:
    """A text stream that loses what finds no room, and falls silent when nobody reads it any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._or_silence(_FULL):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_silence(_FULL):
            self._stream.flush()

    def end(self) -> None:
        """The last flush, after which the interpreter's own has nothing to fail on."""
        with self._or_silence():
            self._stream.flush()

    @contextmanager
    def _or_silence(self, passing: tuple[int, ...] = ()) -> Iterator[None]:
        """Where an error is not a passing one, the descriptor leads nowhere from then on, so that nothing
        that is buffered fails once more."""
        try:
            yield
        except OSError as error:
            if error.errno in passing:
                return
            with suppress(OSError):  # no descriptor is behind it
                lead_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, a reader of stdout or stderr that leaves is no error for who writes: the tee of
    `| tee log` dies of the same Ctrl-C, and a terminal may be closed. A stream that is None leads nowhere."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        out, err = (_Lasting(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                yield
            finally:
                out.end()
                err.end()
