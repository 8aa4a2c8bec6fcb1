"""Beam search: the likeliest sequences, among those that a beam of a few hypotheses comes across.

    score(y) = sum_t log p(y_t | prompt, y_<t) / |y|^alpha          |y| counts the end token

is the length normalisation of Hugging Face. (Wu et al. 2016, section 7, divide by ((5 + |y|) / 6)^alpha, and
add a penalty for parts of a source that are not covered.) Each step, the hypotheses (one, then `width`) go on
by every token; of these candidates

- what completes a stop sequence or the end token is finished, if it is among the first `width`: it competes
  with the finished ones by its score, and is never extended;
- the first `width` of the others are the next hypotheses, by their sums, which need no division.

At n_tokens all are finished. Before, the search stops by `early_stopping`; with L tokens written, a
hypothesis of sum s < 0 reaches at most s / M^alpha, as a sum only falls:

    exact      M = n_tokens for alpha > 0, else L: the bound is true. Stops when the n-th best finished one
               has reached the bound of every hypothesis, so that nothing can enter the n best any more
    estimate   M = L always, and all `width` finished have to have reached it
    full       like estimate, and also when `width` are finished

which are `early_stopping` "never", False and True of Hugging Face. A beam of width 1 is over when it has
finished one: that is greedy decoding, but for what ties on the grid below.

Phrases that must appear: candidates from which they cannot all be written any more are ruled out, exactly, by
the least number of tokens that it would take. So that those who are on their way are not crowded out by those
who put it off, candidates are put into banks by this number, and the places of the beam are dealt to the
banks in turn, least number first (dynamic beam allocation, Post and Vilar 2018, section 3; their banks
count the tokens that have been met). Without phrases there is one bank, and candidates come by their sums.

Log-probabilities are rounded to multiples of 2^-24, finer than float32 logits of 1 and above are: their sums
are then exact in any order, what ought to tie does, and both implementations choose alike. Of equals the
earlier hypothesis comes first, then the lower token id; of equals that are finished the one found first.

Shapes: B hypotheses, T tokens of prompt and hypothesis, V vocabulary.
Not here: the model and its cache, batches of prompts, sampling among the candidates, diverse groups.
"""

from collections.abc import Callable
from math import inf
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Integer
from numpy import ndarray as Array

from ref_numpy.config import BeamConfig

GRID = 2.0**24  # steps of a log-probability per nat

NextLogits = Callable[[Integer[Array, "B T"], Integer[Array, "B"]], Float[Array, "B V"]]


class Hypothesis(NamedTuple):
    """A finished sequence."""

    tokens: list[int]  # after the prompt; the end token or stop sequence is one of them
    score: float


class State(NamedTuple):
    """All that the rules have to know of a hypothesis."""

    tail: tuple[int, ...]  # the longest end of its tokens with which a phrase or stop sequence begins
    missing: frozenset[tuple[int, ...]]  # phrases that have not appeared


class Running(NamedTuple):
    """A hypothesis that goes on."""

    tokens: list[int]
    total: float  # sum of log-probabilities
    state: State


def log_probabilities(logits: Float[Array, "B V"]) -> Float64[Array, "B V"]:
    """log softmax in float64, on the grid. Raises ValueError for logits that are not numbers."""
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        x = x - x.max(axis=-1, keepdims=True)
        x = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    if np.isnan(x).any():
        raise ValueError("the model's logits are not numbers, so no token can be chosen")
    return np.round(x * GRID) / GRID


def advance(state: State, token: int, config: BeamConfig) -> State:
    """The state after one more token."""
    text = (*state.tail, token)
    ends = [text[i:] for i in range(len(text))]
    patterns = (*config.stops, *config.phrases)
    tail = next((end for end in ends if any(pattern[: len(end)] == end for pattern in patterns)), ())
    return State(tail, frozenset(p for p in state.missing if tail[-len(p) :] != p))


def is_stopped(state: State, config: BeamConfig) -> bool:
    """Whether the tokens end in a stop sequence."""
    return any(state.tail[-len(stop) :] == stop for stop in config.stops)


def tokens_needed(config: BeamConfig, vocab_size: int) -> dict[State, float]:
    """For each state that can be reached, the least number of tokens after which no phrase is missing.

    It is inf where a phrase cannot appear; states that stop too early are left out. Shortest paths, by
    n(s) = 0 where nothing is missing, else 1 + min over the states s' that follow s of n(s'), until it holds.
    """
    named = set(config.ids)
    other = next((token for token in range(vocab_size) if token not in named), None)
    alphabet = sorted(named - set(config.forbidden)) + [other] * (other is not None)
    following: dict[State, list[State]] = {}
    unread = [State((), frozenset(config.phrases))]
    while unread:
        state = unread.pop()
        if state not in following:
            after = [] if is_stopped(state, config) else [advance(state, t, config) for t in alphabet]
            following[state] = [s for s in after if not (s.missing and is_stopped(s, config))]
            unread += following[state]
    needed = {state: inf if state.missing else 0.0 for state in following}
    changed = True
    while changed:
        changed = False
        for state, after in following.items():
            least = 1 + min((needed[s] for s in after), default=inf)
            if least < needed[state]:
                needed[state], changed = least, True
    return needed


def check(config: BeamConfig, vocab_size: int, n_tokens: int, needed: dict[State, float]) -> None:
    """Raises ValueError where the config does not fit the vocabulary or the length."""
    largest = max(config.ids, default=0)
    if largest >= vocab_size:
        raise ValueError(f"token {largest} is not in the vocabulary; ids run from 0 to {vocab_size - 1}")
    if len(set(config.forbidden)) == vocab_size:
        raise ValueError(f"all {vocab_size} tokens are forbidden, so none can be chosen")
    least = needed[State((), frozenset(config.phrases))]
    if least > n_tokens:
        takes = "can never all appear" if least == inf else f"take {least:.0f} tokens"
        raise ValueError(f"the phrases {takes}, but max_new_tokens is {n_tokens}")


def deal(scores: Float64[Array, "B V"], banks: Float64[Array, "B V"]) -> Int[Array, "N"]:
    """Flat indices of the candidates above -inf: the best of each bank, the second of each, and so on; each
    time the lowest bank first."""
    falling = np.argsort(-scores, axis=None, kind="stable")
    falling = falling[scores.ravel()[falling] > -inf]
    bank = banks.ravel()[falling]
    turn = np.zeros_like(falling)
    for number in np.unique(bank):
        turn[bank == number] = np.arange(np.count_nonzero(bank == number))
    return falling[np.lexsort((bank, turn))]


def beam_search(
    next_logits: NextLogits,
    prompt: Integer[Array, "T"],
    n_tokens: int,
    config: BeamConfig = BeamConfig(),  # noqa: B008 (it is frozen)
) -> list[Hypothesis]:
    """The n best sequences of at most n_tokens after the prompt, the best first; fewer if there are no more.

    next_logits(tokens, parents) gives the logits of what follows each row. Row b is row parents[b] of the
    call before, and one token more: whoever keeps keys and values takes those of the parents. The first call
    has the prompt as its only row. Raises ValueError for an empty prompt, n_tokens below 1, ids outside the
    vocabulary, logits that are not numbers, and phrases that cannot all be written in n_tokens.
    """
    if prompt.size == 0:
        raise ValueError("the prompt is empty, but the model needs at least one token to go on from")
    if n_tokens < 1:
        raise ValueError(f"max_new_tokens is {n_tokens}, but a beam needs at least 1")
    width, alpha, exact = config.width, config.length_penalty, config.early_stopping == "exact"
    running = [Running([], 0.0, State((), frozenset(config.phrases)))]
    finished: list[Hypothesis] = []
    parents = np.zeros(1, dtype=np.int64)
    for length in range(1, n_tokens + 1):
        tokens = np.array([[*prompt.tolist(), *hypothesis.tokens] for hypothesis in running])  # (B, T)
        log_p = log_probabilities(next_logits(tokens, parents))  # (B, V)
        V = log_p.shape[-1]
        if length == 1:
            needed = tokens_needed(config, V)
            check(config, V, n_tokens, needed)

        scores = log_p + np.array([[hypothesis.total] for hypothesis in running])
        scores[:, list(config.forbidden)] = -inf
        banks = np.zeros_like(scores)
        for row, hypothesis in enumerate(running):
            state = hypothesis.state
            banks[row] = needed.get(State((), state.missing), inf)  # after any token that no rule names
            for token in set(config.ids):
                banks[row, token] = needed.get(advance(state, token, config), inf)
        scores[banks > n_tokens - length] = -inf

        hypotheses, origins = [], []
        for place, candidate in enumerate(deal(scores, banks)):
            row, token = divmod(int(candidate), V)
            written = [*running[row].tokens, token]
            total, state = float(scores[row, token]), advance(running[row].state, token, config)
            if length == n_tokens or is_stopped(state, config):
                if place < width:
                    finished.append(Hypothesis(written, total / float(length) ** alpha))
            elif len(hypotheses) < width:
                hypotheses.append(Running(written, total, state))
                origins.append(row)
            if place >= width and (length == n_tokens or len(hypotheses) == width):
                break
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:width]  # stable
        running, parents = hypotheses, np.array(origins, dtype=np.int64)

        longest = n_tokens if exact and alpha > 0 else length
        bound = max((hypothesis.total for hypothesis in running), default=-inf) / float(longest) ** alpha
        rank = config.n_best if exact else width
        is_full = len(finished) == width and (width == 1 or config.early_stopping == "full")
        if is_full or bound <= (finished[rank - 1].score if len(finished) >= rank else -inf):
            break
    if not finished:
        raise ValueError("no sequence is possible: each that the rules allow has probability 0")
    return finished[: config.n_best]
