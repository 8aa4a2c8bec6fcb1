"""Byte-level byte pair encoding (Sennrich et al. 2016, section 3.2; Radford et al. 2019, section 2.2).

    text -> documents, between special tokens -> pre-tokens, by a regular expression -> bytes -> tokens

Training starts from the 256 bytes and merges, again and again, the pair of neighbouring tokens that is most
frequent in the corpus, until the vocabulary is full or no pair is left. Pairs are counted within pre-tokens,
never across two of them. So on paper:

    corpus   low low lower
    words    low 1, _low 1, _lower 1     the distinct pre-tokens, and how often each was found; _ is the space
    tokens   l o w | _ l o w | _ l o w e r
    pairs    l+o 3, o+w 3, _+l 2, w+e 1, e+r 1
    merge 1  l+o (3; o+w has 3 too: a tie)                  lo w | _ lo w | _ lo w e r
    pairs    lo+w 3, _+lo 2, w+e 1, e+r 1
    merge 2  lo+w (3)                                       low | _ low | _ low e r
    pairs    _+low 2, low+e 1, e+r 1
    merge 3  _+low (2)                                      low | _low | _low e r

Ties: among the most frequent pairs the one with the smallest ids wins, the left id first; this is the rule
of Hugging Face's `tokenizers`. Ids are given as in GPT-2: the bytes in `BYTE_ORDER`, then what the merges
make, then the special tokens. That order has the visible ASCII characters first, as in ASCII, so l (75) goes
before o (78), and the space (220) after all of them.

Encoding replays the merges in the order in which they were learned, in each pre-token by itself:

    _slow    _ s l o w  ->  _ s lo w  ->  _ s low           no _+low here: the s stands between them

Not here: speed (each word that a merge touches is rebuilt), corpora beyond memory, dropout of merges.
"""

import heapq
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import regex

from ref_numpy.bpe_format import (
    BYTE_ORDER,
    SPLITS,
    TokenizerError,
    Vocabulary,
    from_json,
    new_vocabulary,
    to_json,
)

Pair = tuple[bytes, bytes]


class Merge(NamedTuple):
    """One step of training, for those who watch."""

    pair: Pair
    count: int  # how often the pair stood in the corpus
    words: list[str]  # a few pre-tokens that it stood in


# --- cutting text ---------------------------------------------------------------------------------


def cut_at_special_tokens(text: str, special_tokens: Collection[str]) -> list[str]:
    """Text and special tokens in turn: even places hold text, odd places a special token.

    Where several special tokens begin at the same place the longest wins.
    """
    if not special_tokens:
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text)


def pre_tokens(text: str, pattern: str | None) -> list[str]:
    """The matches of the pattern, and whatever stands between them; joined they are the text again."""
    if pattern is None:
        return [text] if text else []
    pieces, end = [], 0
    for match in regex.finditer(pattern, text):
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


def as_bytes(word: str) -> list[bytes]:
    """The tokens that every word starts from: its single bytes in UTF-8."""
    return [bytes([byte]) for byte in word.encode("utf-8")]


def pairs_of(tokens: list[bytes]) -> list[Pair]:
    """Neighbours. In a a a the pair a+a stands twice, although only one of the two can be merged."""
    return list(pairwise(tokens))


def merged(tokens: list[bytes], pair: Pair) -> list[bytes]:
    """The tokens after each occurrence of the pair, from left to right, has become one token."""
    result, i = [], 0
    while i < len(tokens):
        if (tokens[i], *tokens[i + 1 : i + 2]) == pair:
            result.append(tokens[i] + tokens[i + 1])
            i += 2
        else:
            result.append(tokens[i])
            i += 1
    return result


# --- training -------------------------------------------------------------------------------------


def count_words(texts: Iterable[str], special_tokens: Collection[str], pattern: str | None) -> Counter[str]:
    """How often each pre-token stands in the texts; special tokens are borders and do not count."""
    words = Counter()
    for text in texts:
        for document in cut_at_special_tokens(text, special_tokens)[::2]:
            words.update(pre_tokens(document, pattern))
    return words


def learn_merges(
    words: Counter[str], ties: Literal["smallest ids", "greatest bytes"] = "smallest ids"
) -> Iterator[Merge]:
    """Yields merges, the most frequent pair first, until no pair is left: see the top of this file.

    `ties` "greatest bytes" takes the pair whose bytes come last in the dictionary, as some courses do.
    """
    ids = {bytes([byte]): id for id, byte in enumerate(BYTE_ORDER)}
    tokens = {word: as_bytes(word) for word in words}  # of each word, as far as the merges have come
    count = defaultdict(int)  # of each pair
    where = defaultdict(dict)  # the words that a pair stands in: a dict, since it keeps the order
    for word, n in words.items():
        for pair in pairs_of(tokens[word]):
            count[pair] += n
            where[pair][word] = None

    def rank(pair: Pair) -> tuple:
        """Sorts the pair to merge first to the front."""
        if ties == "smallest ids":
            return -count[pair], ids[pair[0]], ids[pair[1]], pair
        backwards = ([-byte for byte in token] + [1] for token in pair)  # z before a, ab before a
        return -count[pair], *backwards, pair

    queue = [rank(pair) for pair in count]
    heapq.heapify(queue)
    while queue:
        negative_count, *_, pair = heapq.heappop(queue)
        if count[pair] != -negative_count:
            continue  # the count has changed since; the pair stands in the queue again, with its new count
        touched = list(where[pair])
        yield Merge(pair, count[pair], touched[:4])
        ids.setdefault(pair[0] + pair[1], len(ids))
        changed = set()
        for word in touched:  # take its old pairs out of the counts, and put its new pairs in
            before, tokens[word] = tokens[word], merged(tokens[word], pair)
            for old in pairs_of(before):
                count[old] -= words[word]
                where[old].pop(word, None)
                changed.add(old)
            for new in pairs_of(tokens[word]):
                count[new] += words[word]
                where[new][word] = None
                changed.add(new)
        for other in changed:
            if count[other] > 0:
                heapq.heappush(queue, rank(other))


def train(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Collection[str] = (),
    split: str | None = SPLITS["gpt2"],
    ties: Literal["smallest ids", "greatest bytes"] = "smallest ids",
    trace: Callable[[Merge], object] | None = None,
) -> Vocabulary:
    """Learns vocab_size tokens: 256 bytes, merges, special tokens; fewer if the texts run out of pairs.

    `trace` is called with each merge as it happens; print will do. Raises TokenizerError for a vocab_size
    below 256 plus the special tokens, for a bad pattern and for special tokens that cannot be.
    """
    special_tokens = list(dict.fromkeys(special_tokens))
    new_vocabulary([], special_tokens, split)  # says what is wrong with them before the work begins
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise TokenizerError(
            f"vocab_size is {vocab_size}, but must be at least {smallest}: 256 bytes and the special tokens"
        )
    merges, made = [], set()
    for merge in learn_merges(count_words(texts, special_tokens, split), ties):
        if len(made) == vocab_size - smallest:
            break
        merges.append(merge.pair)
        made.add(merge.pair[0] + merge.pair[1])  # two merges can make the same token
        if trace is not None:
            trace(merge)
    return new_vocabulary(merges, special_tokens, split)


# --- encoding and decoding ------------------------------------------------------------------------


def encode_word(word: str, rank: dict[Pair, int]) -> list[bytes]:
    """Of all neighbours take the pair that was learned first, leftmost if it stands twice; merge; repeat."""
    tokens = as_bytes(word)
    while len(tokens) > 1:
        ranks = [rank.get(pair, inf) for pair in pairs_of(tokens)]
        first = min(ranks)
        if first == inf:
            break
        i = ranks.index(first)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


def encode(text: str, vocabulary: Vocabulary, allowed_special: Collection[str] = ()) -> list[int]:
    """The ids of a text. Special tokens are read as such only if named in allowed_special, otherwise as text.

    Raises TokenizerError if allowed_special names an unknown one, UnicodeEncodeError for half of a surrogate
    pair.
    """
    for name in allowed_special:
        if name not in vocabulary.special_tokens:
            raise TokenizerError(f"{name!r} is no special token of this vocabulary")
    rank = {pair: place for place, pair in enumerate(vocabulary.merges)}  # of one listed twice, the last
    id_of = vocabulary.ordinary_ids
    words: dict[str, list[int]] = {}  # a word that was seen before need not be merged again
    ids = []
    for place, part in enumerate(cut_at_special_tokens(text, allowed_special)):
        if place % 2:
            ids.append(vocabulary.special_tokens[part])
            continue
        for word in pre_tokens(part, vocabulary.split):
            if word not in words:
                words[word] = [id_of[token] for token in encode_word(word, rank)]
            ids += words[word]
    return ids


def decode_bytes(ids: Iterable[int], vocabulary: Vocabulary) -> bytes:
    """The bytes of the tokens, one after the other. Raises TokenizerError for an id that no token has."""
    result = bytearray()
    for id in ids:
        if not 0 <= id < len(vocabulary.tokens):
            raise TokenizerError(f"id {id} is no token; ids run from 0 to {len(vocabulary.tokens) - 1}")
        result += vocabulary.tokens[id]
    return bytes(result)


def decode(
    ids: Iterable[int], vocabulary: Vocabulary, errors: Literal["replace", "strict"] = "replace"
) -> str:
    """The text of the tokens. Bytes that are not UTF-8 become U+FFFD; "strict" raises UnicodeDecodeError."""
    return decode_bytes(ids, vocabulary).decode("utf-8", errors=errors)


# --- files ----------------------------------------------------------------------------------------


def save(vocabulary: Vocabulary, path: Path) -> None:
    """Write tokenizer.json, beside and then renamed into place: a reader sees the old file or the new one."""
    # A name that is nobody else's: beside it may be files of the user's.
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.being-written")
    try:
        new.write_text(to_json(vocabulary), encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def load(path: Path) -> Vocabulary:
    """Read tokenizer.json. Raises TokenizerError that names the file if it is damaged or foreign."""
    try:
        return from_json(path.read_bytes())
    except TokenizerError as error:
        raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from None
