"""What a run is trained on and what is held out: as text, and as ids that are made once and kept in files."""

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt
from numpy import ndarray as Array

from ref_numpy.bpe_format import SPLITS, TokenizerError
from torch_impl.bpe import BPETokenizer
from torch_impl.training.bpe_corpus import byte_bar, encode_texts, read_parts, train_on_texts
from torch_impl.training.cache import cached
from torch_impl.training.config import DEFAULT_VOCAB_SIZE, TOKENIZERS, RunConfig, TokenizerSettings
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError
from torch_impl.training.text import Text, file_text
from torch_impl.training.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    parse_tokenizer,
    tokenizer_sha256,
)


@dataclass(frozen=True)
class Corpus:
    """Text to train on and held-out text, neither of them in memory; and what names them."""

    train: Text
    valid: Text
    train_sha256: str
    valid_sha256: str

    def sha256(self) -> str:
        """Names both: a resumed run must find what it began with."""
        return hashlib.sha256(f"{self.train_sha256} {self.valid_sha256}".encode("ascii")).hexdigest()


def load_corpus(train_file: str, valid_file: str) -> Corpus:
    """The two texts. Without a training file, the embedded one; without a held-out file, the last tenth.

    Raises InputError for what is missing, no file, empty, or not UTF-8 text.
    """
    whole = file_text(train_file) if train_file else Text(python_reference().encode("utf-8"))
    other = [file_text(valid_file)] if valid_file else []
    with byte_bar([whole, *other] * 2, "reading") as bar:
        if valid_file:  # ten tenths of either: looked through, and kept whole
            (train, _), (valid, _) = whole.split(10, bar.update), other[0].split(10, bar.update)
        else:
            train, valid = whole.split(9, bar.update)
        return Corpus(train, valid, train.sha256(bar.update), valid.sha256(bar.update))


def python_reference() -> str:
    """The Python language reference, as `help()` shows it: about half a megabyte in every interpreter."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def make_tokenizer(settings: TokenizerSettings, corpus: Corpus, cache: Path) -> Tokenizer:
    """The tokenizer that the settings ask for: read from its file, or learned from the training text.

    What an earlier run has learned is taken from the cache. Raises InputError for a file that is no
    tokenizer, and for a text that is too small for the vocabulary.
    """
    name, size = settings.tokenizer, settings.vocab_size or DEFAULT_VOCAB_SIZE
    if name == "bytes":
        return ByteTokenizer()
    if name not in TOKENIZERS:
        tokenizer = load_tokenizer(Path(name))
        for special in settings.special_tokens:
            if special not in getattr(tokenizer, "special_tokens", ()):
                raise InputError(f"--special-tokens {special}: {name} has no such special token")
        return tokenizer

    def learn() -> Tokenizer:
        if name == "bpe":
            texts = [corpus.train]
            return BPETokenizer(train_on_texts(texts, size, settings.special_tokens, workers=_cores()))
        with byte_bar([corpus.train], "counting") as bar:
            parts = read_parts([corpus.train], (), SPLITS["whitespace"], progress=bar.update)
            if name == "characters":
                return CharacterTokenizer.train(parts)
            return WordTokenizer.train(parts, size, settings.lowercase)

    def learned() -> Iterator[bytes]:
        yield learn().to_json().encode("utf-8")
        _refuse_changed(corpus.train, corpus.train_sha256)

    made_from = {
        "text": corpus.train_sha256,
        "name": name,
        "vocab_size": size,
        "special_tokens": settings.special_tokens,
        "lowercase": settings.lowercase,
    }
    try:
        path, n = cached(cache, "tokenizer", made_from, learned)
    except TokenizerError as error:
        raise InputError(str(error)) from None
    return parse_tokenizer(path.read_bytes()[:n])


def encode_corpus(
    corpus: Corpus, tokenizer: Tokenizer, config: RunConfig, cache: Path
) -> list[UInt[Array, "_"]]:
    """Token ids of both texts, in memory only where they are read.

    Raises InputError for a text shorter than context_length + 1 tokens.
    """
    length = config.model.context_length
    ids_of_both = []
    for text, digest, name, file in (
        (corpus.train, corpus.train_sha256, "training text", config.run.train_file),
        (corpus.valid, corpus.valid_sha256, "held-out text", config.run.valid_file),
    ):
        ids = encoded(text, digest, tokenizer, config.tokenizer.special_tokens, cache)
        if ids.size <= length:
            held_out = "" if file or name == "training text" else " (the last tenth of the training text)"
            shorter = f" or a --context-length below {ids.size}" if ids.size > 1 else ""
            raise InputError(
                f"the {name}{held_out} has {counted(ids.size, 'token')}, but context_length {length} needs "
                f"at least {length + 1}; use a longer text{shorter}"
            )
        ids_of_both.append(ids)
    return ids_of_both


def encoded(
    text: Text, text_sha256: str, tokenizer: Tokenizer, special_tokens: tuple[str, ...], cache: Path
) -> UInt[Array, "_"]:
    """Token ids of a text, from the cache if they were made before; in memory only where they are read."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)

    def encode() -> Iterator[bytes]:
        with byte_bar([text], "encoding") as bar:
            if isinstance(tokenizer, BPETokenizer):
                parts = encode_texts(tokenizer, [text], special_tokens, _cores(), bar.update)
            else:  # none of these joins what a space divides
                parts = map(
                    tokenizer.encode, read_parts([text], (), SPLITS["whitespace"], progress=bar.update)
                )
            for ids in parts:
                yield ids.tobytes()
        _refuse_changed(text, text_sha256)

    made_from = {
        "text": text_sha256,
        "tokenizer": tokenizer_sha256(tokenizer),
        "special_tokens": sorted(special_tokens),
        "byte_order": sys.byteorder,
    }
    path, size = cached(cache, "ids", made_from, encode)
    if not size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="c", shape=(size // dtype.itemsize,))  # torch wants it writable


def _refuse_changed(text: Text, text_sha256: str) -> None:
    """Raises InputError for a text that was written to while it was read: the cache would keep under its name
    what was made of another."""
    if isinstance(text.source, Path) and text.sha256() != text_sha256:
        raise InputError(f"{text.source} has changed while it was read; begin again once it is whole")


def _cores() -> int:
    return os.cpu_count() or 1
