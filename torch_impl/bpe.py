"""Byte-level byte pair encoding for gigabytes: the twin of ref_numpy.bpe, equal to the last merge and id.

Splitting text is most of the work, so the rest is arranged around it: text that is ASCII is split by a
simpler pattern that means the same there; training counts each distinct pre-token once and works on those;
encoding gives each distinct pre-token a number, merges the new ones together, and gathers their ids.
Merges are learned in torch_impl.training.bpe_merges and applied in bpe_table; bpe_corpus there reads files.
"""

import gc
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from threading import Lock
from typing import Literal

if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # they start slowly, with nothing to do here
    gc.disable()  # words and merges make no cycles, and looking for some would take a tenth of the time

import numpy as np
import regex
from jaxtyping import Int, Integer, UInt
from numpy import ndarray as Array

from ref_numpy.bpe_format import SPLITS, TokenizerError, Vocabulary, new_vocabulary, to_json
from torch_impl.training.bpe_merges import learn_merges
from torch_impl.training.bpe_table import MergeTable
from torch_impl.training.files import replace_file
from torch_impl.training.pieces import Pieces

_PART = 1 << 16  # characters that are split, or ids that are decoded, before the next ones
_BLOCK = 1 << 11  # characters that are split as ASCII or not
_WAITING = 32  # parts whose new words are encoded together
_WORDS_KEPT = 1 << 17  # encoded words that are remembered
_FEW, _LONG = 32, 64  # words, bytes: below and above, a loop is faster than whole arrays


def _within_ascii(pattern: str) -> re.Pattern:
    """The same pattern for ASCII, where the letters are A-Za-z, in Python's own `re`: twice as fast."""
    classes = re.compile(r"\[[^]]*\]|\\p\{[LN]\}")
    spelled = classes.sub(lambda found: f"[{found[0].strip('[]')}]", pattern)  # \p{L} alone: [\p{L}]
    spelled = spelled.replace("]+", "]++")  # what follows a run is never part of it, so no way back is kept
    return re.compile(spelled.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"), re.ASCII)


_SAFE_CUT = re.compile(r"(?<=\S)(?= )")


class Splitter:
    """Cuts text into pre-tokens by a pattern, as ref_numpy.bpe.pre_tokens does."""

    def __init__(self, pattern: str | None):
        self.pattern = pattern
        self.cuttable = pattern in SPLITS.values()
        if self.cuttable:
            self._ascii, self._any = _within_ascii(pattern).findall, regex.compile(pattern).findall

    def __call__(self, text: str) -> Iterator[list[str]]:
        """The pre-tokens in order, some ten thousand at a time: so few stay in the processor's cache."""
        if self.cuttable:
            for part in _parts(text, _PART):
                if part.isascii():
                    yield self._ascii(part)
                else:
                    blocks = ((block, block.isascii()) for block in _parts(part, _BLOCK))
                    yield [w for block, ascii in blocks for w in (self._ascii if ascii else self._any)(block)]
        else:
            yield pre_tokens(text, self.pattern)


def _parts(text: str, size: int) -> Iterator[str]:
    """Parts of about `size` characters that can be split on their own; see SPLITS."""
    start = 0
    while (cut := _SAFE_CUT.search(text, start + size)) is not None:
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def pre_tokens(text: str, pattern: str | None) -> list[str]:
    """The matches of any pattern, and whatever stands between them."""
    if pattern is None:
        return [text] if text else []
    pieces, end = [], 0
    for match in regex.finditer(pattern, text):
        pieces += (text[end : match.start()], match.group())
        end = match.end()
    pieces.append(text[end:])
    return [piece for piece in pieces if piece]


def special_pattern(special_tokens: Collection[str]) -> re.Pattern | None:
    """Matches special tokens, the longest of those that begin at a place; None where there are none."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def count_words(texts: Iterable[str], special_tokens: Collection[str], split: str | None) -> Counter[str]:
    """How often each pre-token stands in the texts; special tokens are borders and do not count."""
    splitter, special = Splitter(split), special_pattern(special_tokens)
    words = Counter()
    for text in texts:
        for document in special.split(text)[::2] if special else [text]:
            for some in splitter(document):
                words.update(some)
    return words


def check_training(vocab_size: int, special_tokens: Collection[str], split: str | None) -> None:
    """Raises TokenizerError for what `train` could not do, before any work is done."""
    new_vocabulary([], special_tokens, split)
    smallest = 256 + len(set(special_tokens))
    if vocab_size < smallest:
        raise TokenizerError(
            f"vocab_size is {vocab_size}, but must be at least {smallest}: 256 bytes and the special tokens"
        )


def train_on_words(
    words: Counter[str],
    vocab_size: int,
    special_tokens: Collection[str] = (),
    split: str | None = SPLITS["gpt2"],
    ties: Literal["smallest ids", "greatest bytes"] = "smallest ids",
    progress: Callable[[int], object] = lambda merges: None,
) -> Vocabulary:
    """As `train`, from pre-tokens that are counted already; `progress` is told of each merge."""
    check_training(vocab_size, special_tokens, split)
    merges, made = [], set()
    room = vocab_size - 256 - len(set(special_tokens))
    for left, right in learn_merges(words, ties) if room else ():
        merges.append((left, right))
        made.add(left + right)  # two merges can make the same token
        progress(1)
        if len(made) == room:
            break
    return new_vocabulary(merges, special_tokens, split)


def train(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Collection[str] = (),
    split: str | None = SPLITS["gpt2"],
    ties: Literal["smallest ids", "greatest bytes"] = "smallest ids",
) -> Vocabulary:
    """Learns vocab_size tokens: 256 bytes, merges, special tokens; fewer if the text runs out of pairs.

    Each text stands for itself: no pre-token crosses from one to the next. Texts may come from a generator.
    Raises TokenizerError for a vocab_size below 256 plus the special tokens, for a bad pattern and for
    special tokens that cannot be.
    """
    check_training(vocab_size, special_tokens, split)
    return train_on_words(count_words(texts, special_tokens, split), vocab_size, special_tokens, split, ties)


class BPETokenizer:
    """Encodes and decodes with a vocabulary. See torch_impl.training.tokenizer for the interface."""

    opening = "\n\n"

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary.tokens)
        self.special_tokens = vocabulary.special_tokens
        self.dtype = np.min_scalar_type(self.vocab_size - 1)
        ids = vocabulary.ordinary_ids
        self._merges = MergeTable(
            [(ids[left], ids[right]) for left, right in vocabulary.merges],
            [ids[left + right] for left, right in vocabulary.merges],
            np.array([ids[bytes([byte])] for byte in range(256)]),
        )
        self._split = Splitter(vocabulary.split)
        self._lock = Lock()  # threads may share a tokenizer
        self.forget()
        self._tokens = Pieces(
            np.frombuffer(b"".join(vocabulary.tokens), np.uint8), np.array([*map(len, vocabulary.tokens)])
        )

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> UInt[Array, "N"]:
        """The ids of a text. Special tokens are read as such only if named in allowed_special, else as text.

        Raises TokenizerError if allowed_special names an unknown one, UnicodeEncodeError for half of a
        surrogate pair.
        """
        for name in allowed_special:
            if name not in self.special_tokens:
                raise TokenizerError(f"{name!r} is no special token of this vocabulary")
        special = special_pattern(allowed_special)
        rows = [np.empty(0, self.dtype)]
        with self._lock:
            for place, part in enumerate(special.split(text) if special else [text]):
                if place % 2:
                    rows.append(np.array([self.special_tokens[part]], self.dtype))
                else:
                    rows += self._encode_text(part)
        return np.concatenate(rows)

    def _encode_text(self, text: str) -> Iterator[UInt[Array, "_"]]:
        waiting = []  # numbers of words: many new ones are encoded together
        try:
            for words in self._split(text):
                waiting.append(np.fromiter(map(self._number.__getitem__, words), np.int32, len(words)))
                if len(waiting) == _WAITING:
                    yield from self._ids_of(waiting)
                    waiting.clear()
            yield from self._ids_of(waiting)
        except BaseException:
            self.forget()  # some words have a number, but no ids
            raise

    def _ids_of(self, rows: list[Int[Array, "_"]]) -> Iterator[UInt[Array, "_"]]:
        """The ids of rows of numbered words, after the new ones among all words have been encoded."""
        if new := len(self._number) - self._words.size:
            self._learn([*islice(reversed(self._number), new)][::-1])
        yield from map(self._words.row, rows)
        if len(self._number) > _WORDS_KEPT:
            self.forget()

    def _learn(self, words: list[str]) -> None:
        short = [n for n, word in enumerate(words) if len(word) <= _LONG] if len(words) > _FEW else []
        long = [*set(range(len(words))).difference(short)]
        encoded = [self._merges.encode_word(words[n]) for n in long]
        ids, lengths = [*chain(*encoded)], [*map(len, encoded)]
        if short:
            short_ids, short_lengths = self._merges.encode_words([words[n] for n in short])
            ids, lengths = np.concatenate([short_ids, ids]), np.concatenate([short_lengths, lengths])
        self._words.add(np.array(ids, self.dtype), np.array(lengths, int), np.array([*short, *long]))

    def forget(self) -> None:
        """Drop the encoded words that are remembered, and their memory."""
        self._number = defaultdict(count().__next__)
        self._words = Pieces(np.empty(0, self.dtype), np.empty(0, int))

    def __reduce__(self) -> tuple:
        """A copy, in another process too, knows the vocabulary and has seen no words yet."""
        return BPETokenizer, (self.vocabulary,)

    def encode_iterable(self, texts: Iterable[str], allowed_special: Collection[str] = ()) -> Iterator[int]:
        """The ids of texts one after the other, such as the lines of a file; each stands for itself."""
        for text in texts:
            yield from self.encode(text, allowed_special).tolist()

    def decode_bytes(self, ids: Integer[Array, "N"] | Iterable[int]) -> bytes:
        """The bytes of the tokens, one after the other. Raises TokenizerError for an id that no token has."""
        ids = np.asarray(ids if isinstance(ids, Array) else list(ids))
        if not ids.size:
            return b""
        for id in (int(ids.min()), int(ids.max())):
            if not 0 <= id < self.vocab_size:
                raise TokenizerError(f"id {id} is no token; ids run from 0 to {self.vocab_size - 1}")
        parts = (ids[start : start + _PART] for start in range(0, ids.size, _PART))
        return b"".join(self._tokens.row(part).tobytes() for part in parts)

    def decode(
        self, ids: Integer[Array, "N"] | Iterable[int], errors: Literal["replace", "strict"] = "replace"
    ) -> str:
        """The text of the tokens. Bytes that are no UTF-8 become U+FFFD; "strict" raises an error."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return to_json(self.vocabulary)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, in one piece."""
        replace_file(Path(path), self.to_json().encode("utf-8"))


if __name__ == "__main__":
    from torch_impl.training.bpe_command import main

    code = main(sys.argv[1:])
    gc.freeze()  # or the end of the process would look for cycles after all
    sys.exit(code)
