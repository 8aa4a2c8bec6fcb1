"""Texts larger than memory for the tokenizer: read in parts, each worked on by any of several processes.

A part ends where splitting the rest anew gives what splitting the whole would: at a pre-token that begins
whatever stands before it, such as most words (see ref_numpy.bpe_format.SPLITS), and never inside a special
token. A split pattern of the user's own promises no such place: parts end at special tokens there; a text
without any is one part.

The processes are spawned, which imports the caller's main module again: with more than one worker that module
needs the usual `if __name__ == "__main__":`.
"""

import math
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import Literal

import numpy as np
import regex
from jaxtyping import UInt
from numpy import ndarray as Array
from tqdm import tqdm

from ref_numpy.bpe_format import SPLITS, Vocabulary
from torch_impl.bpe import BPETokenizer, check_training, count_words, special_pattern, train_on_words
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError
from torch_impl.training.text import Text, untold

_PART = 1 << 23  # bytes
_SAMPLED_PART = 1 << 16  # smaller, so that a sample is spread over the text
_BEGINNINGS = {  # of pre-tokens, the last one first
    SPLITS["gpt2"]: regex.compile(r"(?r)(?<=\S)\s"),
    SPLITS["gpt4"]: regex.compile(r"(?r)(?<=\S) |(?<=[\p{L}\p{N}])\n"),
    SPLITS["whitespace"]: regex.compile(r"(?r)(?<=\S)\s"),
}
_DELAY = 0.5  # seconds before a progress bar shows itself


def last_cut(text: str, special_tokens: Collection[str], split: str | None) -> int:
    """The last place where the text can be cut in two; 0 if there is none. See the top of this file."""
    last = len(text) - max(map(len, special_tokens), default=1) + 1  # what begins before it is here in full
    if split not in _BEGINNINGS:
        pattern = special_pattern(special_tokens)
        ends = [found.end() for found in pattern.finditer(text)] if pattern else []
        return max((end for end in ends if end < last), default=0)
    for found in _BEGINNINGS[split].finditer(text, 0, max(last, 0)):
        if not _inside(text, found.start(), special_tokens):
            return found.start()
    return 0


def _inside(text: str, cut: int, special_tokens: Collection[str]) -> bool:
    return any(token in text[max(0, cut - len(token) + 1) : cut + len(token) - 1] for token in special_tokens)


def read_parts(
    texts: Iterable[Text],
    special_tokens: Collection[str],
    split: str | None,
    size: int = _PART,
    progress: Callable[[int], object] = untold,
) -> Iterator[str]:
    """The texts in parts of about `size` bytes; `progress` is told of bytes as they are read.

    Raises InputError for a file that is not UTF-8, OSError for one that cannot be read.
    """
    for text in texts:
        rest, more = "", []  # what no cut was found in, and what has been read since
        for read in text.parts(size, progress):
            more.append(read)
            if sum(map(len, more)) < len(rest):
                continue  # looking again for a cut is worth it when the text has doubled
            whole = rest + "".join(more)
            more.clear()
            cut = last_cut(whole, special_tokens, split)
            if cut:
                yield whole[:cut]
            rest = whole[cut:]
        if rest := rest + "".join(more):
            yield rest


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

    spawning, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, spawning, _start, (initializer, arguments)) as pool:
        waiting = deque()
        try:
            for item in items:
                with _unheard_by_children():
                    waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:  # what the workers have begun would take them seconds
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise


@contextmanager
def _unheard_by_children() -> Iterator[None]:
    """Ctrl-C, which a terminal sends to all, is for the parent to answer: it waits for the end of the block,
    and processes that start within never hear it. Windows has no such mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(initializer: Callable | None, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where there was no mask
    Thread(target=_leave_with_parent, daemon=True).start()
    if initializer:
        initializer(*arguments)


def _leave_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def worth_spawning(texts: Iterable[Text], workers: int) -> int:
    """No more workers than the texts have work for: starting one takes as long as about 8 MB of text."""
    return max(1, min(workers, sum(text.size() for text in texts) >> 23))


def count_texts(
    texts: list[Text],
    special_tokens: Collection[str] = (),
    split: str | None = SPLITS["gpt2"],
    workers: int = 1,
    sample: float = 1.0,
    progress: Callable[[int], object] = untold,
) -> Counter[str]:
    """How often each pre-token stands in the texts, or in a part `sample` of them, spread evenly."""
    size = _PART if sample == 1 else _SAMPLED_PART
    parts = read_parts(texts, special_tokens, split, size, progress)
    if sample < 1:
        parts = (p for k, p in enumerate(parts) if math.ceil((k + 1) * sample) > math.ceil(k * sample))
    count = partial(_count_part, special_tokens=tuple(special_tokens), split=split)
    words = Counter()
    for found in ordered_map(count, parts, worth_spawning(texts, workers)):
        words.update(found)
    return words


def _count_part(text: str, special_tokens: tuple[str, ...], split: str | None) -> Counter[str]:
    return count_words([text], special_tokens, split)


def train_on_texts(
    texts: list[Text],
    vocab_size: int,
    special_tokens: Collection[str] = (),
    split: str | None = SPLITS["gpt2"],
    ties: Literal["smallest ids", "greatest bytes"] = "smallest ids",
    workers: int = 1,
    sample: float = 1.0,
) -> Vocabulary:
    """Learns vocab_size tokens, with progress bars of bytes and then of merges.

    Raises InputError where the texts run out of pairs before, and as torch_impl.bpe.train.
    """
    check_training(vocab_size, special_tokens, split)
    with byte_bar(texts, "counting") as bar:
        words = count_texts(texts, special_tokens, split, workers, sample, bar.update)
    wanted = vocab_size - 256 - len(set(special_tokens))
    with tqdm(total=wanted, unit=" merges", delay=_DELAY, dynamic_ncols=True, disable=None) as bar:
        vocabulary = train_on_words(words, vocab_size, special_tokens, split, ties, bar.update)
    if len(vocabulary.tokens) < vocab_size:
        raise InputError(
            f"--vocab-size is {vocab_size}, but the text runs out of pairs after "
            f"{counted(len(vocabulary.merges), 'merge')}; give it more text, or ask for --vocab-size "
            f"{len(vocabulary.tokens)}"
        )
    return vocabulary


def byte_bar(texts: Iterable[Text], what: str) -> tqdm:
    """A progress bar of bytes; it shows itself when the work takes longer than a moment."""
    total = sum(text.size() for text in texts)
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, delay=_DELAY, dynamic_ncols=True, disable=None
    )


def encode_texts(
    tokenizer: BPETokenizer,
    texts: list[Text],
    allowed_special: Collection[str] = (),
    workers: int = 1,
    progress: Callable[[int], object] = untold,
) -> Iterator[UInt[Array, "_"]]:
    """The ids of the texts, part by part; together they are the ids of the whole texts."""
    parts = read_parts(texts, allowed_special, tokenizer.vocabulary.split, _PART, progress)
    if (workers := worth_spawning(texts, workers)) == 1:
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
