"""The folder of a new run, which stays once there is something in it to go on from."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch_impl.training.config import RunConfig
from torch_impl.training.files import REMOVED, REPLACED, WRITTEN, InputError, refusal, whole_folder
from torch_impl.training.lock import InUse, locked, refuse_in_use

_OF_A_BEGINNING = {"lock", "lock.json", f"lock.json{WRITTEN}", "tensorboard", f"last{WRITTEN}"}
"""What a run folder holds until its first checkpoint is whole."""
_OF_A_RUN = re.compile(
    r"last|best|(before-)?step-\d+|tensorboard|lock(\.json)?|metrics\.jsonl|sample\.txt|losses\.png"
    rf"|report\.(json|html)|trace\.json\.gz|.*({WRITTEN}|{REPLACED}|{REMOVED})"
)
"""What it makes, replaces or removes in its folder."""


class NotBegun(Exception):
    """The system refuses a run something before its first checkpoint. The message is one line."""


@contextmanager
def system_errors_told() -> Iterator[None]:
    """Within the block an OSError becomes NotBegun."""
    try:
        yield
    except OSError as error:
        raise NotBegun(f"{refusal(error)}; the run has not begun") from error


def has_only_begun(folder: Path) -> bool:
    """Whether nothing in a run folder is there to go on from, nor anything of somebody else's."""
    return {path.name for path in folder.iterdir()} <= _OF_A_BEGINNING


def is_of_a_run(path: Path) -> bool:
    """Whether a path has, in the folder of a run, a name that the run takes itself."""
    return _OF_A_RUN.fullmatch(path.name) is not None and (path.parent / "lock.json").is_file()


def refuse_taken(out: Path, cache: Path) -> None:
    """Raises InputError where the folder that is asked for cannot be a new run's."""
    refuse_in_use(out)
    if out.is_dir() and whole_folder(out / "last").is_dir():
        raise InputError(f"{out} exists, and a run is never overwritten; name another --out, or --resume it")
    if out.is_dir() and (out / "lock").exists() and has_only_begun(out):
        raise InputError(
            f"{out} exists, and holds no checkpoint to go on from; unless its run has just begun, delete it, "
            "or name another --out"
        )
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists, and a run is never overwritten; name another --out")
    for place in (out.absolute(), *out.absolute().parents):
        if (place / "training.json").is_file():
            raise InputError(
                f"{out} lies in a checkpoint, {place}, which its run replaces; name another --out"
            )
        if is_of_a_run(place):
            raise InputError(
                f"{place} is a name that the run in {place.parent} takes itself; name another --out"
            )
    if out.absolute() in (cache.absolute(), *cache.absolute().parents):
        raise InputError(f"--cache {cache} lies in {out}, which the run makes; name another --cache")


def _create_folder(out: Path | None, config: RunConfig) -> Path:
    """The run folder that is asked for, or one with a name of its own. Raises InputError if it cannot be."""
    first = out or Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, attempt = first, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.exists():
                raise InputError(f"cannot create the run folder: {refusal(error)}") from error
            if out is not None:
                refuse_in_use(folder)
                raise InputError(
                    f"{folder} exists, and a run is never overwritten; name another --out"
                ) from error
        attempt += 1  # another run of the same second has the name
        folder = first.with_name(f"{first.name}-{attempt}")


@contextmanager
def new_run_folder(out: Path | None, config: RunConfig) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Makes a new run's folder, locks it, as `locked` does, and removes it when the run ends without anything
    to go on from or to look at: its name is free again. Until then an OSError is NotBegun. Raises InputError
    where the folder cannot be made, or another process has taken it.

    A folder that was moved meanwhile is not looked for, and what has its name now is left alone.
    """
    folder, idle = _create_folder(out, config), True
    try:
        with locked(folder) as require_ours:
            try:
                yield folder, require_ours
            except OSError:
                require_ours()
                if not has_only_begun(folder):
                    raise
                with system_errors_told():
                    raise
            finally:
                idle = False
                with suppress(OSError):
                    require_ours()
                    idle = has_only_begun(folder)
    except InUse:
        idle = False
        raise
    finally:
        if idle:  # and the lock let go, for Windows removes no open file
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def resumed_run_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Locks the folder of a run that goes on, as `locked` does. Where it was moved meanwhile, that is said,
    and not what followed from it."""
    with locked(folder) as require_ours:
        try:
            yield require_ours
        except (OSError, InputError):
            require_ours()
            raise
