"""Rotary positions: parity, and what makes them relative."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import array, arrays, seeds, sizes
from ref_numpy.config import ModelConfig
from ref_numpy.rope import rope_angles, rope_forward
from torch_impl import rope as fast

configs = st.builds(
    lambda heads, base, layout, scale: ModelConfig(
        n_head=heads[0], d_model=heads[0] * heads[1], positions="rope",
        rope_base=base, rope_layout=layout, rope_scale=scale,
    ),
    st.sampled_from([(1, 2), (3, 4), (2, 10)]),
    st.sampled_from([10000.0, 7.0, 5e5]),
    st.sampled_from(["half", "interleaved"]),
    st.sampled_from([1.0, 4.0, 0.3]),  # the last no power of 2: dividing by it rounds
)  # fmt: skip


@given(config=configs, shape=sizes(2), data=st.data(), seed=seeds)
def test_parity(agree, config, shape, data, seed):
    (B, T), H, D = shape, config.n_head, config.head_width
    rows = data.draw(st.sampled_from([(), (B,)]))  # places shared by all sequences, or each its own
    places = np.random.default_rng(seed).integers(60, size=(*rows, T))
    agree("rope", seed, x=data.draw(arrays((B, H, T, D))), places=places, config=config)


@given(config=configs, seed=seeds, t=st.integers(0, 50), s=st.integers(0, 50), shift=st.integers(0, 50))
def test_a_score_depends_on_the_distance_alone(config, seed, t, s, shift):
    random = np.random.default_rng(seed)
    q, k = (array(random, (1, 1, 1, config.head_width)) for _ in "qk")

    def score(t, s):
        turned = (rope_forward(x, np.array([place]), config)[0] for x, place in ((q, t), (k, s)))
        return float(np.prod(list(turned), axis=0).sum())

    assert score(t, s) == pytest.approx(score(t + shift, s + shift), abs=1e-9 * config.head_width)


@given(config=configs, seed=seeds)
def test_turning_keeps_lengths_and_place_0_stays(config, seed):
    x = array(np.random.default_rng(seed), (1, 2, 5, config.head_width))
    y, _ = rope_forward(x, np.arange(5), config)
    np.testing.assert_allclose((y**2).sum(-1), (x**2).sum(-1), rtol=1e-12)
    np.testing.assert_array_equal(y[:, :, 0], x[:, :, 0])


def test_by_hand():
    """Width 4, place 2, base 100: pairs turn by 2 and by 2 / 10; which features pair up is the layout."""
    x = np.array([1.0, 10.0, 2.0, 20.0]).reshape(1, 1, 1, 4)

    def turned(a, b, angle):
        return [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]

    half = ModelConfig(n_head=1, d_model=4, positions="rope", rope_base=100.0)
    y, _ = rope_forward(x, np.array([2]), half)
    (a, c), (b, d) = turned(1, 2, 2.0), turned(10, 20, 0.2)
    np.testing.assert_allclose(y.ravel(), [a, b, c, d], rtol=1e-14)
    y, _ = rope_forward(x, np.array([2]), replace(half, rope_layout="interleaved"))
    np.testing.assert_allclose(y.ravel(), [*turned(1, 10, 2.0), *turned(2, 20, 0.2)], rtol=1e-14)


def test_interpolation_fits_a_longer_text_into_known_angles():
    config = ModelConfig(n_head=1, d_model=6, positions="rope")
    longer = replace(config, rope_scale=4.0)
    np.testing.assert_array_equal(rope_angles(np.arange(32) * 4, longer), rope_angles(np.arange(32), config))


def test_a_model_in_float64_has_angles_in_float64():
    """The table was made in float32; a table that is only cast would stay 1e-8 off."""
    config = ModelConfig(n_head=1, d_model=6, positions="rope")
    rotation = fast.RotaryPositions(config).double()(torch.tensor([7]))
    sines = np.sin(rope_angles(np.array([7]), config))[0]
    np.testing.assert_allclose(rotation.sin[0, 0], [*-sines, *sines], rtol=1e-13)


def test_angles_that_can_be_computed_are_not_saved():
    """In the fast half, of which a checkpoint has all that is called a state."""
    assert not fast.RotaryPositions(ModelConfig(n_head=1, d_model=4, positions="rope")).state_dict()
