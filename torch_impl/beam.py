"""Beam search that stays on the device. The twin of ref_numpy/beam.py.

Shapes do not depend on values: hypotheses that do not exist have the sum -inf. What the rules know of a
hypothesis is a number, the state of an automaton (Aho and Corasick 1975) over phrases and stop sequences,
times the set of phrases that have appeared; its tables are made once, on the host. The search looks at the
device only to see whether it is over, and on a GPU only every few steps: what runs on meanwhile changes
nothing.
"""

from collections.abc import Callable
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Integer
from torch import Tensor

from ref_numpy.config import BeamConfig

_GRID = 2.0**24
_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}  # at a GPU a look waits until it has caught up
_NEVER = 1 << 30

NextLogits = Callable[[Integer[Tensor, "B T"], Integer[Tensor, "B"]], Float[Tensor, "B V"]]


class Hypothesis(NamedTuple):
    """A finished sequence: its tokens after the prompt, and its score."""

    tokens: list[int]
    score: float


class Rules(NamedTuple):
    """S states by A columns: one for each token that has a name here, and the last for all others."""

    named: Tensor  # (A - 1,) tokens
    column: Tensor  # (V,) of each token
    following: Tensor  # (S, A) states
    needed: Tensor  # (S, A) least number of tokens after this one until no phrase is missing
    stops: Tensor  # (S, A) whether this token ends the sequence
    forbidden: Tensor  # tokens
    banks: int  # numbers of tokens that may be needed: 0, ..., banks - 1
    n_stops: int  # tokens that may end a sequence


def rules_of(config: BeamConfig, vocab_size: int, n_tokens: int, device: torch.device) -> Rules:
    """Raises ValueError where the config does not fit the vocabulary or the length."""
    largest = max(config.ids, default=0)
    if largest >= vocab_size:
        raise ValueError(f"token {largest} is not in the vocabulary; ids run from 0 to {vocab_size - 1}")
    if len(set(config.forbidden)) == vocab_size:
        raise ValueError(f"all {vocab_size} tokens are forbidden, so none can be chosen")
    named = sorted(set(config.ids))
    columns = {token: i for i, token in enumerate(named)}
    patterns = [[columns[token] for token in p] for p in (*config.phrases, *config.stops)]
    goto, bits, ends = _automaton(patterns, len(config.phrases), len(named) + 1)

    sets = 1 << len(config.phrases)  # a state is node * sets + the set of phrases that have appeared
    appeared = np.arange(sets)[None, :, None] | bits[goto][:, None]  # (nodes, sets, A)
    following = (goto[:, None] * sets + appeared).reshape(-1, len(named) + 1)
    stops = ends[goto].repeat(sets, axis=0)
    may_be = np.ones(following.shape[1], bool)
    may_be[[columns[token] for token in config.forbidden]] = False
    may_be[-1] = vocab_size > len(named)
    is_whole = following % sets == sets - 1
    may_be = may_be & (is_whole | ~stops)

    n = np.where(np.arange(len(following)) % sets == sets - 1, 0, _NEVER)
    while True:
        after = np.where(is_whole, 0, n[following])
        shorter = np.minimum(n, 1 + np.where(may_be, after, _NEVER).min(axis=1))
        if (shorter == n).all():
            break
        n = shorter
    if n[0] > n_tokens:
        takes = "can never all appear" if n[0] >= _NEVER else f"take {n[0]} tokens"
        raise ValueError(f"the phrases {takes}, but max_new_tokens is {n_tokens}")

    column = torch.full((vocab_size,), len(named))
    column[named] = torch.arange(len(named))
    tables = (following, np.where(is_whole | ~stops, after, _NEVER), stops)
    on_device = [torch.from_numpy(table).to(device) for table in tables]
    banks = min(int(n[n < _NEVER].max(initial=0)), n_tokens) + 1
    n_stops = len({stop[-1] for stop in config.stops})
    tokens = [torch.tensor(ids, dtype=torch.long, device=device) for ids in (named, config.forbidden)]
    return Rules(tokens[0], column.to(device), *on_device, tokens[1], banks, n_stops)


def _automaton(patterns: list[list[int]], n_phrases: int, columns: int) -> tuple[np.ndarray, ...]:
    """Nodes of the trie of patterns: where each column leads, the phrases that end there as bits, and
    whether a stop sequence does. A node also has what its longest proper suffix in the trie has."""
    children: list[dict[int, int]] = [{}]
    bits, ends = [0], [False]
    for number, pattern in enumerate(patterns):
        node = 0
        for letter in pattern:
            if letter not in children[node]:
                children[node][letter] = len(children)
                children.append({})
                bits.append(0)
                ends.append(False)
            node = children[node][letter]
        if number < n_phrases:
            bits[node] |= 1 << number
        else:
            ends[node] = True
    goto = np.zeros((len(children), columns), np.int64)
    suffix, queue = [0] * len(children), [0]
    for node in queue:  # by depth, so that the suffix of a node is complete before the node is
        bits[node] |= bits[suffix[node]]
        ends[node] |= ends[suffix[node]]
        goto[node] = goto[suffix[node]]
        for letter, child in children[node].items():
            suffix[child] = int(goto[node, letter]) if node else 0
            goto[node, letter] = child
            queue.append(child)
    return goto, np.array(bits), np.array(ends)


def log_probabilities(logits: Float[Tensor, "B V"]) -> Float64[Tensor, "B V"]:
    """log softmax in float64, rounded to multiples of 2^-24: sums are exact."""
    return (logits.double().log_softmax(dim=-1) * _GRID).round() / _GRID


def first_largest(x: Float64[Tensor, "N"], k: int) -> Integer[Tensor, "K"]:
    """Places of the k largest, the largest first, equals by their places; topk leaves that open."""
    k = min(k, x.numel())
    smallest = x.topk(k).values[-1]
    above, equal = x > smallest, x == smallest
    chosen = above | (equal & (equal.cumsum(0) <= k - above.sum()))
    target = torch.where(chosen, chosen.cumsum(0) - 1, k)  # what is not chosen goes to a place of its own
    places = torch.zeros(k + 1, dtype=torch.long, device=x.device)
    places = places.scatter(0, target, torch.arange(x.numel(), device=x.device))[:k]
    return places[x[places].argsort(descending=True, stable=True)]


def deal(
    scores: Float64[Tensor, "B V"], needed: Integer[Tensor, "B V"], rules: Rules, k: int
) -> tuple[Integer[Tensor, "K"], Float64[Tensor, "K"]]:
    """Flat indices and scores of k candidates: the best of each bank, the second of each, ..., each time the
    lowest bank first. Where there are fewer, the rest scores -inf.

    In a row all tokens without a name are in one bank: the k best of them are enough, and those with a name.
    """
    B, V = scores.shape
    starts = torch.arange(0, B * V, V, device=scores.device)[:, None]  # (B, 1)
    others = scores.index_fill(1, rules.named, -inf)
    places = torch.stack([first_largest(row, k) for row in others])  # (B, k)
    values = torch.cat([others.gather(1, places), scores[:, rules.named]], dim=1).flatten()
    places = torch.cat([places + starts, rules.named + starts], dim=1).flatten()
    order = places.argsort()
    places, values = places[order], values[order]
    bank, turns = needed.flatten()[places], []
    for number in range(rules.banks):
        members = values.masked_fill(bank != number, -inf)
        best = first_largest(members, k)
        turns.append((places[best], members[best]))
    places, values = (torch.stack(parts, dim=1).flatten() for parts in zip(*turns, strict=True))
    order = first_true(values > -inf, k)
    return places[order], values[order]


def first_true(holds: Bool[Tensor, "N"], k: int) -> Integer[Tensor, "K"]:
    """The first k places where it holds, in their order; after them others."""
    return (~holds).to(torch.uint8).argsort(stable=True)[:k]


@torch.inference_mode()
def beam_search(
    next_logits: NextLogits,
    prompt: Integer[Tensor, "T"],
    n_tokens: int,
    config: BeamConfig = BeamConfig(),  # noqa: B008 (it is frozen)
) -> list[Hypothesis]:
    """The n best sequences of at most n_tokens after the prompt, the best first; fewer if there are no more.

    next_logits(tokens, parents) gives the logits of what follows each row. Row b is row parents[b] of the
    call before, and one token more. Both are on the device of the prompt (on the CPU for one without
    float64). The first call has one row; soon there are always `width`. Raises ValueError as the reference
    does.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty, but the model needs at least one token to go on from")
    if n_tokens < 1:
        raise ValueError(f"max_new_tokens is {n_tokens}, but a beam needs at least 1")
    device = torch.device("cpu") if prompt.device.type == "mps" else prompt.device
    width, alpha, exact = config.width, config.length_penalty, config.early_stopping == "exact"
    tokens = prompt.long().to(device)[None]  # (B, T)
    parents = torch.zeros(1, dtype=torch.long, device=device)
    totals = torch.zeros(1, dtype=torch.float64, device=device)
    states = torch.zeros(1, dtype=torch.long, device=device)
    best = torch.full((width,), -inf, dtype=torch.float64, device=device)  # scores of the finished
    texts = torch.zeros((width, n_tokens), dtype=torch.long, device=device)
    lengths = torch.zeros(width, dtype=torch.long, device=device)
    over = torch.zeros((), dtype=torch.bool, device=device)
    broken = torch.zeros((), dtype=torch.bool, device=device)
    for length in range(1, n_tokens + 1):
        log_p = log_probabilities(next_logits(tokens, parents).to(device))  # (B, V)
        V = log_p.shape[1]
        if length == 1:
            rules = rules_of(config, V, n_tokens, device)
        broken |= log_p.isnan().any() & ~over
        scores = (totals[:, None] + log_p).index_fill(1, rules.forbidden, -inf)
        k = (1 + rules.n_stops) * width  # so many that `width` of them go on
        if config.phrases:
            needed = rules.needed[states][:, rules.column]  # (B, V)
            scores = scores.masked_fill(needed > n_tokens - length, -inf)
            places, reached = deal(scores, needed, rules, k)
        else:
            places = first_largest(scores.flatten(), k)
            reached = scores.flatten()[places]
        rows, ids, exists = places // V, places % V, reached > -inf
        ends = rules.stops[states[rows], rules.column[ids]] | (length == n_tokens)

        found = torch.where(ends & exists & ~over, reached / float(length) ** alpha, -inf)[:width]
        written = torch.cat([tokens[rows[:width], prompt.numel() :], ids[:width, None]], dim=1)
        written = torch.nn.functional.pad(written, (0, n_tokens - length))
        merged, order = torch.cat([best, found]).sort(descending=True, stable=True)
        best, order = merged[:width], order[:width]
        texts = torch.cat([texts, written])[order]
        lengths = torch.cat([lengths, torch.full_like(found, length, dtype=torch.long)])[order]

        goes_on = exists & ~ends
        going = first_true(goes_on, width)
        totals = torch.where(goes_on[going], reached[going], -inf)
        going = torch.where(goes_on[going], going, going[0])  # what does not exist is a copy of the first
        parents, ids = rows[going], ids[going]
        states = rules.following[states[parents], rules.column[ids]]
        tokens = torch.cat([tokens[parents], ids[:, None]], dim=1)

        longest = n_tokens if exact and alpha > 0 else length
        rank = config.n_best if exact else width
        over = over | (totals.max() / float(longest) ** alpha <= best[rank - 1])
        if width == 1 or config.early_stopping == "full":
            over = over | (best[-1] > -inf)
        if length % _STEPS_BETWEEN_LOOKS.get(device.type, 1) == 0 and bool(over | broken):
            break
    if bool(broken):
        raise ValueError("the model's logits are not numbers, so no token can be chosen")
    found = [
        Hypothesis(text[:length], score)
        for text, length, score in zip(texts.tolist(), lengths.tolist(), best.tolist(), strict=True)
        if score > -inf
    ]
    if not found:
        raise ValueError("no sequence is possible: each that the rules allow has probability 0")
    return found[: config.n_best]
