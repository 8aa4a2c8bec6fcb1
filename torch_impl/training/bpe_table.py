"""Applying merges that were learned, to many words at once or to one. See bpe_merges for the rows."""

import heapq

import numpy as np
from jaxtyping import Int, Int64
from numpy import ndarray as Array

from torch_impl.training.bpe_merges import BORDER, DEAD, LOW, links, pair_of, row_of

NO_RANK = 2**31 - 1
_FREE = -(2**63)  # no pair


class Ranks:
    """The ranks of pairs, for whole arrays of them: a hash table in arrays, with linear probing.

    Faster than a binary search, which waits for memory at every one of its steps.
    """

    def __init__(self, pairs: Int64[Array, "N"], ranks: Int64[Array, "N"]):
        bits = max(pairs.size.bit_length() + 1, 3)  # from a quarter to a half of the slots are taken
        self._shift, self._last = np.uint64(64 - bits), (1 << bits) - 1
        self._pairs = np.full(1 << bits, _FREE)
        self._ranks = np.full(1 << bits, NO_RANK)
        slots = self._slots(pairs)
        while pairs.size:
            free = self._pairs[slots] == _FREE
            self._pairs[slots[free]] = pairs[free]  # where several want one slot, one of them gets it
            has = self._pairs[slots] == pairs
            self._ranks[slots[has]] = ranks[has]
            pairs, ranks, slots = pairs[~has], ranks[~has], (slots[~has] + 1) & self._last

    def _slots(self, pairs: Int64[Array, "N"]) -> Int64[Array, "N"]:
        """Where to look first: top bits of a product with the golden ratio (Knuth, vol. 3, section 6.4)."""
        return (pairs.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> self._shift).view(np.int64)

    def of(self, pairs: Int64[Array, "N"]) -> Int64[Array, "N"]:
        """NO_RANK where a pair is never merged."""
        slots = self._slots(pairs)
        there = self._pairs[slots]
        others = np.flatnonzero((there != pairs) & (there != _FREE))
        while others.size:
            slots[others] = after = (slots[others] + 1) & self._last
            there = self._pairs[after]
            others = others[(there != pairs[others]) & (there != _FREE)]
        return np.where(self._pairs[slots] == pairs, self._ranks[slots], NO_RANK)


class MergeTable:
    """Rank and result of each pair of ids."""

    def __init__(self, pairs: list[tuple[int, int]], results: list[int], id_of_byte: Int64[Array, "256"]):
        self.rank = {a << 32 | b: rank for rank, (a, b) in enumerate(pairs)}  # of one listed twice, the last
        self.results = results
        self.id_of_byte = id_of_byte
        self._ranks = Ranks(
            np.fromiter(self.rank.keys(), np.int64, len(self.rank)),
            np.fromiter(self.rank.values(), np.int64, len(self.rank)),
        )
        self._results = np.array(results, np.int32)

    def encode_words(self, words: list[str]) -> tuple[Int[Array, "N"], Int[Array, "W"]]:
        """All ids, and how many of them each word has. A round makes one merge in each word with one left."""
        token = row_of(words, self.id_of_byte)
        previous, next = links(token)
        border = token == BORDER
        rank = np.append(self._ranks.of(pair_of(token[:-1], token[1:])), NO_RANK)
        live = np.flatnonzero(~border)  # positions in words that may have a merge left
        word = np.cumsum(border)[live]
        while live.size:
            starts = np.flatnonzero(np.concatenate([[True], word[1:] != word[:-1]]))
            best = np.minimum.reduceat(rank[live] << 32 | live, starts)  # lowest rank, then leftmost
            merges = best < NO_RANK << 32
            p = best[merges] & LOW
            q = next[p]
            token[p], token[q] = self._results[best[merges] >> 32], DEAD
            next[p] = right = next[q]
            previous[right] = p
            left = previous[p]
            rank[left] = self._ranks.of(pair_of(token[left], token[p]))
            rank[p] = self._ranks.of(pair_of(token[p], token[right]))
            stays = np.repeat(merges, np.diff(starts, append=live.size)) & (token[live] != DEAD)
            live, word = live[stays], word[stays]
        token = token[token != DEAD]
        ends = np.flatnonzero(token == BORDER)
        return np.delete(token, ends), np.diff(ends) - 1

    def encode_word(self, word: str) -> list[int]:
        """The ids of one word, in n log n steps for n bytes: the pairs wait in a heap, by rank and place."""
        token = self.id_of_byte[np.frombuffer(word.encode("utf-8"), np.uint8)].tolist()
        n = len(token)
        token.append(BORDER)
        previous, next = list(range(-1, n)), list(range(1, n + 2))
        rank_of = self.rank.get
        queue = [(rank, p) for p in range(n) if (rank := rank_of(token[p] << 32 | token[p + 1])) is not None]
        heapq.heapify(queue)
        while queue:
            rank, p = heapq.heappop(queue)
            if token[p] < 0 or rank_of(token[p] << 32 | token[next[p]]) != rank:
                continue  # stale: one of the two has been merged since
            q, new = next[p], self.results[rank]
            token[p], token[q] = new, DEAD
            next[p] = right = next[q]
            previous[right] = p
            if (after := rank_of(new << 32 | token[right])) is not None:
                heapq.heappush(queue, (after, p))
            left = previous[p]
            if left >= 0 and (before := rank_of(token[left] << 32 | new)) is not None:
                heapq.heappush(queue, (before, left))
        return [id for id in token if id >= 0]
