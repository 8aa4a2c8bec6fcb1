"""What is made of a text once and used by later runs: files named by the hash of all that made them.

A file ends with its seal, the SHA-256 of its name and its content. What is cut short, damaged or was put
there under a wrong name does not carry its seal, and is made anew. The folder can be deleted at any time.
Several processes can make the same file at once: each writes one of its own, and renames it into place.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch_impl.training.files import WRITTEN, InputError, flush_to_disk, unused_name

_FORMAT = 1  # of the files; another number makes all of them anew
_DIGITS = 40  # of the hash, in a file's name
_SEAL = hashlib.sha256().digest_size  # bytes
_ABANDONED = 3600  # seconds after which an unfinished file has no writer any more


def cached(
    folder: Path, kind: str, made_from: Mapping[str, object], make: Callable[[], Iterable[bytes]]
) -> tuple[Path, int]:
    """The file of what `make` yields, and the size of that in bytes; made only if it is not there yet.

    Raises InputError where the file cannot be written.
    """
    recipe = json.dumps({"format": _FORMAT, "kind": kind, **made_from}, sort_keys=True)
    path = folder / f"{kind}-{hashlib.sha256(recipe.encode('utf-8')).hexdigest()[:_DIGITS]}.bin"
    try:
        if not _is_sealed(path):
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, make())
        return path, path.stat().st_size - _SEAL
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot keep the encoded text in {path}: {reason}; name another folder with --cache"
        ) from error


def _is_sealed(path: Path) -> bool:
    if not path.is_file() or (left := path.stat().st_size - _SEAL) < 0:
        return False
    digest = hashlib.sha256(path.name.encode("utf-8"))
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
        return file.read() == digest.digest()


def _write(path: Path, content: Iterable[bytes]) -> None:
    for stale in path.parent.glob(f"*-{'?' * _DIGITS}.bin.*{WRITTEN}"):  # of processes that were killed
        try:
            if time.time() - stale.stat().st_mtime > _ABANDONED:
                stale.unlink()
        except OSError:
            pass  # another process was faster, or has it open
    new = unused_name(path)
    digest = hashlib.sha256(path.name.encode("utf-8"))
    try:
        with new.open("xb") as file:
            for block in content:
                file.write(block)
                digest.update(block)
            file.write(digest.digest())
        flush_to_disk(new)
        try:
            new.replace(path)
        except PermissionError:  # Windows, where another process made the same file and has it open
            if not _is_sealed(path):
                raise
    finally:
        new.unlink(missing_ok=True)
