"""One process at a time in a run folder."""

import errno
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from torch_impl.training.files import InputError, write_file

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, shared: bool = False) -> None:  # which there is not
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int, shared: bool = False) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a disk without locks answers: then the folder is anybody's."""


class InUse(InputError):
    """The folder is another process's."""


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Within the block the folder is this process's. Raises InUse where it is another's.

    The system holds the lock on an open file, and lets go of it when the process ends, however it ends: what
    is left of a killed run is a file, which stops nobody. The process's name stands in lock.json.

    The lock goes along with a folder that is renamed, but what is written goes to whoever has the name then:
    yields what is to be called before, and raises FileNotFoundError where the name leads elsewhere by now.
    """
    own = folder.stat()
    with (folder / "lock").open("ab") as file:
        _take(folder, file.fileno())
        write_file(folder / "lock.json", json.dumps(_myself()).encode("ascii"))
        yield partial(_require_the_same, folder, own, file.fileno())


def refuse_in_use(folder: Path) -> None:
    """Raises InUse where a folder is another process's. Nothing is written there, and the lock is held, with
    whoever else looks, for no longer than that."""
    with suppress(OSError):  # of a folder that is not there, or not this user's
        if folder.is_dir():
            with (folder / "lock").open("r+b") as file:
                _take(folder, file.fileno(), shared=True)


def _take(folder: Path, descriptor: int, shared: bool = False) -> None:
    try:
        _lock(descriptor, shared)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise InUse(
                f"{folder} is in use: {_holder(folder)} trains there; wait for it, or stop it with Ctrl-C"
            ) from error
        if error.errno not in _NO_LOCKS:
            raise


def _require_the_same(folder: Path, own: os.stat_result, descriptor: int) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        if os.path.samestat(own, folder.stat()) and _is_or_was(folder / "lock", os.fstat(descriptor)):
            return
    raise FileNotFoundError(
        f"{folder} was moved, deleted or taken over meanwhile, and nothing more is written there; what was "
        "saved before is where the folder is now"
    )


def _is_or_was(path: Path, file: os.stat_result) -> bool:
    """False where a path is another file. A folder that is deleted leaves its number to the next one of its
    name, but no file that is open does; and who deletes a lock by hand harms no run."""
    try:
        return os.path.samestat(file, path.stat())
    except FileNotFoundError:
        return True


def _myself() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(folder: Path) -> str:
    """The process that wrote its name beside the lock, which on Windows nobody else can read from."""
    try:
        told = json.loads((folder / "lock.json").read_bytes())
        return f"process {int(told['pid'])} on {str(told['host'])[:100]!r}, since {str(told['since'])[:20]},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
