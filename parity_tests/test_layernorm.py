"""LayerNorm and RMSNorm: parity, and what normalised means."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import array, arrays, optional_arrays, seeds, sizes
from ref_numpy.layernorm import layernorm_forward, rmsnorm_forward
from torch_impl.layernorm import LayerNorm, RMSNorm, layernorm, rmsnorm

# Not smaller: PyTorch's kernel for CPUs makes the gradient of x a difference of terms that grow with
# (variance + epsilon)^(-3/2), and loses all digits of it on a constant row with an epsilon of 1e-12.
epsilons = st.sampled_from([1e-5, 1e-2])


@st.composite
def inputs(draw):
    B, T, C = draw(sizes(3, least=3))  # of two features only the signs are left, and a gradient of 0
    leading = draw(st.sampled_from([(), (T,), (B, T)]))
    return draw(arrays((*leading, C)))


@given(x=inputs(), data=st.data(), epsilon=epsilons, seed=seeds)
def test_parity_of_layernorm(agree, x, data, epsilon, seed):
    width = x.shape[-1]
    weight = data.draw(arrays((width,), ("normal",)))
    bias = data.draw(optional_arrays((width,)))
    agree("layernorm", seed, x=x, weight=weight, bias=bias, epsilon=epsilon)


def test_the_mean_of_a_row_is_not_rounded_on_the_way_back(agree):
    """Three numbers as bfloat16 has them around 1000, and their mean as it has not: PyTorch's kernel for CPUs
    kept 1000 for 1001.3, and the gradient of x was 1.1 where it is 0.002."""
    x, weight = np.array([1004.0, 1000.0, 1000.0]), np.array([1.7, -0.06, -0.15])
    agree("layernorm", 15, x=x, weight=weight, bias=None, epsilon=1e-2)


def test_gradients_of_many_rows_are_not_summed_in_their_precision(agree):
    """Of 500 rows PyTorch's kernel for CPUs lost a thirteenth of the gradient of the weight."""
    x, (weight, bias) = array(np.random.default_rng(0), (500, 3)), array(np.random.default_rng(1), (2, 3))
    agree("layernorm", x=x, weight=weight, bias=bias, epsilon=1e-5)


@given(x=inputs(), data=st.data(), epsilon=epsilons, seed=seeds)
def test_parity_of_rmsnorm(agree, x, data, epsilon, seed):
    weight = data.draw(arrays((x.shape[-1],), ("normal",)))
    agree("rmsnorm", seed, x=x, weight=weight, epsilon=epsilon)


@given(seed=seeds, width=st.sampled_from([2, 7, 64]), shift=st.floats(-100, 100), factor=st.floats(0.1, 100))
def test_rows_come_out_with_mean_0_and_variance_1_wherever_they_were(seed, width, shift, factor):
    x = array(np.random.default_rng(seed), (5, width)) * factor + shift
    y, _ = layernorm_forward(x, np.ones(width), None, 1e-15)
    np.testing.assert_allclose(y.mean(axis=-1), 0, rtol=0, atol=1e-9)
    np.testing.assert_allclose((y**2).mean(axis=-1), 1, rtol=0, atol=1e-6)
    y, _ = rmsnorm_forward(x, np.ones(width), 1e-15)
    np.testing.assert_allclose((y**2).mean(axis=-1), 1, rtol=0, atol=1e-6)


def test_epsilon_stands_inside_the_root():
    """A row of +-0.001 has variance 1e-6; with epsilon 3e-6 it is divided by sqrt(4e-6) = 0.002."""
    x = np.array([0.001, -0.001])
    assert layernorm_forward(x, np.ones(2), None, 3e-6)[0] == pytest.approx([0.5, -0.5])
    assert rmsnorm_forward(x, np.ones(2), 3e-6)[0] == pytest.approx([0.5, -0.5])


def test_a_constant_row_is_its_bias():
    y, _ = layernorm_forward(np.full(4, 7.0), np.full(4, 3.0), np.arange(4.0), 1e-5)
    assert y.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("module", "function"), [(LayerNorm, layernorm), (RMSNorm, rmsnorm)])
def test_modules_compute_with_all_of_their_parameters_in_the_precision_of_the_input(module, function):
    random = np.random.default_rng(0)
    norm = module(5, 1e-2, bias=True) if module is LayerNorm else module(5, 1e-2)
    with torch.no_grad():
        for param in norm.parameters():
            param.copy_(torch.from_numpy(array(random, (5,))))
    x = torch.from_numpy(array(random, (3, 5)))
    want = function(x, *(param.detach().double() for param in norm.parameters()), 1e-2)
    assert torch.equal(norm(x), want) and norm(x).dtype == torch.float64
