"""Beam search: both sides find the same; a beam as wide as the space finds the best there is.

A model is here a table: logits that depend on the last two tokens, so that what is best at once is not always
best in the end. The outside oracle is in test_beam_transformers.py.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.strategies import array, seeds
from ref_numpy import beam as plain
from ref_numpy.config import BeamConfig
from torch_impl import beam as fast

LENGTHS = st.integers(1, 6)


class Table(NamedTuple):
    """A language model of few parameters."""

    logits: np.ndarray  # (V, V, V), of the next token by the last two

    def next_logits(self, tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        before = tokens[:, -2] if tokens.shape[1] > 1 else tokens[:, -1]
        return self.logits[before, tokens[:, -1]]

    def next_tensor(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.next_logits(tokens.numpy(), parents.numpy()))

    def score(self, prompt: list[int], tokens: list[int], alpha: float) -> float:
        """What the tokens' own log-probabilities sum to, over length^alpha."""
        ids, total = [*prompt, *tokens], 0.0
        for place in range(len(prompt), len(ids)):
            row = self.next_logits(np.array([ids[:place]]), np.zeros(1, int))
            total += float(plain.log_probabilities(row)[0, ids[place]])
        return total / len(tokens) ** alpha


def table(vocab_size: int, seed: int, regime: str = "normal") -> Table:
    return Table(array(np.random.default_rng(seed), (vocab_size,) * 3, regime))


tables = st.builds(table, st.integers(2, 7), seeds, st.sampled_from(["normal", "huge", "ties", "one_hot"]))


def contains(tokens: Sequence[int], part: tuple[int, ...]) -> bool:
    return any(tuple(tokens[i : i + len(part)]) == part for i in range(len(tokens)))


@st.composite
def beam_configs(draw: st.DrawFn, vocab_size: int) -> BeamConfig:
    """Every rule on or off, alone and together, as far as they do not contradict each other."""
    token = st.integers(0, vocab_size - 1)
    part = st.lists(token, min_size=1, max_size=3).map(tuple)
    phrases = draw(st.just([]) | st.lists(part, min_size=1, max_size=3))
    stops = [stop for stop in draw(st.lists(part, max_size=3)) if fits(stop, phrases)]
    end_token = draw(st.none() | token)
    width = draw(st.integers(1, 6))
    return BeamConfig(
        width=width,
        n_best=draw(st.integers(1, width)),
        length_penalty=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0])),
        early_stopping=draw(st.sampled_from(["exact", "estimate", "full"])),
        end_token=end_token if fits((end_token,), phrases) else None,
        stop_sequences=tuple(stops),
        forbidden=tuple(t for t in draw(st.lists(token, max_size=2)) if not any(t in p for p in phrases)),
        phrases=tuple(phrases),
    )


def fits(stop: tuple, phrases: list[tuple[int, ...]]) -> bool:
    """Whether it ends none of the phrases before its time."""
    return not any(contains(phrase[:-1], stop) for phrase in phrases)


def result(search: Callable, *arguments) -> list[tuple[list[int], float]] | str:
    """What is found, or what is refused."""
    try:
        return [tuple(hypothesis) for hypothesis in search(*arguments)]
    except ValueError as error:
        return str(error)


def searched(model: Table, prompt: list[int], n_tokens: int, config: BeamConfig) -> list | str:
    """Both sides, which have to agree in every token and every bit of the scores."""
    want = result(plain.beam_search, model.next_logits, np.array(prompt), n_tokens, config)
    got = result(fast.beam_search, model.next_tensor, torch.tensor(prompt), n_tokens, config)
    assert got == want
    return want


def allowed(tokens: tuple[int, ...], n_tokens: int, config: BeamConfig) -> bool:
    """The rules, said of a whole sequence: it ends where it first may, and breaks none."""

    def is_stopped(part: tuple[int, ...]) -> bool:
        return any(part[-len(stop) :] == stop for stop in config.stops)

    ends = is_stopped(tokens) or len(tokens) == n_tokens
    goes_on = not any(is_stopped(tokens[:i]) for i in range(1, len(tokens)))
    return (
        ends
        and goes_on
        and not set(tokens) & set(config.forbidden)
        and all(contains(list(tokens), phrase) for phrase in config.phrases)
    )


def exhaustive(model: Table, prompt: list[int], n_tokens: int, config: BeamConfig) -> list[tuple]:
    """Every sequence that the rules allow, with its score, the best first."""
    ids = range(len(model.logits))
    texts = (text for length in range(1, n_tokens + 1) for text in product(ids, repeat=length))
    scored = [
        (list(text), model.score(prompt, list(text), config.length_penalty))
        for text in texts
        if allowed(text, n_tokens, config)
    ]
    return sorted((pair for pair in scored if pair[1] > -np.inf), key=lambda pair: -pair[1])


@given(model=tables, data=st.data(), n_tokens=st.integers(1, 12))
def test_both_sides_find_the_same(model, data, n_tokens):
    V = len(model.logits)
    prompt = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=4))
    searched(model, prompt, n_tokens, data.draw(beam_configs(V)))


@given(seed=seeds, data=st.data(), V=st.integers(2, 3), n_tokens=st.integers(1, 4), best=st.integers(1, 9))
def test_a_beam_as_wide_as_the_space_is_exhaustive(seed, data, V, n_tokens, best):
    """With every rule: the same scores, and in each the sequence's own."""
    rules = data.draw(beam_configs(V))
    config = BeamConfig(
        **{**vars(rules), "width": V**n_tokens, "n_best": min(best, V**n_tokens), "early_stopping": "exact"}
    )
    model = table(V, seed)
    found, every = searched(model, [0, 1], n_tokens, config), exhaustive(model, [0, 1], n_tokens, config)
    if not every:
        assert "phrases" in found or "all" in found or "no sequence" in found
        return
    assert [score for _, score in found] == [score for _, score in every[: config.n_best]]
    assert all(pair in every for pair in found), "which of equals are found is the beam's own matter"


@given(model=tables, n_tokens=LENGTHS, end=st.none() | st.integers(0, 1))
def test_width_1_is_greedy(model, n_tokens, end):
    """The likeliest token each time, the first of equals, until the end token."""
    found = searched(model, [1], n_tokens, BeamConfig(width=1, end_token=end))
    ids = [1]
    while len(ids) <= n_tokens and (ids[-1] != end or len(ids) == 1):
        row = model.next_logits(np.array([ids]), np.zeros(1, int))
        ids.append(int(plain.log_probabilities(row).argmax()))
    assert found[0][0] == ids[1:]


@given(model=tables, data=st.data(), n_tokens=LENGTHS)
def test_what_is_found_is_sorted_distinct_allowed_and_scored_by_its_own_probabilities(model, data, n_tokens):
    config = data.draw(beam_configs(len(model.logits)))
    found = searched(model, [0], n_tokens, config)
    assume(not isinstance(found, str))
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(tokens) for tokens, _ in found}) == len(found) <= config.n_best
    for tokens, score in found:
        assert allowed(tuple(tokens), n_tokens, config), "phrases appear, and nothing follows a stop"
        assert score == pytest.approx(model.score([0], tokens, config.length_penalty), rel=1e-12)


@pytest.mark.parametrize("side", ["plain", "fast"])
@given(model=tables, data=st.data(), n_tokens=LENGTHS)
def test_each_row_continues_its_parent_and_no_finished_one_is_extended(side, model, data, n_tokens):
    """What a cache of keys and values relies on, seen from the model."""
    V = len(model.logits)
    config = data.draw(beam_configs(V))
    calls: list[np.ndarray] = [np.array([[1]])]

    def next_logits(tokens, parents):
        rows, origins = np.asarray(tokens), np.asarray(parents)
        if len(calls) > 1:
            np.testing.assert_array_equal(rows[:, :-1], calls[-1][origins])
        else:
            assert rows.tolist() == [[1]] and origins.tolist() == [0]
        calls.append(rows)
        assert len(rows) <= config.width
        logits = model.next_logits(rows, origins)
        return logits if side == "plain" else torch.from_numpy(logits)

    search, prompt = {
        "plain": (plain.beam_search, np.array([1])),
        "fast": (fast.beam_search, torch.tensor([1])),
    }[side]
    result(search, next_logits, prompt, n_tokens, config)
    for rows in calls:
        for row in rows[:, 1:]:
            stopped = [contains(row.tolist(), stop) for stop in config.stops]
            assert not any(stopped)


@given(model=tables, data=st.data(), n_tokens=st.integers(2, 6), width=st.integers(2, 4))
def test_stopping_early_loses_nothing(model, data, n_tokens, width):
    """`exact` finds what a search to the last token finds, which a width of finished ones never stops."""
    end = data.draw(st.integers(0, len(model.logits) - 1))
    alpha = data.draw(st.sampled_from([0.0, 0.7, 1.0, 3.0, -0.5]))
    config = BeamConfig(width, data.draw(st.integers(1, width)), alpha, end_token=end)
    stopping = plain.beam_search(model.next_logits, np.array([0]), n_tokens, config)
    # As many sequences as can ever be finished: then the worst one is never beaten.
    everything = all_finished(model, n_tokens, config)
    assert [h.score for h in stopping] == everything[: config.n_best]


class Looks(TorchDispatchMode):
    """Counts what would wait for a device: numbers and shapes that the host asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        waits = ("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense", "aten::nonzero")
        self.count += operation.name() in waits
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("phrases", [(), ((1, 2), (3,))])
def test_the_host_asks_the_device_for_nothing_but_whether_the_search_is_over(phrases):
    logits = torch.from_numpy(table(5, 0).logits)
    config = BeamConfig(3, 2, phrases=phrases, stop_sequences=((4, 4),), forbidden=(0,))
    with Looks() as looks:
        fast.beam_search(lambda ids, _: logits[ids[:, -2], ids[:, -1]], torch.tensor([0, 1]), 7, config)
    assert 1 <= looks.count <= 7 + 1, "once a step, and at the end"


@given(model=tables, data=st.data(), n_tokens=st.integers(2, 12), steps=st.integers(2, 5))
def test_a_search_that_is_over_before_the_host_looks_finds_the_same(model, data, n_tokens, steps):
    config = data.draw(beam_configs(len(model.logits)))
    arguments = (model.next_tensor, torch.tensor([0]), n_tokens, config)
    want = result(fast.beam_search, *arguments)
    with mock.patch.dict(fast._STEPS_BETWEEN_LOOKS, cpu=steps):
        assert result(fast.beam_search, *arguments) == want


def all_finished(model: Table, n_tokens: int, config: BeamConfig) -> list[float]:
    """The scores of whatever a beam of this width finishes, in a loop that never stops early."""
    beam, scores = [([], 0.0)], []
    for length in range(1, n_tokens + 1):
        candidates = []
        for row, (tokens, total) in enumerate(beam):
            log_p = plain.log_probabilities(model.next_logits(np.array([[0, *tokens]]), np.zeros(1, int)))[0]
            candidates += [(-(total + p), row, token, tokens) for token, p in enumerate(log_p)]
        candidates.sort()
        beam = []
        for place, (cost, _, token, tokens) in enumerate(candidates):
            if cost == np.inf:
                break
            if token == config.end_token or length == n_tokens:
                scores += [-cost / length**config.length_penalty] * (place < config.width)
            elif len(beam) < config.width:
                beam.append(([*tokens, token], -cost))
    return sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("logits", "n_tokens", "config", "want"),
    [
        # By its mean, or its sum times its length, a longer one still beats the worst of three.
        ([[0, 2, 1]] * 3, 3, BeamConfig(3, 3, 1.0, end_token=1), [[1], [2, 1], [2, 2, 1]]),
        ([[-1, 2, -6]] * 3, 4, BeamConfig(3, 3, -0.5, end_token=1), [[1], [0, 1], [0, 0, 1]]),
        # The likeliest token ends it, though a longer one would be better.
        ([[0, 1]] * 2, 4, BeamConfig(1, length_penalty=2.0, end_token=1), [[1]]),
        # After the first token one of two is finished, and the second is better by its length.
        ([[-2.1, -2]] * 2, 2, BeamConfig(2, 1, 2.0, "estimate", end_token=1), [[0, 1]]),
        ([[9e9]], 3, BeamConfig(), [[0, 0, 0]]),
    ],
)
def test_a_search_ends_neither_too_early_nor_too_late(logits, n_tokens, config, want):
    """The logits by the last token; in all but the last case token 1 ends a sequence."""
    model = Table(np.broadcast_to(np.array(logits, float), (len(logits),) * 3).copy())
    assert [tokens for tokens, _ in searched(model, [0], n_tokens, config)] == want


def test_a_longer_sequence_wins_by_its_length():
    """Token 2 ends. Ending at once costs 1 nat; going on costs 0.6 each time, and the fifth token ends."""
    ending = np.log([1e-9, 1 - np.exp(-1) - 1e-9, np.exp(-1)])
    model = Table(np.broadcast_to(ending, (3, 3, 3)).copy())
    for alpha, length in ((0.0, 1), (1.0, 5)):
        config = BeamConfig(2, length_penalty=alpha, end_token=2)
        ((tokens, score),) = searched(model, [0], 5, config)
        assert len(tokens) == length
        assert score == pytest.approx(model.score([0], tokens, alpha))


def test_equal_candidates_come_by_the_beam_and_then_by_the_token():
    model = Table(np.zeros((3, 3, 3)))
    found = searched(model, [0], 2, BeamConfig(4, 4))
    assert [tokens for tokens, _ in found] == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_a_beam_stays_full_where_all_the_likeliest_candidates_are_finished():
    """Tokens 0, 1, 2 end; the two that do not are behind all of them."""
    model = Table(np.broadcast_to([5.0, 4.0, 3.0, 0.0, -0.5], (5, 5, 5)).copy())
    config = BeamConfig(2, 2, 10.0, stop_sequences=((0,), (1,), (2,)))
    assert [tokens for tokens, _ in searched(model, [0], 3, config)] == [[3, 3, 0], [3, 4, 0]]


def test_phrases_may_overlap_each_other_and_a_stop_sequence_may_close_the_last():
    model = table(6, 5)
    config = BeamConfig(phrases=((1, 2, 3), (3, 4)), stop_sequences=((4,),))
    ((tokens, _),) = searched(model, [0], 4, config)
    assert tokens == [1, 2, 3, 4]


def test_a_phrase_that_a_stop_sequence_would_cut_is_kept_apart():
    """[3, 4] stops, so 1 3 4 2 cannot be; the two phrases take five tokens."""
    config = BeamConfig(phrases=((1, 3), (4, 2)), stop_sequences=((3, 4),))
    ((tokens, _),) = searched(table(5, 1), [0], 5, config)
    assert contains(tokens, (1, 3)) and contains(tokens, (4, 2)) and not contains(tokens, (3, 4))
    assert searched(table(5, 1), [0], 3, config) == "the phrases take 4 tokens, but max_new_tokens is 3"


def test_the_prompt_completes_neither_a_phrase_nor_a_stop_sequence():
    config = BeamConfig(width=1, phrases=((1, 2),), stop_sequences=((2, 0),))
    ((tokens, _),) = searched(table(4, 0), [0, 1, 2], 4, config)
    assert contains(tokens, (1, 2))
    found = searched(
        Table(np.broadcast_to([5.0, 0, 0], (3, 3, 3)).copy()), [1, 2], 2, BeamConfig(stop_sequences=((2, 0),))
    )
    assert found[0][0] == [0, 0]


@pytest.mark.parametrize(
    ("config", "n_tokens", "message"),
    [
        (BeamConfig(phrases=((0, 1), (2, 2))), 3, "the phrases take 4 tokens, but max_new_tokens is 3"),
        (
            BeamConfig(phrases=((0,), (1,)), stop_sequences=((0,), (1,))),
            9,
            "the phrases can never all appear, but max_new_tokens is 9",
        ),
        (BeamConfig(phrases=((3,),)), 3, "token 3 is not in the vocabulary; ids run from 0 to 2"),
        (BeamConfig(phrases=((4,),)), 3, "token 4 is not in the vocabulary; ids run from 0 to 2"),
        (BeamConfig(forbidden=(0, 1, 2)), 3, "all 3 tokens are forbidden, so none can be chosen"),
        (BeamConfig(), 0, "max_new_tokens is 0, but a beam needs at least 1"),
    ],
)
def test_what_cannot_be_met_is_one_line(config, n_tokens, message):
    assert searched(table(3, 0), [0], n_tokens, config) == message


def test_logits_that_are_no_numbers_and_an_empty_prompt_are_refused():
    model = Table(np.full((3, 3, 3), np.nan))
    assert searched(model, [0], 2, BeamConfig()).startswith("the model's logits are not numbers")
    for search, prompt in ((plain, np.zeros(0, int)), (fast, torch.zeros(0, dtype=torch.long))):
        assert "the prompt is empty" in result(search.beam_search, model.next_logits, prompt, 2)


def test_what_a_model_says_of_a_text_that_is_over_has_no_weight():
    """Token 2 ends it all at once; no other is possible, and after it there are no numbers."""
    logits = np.full((3, 3, 3), np.nan)
    logits[0, 0] = [-np.inf, -np.inf, 0.0]
    with mock.patch.dict(fast._STEPS_BETWEEN_LOOKS, cpu=5):
        assert searched(Table(logits), [0], 5, BeamConfig(end_token=2)) == [([2], 0.0)]


def test_impossible_phrases_by_probability_are_refused():
    logits = np.zeros((3, 3, 3))
    logits[..., 2] = -np.inf
    found = searched(Table(logits), [0], 3, BeamConfig(phrases=((2,),)))
    assert found == "no sequence is possible: each that the rules allow has probability 0"
