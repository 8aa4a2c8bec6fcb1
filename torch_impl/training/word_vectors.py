"""Pretrained word vectors in GloVe's text format (Pennington, Socher, Manning 2014), read as a stream.

    the 0.04656 0.21318 -0.00742 ...        a word and d numbers on each line, one space between them, UTF-8

Files that people download also hold: a first line "400000 300" as word2vec writes it, which
is skipped; words with spaces in them (". . .", in glove.840B.300d), which end where the last d numbers begin;
spaces at the ends of lines; words that occur twice, of which the first is taken.
Such a file has gigabytes; only the vectors of the words that are asked for are kept in memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from numpy import ndarray as Array
from torch import Tensor

from torch_impl.training.bpe_corpus import byte_bar
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError
from torch_impl.training.text import Text, readable

_NUMBER = b"0123456789.+-eE "  # what numbers are written with
_NAMED = 8  # words without a vector
_TOLD_AFTER = 1 << 20  # bytes between two movements of the progress bar


class WordVectors(NamedTuple):
    """Vectors of the words asked for, each in its row; the rows of words that the file lacks are 0."""

    vectors: Float32[Array, "V C"]
    found: Bool[Array, "V"]


@torch.no_grad()
def place_word_vectors(table: Float[Tensor, "V C"], read: WordVectors) -> None:
    """Puts the vectors that were found into their rows of an embedding with its initial weights.

    All are multiplied by one number, which gives them the root mean square of the rows that they replace
    (0.02): angles and relative lengths stay, and they are as large beside the positions, the other rows and
    the learning rate as random rows are. GloVe's own are many times larger, and so would tied logits be.
    """
    rows = torch.from_numpy(read.found).to(table.device)
    vectors = torch.from_numpy(read.vectors).double()[torch.from_numpy(read.found)]
    size, wanted = vectors.square().mean().sqrt(), table[rows].cpu().double().square().mean().sqrt()
    if size > 0:
        vectors *= wanted / size
    table[rows] = vectors.to(table.dtype).to(table.device)


def coverage(read: WordVectors, words: list[str], counts: Int[Array, "V"]) -> str:
    """One line on the words that have no vector: how many, their share of vocabulary and text, the first few.

    `counts` tells how often each word occurs in the running text.
    """
    missing = np.flatnonzero(~read.found)
    missing = missing[np.argsort(-counts[missing], kind="stable")]
    line = f"word vectors: {read.found.sum():,} of {len(words):,} words are found"
    if not missing.size:
        return line
    shares = missing.size / len(words), counts[missing].sum() / counts.sum()
    few = " ".join(words[row] for row in missing[:_NAMED]) + " ..." * (missing.size > _NAMED)
    return (
        f"{line}; {missing.size:,} are not, {shares[0]:.2%} of the vocabulary and {shares[1]:.2%} of the "
        f"running text, and begin at random: {few}"
    )


class _Format(NamedTuple):
    width: int
    count: int | None  # of vectors, where a header tells it


def vector_width(path: Path) -> int:
    """How many numbers a word has, by the first line. Raises InputError for a file that is none of these."""
    with readable(path).open("rb") as file:
        return _format(path, file.readline()).width


def read_word_vectors(path: Path, rows: Mapping[str, int]) -> WordVectors:
    """The vectors of the words that have a row.

    Every line is looked at: its width, its word's UTF-8, and that its numbers are written with what numbers
    are; those of the words asked for are read. Raises InputError with the number of the first bad line.
    """
    width = vector_width(path)
    vectors = np.zeros((len(rows), width), np.float32)
    found = np.zeros(len(rows), bool)
    number, unread = 0, 0
    with byte_bar([Text(path)], "word vectors") as bar, path.open("rb") as file:
        expected = _format(path, file.readline())
        file.seek(0)
        for number, line in enumerate(file, 1):
            unread += len(line)
            if unread >= _TOLD_AFTER:
                bar.update(unread)
                unread = 0
            if number == 1 and expected.count is not None:
                continue
            word, numbers = _fields(path, number, line, width)
            row = rows.get(word)
            if row is not None and not found[row]:
                vectors[row] = _numbers(path, number, numbers)
                found[row] = True
            elif b" ".join(numbers).translate(None, _NUMBER):
                _numbers(path, number, numbers)  # says what is wrong
        bar.update(unread)
    lines = number - (expected.count is not None)
    if expected.count not in (None, lines):
        raise InputError(
            f"{path}: line 1 promises {expected.count} vectors, but there are {lines}; is the file cut short?"
        )
    return WordVectors(vectors, found)


def _format(path: Path, first: bytes) -> _Format:
    """What the first line says: it is a header, or a vector, whose width is what follows its word."""
    fields = first.rstrip(b"\r\n ").split(b" ")
    if len(fields) == 2 and all(field.isdigit() for field in fields) and int(fields[1]) > 0:
        return _Format(int(fields[1]), int(fields[0]))
    width = len(fields) - 1
    while width and not _is_number(fields[-width]):  # a word with spaces
        width -= 1
    if not width:
        raise InputError(
            f"{path}, line 1 is no word with numbers after it; word vectors are lines such as: the 0.1 -0.2"
        )
    return _Format(width, None)


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return b"_" not in field  # which Python alone allows


def _fields(path: Path, number: int, line: bytes, width: int) -> tuple[str, list[bytes]]:
    """The word of a line, and its numbers as they are written."""
    line = line.rstrip(b"\r\n ")
    if not line:
        raise InputError(f"{path}, line {number} is empty; remove it")
    word, *numbers = line.rsplit(b" ", width)
    has, parts = len(numbers), word.split(b" ")
    while len(parts) > 1 and _is_number(parts[-1]):  # no word with spaces, but numbers too many
        parts.pop()
        has += 1
    if has != width:
        raise InputError(
            f"{path}, line {number} has {counted(has, 'number')}, but the first vector has {width}"
        )
    if not word:
        raise InputError(f"{path}, line {number} has no word before its numbers")
    try:
        return word.decode("utf-8"), numbers
    except UnicodeDecodeError as error:
        byte = word[error.start]
        raise InputError(
            f"{path}, line {number} is not UTF-8: byte 0x{byte:02x} in its word; save the file as UTF-8"
        ) from None


def _numbers(path: Path, number: int, fields: list[bytes]) -> Float32[Array, "C"]:
    for field in fields:
        if not _is_number(field):
            raise InputError(f"{path}, line {number}: {field.decode('utf-8', 'replace')!r} is no number")
    with np.errstate(over="ignore"):
        vector = np.array([float(field) for field in fields], np.float32)
    if not np.isfinite(vector).all():
        field = fields[int(np.flatnonzero(~np.isfinite(vector))[0])]
        raise InputError(f"{path}, line {number}: {field.decode('ascii')} is no finite number")
    return vector
