"""Sampling: the same token on both sides from the same logits and random number, and each filter's laws.

The logits processors of transformers are the outside oracle. Top-p differs from theirs in two places: of
equal tokens the lower ids stay (there, any), and where a cumulative probability is p but for its rounding, it
is summed from the top (there, from the bottom).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from parity_tests.strategies import arrays, sampling_configs
from ref_numpy import sampling as plain
from ref_numpy.config import SamplingConfig
from ref_numpy.rng import SAMPLE, Key, uniform
from torch_impl import sampling as fast

BOTH = [(plain.sample_token, np.array), (fast.sample_token, torch.tensor)]

logits_of_any_size = st.integers(5, 40).flatmap(lambda size: arrays((size,)))


@given(
    logits=logits_of_any_size,
    seen=st.lists(st.integers(0, 4)),
    config=sampling_configs(),
    u=st.floats(0, 1, exclude_max=True),
)
def test_filtered_logits_and_sampled_tokens_are_equal(logits, seen, config, u):
    want = plain.filtered_logits(logits, seen, config)
    got = fast.filtered_logits(torch.from_numpy(logits), seen, config).numpy()
    np.testing.assert_array_equal(got, want)
    token = plain.sample_token(logits, seen, config, u)
    assert fast.sample_token(torch.from_numpy(logits), seen, config, u) == token
    assert want[token] > -np.inf, "what was ruled out is never drawn"


@given(logits=logits_of_any_size, seen=st.lists(st.integers(0, 4)), config=sampling_configs())
def test_parity_of_filtered_logits(agree, logits, seen, config):
    agree("filtered_logits", logits=logits, seen=seen, config=config)


@given(logits=logits_of_any_size, config=sampling_configs(), u=st.floats(0, 1, exclude_max=True))
def test_parity_of_sample_token(agree, logits, config, u):
    agree("sample_token", logits=logits, seen=[0, 2, 2], config=config, u=u)


@given(logits=logits_of_any_size, k=st.integers(1, 60))
def test_top_k_keeps_the_k_largest_and_their_equals(logits, k):
    kept = ~np.isneginf(plain.keep_top_k(logits, k))
    assert kept.sum() >= min(k, logits.size)
    assert logits[kept].min() == np.sort(logits)[-min(k, logits.size)]
    assert kept.all() or logits[kept].min() > logits[~kept].max()


@given(logits=logits_of_any_size, p=st.floats(1e-6, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    kept = ~np.isneginf(plain.keep_top_p(logits, p))
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    assert kept[logits.argmax()], "the likeliest always stays"
    assert probabilities[kept].sum() >= p - 1e-12
    assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-12, "without its last it would not"
    assert kept.all() or logits[kept].min() >= logits[~kept].max()


@given(logits=logits_of_any_size, p=st.floats(0, 1))
def test_min_p_keeps_what_is_not_much_less_likely_than_the_likeliest(logits, p):
    kept = ~np.isneginf(plain.keep_min_p(logits, p))
    np.testing.assert_array_equal(kept, np.exp(logits - logits.max()) >= p)


@given(logits=logits_of_any_size, k=st.integers(1, 10), p=st.floats(0.01, 1))
def test_top_k_and_min_p_change_nothing_the_second_time(logits, k, p):
    """Not so top-p: of what is left, fewer tokens may reach p."""
    for keep, limit in ((plain.keep_top_k, k), (plain.keep_min_p, p)):
        once = keep(logits, limit)
        np.testing.assert_array_equal(keep(once, limit), once)


@given(logits=logits_of_any_size)
def test_forbidden_tokens_and_the_greedy_choice_change_nothing_the_second_time(logits):
    once = plain.forbid(logits, (0, 3))
    np.testing.assert_array_equal(plain.forbid(once, (0, 3)), once)
    greedy = SamplingConfig(temperature=0.0)
    chosen = plain.filtered_logits(logits, [], greedy)
    np.testing.assert_array_equal(plain.filtered_logits(chosen, [], greedy), chosen)


@given(logits=logits_of_any_size, p=st.floats(0.01, 1))
def test_top_p_again_keeps_the_likeliest_and_no_more_than_before(logits, p):
    once = plain.keep_top_p(logits, p)
    twice = plain.keep_top_p(once, p)
    assert twice[logits.argmax()] == logits.max()
    assert ((twice == once) | np.isneginf(twice)).all()


@given(logits=logits_of_any_size, more=st.integers(0, 5))
def test_a_k_of_all_tokens_or_more_changes_nothing(logits, more):
    np.testing.assert_array_equal(plain.keep_top_k(logits, logits.size + more), logits)


def processed(logits: np.ndarray, seen: Sequence[int], config: SamplingConfig) -> np.ndarray:
    """What transformers makes of the logits, in the order of its generate(): in float64, as they are."""
    steps = LogitsProcessorList()
    if config.repetition_penalty != 1:
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.forbidden:
        steps.append(theirs.SuppressTokensLogitsProcessor(list(config.forbidden)))
    if config.temperature != 1:
        steps.append(theirs.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(theirs.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(theirs.TopPLogitsWarper(config.top_p))
    if config.min_p > 0:
        steps.append(theirs.MinPLogitsWarper(config.min_p))
    ids = torch.tensor(seen, dtype=torch.long)[None]
    return steps(ids, torch.from_numpy(logits)[None].clone())[0].numpy()


STRATEGIES = {
    "as the model believes": SamplingConfig(),
    "temperature": SamplingConfig(temperature=0.7),
    "top-k": SamplingConfig(top_k=4),
    "top-p": SamplingConfig(top_p=0.8),
    "min-p": SamplingConfig(min_p=0.2),
    "repetition penalty": SamplingConfig(repetition_penalty=1.5),
    "forbidden": SamplingConfig(forbidden=(0, 5)),
    "all": SamplingConfig(0.9, 8, 0.9, 0.05, 1.2, (3,)),
}


@pytest.mark.parametrize("filters", [plain, fast], ids=["plain", "fast"])
@pytest.mark.parametrize("name", STRATEGIES)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(9, 60), scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_each_filter_is_that_of_transformers(filters, name, seed, size, scale):
    """No two logits alike: with every bit that stays."""
    random = np.random.default_rng(seed)
    logits, seen = random.normal(0, scale, size), random.integers(size, size=5).tolist()
    want = processed(logits, seen, STRATEGIES[name])
    got = filters.filtered_logits(
        logits if filters is plain else torch.tensor(logits), seen, STRATEGIES[name]
    )
    np.testing.assert_array_equal(np.asarray(got), want)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(5, 40), config=sampling_configs())
def test_equal_tokens_aside_any_strategy_is_that_of_transformers(seed, size, config):
    """Logits from five values: as many of each stay, though top-p may keep others of equal ones."""
    logits = np.random.default_rng(seed).integers(-2, 3, size) * 0.7
    config = replace(config, temperature=config.temperature or 1.0, forbidden=())
    if config.top_p < 1:  # away from sums that are p but for their rounding
        config = replace(config, top_p=config.top_p * 0.987654321)
    want, got = processed(logits, [0, 2], config), plain.filtered_logits(logits, [0, 2], config)
    np.testing.assert_array_equal(np.sort(got), np.sort(want))
    if config.top_p == 1:
        np.testing.assert_array_equal(got, want)


LOGITS, SEEN = np.array([0.3, -1.0, 2.0, 0.8, -0.2, 1.1, 0.0, 1.7, -2.0, 0.5]), [2, 4]


@pytest.fixture(scope="module")
def draws() -> list[float]:
    """As generate() draws them: one for each place of a text of ten thousand tokens."""
    return [uniform(Key(7, SAMPLE, step=i), 1)[0] for i in range(10_000)]


def is_drawn_from(counts: np.ndarray, p: np.ndarray) -> bool:
    """Chi-square at a level of one in a thousand, its quantile by Wilson and Hilferty (1931)."""
    if counts[p == 0].any():
        return False
    n, k = counts.sum(), np.count_nonzero(p) - 1
    expected = n * p[p > 0]
    quantile = k * (1 - 2 / (9 * k) + 3.09 * np.sqrt(2 / (9 * k))) ** 3
    return ((counts[p > 0] - expected) ** 2 / expected).sum() < quantile


@pytest.mark.parametrize("implementation", ["plain", "fast"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_ten_thousand_draws_follow_the_distribution_of_transformers(name, implementation, draws):
    """And not that of a temperature a quarter higher, so the test would notice."""
    config = STRATEGIES[name]
    if implementation == "plain":
        drawn = [plain.sample_token(LOGITS, SEEN, config, u) for u in draws]
    else:  # as rows of one batch
        logits = torch.from_numpy(LOGITS).expand(len(draws), -1)
        seen = fast.seen_tokens([SEEN], LOGITS.size).expand(len(draws), -1)
        forbidden = fast.forbidden_tokens(config, LOGITS.size)
        drawn = fast.choose(logits, seen, forbidden, config, torch.tensor(draws, dtype=torch.float64)).numpy()
        assert [fast.sample_token(logits[0], SEEN, config, u) for u in draws[:50]] == drawn[:50].tolist()
    counts = np.bincount(drawn, minlength=LOGITS.size)
    for changed, agrees in ((config, True), (replace(config, temperature=1.25 * config.temperature), False)):
        kept = processed(LOGITS, SEEN, changed)
        p = np.exp(kept - kept.max())
        assert is_drawn_from(counts, p / p.sum()) == agrees


def test_top_p_by_hand():
    """Of 1/2, 1/4, 1/8, 1/8: half is reached by the first alone, more than half takes the second as well."""
    logits = np.log(np.array([0.125, 0.5, 0.125, 0.25]))
    for p, kept in ((0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.76, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        assert np.flatnonzero(~np.isneginf(plain.keep_top_p(logits, p))).tolist() == kept


def test_a_token_seen_twice_is_penalised_once_whatever_its_sign():
    got = plain.penalise_repetition(np.array([2.0, -2.0, 1.0]), [0, 1, 0], 4.0)
    assert got.tolist() == [0.5, -8.0, 1.0]
    by_two = plain.filtered_logits(
        np.array([2.0, -2.0, 1.0]), [0, 1, 0], SamplingConfig(repetition_penalty=2.0)
    )
    assert by_two.tolist() == [1.0, -4.0, 1.0]


@pytest.mark.parametrize(("sample", "array"), BOTH)
def test_forbidden_tokens_are_never_chosen_not_even_greedily(sample, array):
    config = SamplingConfig(temperature=0.0, forbidden=(1,))
    assert sample(array([0.0, 9.0, 3.0]), [], config, 0.5) == 2
    with pytest.raises(ValueError, match="all 2 tokens are forbidden"):
        sample(array([0.0, 0.0]), [], replace(config, forbidden=(0, 1)), 0.5)


@pytest.mark.parametrize(("sample", "array"), BOTH)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("logits", "forbidden"), [([0.0, -np.inf], (0,)), ([-np.inf, -np.inf], ())])
def test_where_no_token_is_possible_none_is_chosen(sample, array, temperature, logits, forbidden):
    """Greedily one side took a forbidden token, and the other one that does not exist."""
    with pytest.raises(ValueError, match="can be chosen"):
        sample(array(logits), [], SamplingConfig(temperature=temperature, forbidden=forbidden), 0.5)


@pytest.mark.parametrize(("sample", "array"), BOTH)
def test_greedy_takes_the_first_of_equals(sample, array):
    assert sample(array([1.0, 3.0, 3.0, 2.0]), [], SamplingConfig(temperature=0.0), 0.99) == 1


@given(logits=logits_of_any_size)
def test_temperature_0_and_k_1_choose_the_likeliest(logits):
    best = int(logits.argmax())
    assert plain.sample_token(logits, [], SamplingConfig(temperature=0.0), 0.5) == best
    if (logits == logits.max()).sum() == 1:
        assert plain.sample_token(logits, [], SamplingConfig(top_k=1), 0.5) == best


def test_frequencies_follow_the_softmax():
    """5,000 evenly spread u: each token as often as its probability says."""
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    u = (np.arange(5_000) + 0.5) / 5_000
    for config, p in (
        (SamplingConfig(), [0.5, 0.3, 0.2]),
        (SamplingConfig(temperature=0.5), np.array([25, 9, 4]) / 38),
        (SamplingConfig(top_k=2), [5 / 8, 3 / 8, 0]),
    ):
        counts = np.bincount([plain.sample_token(logits, [], config, x) for x in u], minlength=3)
        np.testing.assert_allclose(counts / 5_000, p, rtol=0, atol=4e-4)


@pytest.mark.parametrize(("sample", "array"), BOTH)
@pytest.mark.parametrize("token", [-1, 3, 4])
def test_a_forbidden_token_that_does_not_exist_is_refused(sample, array, token):
    with pytest.raises(ValueError, match=f"forbidden token {token} is not in the vocabulary of 3"):
        sample(array([0.0, 1.0, 2.0]), [], SamplingConfig(forbidden=(token,)), 0.5)


@pytest.mark.parametrize(
    ("keep", "array"), [(plain.keep_min_p, np.array), (fast.keep_min_p, torch.DoubleTensor)]
)
def test_a_share_of_exactly_p_stays(keep, array):
    """The likeliest has a share of exactly 1, and its equals have."""
    kept = keep(array([1.0, 3.0, 3.0, 2.0]), 1.0)
    assert [x > -np.inf for x in kept.tolist()] == [False, True, True, False]


def test_a_slice_of_the_distribution_begins_with_its_own_boundary():
    """Two equal tokens, u = 1/2: the first owns [0, 1/2), so the second is drawn."""
    assert plain.draw(np.zeros(2), 0.5) == 1
    assert fast.draw(torch.zeros(2, dtype=torch.float64), 0.5) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_token_is_drawn_in_float64_whatever_the_logits_are(dtype):
    """A million equal tokens, and u a millionth of a slice below and above a boundary in the middle."""
    logits, middle = np.zeros(1_000_000, dtype), 600_001
    for offset, token in ((-1e-12, middle - 1), (1e-12, middle)):
        for sample, array in BOTH:
            assert sample(array(logits), [], SamplingConfig(), middle / logits.size + offset) == token


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_logits_of_any_size_are_sampled(temperature):
    """What all logits share has no say, so none may overflow."""
    config = SamplingConfig(temperature=temperature)
    for shift in (-1e5, 0.0, 1e5):
        logits = np.array([0.0, -1e4, 0.0]) + shift
        for sample, array in BOTH:
            assert [sample(array(logits), [], config, u) for u in (0.0, 0.49, 0.51, 0.99)] == [0, 0, 2, 2]


@given(logits=logits_of_any_size)
def test_the_first_and_the_last_token_that_stay_can_be_drawn_and_none_beyond_them(logits):
    x = plain.keep_top_k(logits, 3)
    weights = np.exp(x - x.max())
    assert plain.draw(x, 0.0) == np.flatnonzero(weights > 0)[0]
    assert np.flatnonzero(weights > 1e-12)[-1] <= plain.draw(x, 1 - 2.0**-53) < logits.size
