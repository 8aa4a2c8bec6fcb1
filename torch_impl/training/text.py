"""UTF-8 text that may be larger than memory: a file, or a stretch of one, read block by block."""

import codecs
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torch_impl.training.files import InputError

_BLOCK = 1 << 22  # bytes


def untold(amount: int) -> None:
    """The progress of work that nobody watches."""


@dataclass(frozen=True)
class Text:
    """The bytes from `start` to `end` of a file, or of bytes in memory; they hold whole characters."""

    source: Path | bytes
    start: int = 0
    end: int | None = None  # None: to the end of the file

    def size(self) -> int:
        """Bytes."""
        end = self.end
        if end is None:
            end = len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size
        return end - self.start

    def blocks(self, size: int = _BLOCK) -> Iterator[bytes]:
        """The bytes, `size` at a time. Raises OSError where the file cannot be read."""
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb") as file:
            if self.start:
                file.seek(self.start)
            left = float("inf") if self.end is None else self.end - self.start
            while block := file.read(int(min(size, left))):
                left -= len(block)
                yield block

    def parts(self, size: int = _BLOCK, progress: Callable[[int], object] = untold) -> Iterator[str]:
        """The text, about `size` bytes at a time; `progress` is told of bytes as they are read.

        Line ends stay as they are. Raises InputError that names the first byte that is not UTF-8, or
        says that the text is UTF-16, as Windows' editors and shells save it.
        """
        return self._decoded(_told(self.blocks(size), progress))

    def _decoded(self, blocks: Iterable[bytes]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        read = self.start
        try:
            for block in blocks:
                read += len(block)
                if part := decoder.decode(block):
                    yield part
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            place, byte = read - len(error.object) + error.start, error.object[error.start]
            if place == 0 and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError(f"{self.source} is UTF-16 text; save it as UTF-8") from None
            raise InputError(
                f"{self.source} is not UTF-8 text: byte {place} is 0x{byte:02x}; save it as UTF-8"
            ) from None

    def sha256(self, progress: Callable[[int], object] = untold) -> str:
        """Names the text."""
        digest = hashlib.sha256()
        for block in _told(self.blocks(), progress):
            digest.update(block)
        return digest.hexdigest()

    def split(
        self, tenths: int, progress: Callable[[int], object] = untold, block_size: int = _BLOCK
    ) -> tuple["Text", "Text"]:
        """The first so many tenths of the characters, and the rest.

        Raises InputError for a text that is empty, holds a NUL, or is not UTF-8.
        """
        characters = []  # in each block: as many as there are bytes that begin one

        def counted() -> Iterator[bytes]:
            for block in _told(self.blocks(block_size), progress):
                yield block  # whose bytes may say more than that they hold a NUL
                if (place := block.find(0)) >= 0:
                    place += self.start + len(characters) * block_size
                    raise InputError(
                        f"{self.source} is not text: byte {place} is NUL; if it is UTF-16, save it as UTF-8"
                    )
                characters.append(len(block) if block.isascii() else _beginnings(block).size)

        for _ in self._decoded(counted()):
            pass
        if not characters:
            raise InputError(f"{self.source} is empty")
        left, end = sum(characters) * tenths // 10, self.start + self.size()
        cut = end
        for number, n in enumerate(characters):
            if left < n:
                start = self.start + number * block_size
                block = next(Text(self.source, start, end).blocks(block_size))
                cut = start + int(_beginnings(block)[left])
                break
            left -= n
        return Text(self.source, self.start, cut), Text(self.source, cut, end)


def file_text(file: str | Path) -> Text:
    """All of a file but the byte order mark that some editors begin it with.

    Raises InputError where it is not readable.
    """
    path = readable(file)
    with path.open("rb") as opened:
        marked = opened.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return Text(path, len(codecs.BOM_UTF8) if marked else 0)


def readable(file: str | Path) -> Path:
    """The path of a file that can be read, and again. Raises InputError for what is none."""
    path = Path(file)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a text file in it")
    if path.exists() and not path.is_file():
        raise InputError(
            f"{path} is a pipe or a device, and a text is read more than once; save it in a file"
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return path


def _told(blocks: Iterable[bytes], progress: Callable[[int], object]) -> Iterator[bytes]:
    for block in blocks:
        progress(len(block))
        yield block


def _beginnings(block: bytes) -> np.ndarray:
    """Where characters begin: at every byte that is not 0b10xxxxxx."""
    return np.flatnonzero(np.frombuffer(block, np.uint8) & 0xC0 != 0x80)
