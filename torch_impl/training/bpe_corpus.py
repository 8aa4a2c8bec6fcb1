"""Files larger than memory for the tokenizer: read in parts, each worked on by any of several processes.

A part ends where splitting the rest anew gives what splitting the whole would: before a space that follows
anything but whitespace (see ref_numpy.bpe_format.SPLITS), and never inside a special token. A split pattern
of the user's own promises no such place: parts end at special tokens there; a text without any is one part.

The processes are spawned, which imports the caller's main module again: with more than one worker that module
needs the usual `if __name__ == "__main__":`.
"""

import math
import signal
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt
from numpy import ndarray as Array

from ref_numpy.bpe_format import SPLITS, Vocabulary
from torch_impl.bpe import BPETokenizer, count_words, special_pattern
from torch_impl.training.files import InputError

_PART = 1 << 23  # characters
_SAMPLED_PART = 1 << 16  # smaller, so that a sample is spread over the text


def _nothing(amount: int) -> None: ...


def last_cut(text: str, special_tokens: Collection[str], split: str | None) -> int:
    """The last place where the text can be cut in two; 0 if there is none. See the top of this file."""
    last = len(text) - max(map(len, special_tokens), default=1) + 1  # what begins before it is here in full
    if split not in SPLITS.values():
        pattern = special_pattern(special_tokens)
        ends = [found.end() for found in pattern.finditer(text)] if pattern else []
        return max((end for end in ends if end < last), default=0)
    cut = text.rfind(" ", 0, max(last, 0))
    while cut > 0 and (text[cut - 1].isspace() or _inside(text, cut, special_tokens)):
        cut = text.rfind(" ", 0, cut)
    return max(cut, 0)


def _inside(text: str, cut: int, special_tokens: Collection[str]) -> bool:
    return any(token in text[max(0, cut - len(token) + 1) : cut + len(token) - 1] for token in special_tokens)


def read_parts(
    paths: Iterable[Path],
    special_tokens: Collection[str],
    split: str | None,
    size: int = _PART,
    progress: Callable[[int], object] = _nothing,
) -> Iterator[str]:
    """The text of files in parts of about `size` characters; `progress` is told of bytes as they are read.

    Raises InputError for a file that is not UTF-8, OSError for one that cannot be read.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:  # "\r\n" stays as it is
                rest = ""
                while text := file.read(max(size, len(rest))):
                    progress(len(text) if text.isascii() else len(text.encode("utf-8")))
                    text = rest + text
                    cut = last_cut(text, special_tokens, split)
                    if cut:
                        yield text[:cut]
                    rest = text[cut:]
                if rest:
                    yield rest
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: {error.reason}; convert it to UTF-8 first") from None


def ordered_map(
    function: Callable, items: Iterable, workers: int, initializer: Callable | None = None, *arguments: object
) -> Iterator:
    """The results of function(item) in order, from `workers` processes; few items are in memory at a time."""
    if workers == 1:
        if initializer:
            initializer(*arguments)
        yield from map(function, items)
        return
    from concurrent.futures import ProcessPoolExecutor  # slow to import, and seldom needed
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (initializer, arguments)) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _start(initializer: Callable | None, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    if initializer:
        initializer(*arguments)


def worth_spawning(paths: Iterable[Path], workers: int) -> int:
    """No more workers than the files have work for: starting one takes as long as about 8 MB of text."""
    return max(1, min(workers, sum(path.stat().st_size for path in paths) >> 23))


def count_files(
    paths: list[Path],
    special_tokens: Collection[str] = (),
    split: str | None = SPLITS["gpt2"],
    workers: int = 1,
    sample: float = 1.0,
    progress: Callable[[int], object] = _nothing,
) -> Counter[str]:
    """How often each pre-token stands in the files, or in a part `sample` of them, spread evenly."""
    size = _PART if sample == 1 else _SAMPLED_PART
    parts = read_parts(paths, special_tokens, split, size, progress)
    if sample < 1:
        parts = (p for k, p in enumerate(parts) if math.ceil((k + 1) * sample) > math.ceil(k * sample))
    count = partial(_count_part, special_tokens=tuple(special_tokens), split=split)
    words = Counter()
    for counted in ordered_map(count, parts, worth_spawning(paths, workers)):
        words.update(counted)
    return words


def _count_part(text: str, special_tokens: tuple[str, ...], split: str | None) -> Counter[str]:
    return count_words([text], special_tokens, split)


def encode_files(
    tokenizer: BPETokenizer,
    paths: list[Path],
    allowed_special: Collection[str] = (),
    workers: int = 1,
    progress: Callable[[int], object] = _nothing,
) -> Iterator[UInt[Array, "_"]]:
    """The ids of the files, part by part; together they are the ids of the whole texts."""
    parts = read_parts(paths, allowed_special, tokenizer.vocabulary.split, _PART, progress)
    if (workers := worth_spawning(paths, workers)) == 1:
        yield from (tokenizer.encode(part, allowed_special) for part in parts)
        return
    encode = partial(_encode_part, allowed_special=tuple(allowed_special))
    for packed in ordered_map(encode, parts, workers, _load_worker, tokenizer.vocabulary):
        yield np.frombuffer(packed, tokenizer.dtype)


_worker: list[BPETokenizer] = []  # the tokenizer of this process


def _load_worker(vocabulary: Vocabulary) -> None:
    _worker[:] = [BPETokenizer(vocabulary)]


def _encode_part(text: str, allowed_special: tuple[str, ...]) -> bytes:
    return _worker[0].encode(text, allowed_special).tobytes()
