"""Text to token ids and back, and the file that says how: Hugging Face's tokenizer.json, or GPT-2's two.

Byte pair encoding has a file of its own, torch_impl.bpe; here are the simpler tokenizers behind the same
interface: bytes, characters, words. Bytes are saved as a byte-level BPE without merges, so that the
ecosystem's libraries read them too.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import regex
from jaxtyping import Integer, UInt
from numpy import ndarray as Array

from ref_numpy.bpe_format import TokenizerError, Vocabulary, from_gpt2_files, from_json, to_json
from torch_impl.bpe import BPETokenizer
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError, find_tokenizer, replace_file


@runtime_checkable
class Tokenizer(Protocol):
    """What a run asks of a tokenizer."""

    vocab_size: int
    opening: str  # a text to begin from where nobody gives one

    def encode(self, text: str) -> UInt[Array, "N"]:
        """Token ids, in the smallest unsigned dtype that holds vocab_size - 1."""
        ...

    def decode_bytes(self, ids: UInt[Array, "N"] | list[int]) -> bytes:
        """The bytes that the ids stand for."""
        ...

    def decode(self, ids: UInt[Array, "N"] | list[int]) -> str:
        """The text that the ids stand for; bytes that are not UTF-8 become U+FFFD."""
        ...

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        ...

    def save(self, path: Path) -> None:
        """Write tokenizer.json, in one piece."""
        ...


class ByteTokenizer:
    """Each byte is a token, and its id is its value."""

    vocab_size = 256
    opening = "\n\n"

    def encode(self, text: str) -> UInt[Array, "N"]:
        """The bytes of the text's UTF-8, as uint8."""
        return np.frombuffer(bytearray(text, "utf-8"), np.uint8)

    def decode_bytes(self, ids: UInt[Array, "N"] | list[int]) -> bytes:
        """Raises ValueError for an id outside 0 to 255."""
        return (
            bytes(memoryview(ids))
            if isinstance(ids, Array) and ids.dtype == np.uint8
            else bytes(map(int, ids))
        )

    def decode(self, ids: UInt[Array, "N"] | list[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """The content of tokenizer.json: a byte-level BPE that has no merges, id b for byte b."""
        return to_json(BYTES)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, in one piece."""
        replace_file(Path(path), self.to_json().encode("utf-8"))


BYTES = Vocabulary([bytes([byte]) for byte in range(256)], [], {}, None)
_UNKNOWN = "<unk>"


class WordLevel:
    """A list of known strings, and <unk>, id 0, for all others."""

    normalizer: dict | None = None  # how the file format says that text is changed before ...
    split: dict  # ... it is cut
    decoder: dict | None
    joint: str  # what stands between tokens
    opening: str

    def __init__(self, known: Iterable[str]):
        self.tokens = [_UNKNOWN, *(token for token in dict.fromkeys(known) if token != _UNKNOWN)]
        self.vocab_size = len(self.tokens)
        self.dtype = np.min_scalar_type(self.vocab_size - 1)
        self._ids = {token: id for id, token in enumerate(self.tokens)}

    def _cut(self, text: str) -> Iterable[str]:
        raise NotImplementedError

    def encode(self, text: str) -> UInt[Array, "N"]:
        """Ids of the text's parts."""
        return np.array([self._ids.get(part, 0) for part in self._cut(text)], self.dtype)

    def decode(self, ids: UInt[Array, "N"] | list[int]) -> str:
        """The text of the ids, as far as it was known. Raises InputError for an id that no token has."""
        ids = [int(id) for id in ids]
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise InputError(f"id {id} is no token; ids run from 0 to {self.vocab_size - 1}")
        return self.joint.join(self.tokens[id] for id in ids)

    def decode_bytes(self, ids: UInt[Array, "N"] | list[int]) -> bytes:
        """The UTF-8 of `decode`."""
        return self.decode(ids).encode("utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json: the ecosystem's WordLevel model."""
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": self.normalizer,
            "pre_tokenizer": self.split,
            "post_processor": None,
            "decoder": self.decoder,
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": _UNKNOWN},
        }
        return json.dumps(content, ensure_ascii=False, indent=1)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, in one piece."""
        replace_file(Path(path), self.to_json().encode("utf-8"))


class CharacterTokenizer(WordLevel):
    """Each character is a token: an alphabet of its own, small for plain text."""

    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}  # noqa: RUF012
    decoder = {"type": "Fuse"}  # noqa: RUF012
    joint = ""
    opening = "\n\n"

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        """All characters of the texts, in the order of their code points."""
        characters = set()
        for text in texts:
            characters.update(text)
        return cls(sorted(characters))

    def _cut(self, text: str) -> str:
        return text


class WordTokenizer(WordLevel):
    """Words, and each sign between them as a word of its own, for pretrained word vectors; perhaps in lower
    case. Spaces are not kept."""

    split = {  # noqa: RUF012
        "type": "Split",
        "pattern": {"Regex": r"\w+|[^\w\s]"},
        "behavior": "Removed",
        "invert": True,
    }
    decoder = None
    joint = " "
    opening = "."

    def __init__(self, known: Iterable[str], lowercase: bool = False):
        super().__init__(known)
        if lowercase:
            self.normalizer = {"type": "Lowercase"}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> "WordTokenizer":
        """The most frequent words; among equals the one that comes first in the texts."""
        cut = cls([], lowercase)._cut
        counts = Counter(word for text in texts for word in cut(text))
        return cls((word for word, _ in counts.most_common(vocab_size - 1)), lowercase)

    def _cut(self, text: str) -> list[str]:
        if self.normalizer is not None:  # each character for itself: no sigma knows that it is the last one
            text = text.replace("Σ", "σ").lower()
        return regex.findall(self.split["pattern"]["Regex"], text)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Names the tokenizer."""
    return hashlib.sha256(tokenizer.to_json().encode("utf-8")).hexdigest()


def count_unknown(tokenizer: Tokenizer, ids: Integer[Array, "N"]) -> int:
    """How many of some tokens stand for what the tokenizer does not know."""
    return int(np.count_nonzero(ids == 0)) if isinstance(tokenizer, WordLevel) else 0


def tokens_per_byte(tokenizer: Tokenizer, ids: Integer[Array, "N"], text_bytes: int) -> float | None:
    """Of a text and all its tokens; None where these do not hold all of it."""
    keeps_spaces = not isinstance(tokenizer, WordTokenizer)
    return len(ids) / text_bytes if keeps_spaces and not count_unknown(tokenizer, ids) else None


def unknown_told(tokenizer: Tokenizer, ids: Integer[Array, "N"]) -> str:
    """How many of some tokens stand for what the tokenizer does not know; nothing where it knows all."""
    unknown = count_unknown(tokenizer, ids)
    return f"of {counted(len(ids), 'token')} the tokenizer does not know {unknown}" if unknown else ""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, or the files of a folder, as find_tokenizer finds them.

    Raises InputError for a damaged or foreign file.
    """
    found, *merges = find_tokenizer(Path(path))
    if merges:
        return load_gpt2_files(found, *merges)
    try:
        return parse_tokenizer(_read(found))
    except NoTokenizerJson as error:
        if found.name == "tokenizer.json":
            raise InputError(f"{found} is damaged: {error}") from None
        raise InputError(
            f"{found} is no tokenizer.json; name one, or a folder with vocab.json and merges.txt"
        ) from None
    except TokenizerError as error:
        raise InputError(f"{found} cannot be read as a tokenizer: {error}") from None


def load_gpt2_files(vocab: Path, merges: Path) -> BPETokenizer:
    """The tokenizer of GPT-2's two files. Raises InputError for damaged or foreign ones."""
    try:
        return BPETokenizer(from_gpt2_files(_read(vocab), _read(merges).decode("utf-8")))
    except (TokenizerError, UnicodeDecodeError) as error:
        raise InputError(f"{vocab} with {merges} cannot be read as a tokenizer: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


class NoTokenizerJson(TokenizerError):
    """Of a content that is something else, or damaged beyond recognition."""


def parse_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer that the content of a tokenizer.json describes. Raises TokenizerError for any other."""
    try:
        described = json.loads(content)
        model = described["model"]
        if model.get("type") == "WordLevel":  # the oldest files, as GPT-2's, name no type
            tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
            how = described["normalizer"], described["pre_tokenizer"]
            if how == (None, CharacterTokenizer.split):
                return _as_described(CharacterTokenizer(tokens), described)
            if how[0] in (None, {"type": "Lowercase"}) and how[1] == WordTokenizer.split:
                return _as_described(WordTokenizer(tokens, lowercase=how[0] is not None), described)
        vocabulary = from_json(content)
    except TokenizerError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NoTokenizerJson(f"{type(error).__name__} {error}") from None
    return ByteTokenizer() if vocabulary == BYTES else BPETokenizer(vocabulary)


def _as_described(tokenizer: WordLevel, described: dict) -> WordLevel:
    """The tokenizer. Raises TokenizerError where a file means other ids, or tokens that are no text."""
    written, model = json.loads(tokenizer.to_json()), described["model"]
    for name in ("truncation", "padding", "added_tokens"):
        if described.get(name) not in (None, written[name]):
            raise TokenizerError(f"it uses {name} {described[name]}, which is not supported here")
    if model["unk_token"] != _UNKNOWN or model["vocab"] != written["model"]["vocab"]:
        raise TokenizerError(
            f"its ids must run from 0 to {tokenizer.vocab_size - 1}, beginning with {_UNKNOWN}, its unk_token"
        )
    for token in tokenizer.tokens:
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise TokenizerError(f"its token {token!r} is half of a surrogate pair, which is no text")
    return tokenizer
