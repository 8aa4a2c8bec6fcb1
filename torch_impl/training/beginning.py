"""The folder of a new run, which stays once there is something in it to go on from."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch_impl.training.config import RunConfig
from torch_impl.training.files import InputError, refusal
from torch_impl.training.lock import locked


class NotBegun(Exception):
    """The system refuses a run something before its first checkpoint. The message is one line."""


@contextmanager
def system_errors_told() -> Iterator[None]:
    """Within the block an OSError becomes NotBegun."""
    try:
        yield
    except OSError as error:
        raise NotBegun(f"{refusal(error)}; the run has not begun") from error


def _create_folder(out: Path | None, config: RunConfig) -> Path:
    """The run folder that is asked for, or one with a name of its own. Raises InputError if it cannot be."""
    name = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = out or Path("runs") / name
    attempt = 1
    while out is None and folder.exists():  # another run of the same second
        attempt += 1
        folder = folder.with_name(f"{name}-{attempt}")
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(f"{folder} exists, and a run is never overwritten; name another --out") from error
    except OSError as error:
        raise InputError(f"cannot create the run folder: {refusal(error)}") from error
    return folder


@contextmanager
def new_run_folder(out: Path | None, config: RunConfig) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Makes a new run's folder, locks it, as `locked` does, and removes it when the run ends without a
    checkpoint or a report: nothing can go on from there, and its name is free again. Until then an OSError
    is NotBegun. Raises InputError where the folder cannot be made.

    A folder that was moved meanwhile is not looked for, and what has its name now is left alone.
    """
    folder, idle = _create_folder(out, config), True
    try:
        with locked(folder) as require_ours:
            try:
                yield folder, require_ours
            except OSError:
                require_ours()
                if (folder / "last").is_dir():
                    raise
                with system_errors_told():
                    raise
            finally:
                idle = False
                with suppress(OSError):
                    require_ours()
                    idle = not ((folder / "last").is_dir() or (folder / "report.html").is_file())
    finally:
        if idle:  # and the lock let go, for Windows removes no open file
            shutil.rmtree(folder, ignore_errors=True)
