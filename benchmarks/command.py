"""The outside of a benchmark: its exit code, one line for what stopped it, and the files that it writes."""

import io
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch_impl.training.files import InputError, named_after, refusal, replace_file, unused_name

Main = Callable[[list[str]], None]
_PICTURES = (".png", ".svg", ".pdf")


def command(name: str, interrupted: str = "") -> Callable[[Main], Callable[[list[str]], int]]:
    """Makes of what carries out a command line what also returns an exit code: 0, 2 for a request that cannot
    be met, 130 after Ctrl-C. `interrupted` says what is missing then.

    SIGTERM is taken for Ctrl-C: what ends a command whose time is up shall not lose what it has measured.
    """

    def decorate(main: Main) -> Callable[[list[str]], int]:
        @wraps(main)
        def carry_out(arguments: list[str]) -> int:
            before = signal.signal(signal.SIGTERM, _end)
            try:
                main(arguments)
            except (InputError, OSError) as error:
                reason = refusal(error) if isinstance(error, OSError) else error
                print(f"{name}: error: {reason}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"{name}: interrupted{interrupted and '; '}{interrupted}", file=sys.stderr)
                return 130
            finally:
                signal.signal(signal.SIGTERM, before)
            return 0

        return carry_out

    return decorate


def _end(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some send it to a process and then to its group
    raise KeyboardInterrupt


def text_of(file: str, least: int = 10_000) -> bytes:
    """The text that --text names. Raises InputError where it names none, or one of fewer bytes."""
    if not file:
        raise InputError("--text is missing; name a text, such as Tiny Shakespeare")
    text = Path(file).read_bytes()
    if len(text) < least:
        raise InputError(f"--text {file} has {len(text)} bytes; it needs {least:,} at least")
    return text


def check_files(json: str, out: str = "") -> None:
    """Before anything is measured: whether the rows and the picture can be written where the flags say.

    Raises InputError for a name that cannot be, and OSError for a place that cannot be written.
    """
    if out and Path(out).suffix not in _PICTURES:
        raise InputError(f"--out {out} must end in {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}")
    for flag, path in (("--json", Path(json)), ("--out", Path(out))):
        if path == Path():  # not given
            continue
        if path.is_dir():
            raise InputError(f"{flag} {path} is a folder; name a file in it")
        new = unused_name(path)
        try:
            new.touch()
            new.unlink()
        except OSError as error:
            named_after(error, path)
            raise


def write_picture(path: str, figure: Any) -> None:
    """A figure of matplotlib's, as a file in one piece. Raises OSError where it cannot be written."""
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:], dpi=120)
    replace_file(Path(path), picture.getvalue())
