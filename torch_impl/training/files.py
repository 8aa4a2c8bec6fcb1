"""Files that are whole or absent: written beside, flushed to the disk, then renamed into place."""

import os
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: the value, the limit, the mend."""


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk; folders only where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Put content at path, in one piece: a reader sees the old file or the new one, and never a half.

    Raises OSError where the disk is full or not writable; the old file is then still there.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_bytes(content)
        flush_to_disk(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)
