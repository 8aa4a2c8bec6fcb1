"""Activations: parity, and values that tables give."""

from math import erf, erfc, exp, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import arrays, seeds, sizes
from ref_numpy import activations

NAMES = ("relu", "gelu", "gelu_tanh", "silu")


@pytest.mark.parametrize("name", NAMES)
@given(shape=sizes(2), data=st.data(), seed=seeds)
def test_parity(agree, name, shape, data, seed):
    agree(name, seed, x=data.draw(arrays(tuple(shape))))


@pytest.mark.parametrize(
    ("name", "at_one"),
    [
        ("relu", 1.0),
        ("gelu", 0.8413447460685429),
        ("gelu_tanh", 0.8411919906082768),
        ("silu", 0.7310585786300049),
    ],
)
def test_at_one(name, at_one):
    """The normal distribution at 1, its approximation by Hendrycks and Gimpel, the logistic function at 1."""
    y, _ = getattr(activations, f"{name}_forward")(np.array([1.0]))
    assert y[0] == pytest.approx(at_one, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_far_from_zero_each_is_the_identity_or_nothing(agree, name):
    x = np.array([-1e4, -60.0, 60.0, 1e4])
    with np.errstate(over="raise", invalid="raise"):
        y, cache = getattr(activations, f"{name}_forward")(x)
        gradient = getattr(activations, f"{name}_backward")(np.ones(4), cache)
    np.testing.assert_allclose(y, [0, 0, 60, 1e4], rtol=0, atol=1e-20)
    np.testing.assert_allclose(gradient, [0, 0, 1, 1], rtol=0, atol=1e-20)
    agree(name, x=x)


def test_relu_passes_no_gradient_at_zero(offered):
    """The convention of both sides: the derivative at the kink is 0."""
    zeros = np.zeros(3)
    assert activations.relu_backward(np.ones(3), zeros).tolist() == [0, 0, 0]
    target = offered("relu")
    got = target.backend.run("relu", {"x": zeros}, np.ones(3), "float64", target.mathematics_on)
    assert got.gradients["x"].tolist() == [0, 0, 0]


@given(data=st.data(), shape=sizes(2))
def test_the_normal_distribution_is_pythons(data, shape):
    """NumPy's side makes its own, by Taylor series; held against erf, which is right to the last digit."""
    x = data.draw(arrays(tuple(shape))) * data.draw(st.sampled_from([0.01, 1.0, 9.0]))
    want = np.array([0.5 * (1 + erf(each / sqrt(2))) for each in x.flat]).reshape(x.shape)
    _, cache = activations.gelu_forward(x)
    assert np.abs(cache.cdf - want).max(initial=0) <= 3e-16
    single = x.astype(np.float32)
    _, cache = activations.gelu_forward(single)
    want = np.array([0.5 * (1 + erf(float(each) / sqrt(2))) for each in single.flat]).reshape(x.shape)
    assert cache.cdf.dtype == np.float32 and np.abs(cache.cdf - want).max(initial=0) <= 2**-23


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_values_far_on_the_left_have_all_their_digits(dtype):
    """The reference wrote the logistic function by tanh, and Phi by 1 + erf, which cancel there: in float32
    SiLU was wrong by 5 % at -16, and 0 at -20; GELU was wrong by 2 % at -8."""
    x = np.linspace(-80, -8, 721).astype(dtype)
    exact = np.array([each / (1 + exp(-each)) for each in x.astype(float)])
    within = 8 * np.finfo(dtype).eps
    np.testing.assert_allclose(activations.silu_forward(x)[0], exact, rtol=within)
    y = np.array([1 / (1 + exp(-each)) for each in x.astype(float)])
    got = activations.silu_backward(np.ones_like(x), x)
    np.testing.assert_allclose(got, y * (1 + x.astype(float) * (1 - y)), rtol=within)
    x = np.linspace(-8.4, -4, 441).astype(dtype)
    exact = [each * 0.5 * erfc(-each / sqrt(2)) for each in x.astype(float)]
    within = 1e-4 if dtype == np.float32 else 1e-11  # whose series is shorter
    np.testing.assert_allclose(activations.gelu_forward(x)[0], exact, rtol=within)
    far = np.array([-8.6, -1e30, -1e38], dtype)
    assert not activations.gelu_forward(far)[0].any()


def test_what_is_no_number_stays_none():
    y, _ = activations.gelu_forward(np.array([np.nan, 1.0]))
    assert np.isnan(y[0]) and not np.isnan(y[1])
