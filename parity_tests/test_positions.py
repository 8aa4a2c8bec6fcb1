"""Positions: parity, and the sinusoids' own laws."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import arrays, seeds, sizes
from ref_numpy.positions import learned_positions_forward, sinusoidal_positions
from torch_impl import positions as fast


@given(shape=sizes(2), data=st.data(), seed=seeds)
def test_parity_of_learned_positions(agree, shape, data, seed):
    weight = data.draw(arrays(tuple(shape)))
    rows = data.draw(st.sampled_from([(), (3,)]))  # places shared by all sequences, or each its own
    places = np.random.default_rng(seed).integers(shape[0], size=(*rows, 5))
    agree("learned_positions", seed, places=places, weight=weight)


@given(length=st.integers(1, 70), width=st.integers(1, 33))
def test_sinusoids_agree(length, width):
    """Sine and cosine of two libraries may differ in the last bit of an angle of up to 70."""
    for precision, dtype, atol in ((np.float64, torch.float64, 1e-13), (np.float32, torch.float32, 2.0**-23)):
        want = sinusoidal_positions(np.arange(length), width, precision)
        got = fast.sinusoidal_positions(torch.arange(length), width, dtype)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_places_may_come_in_any_order():
    places = np.array([[3, 0, 3], [1, 2, 0]])
    table = sinusoidal_positions(np.arange(4), 5, np.float64)
    np.testing.assert_array_equal(sinusoidal_positions(places, 5, np.float64), table[places])
    got = fast.sinusoidal_positions(torch.from_numpy(places), 5, torch.float64)
    np.testing.assert_allclose(got, table[places], rtol=0, atol=1e-15)


def test_a_model_moved_to_another_precision_has_the_sinusoids_of_that():
    """Those of float32 would stay rounded in float64."""
    got = fast.SinusoidalPositions(7, 5).double()(torch.arange(7))
    np.testing.assert_allclose(got, sinusoidal_positions(np.arange(7), 5, np.float64), rtol=0, atol=1e-15)


def test_sinusoids_by_hand():
    """Width 5: sine and cosine of t, of t / 10000^(2/5), and the sine alone of t / 10000^(4/5)."""
    slow, slowest = 10000 ** (2 / 5), 10000 ** (4 / 5)
    want = [
        [0, 1, 0, 1, 0],
        [np.sin(1), np.cos(1), np.sin(1 / slow), np.cos(1 / slow), np.sin(1 / slowest)],
        [np.sin(2), np.cos(2), np.sin(2 / slow), np.cos(2 / slow), np.sin(2 / slowest)],
    ]
    np.testing.assert_allclose(sinusoidal_positions(np.arange(3), 5, np.float64), want, rtol=0, atol=1e-15)


@given(width=st.sampled_from([2, 4, 10]), t=st.integers(0, 40), k=st.integers(0, 20))
def test_a_step_of_k_is_a_rotation(width, t, k):
    """Vaswani et al. 3.5: PE(t + k) is a linear function of PE(t), the same one for every t."""
    table = sinusoidal_positions(np.arange(t + k + 1), width, np.float64)
    at_k = sinusoidal_positions(np.arange(k + 1), width, np.float64)[k]
    sin_t, cos_t = table[t, 0::2], table[t, 1::2]
    sin_k, cos_k = at_k[0::2], at_k[1::2]
    np.testing.assert_allclose(table[t + k, 0::2], sin_t * cos_k + cos_t * sin_k, rtol=0, atol=1e-12)
    np.testing.assert_allclose(table[t + k, 1::2], cos_t * cos_k - sin_t * sin_k, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [3, 4, -1, -3])
def test_a_place_outside_the_table_is_refused(place):
    places, weight = np.array([1, place, 2]), np.zeros((3, 2))
    with pytest.raises(ValueError, match=f"place {place} lies outside the context length of 3"):
        learned_positions_forward(places, weight)
    with pytest.raises(IndexError):
        fast.learned_positions(torch.from_numpy(places), torch.from_numpy(weight))


def test_a_table_that_can_be_computed_is_not_saved():
    """In the fast half, of which a checkpoint has all that is called a state."""
    assert not fast.SinusoidalPositions(3, 4).state_dict()
