"""What a byte-level BPE tokenizer is, and the two ways to write it down; described once, for both sides.

    tokenizer.json               one file, that of Hugging Face's tokenizers
    vocab.json and merges.txt    two files, those of GPT-2; they name no split pattern (it is GPT-2's)

Both write a token as text in which each byte stands as one visible character (`byte_characters`).
Not here: any other kind of tokenizer, normalisers, truncation, padding, tokens with stripping rules, tokens
cut out of any text, words taken whole that merges do not make. A file that asks for one of them is refused,
since its ids would differ. What its post_processor puts around a text is no part of the text.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import regex

# How text is cut into pre-tokens, which no token crosses. What counts as a letter changes with the version of
# Unicode, and so do the ids of new characters: requirements.txt pins the `regex` package.
# A long text can be cut where a pre-token begins whatever stands before it: in all of these at a space after
# anything but whitespace; in gpt2 and whitespace at any whitespace there; in gpt4 at a newline after a letter
# or a digit.
SPLITS = {
    # Radford et al. 2019: words and numbers with the space before them, contractions, punctuation, spaces.
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # GPT-4 (cl100k_base): contractions in capitals too, three digits at most, newlines after punctuation.
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Runs of anything but whitespace, with the space before them.
    "whitespace": r" ?\S+|\s+(?!\S)|\s+",
}

_visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
# The bytes in the order of their ids: GPT-2's, the visible ones first. Ties in training fall by these ids.
BYTE_ORDER = bytes(_visible + [byte for byte in range(256) if byte not in _visible])


class TokenizerError(ValueError):
    """A tokenizer that cannot be. The message is one line: the value, the limit and the mend."""


def byte_characters() -> dict[int, str]:
    """The visible character that stands for each byte in the files (GPT-2's encoder.py, bytes_to_unicode).

    A byte whose Latin-1 character is visible stands for itself, the others for U+0100 and up, in order.
    """
    hidden = iter(range(256, 512))
    return {byte: chr(byte) if byte in _visible else chr(next(hidden)) for byte in BYTE_ORDER}


_TO_CHARACTER = byte_characters()
_TO_BYTE = {character: byte for byte, character in _TO_CHARACTER.items()}


@dataclass(frozen=True)
class Vocabulary:
    """All that a tokenizer knows. Raises TokenizerError where its parts contradict each other."""

    tokens: list[bytes]
    """The bytes of each token, in the order of their ids; special tokens stand here as their UTF-8."""
    merges: list[tuple[bytes, bytes]]
    """Pairs of tokens in the order in which they were learned: the rank of a merge is its place here."""
    special_tokens: dict[str, int]
    """Text and id of the tokens that are no text: ends of documents, turns of a chat."""
    split: str | None = SPLITS["gpt2"]
    """The pattern whose matches are the pre-tokens; text between matches is a pre-token too. None: no cut."""

    def __post_init__(self) -> None:
        for text, id in self.special_tokens.items():
            _require(text != "", "a special token is the empty string; give it a name, such as <|endoftext|>")
            _require(
                0 <= id < len(self.tokens) and self.tokens[id] == text.encode("utf-8"),
                f"special token {text!r} has id {id}, but that is not its place in the vocabulary",
            )
        ordinary = self.ordinary_ids
        for byte in range(256):
            _require(bytes([byte]) in ordinary, f"byte {byte} has no token; all 256 bytes need one")
        for left, right in self.merges:
            if not (left in ordinary and right in ordinary and left + right in ordinary):
                raise TokenizerError(
                    f"merge {printable(left)} {printable(right)} needs both of them and what they make "
                    "in the vocabulary"
                )
        for text in self.special_tokens:
            clash = bytes(_TO_BYTE[character] for character in text if character in _TO_BYTE)
            _require(
                text.encode("utf-8") not in ordinary and not (len(clash) == len(text) and clash in ordinary),
                f"special token {text!r} is an ordinary token as well; choose a name such as <|{text}|>",
            )
        check_pattern(self.split)

    @property
    def ordinary_ids(self) -> dict[bytes, int]:
        """The id of each token that is text."""
        special = set(self.special_tokens.values())
        return {token: id for id, token in enumerate(self.tokens) if id not in special}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise TokenizerError(message)


def printable(token: bytes) -> str:
    """A token as it stands in the files: a visible character for each byte."""
    return "".join(map(_TO_CHARACTER.__getitem__, token))


def _bytes_of(text: str) -> bytes:
    try:
        return bytes(map(_TO_BYTE.__getitem__, text))
    except KeyError as error:
        raise TokenizerError(f"token {text!r} has the character {error}, which stands for no byte") from None


def _require_text(what: str, text: str) -> None:
    """Half of a surrogate pair, as a byte of a command line arrives that is no UTF-8, fits in no file."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{what} {text!r} is no text at character {error.start}; leave it out") from None


def check_pattern(pattern: str | None) -> None:
    """Raises TokenizerError if the pattern is no regular expression, or no text."""
    _require_text("split pattern", pattern or "")
    try:
        regex.compile(pattern or "")
    except (regex.error, TypeError) as error:
        raise TokenizerError(f"split pattern {pattern!r} is no regular expression: {error}") from None


def new_vocabulary(
    merges: list[tuple[bytes, bytes]], special_tokens: Iterable[str] = (), split: str | None = SPLITS["gpt2"]
) -> Vocabulary:
    """The vocabulary of freshly learned merges: the 256 bytes in GPT-2's order, what the merges made, the
    special tokens. A token that two merges make has one id."""
    tokens = dict.fromkeys(
        [*(bytes([byte]) for byte in BYTE_ORDER), *(left + right for left, right in merges)]
    )
    return vocabulary_of(dict(enumerate(tokens)), merges, special_tokens, split)


def vocabulary_of(
    tokens: dict[int, bytes],
    merges: list[tuple[bytes, bytes]],
    special_tokens: Iterable[str] = (),
    split: str | None = SPLITS["gpt2"],
) -> Vocabulary:
    """A vocabulary from tokens by id. A special token that is among them keeps its id, others are appended.

    Raises TokenizerError where the ids have gaps or the parts contradict each other.
    """
    ids = sorted(tokens)
    _require(ids == list(range(len(ids))), f"{len(ids)} tokens must have the ids 0 to {len(ids) - 1}")
    listed = [tokens[id] for id in ids]
    places = {token: id for id, token in enumerate(listed)}
    special = {}
    for text in dict.fromkeys(special_tokens):
        _require_text("special token", text)
        token = text.encode("utf-8")
        if token not in places or len(token) == 1:
            places[token] = len(listed)
            listed.append(token)
        special[text] = places[token]
    return Vocabulary(listed, merges, special, split)


def _named(vocabulary: Vocabulary) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids by name, and the merges by the names of the two."""
    names = {token: printable(token) for token in vocabulary.tokens}
    special = {id: text for text, id in vocabulary.special_tokens.items()}
    ids = {special.get(id) or names[token]: id for id, token in enumerate(vocabulary.tokens)}
    return ids, [(names[left], names[right]) for left, right in vocabulary.merges]


def _from_names(
    ids: dict[str, int], merges: list[list[str]], special: Iterable[str] | None, split: str | None
) -> Vocabulary:
    """The vocabulary of a file's names; special None means those that are no byte and that no merge makes."""
    if special is None:
        special = ids.keys() - _TO_BYTE.keys() - {left + right for left, right in merges}
    special = sorted(special, key=ids.__getitem__)
    tokens = {id: name.encode("utf-8") if name in special else _bytes_of(name) for name, id in ids.items()}
    _require(len(tokens) == len(ids), "two of its tokens have the same id")
    return vocabulary_of(
        tokens, [(_bytes_of(left), _bytes_of(right)) for left, right in merges], special, split
    )


@contextmanager
def _damage_is_named() -> Iterator[None]:
    try:
        yield
    except TokenizerError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"it is damaged: {type(error).__name__} {error}") from None


# --- tokenizer.json -------------------------------------------------------------------------------


def to_json(vocabulary: Vocabulary) -> str:
    """The content of a tokenizer.json, as `tokenizers.Tokenizer.from_file` reads it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": vocabulary.split}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids, merges = _named(vocabulary)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": text} | flags for text, id in vocabulary.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]}
        if vocabulary.split is not None
        else byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False)


def from_json(text: str | bytes) -> Vocabulary:
    """Reads the content of a tokenizer.json. Raises TokenizerError for a damaged or foreign one."""
    with _damage_is_named():
        content = json.loads(text)
        model = content["model"]
        kind = model.get("type", "BPE")
        _require(kind == "BPE", f"its model is {kind}, but only byte-level BPE is read here")
        changes = ("normalizer", "truncation", "padding")
        foreign = [f"{name} {content[name]}" for name in changes if content.get(name)]
        switches = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        foreign += [f"model.{name} {model[name]}" for name in switches if model.get(name)]
        _require(not foreign, f"it uses {', '.join(foreign)}, which is not supported here")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        special = _special_tokens(content.get("added_tokens") or [], model["vocab"])
        pattern = _pattern_of(content.get("pre_tokenizer"))
        vocabulary = _from_names(model["vocab"] | special, merges, special, pattern)
        if model.get("ignore_merges"):
            _require_merges_to_reach_all(vocabulary)
        return vocabulary


def _special_tokens(added: list[dict], vocab: dict[str, int]) -> dict[str, int]:
    """Text and id of the added tokens. `tokenizers` numbers those that the model lacks from its end on,
    whatever ids the file gives them."""
    ids = dict(vocab)
    for entry in added:
        text, id = entry["content"], entry["id"]
        rules = [name for name in ("single_word", "lstrip", "rstrip") if entry[name]]
        _require(not rules, f"its added token {text!r} has {', '.join(rules)}, which is not supported here")
        _require(
            entry["special"],
            f"its added token {text!r} is not special, so cut out of any text, which is not supported here",
        )
        place = ids.setdefault(text, len(ids))
        _require(
            id == place, f"its added token {text!r} has id {id}, but its place in the vocabulary is {place}"
        )
    return {entry["content"]: entry["id"] for entry in added}


def _require_merges_to_reach_all(vocabulary: Vocabulary) -> None:
    """With ignore_merges a word that is a token is that token at once: the same where merges make it too."""
    rank = {pair: place for place, pair in enumerate(vocabulary.merges)}
    for token in vocabulary.ordinary_ids:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 1:
            ranks = [rank.get(pair, inf) for pair in pairwise(parts)]
            first = min(ranks)
            _require(
                first < inf,
                f"it uses model.ignore_merges, but its merges do not make token {printable(token)}, which is "
                "not supported here",
            )
            i = ranks.index(first)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _pattern_of(pre_tokenizer: dict | None) -> str | None:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
            return None
        case [{"type": "ByteLevel", "add_prefix_space": False}]:
            return SPLITS["gpt2"]
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            return pattern
    raise TokenizerError(f"its pre_tokenizer {pre_tokenizer} is not supported here")


# --- vocab.json and merges.txt --------------------------------------------------------------------


def to_gpt2_files(vocabulary: Vocabulary) -> tuple[str, str]:
    """The contents of vocab.json and of merges.txt, the latter with its version line."""
    ids, merges = _named(vocabulary)
    lines = (f"{left} {right}\n" for left, right in merges)
    return json.dumps(ids, ensure_ascii=False), "#version: 0.2\n" + "".join(lines)


def from_gpt2_files(vocab: str | bytes, merges: str, split: str | None = SPLITS["gpt2"]) -> Vocabulary:
    """Reads the contents of vocab.json and merges.txt, whose version line may be missing.

    The files do not say which tokens are special: it is those that are no byte and that no merge makes.
    Raises TokenizerError for damaged contents, and where merges are missing.
    """
    with _damage_is_named():
        lines = [
            line
            for line in merges.replace("\r\n", "\n").split("\n")
            if line and not line.startswith("#version")
        ]
        pairs = [line.split(" ") for line in lines]
        ids = json.loads(vocab)
        _require_merges_to_be_all(ids, {"".join(pair) for pair in pairs})
        return _from_names(ids, pairs, None, split)


_LOST = 0.01
"""The largest share of a vocabulary that may lack its merge. Of GPT-2's, tokens as rare as its last hundredth
make a text shorter by 0.03%; added words that happen to look like lost tokens are far fewer."""
_SPECIAL = 16
"""As many of a small vocabulary may be such words all the same."""


def _require_merges_to_be_all(ids: dict[str, int], made: set[str]) -> None:
    """A token that two others make, and no merge does, has lost its merge. A special token, such as
    <|endoftext|>, <mask> or madeupword0000, has not: hardly one, such as [], is two tokens side by side."""
    unmade = ids.keys() - made
    lost = sum(any(name[:cut] in ids and name[cut:] in ids for cut in range(1, len(name))) for name in unmade)
    makes = f"merges.txt makes {len(ids.keys() & made):,} of the {len(ids):,} tokens in vocab.json"
    _require(lost <= max(_LOST * len(ids), _SPECIAL), f"{makes}; is it cut short?")
