"""Dropout: the same units on both sides, at the right rate, wherever a sequence is computed."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import arrays, dropout_keys, seeds, sizes
from ref_numpy.dropout import DropoutKey, dropout_forward, keep_mask
from torch_impl import dropout as fast

rates = st.sampled_from([0.0, 2**-16, 0.1, 0.25, 0.5, 0.9]) | st.floats(0, 0.99)


@given(shape=sizes(3), data=st.data(), p=rates, key=st.none() | dropout_keys(), seed=seeds)
def test_parity(agree, shape, data, p, key, seed):
    agree("dropout", seed, x=data.draw(arrays(tuple(shape))), p=p, key=key)


@given(shape=sizes(3), p=rates, key=dropout_keys())
def test_parity_of_keep_mask(agree, shape, p, key):
    """Over enough units that sixteen bits sometimes equal the threshold itself."""
    agree("keep_mask", shape=(*shape, 101), p=p, key=key)


@given(shape=sizes(3), p=rates, key=dropout_keys())
def test_masks_are_those_of_the_cpu_on_any_device(ours, shape, p, key):
    got = fast.keep_mask(tuple(shape), p, key, ours.device)
    assert got.tolist() == keep_mask(tuple(shape), p, key).tolist()


def test_a_compiled_mask_of_a_key_that_is_known(ours):
    """Of a key whose step and row are numbers, not tensors, came a kernel that Triton refused.

    The CPU, which may lack a C++ compiler, traces it alone.
    """
    backend = "aot_eager" if torch.device(ours.device).type == "cpu" else "inductor"
    key = DropoutKey(seed=2, step=3, site=4)
    got = torch.compile(fast.keep_mask, backend=backend)((2, 3, 5), 0.5, key, ours.device)
    assert got.tolist() == keep_mask((2, 3, 5), 0.5, key).tolist()


@given(shape=sizes(3, least=2), p=rates, key=dropout_keys(), data=st.data())
def test_a_sequence_keeps_its_mask_in_any_batch(shape, p, key, data):
    """So a batch may be cut into micro-batches, or dealt out to devices, anywhere."""
    cut = data.draw(st.integers(1, shape[0] - 1))
    whole = keep_mask(tuple(shape), p, key)
    first = keep_mask((cut, *shape[1:]), p, key)
    rest = keep_mask((shape[0] - cut, *shape[1:]), p, key._replace(first_row=key.first_row + cut))
    assert np.concatenate([first, rest]).tolist() == whole.tolist()


@given(p=rates, key=dropout_keys())
def test_the_share_that_is_dropped_is_p_and_the_mean_stays(p, key):
    """Within six standard deviations, and the half of 2^-16 by which p is rounded."""
    n = 40_000
    y, _ = dropout_forward(np.ones((4, n // 4)), p, key)
    deviation = np.sqrt(p * (1 - p) / n)
    assert abs((y == 0).mean() - p) <= 6 * deviation + 2.0**-17
    assert abs(y.mean() - 1) <= (6 * deviation + 2.0**-17) / (1 - p)
    kept = y[y != 0]
    assert kept.size == 0 or np.ptp(kept) == 0


@given(key=dropout_keys())
def test_a_small_rate_drops_too(key):
    """Of 40,000 units that go one in a thousand; that none goes has a chance of e^-40."""
    x = np.ones((4, 10_000))
    assert 0 < (dropout_forward(x, 1e-3, key)[0] == 0).sum() < 100
    assert 0 < (fast.dropout(torch.from_numpy(x), 1e-3, key) == 0).sum() < 100


@given(key=dropout_keys(), field=st.sampled_from(["seed", "step", "site", "first_row"]))
def test_another_step_site_seed_or_row_drops_other_units(key, field):
    other = key._replace(**{field: getattr(key, field) + 1 if field != "seed" else key.seed ^ 1})
    shape = (1, 256)
    assert keep_mask(shape, 0.5, key).tolist() != keep_mask(shape, 0.5, other).tolist()


def test_without_a_key_nothing_is_dropped():
    x = np.arange(6.0).reshape(2, 3)
    y, _ = dropout_forward(x, 0.5, None)
    assert y.tolist() == x.tolist()
    assert (dropout_forward(np.ones((2, 99)), 0.5, DropoutKey(0, 0))[0] == 0).any()


def test_the_smallest_rate_is_one_in_65536():
    y, _ = dropout_forward(np.ones((2, 3)), 2.0**-16, DropoutKey(0, 0))
    assert y.tolist() == [[65536 / 65535] * 3] * 2


def test_every_one_of_the_sixteen_bits_counts():
    """Of a million units some have just the value 1001, and fall between this threshold and the next one; so
    do some of those that take the lower half of a word, and some that take the upper."""
    key = DropoutKey(seed=0, step=0)
    for keep in (keep_mask, lambda *arguments: fast.keep_mask(*arguments, torch.device("cpu")).numpy()):
        at = [keep((1, 2**20), threshold / 65536, key) for threshold in (1000, 1001, 1002)]
        for half in (0, 1):
            first, second, third = (kept[0, half::2] for kept in at)
            assert (first & ~second).any() and (second & ~third).any()


def test_a_key_begins_with_the_first_sequence_at_the_embedding():
    assert DropoutKey(3, 5) == DropoutKey(3, 5, first_row=0, site=0)
