"""Files and folders that are whole or absent: written beside, flushed to disk, renamed into place."""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch_impl.training.visible import in_one_line

_SHARING_VIOLATION = 32
_HELD = (5, _SHARING_VIOLATION)
"""What Windows says where somebody else has a file open; 5 is access denied."""


WRITTEN, REPLACED, REMOVED = ".being-written", ".being-replaced", ".being-removed"
"""What a path's name ends in for the moment that it takes. Nobody types these: what has such a name was left
by a program that was killed, and says so to who finds it, and a `last.old` is the user's."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: the value, the limit, the mend.

    What it quotes may come from a stranger's file, and is spelled out where it could do something to a
    terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(in_one_line(message))


def refusal(error: OSError, nameless: str = "") -> str:
    """What the system refuses, in one line: the path, the reason, and the mend where there is one. `nameless`
    is what an error is about that names no path."""
    place, reason = (in_one_line(str(told)) for told in (error.filename or nameless, error.strerror or error))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{place and ', writing '}{place}; make room"
    told = f"{place}{place and ': '}{reason}"
    held = getattr(error, "winerror", None) == _SHARING_VIOLATION  # which Python calls EACCES as well
    if place and not held and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{told}; give this user the right to it, or use another place"
    return told


def named_after(error: BaseException, path: Path) -> None:
    """Gives an OSError in writing a path its name, which somebody knows, in place of none, or of a temporary
    one, which begins with it. An error about something else, such as what is copied there, keeps its own."""
    if isinstance(error, OSError) and str(error.filename or path).startswith(str(path)):
        error.filename, error.filename2 = str(path), None


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk; folders only where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    """Wait until the files in a folder, and its list of their names, are on the disk."""
    for path in folder.iterdir():
        flush_to_disk(path)
    flush_to_disk(folder)


def patiently(act: Callable[..., object], *arguments: object) -> None:
    """Rename or remove, on Windows a few times within a second: there a reader, such as a virus scanner or
    TensorBoard, holds a file or its folder for a moment."""
    for pause in (0.05, 0.2, 0.7, None):
        try:
            act(*arguments)
            return
        except PermissionError as error:
            if pause is None or getattr(error, "winerror", None) not in _HELD:
                raise
            time.sleep(pause)


def write_file(path: Path, content: bytes) -> None:
    """Put content at a path in a folder that is the program's own, in one piece: a reader sees the old file
    or the new one, and never a half. What a killed writer leaves is overwritten by the next.

    Raises OSError where the disk is full or not writable; the old file is then still there.
    """
    _write_by_way_of(_for_now(path, WRITTEN), path, content)


def replace_file(path: Path, content: bytes) -> None:
    """Put content at a path that the user names, in one piece, as write_file does; whatever its name, no file
    beside it is touched.

    Raises OSError where the disk is full or not writable; the old file is then still there.
    """
    _write_by_way_of(unused_name(path), path, content)


def _for_now(path: Path, ending: str) -> Path:
    """The name that a path of the program's own has meanwhile."""
    return path.with_name(path.name + ending)


def unused_name(path: Path, ending: str = WRITTEN) -> Path:
    """A name beside any path, for what is to be renamed to it, that nobody else has taken."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{ending}")


def _write_by_way_of(new: Path, path: Path, content: bytes) -> None:
    try:
        new.write_bytes(content)
        flush_to_disk(new)
        patiently(new.replace, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        named_after(error, path)
        raise
    flush_to_disk(path.parent)


def write_new_file(path: Path, content: bytes) -> None:
    """Put content at a path where nothing is yet, in one piece.

    Raises InputError where the name is taken, and OSError where the file cannot be written.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    new = unused_name(path)
    try:
        new.write_bytes(content)
        flush_to_disk(new)
        path.open("xb").close()  # the name is ours from here on; no system renames without overwriting
        patiently(new.replace, path)
    except FileExistsError:
        raise InputError(f"{path} exists, and is not overwritten; name another file") from None
    except OSError as error:
        named_after(error, path)
        raise
    finally:
        new.unlink(missing_ok=True)
    flush_to_disk(path.parent)


@contextmanager
def replaced_folder(folder: Path, require_place: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A new, empty folder to write into, which takes the place of `folder` when the block ends well.

    Two renames do it, since no system swaps folders everywhere: the old folder gets the name of what is being
    replaced, and the new one that of the folder. At every moment one of these two is whole; `settle_folder`
    and `whole_folder` know which. If the block or the disk fails, the new folder is removed, the old one
    stays, and the error goes on. Before anything is renamed or removed then, `require_place` may raise
    OSError: the path leads elsewhere since.
    """
    new, old = _for_now(folder, WRITTEN), _for_now(folder, REPLACED)
    settle_folder(folder)
    try:
        new.mkdir()
        yield new
        _flush_all(new)
        require_place()
        if folder.exists():
            patiently(folder.rename, old)
        patiently(new.rename, folder)
    except BaseException as error:
        require_place()
        settle_folder(folder)
        named_after(error, folder)
        raise
    flush_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block ends well, and else is removed.

    Raises InputError where the name is taken, and OSError where the folder cannot be made.
    """
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists, and is not overwritten; name another folder")
    new = unused_name(folder)
    try:
        new.mkdir(parents=True)
        yield new
        _flush_all(new)
        patiently(new.rename, folder)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        named_after(error, folder)
        raise
    flush_to_disk(folder.parent)


def settle_folder(folder: Path) -> None:
    """Clean up after a writer that was killed: a whole folder in its place, and nothing of it beside that."""
    new, old = _for_now(folder, WRITTEN), _for_now(folder, REPLACED)
    if old.exists() and not folder.exists():  # killed between the two renames
        patiently(old.rename, folder)
    for stale in (new, old):
        if stale.exists():
            patiently(shutil.rmtree, stale)


def whole_folder(folder: Path) -> Path:
    """Where the content of a folder can be read right now, even if a writer was killed or is at work.

    Earlier writers called what they replaced NAME.old, as a user may call a copy: it is read, and stays.
    """
    for old in (_for_now(folder, REPLACED), _for_now(folder, ".old")):
        if old.exists() and not folder.exists():
            return old
    return folder


def find_checkpoint(folder: Path) -> Path:
    """What a folder that a user names stands for: its best/, else its last/, else the folder itself.

    Raises InputError where there is no folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder; name a run folder, a checkpoint in one, or a model's folder"
        )
    for checkpoint in (folder / "best", folder / "last"):
        if whole_folder(checkpoint).is_dir():
            return checkpoint
    return folder.absolute()


def find_tokenizer(path: Path) -> list[Path]:
    """The files of the tokenizer that a user names: the path itself, or in a folder its tokenizer.json, else
    GPT-2's vocab.json and merges.txt.

    Raises InputError for a folder that holds neither.
    """
    if not path.is_dir():
        return [path]
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    raise InputError(
        f"{path} holds no tokenizer; name a folder with tokenizer.json, or with vocab.json and merges.txt"
    )


def refuse_links(folder: Path) -> None:
    """Raises InputError if a folder holds a symbolic link, which would lead a write out of it."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link; a run folder must hold its own files")
