"""The folder of a new run, which stays once there is something in it to go on from."""

import errno
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch_impl.training.config import RunConfig
from torch_impl.training.files import InputError


class NotBegun(Exception):
    """The system refuses a run something before its first checkpoint. The message is one line."""


@contextmanager
def system_errors_told() -> Iterator[None]:
    """Within the block an OSError becomes NotBegun."""
    try:
        yield
    except OSError as error:
        place = error.filename or "the run folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            said = f"the disk is full, writing {place}; the run has not begun. Make room, and ask again"
        else:
            said = f"{place}: {error.strerror or error}; the run has not begun"
        raise NotBegun(said) from error


def create_folder(out: Path | None, config: RunConfig) -> Path:
    """The run folder that is asked for, or one with a name of its own. Raises InputError if it cannot be."""
    name = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = out or Path("runs") / name
    attempt = 1
    while out is None and folder.exists():  # another run of the same second
        attempt += 1
        folder = folder.with_name(f"{name}-{attempt}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create the run folder {folder}: {error.strerror}") from error
    return folder


@contextmanager
def kept_once_begun(folder: Path) -> Iterator[None]:
    """A new run's folder goes when the run ends without a checkpoint or a report: nothing can go on from
    there, and its name is free again. Until then an OSError is NotBegun.

    A folder that was moved meanwhile is not looked for, and what has its name now is left alone.
    """
    own = _identity(folder)
    try:
        try:
            yield
        except OSError as error:
            if _identity(folder) != own:
                gone = "moved or deleted while the run went on"
                raise FileNotFoundError(errno.ENOENT, gone, str(folder)) from error
            if (folder / "last").is_dir():
                raise
            with system_errors_told():
                raise
    finally:
        begun = (folder / "last").is_dir() or (folder / "report.html").is_file()
        if not begun and _identity(folder) == own:
            shutil.rmtree(folder, ignore_errors=True)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another of its name; None where there is none."""
    with suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None
