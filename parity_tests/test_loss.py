"""Cross entropy: parity, with targets that do not count, smoothing, and logits of any size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.parity import rounded
from parity_tests.strategies import arrays, seeds, sizes
from ref_numpy.loss import IGNORE, cross_entropy_backward, cross_entropy_forward
from torch_impl.loss import cross_entropy

smoothings = st.sampled_from([0.0, 0.1, 0.5])


@st.composite
def cases(draw):
    B, T, V = draw(sizes(3))
    places = draw(st.sampled_from([(T,), (B, T)]))
    random = np.random.default_rng(draw(seeds))
    targets = random.integers(V, size=places)
    targets[random.random(places) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = IGNORE
    return {
        "logits": draw(arrays((*places, V))) * draw(st.sampled_from([1.0, 1e2])),
        "targets": targets,
        "label_smoothing": draw(smoothings),
        "count": draw(st.none() | st.integers(1, 50)),
    }


@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("cross_entropy", seed, **arguments)


@given(vocab_size=st.integers(1, 50), smoothing=smoothings, seed=seeds, shift=st.floats(-1e4, 1e4))
def test_a_model_that_knows_nothing_loses_ln_v(vocab_size, smoothing, seed, shift):
    targets = np.random.default_rng(seed).integers(vocab_size, size=5)
    loss, _ = cross_entropy_forward(np.full((5, vocab_size), shift), targets, smoothing)
    assert loss == pytest.approx(np.log(vocab_size), abs=1e-12)


@given(arguments=cases(), cut=st.integers(0, 13))
def test_shares_of_any_split_add_up_to_the_whole(arguments, cut):
    """With the count of the whole, losses of parts add up and their gradients are its slices."""
    logits, targets, smoothing, _ = arguments.values()
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    count = int((targets != IGNORE).sum())
    whole, cache = cross_entropy_forward(logits, targets, smoothing)
    gradient = cross_entropy_backward(1.0, cache)
    shares, gradients = 0.0, []
    for part in (slice(None, cut), slice(cut, None)):
        if targets[part].size:
            share, part_cache = cross_entropy_forward(logits[part], targets[part], smoothing, count)
            shares += share
            gradients.append(cross_entropy_backward(1.0, part_cache))
    assert shares == pytest.approx(whole, rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(np.concatenate(gradients), gradient, rtol=0, atol=1e-15)


@given(seed=seeds)
def test_the_loss_of_bfloat16_logits_keeps_float32(ours, seed):
    """In bfloat16 a mean over many tokens would lose its last digits, and small improvements with them."""
    random = np.random.default_rng(seed)
    logits = rounded({"logits": random.standard_normal((40, 50))}, "bfloat16")["logits"]
    targets = random.integers(50, size=40)
    want, _ = cross_entropy_forward(logits, targets)
    on_device = (
        torch.from_numpy(logits).to(ours.device, torch.bfloat16),
        torch.from_numpy(targets).to(ours.device),
    )
    got = cross_entropy(*on_device)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want, rel=1e-6)


def test_one_place_by_hand():
    """p = (1/4, 3/4), target 1: loss ln(4/3), gradient (1/4, -1/4); smoothed by 0.2, q = (0.1, 0.9)."""
    logits, targets = np.log(np.array([[1.0, 3.0]])), np.array([1])
    loss, cache = cross_entropy_forward(logits, targets)
    assert loss == pytest.approx(np.log(4 / 3))
    assert cross_entropy_backward(1.0, cache) == pytest.approx(np.array([[0.25, -0.25]]))
    loss, cache = cross_entropy_forward(logits, targets, 0.2)
    assert loss == pytest.approx(0.1 * np.log(4) + 0.9 * np.log(4 / 3))
    assert cross_entropy_backward(1.0, cache) == pytest.approx(np.array([[0.15, -0.15]]))


@given(arguments=cases(), seed=seeds)
def test_targets_that_do_not_count_have_no_influence(arguments, seed):
    logits, targets = arguments["logits"], arguments["targets"]
    ignored = (targets == IGNORE)[..., None]
    other = np.where(ignored, np.random.default_rng(seed).standard_normal(logits.shape), logits)
    loss, cache = cross_entropy_forward(*arguments.values())
    other_loss, _ = cross_entropy_forward(*(arguments | {"logits": other}).values())
    assert loss == other_loss
    assert np.abs(cross_entropy_backward(1.0, cache) * ignored).max() == 0


def test_where_nothing_counts_the_loss_is_zero():
    loss, cache = cross_entropy_forward(np.ones((3, 4)), np.full(3, IGNORE))
    assert loss == 0 and np.abs(cross_entropy_backward(1.0, cache)).max() == 0


@pytest.mark.parametrize("target", [-1, 4, 5, IGNORE - 1])
def test_a_target_outside_the_vocabulary_is_refused(target):
    with pytest.raises(ValueError, match="a target lies outside the vocabulary of 4 and is not -100"):
        cross_entropy_forward(np.ones((2, 4)), np.array([0, target]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unless_told_the_mean_is_over_the_places_that_count(agree, smoothing):
    """Some do and some do not, and no count is given: the cases that are drawn seldom have all three."""
    logits = np.random.default_rng(0).standard_normal((6, 5))
    targets = np.array([3, IGNORE, 0, IGNORE, IGNORE, 4])
    agree("cross_entropy", 0, logits=logits, targets=targets, label_smoothing=smoothing, count=None)
