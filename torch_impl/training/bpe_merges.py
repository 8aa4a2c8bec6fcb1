"""Learning merges, over arrays: all words lie in one row of ids, with borders between.

A row is a doubly linked list in arrays. A merge of (a, b) at position p writes the new token at p and takes
the position of b out of the list, so a merge costs as much as the number of places it happens at, whatever
the length of the text. Where a pair stands in many places, one merge is some twenty whole-array operations;
where it stands in few, a loop over them is faster than NumPy's calls. Both give the same arrays.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Int, Int64
from numpy import ndarray as Array

from ref_numpy.bpe_format import BYTE_ORDER

BORDER, DEAD = -1, -2  # between words; merged into the token before
_MANY = 64  # places from which whole arrays are faster than a loop; measured
LOW = 2**32 - 1


def row_of(words: Iterable[str], id_of_byte: Int64[Array, "256"]) -> Int[Array, "N"]:
    """Ids of the words' bytes, with borders around each: the byte 0xFF, which UTF-8 never holds."""
    raw = np.frombuffer(b"\xff".join([b"", *map(str.encode, words), b""]), np.uint8)
    ids = id_of_byte.astype(np.int32)
    ids[0xFF] = BORDER
    return ids[raw]


def links(row: Int[Array, "N"]) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """Position of the token before and of the token after each position."""
    place = np.arange(-1, row.size + 1, dtype=np.int32 if row.size < 2**31 - 1 else np.int64)
    return place[:-2].copy(), place[2:].copy()


class _Corpus:
    """The words of a corpus while their merges are learned: where each pair stands, and how often."""

    def __init__(self, words: Mapping[str, int], id_of_byte: Int64[Array, "256"]):
        self.token = row_of(words, id_of_byte)
        self.previous, self.next = links(self.token)
        counts = np.fromiter(words.values(), np.int64, len(words))
        word = np.cumsum(self.token == BORDER)
        self.weight = np.concatenate([[0], counts, [0]])[word]
        # The same memory once more, for loops: reading one number from a memoryview is far faster.
        self.views = tuple(map(memoryview, (self.token, self.previous, self.next, self.weight)))
        self.count: dict[int, int] = defaultdict(int)  # by pair: left id * 2^32 + right id
        self.where: dict[int, list[int] | Array] = {}  # left positions, some perhaps stale
        places = np.flatnonzero((self.token[:-1] >= 0) & (self.token[1:] >= 0))
        self._add(pair_of(self.token[places], self.token[places + 1]), self.weight[places], places)

    def _add(
        self, pairs: Int64[Array, "N"], weights: Int64[Array, "N"], places: Int[Array, "N"]
    ) -> list[int]:
        """Count new pairs and note their places; returns the pairs, each once."""
        if not pairs.size:
            return []
        order, starts, sums = _sums(pairs, weights)
        distinct, places, starts = pairs[order[starts]].tolist(), places[order], starts.tolist()
        ends = [*starts[1:], pairs.size]
        for pair, start, end, total in zip(distinct, starts, ends, sums, strict=True):
            self.count[pair] += total
            known = self.where.get(pair)
            here = places[start:end]
            self.where[pair] = here if known is None else np.concatenate([known, here])
        return distinct

    def merge(self, a: int, b: int, new: int) -> list[int]:
        """Replace each neighbouring (a, b) by `new`, left to right; returns the pairs that came to be."""
        pair = a << 32 | b
        places = self.where.pop(pair)
        if len(places) > _MANY:
            changed = self._merge_arrays(a, b, new, np.asarray(places))
        else:
            one_by_one = places.tolist() if isinstance(places, Array) else places
            changed = self._merge_loop(a, b, new, sorted(one_by_one) if a == b else one_by_one)
        self.count[pair] = 0
        return changed

    def _merge_loop(self, a: int, b: int, new: int, places: list[int]) -> list[int]:
        token, previous, next, weight = self.views
        count, made = self.count, defaultdict(list)
        for p in places:
            if token[p] != a or token[q := next[p]] != b:
                continue  # stale: another merge has taken one of the two
            w, left, right = weight[p], previous[p], next[q]
            token[p], token[q] = new, DEAD
            next[p], previous[right] = right, p
            if (x := token[left]) >= 0:
                count[x << 32 | a] -= w
                pair = x << 32 | new
                count[pair] += w
                made[pair].append(left)
            if (y := token[right]) >= 0:
                count[b << 32 | y] -= w
                pair = new << 32 | y
                count[pair] += w
                made[pair].append(p)
        for pair, here in made.items():
            known = self.where.get(pair)
            self.where[pair] = here if known is None else [*known, *here]
        return list(made)

    def _merge_arrays(self, a: int, b: int, new: int, places: Int[Array, "_"]) -> list[int]:
        token, previous, next = self.token, self.previous, self.next
        p = np.sort(places)
        p = p[(token[p] == a) & (token[next[p]] == b) & np.append(p[1:] != p[:-1], True)]
        q = next[p]
        if a == b:  # of overlapping places, a a a a, every second one of a run is merged
            run_starts = np.concatenate([[True], p[1:] != q[:-1]])
            index = np.arange(p.size)
            in_run = index - np.maximum.accumulate(np.where(run_starts, index, 0))
            p, q = p[in_run % 2 == 0], q[in_run % 2 == 0]
        right = next[q]
        token[p], token[q] = new, DEAD
        next[p], previous[right] = right, p
        left = previous[p]
        follows = np.zeros(p.size + 1, bool)  # whether a place begins where the one before it ended
        follows[1:-1] = right[:-1] == p[1:]
        x, y, w = token[left].astype(np.int64), token[right].astype(np.int64), self.weight[p]
        has_left, has_right = x >= 0, (y >= 0) & ~follows[1:]
        was_left = np.where(follows[:-1], b, x)  # its token before this merge
        self._subtract(
            np.concatenate([pair_of(was_left, a)[has_left], pair_of(b, y)[has_right]]),
            np.concatenate([w[has_left], w[has_right]]),
        )
        return self._add(
            np.concatenate([pair_of(x, new)[has_left], pair_of(new, y)[has_right]]),
            np.concatenate([w[has_left], w[has_right]]),
            np.concatenate([left[has_left], p[has_right]]),
        )

    def _subtract(self, pairs: Int64[Array, "N"], weights: Int64[Array, "N"]) -> None:
        if pairs.size:
            order, starts, sums = _sums(pairs, weights)
            for pair, total in zip(pairs[order[starts]].tolist(), sums, strict=True):
                self.count[pair] -= total


def _sums(
    keys: Int64[Array, "N"], weights: Int64[Array, "N"]
) -> tuple[Int64[Array, "N"], Int64[Array, "K"], list[int]]:
    """The order that brings equal keys together, where each run of them starts in it, and its weight."""
    order = np.argsort(keys, kind="stable")
    runs = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], runs[1:] != runs[:-1]]))
    return order, starts, np.add.reduceat(weights[order], starts).tolist()


def pair_of(left: Int[Array, "N"] | int, right: Int[Array, "N"] | int) -> Int64[Array, "N"]:
    """Two ids as one number, which sorts by the left id and then by the right one."""
    return np.asarray(left, np.int64) << 32 | np.asarray(right, np.int64)


def _last_first(token: bytes) -> list[int]:
    """Sorts bytes from the end of the dictionary, a token before its own beginnings."""
    return [-byte for byte in token] + [1]


class _Queue:
    """Entries by falling count, and among equal counts in rising order.

    A heap for each count: most pairs share a few small counts, and heaps of plain numbers are fast.
    """

    def __init__(self):
        self.heaps: dict[int, list] = {}
        self.counts: list[int] = []  # a heap too, of the negative counts

    def put(self, count: int, entry: int | tuple) -> None:
        heap = self.heaps.get(count)
        if heap is None:
            self.heaps[count] = [entry]
            heapq.heappush(self.counts, -count)
        else:
            heapq.heappush(heap, entry)

    def take(self) -> tuple[int, int | tuple] | None:
        """The first entry and its count; None where there is none left."""
        while self.counts:
            count = -self.counts[0]
            if heap := self.heaps[count]:
                return count, heapq.heappop(heap)
            heapq.heappop(self.counts)
            del self.heaps[count]
        return None


def learn_merges(
    words: Mapping[str, int], ties: Literal["smallest ids", "greatest bytes"] = "smallest ids"
) -> Iterator[tuple[bytes, bytes]]:
    """Yields merges, the most frequent pair first, until no pair is left; `words` are counted pre-tokens.

    The time grows with the distinct words and the merges, not with the counts. Ties as in ref_numpy.bpe.
    """
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    id_of = {token: id for id, token in enumerate(tokens)}
    corpus = _Corpus(words, np.argsort(np.frombuffer(BYTE_ORDER, np.uint8)))
    count = corpus.count
    by_ids = ties == "smallest ids"
    queue = _Queue()

    def put(pair: int) -> None:
        if count[pair]:
            left, right = tokens[pair >> 32], tokens[pair & LOW]
            queue.put(count[pair], pair if by_ids else (_last_first(left), _last_first(right), pair))

    for pair in count:
        put(pair)
    while (front := queue.take()) is not None:
        expected, entry = front
        pair = entry if by_ids else entry[-1]
        if count[pair] != expected:  # it has changed since; counts of old pairs only fall
            put(pair)
            continue
        a, b = pair >> 32, pair & LOW
        yield tokens[a], tokens[b]
        token = tokens[a] + tokens[b]
        new = id_of.setdefault(token, len(tokens))
        if new == len(tokens):
            tokens.append(token)
        for made in corpus.merge(a, b, new):
            put(made)
