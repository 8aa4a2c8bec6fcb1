"""Muon: the same steps on both sides, and what orthogonal means."""

from unittest import mock

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import array, seeds, sizes
from ref_numpy import muon as plain
from ref_numpy import optim as plain_optim
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.parameters import init_params, is_muons, parameter_shapes
from torch_impl import muon as fast
from torch_impl.optim import make_optimizer, set_learning_rate
from torch_impl.transformer import Transformer

shapes = sizes(2)


@given(shape=shapes, seed=seeds, size=st.sampled_from([1e-4, 1.0, 1e4]))
def test_the_same_matrix_is_made_orthogonal(shape, seed, size):
    """Alone, and as one of a batch."""
    matrices = size * array(np.random.default_rng(seed), (3, *shape))
    want = np.stack([plain.orthogonalise(matrix) for matrix in matrices])
    np.testing.assert_allclose(fast.orthogonalise(torch.from_numpy(matrices)), want, rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        fast.orthogonalise(torch.from_numpy(matrices[:1])), want[:1], rtol=0, atol=1e-10
    )


@given(shape=shapes, seed=seeds)
def test_products_in_tf32_follow_the_reference_step_by_step(shape, seed):
    """And not on the Gram matrix, for which they are too coarse."""
    matrices = array(np.random.default_rng(seed), (2, *shape))
    want = np.stack([plain.orthogonalise(matrix) for matrix in matrices])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with mock.patch.object(fast, "_iterated_on_gram", None):
            found = fast.orthogonalise(torch.from_numpy(matrices))
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=seeds,
    decades=st.floats(0, 4),
    size=st.sampled_from([1e-5, 1.0, 1e5]),
    products=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_products_in_half_precision_let_no_direction_grow(shape, seed, decades, size, products):
    """By the way of float32, on the Gram matrix, weak ones would: to 2 and more."""
    random = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(random.standard_normal(shape), full_matrices=False)
    matrix = size * (u * 10.0 ** -np.linspace(0, decades, len(vt))) @ vt
    found = fast.orthogonalise(torch.from_numpy(matrix[None]).float(), products)[0].double().numpy()
    assert np.linalg.norm(found, 2) < 1.25
    if decades < 1:
        off = np.linalg.norm(found - plain.orthogonalise(matrix)) / np.linalg.norm(found)
        assert off < 16 * torch.finfo(products).eps


@given(shape=shapes, seed=seeds)
def test_singular_vectors_stay_and_singular_values_become_about_1(shape, seed):
    random = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(random.standard_normal(shape), full_matrices=False)
    spread = 10.0 ** -np.linspace(0, 1.5, len(vt))  # before: from 1 to a thirtieth
    found = plain.orthogonalise((u * spread) @ vt)
    inside = u.T @ found @ vt.T
    np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0, rtol=0, atol=1e-10)
    assert ((np.diag(inside) > 0.6) & (np.diag(inside) < 1.3)).all()
    np.testing.assert_allclose(u @ (u.T @ found @ vt.T) @ vt, found, rtol=0, atol=1e-10)


def test_the_size_of_a_gradient_does_not_matter_and_none_is_no_step():
    gradient = np.random.default_rng(0).standard_normal((3, 5))
    np.testing.assert_allclose(
        plain.orthogonalise(1e4 * gradient), plain.orthogonalise(gradient), rtol=0, atol=1e-6
    )
    zero = np.zeros((3, 5))
    assert (plain.orthogonalise(zero) == 0).all()
    assert (fast.orthogonalise(torch.zeros(2, 3, 5)) == 0).all()


def test_a_step_by_hand():
    """One number becomes p(p(p(p(p(1))))) with its sign; a tall matrix moves sqrt(M / N) times as far."""
    s = 1.0
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    param, m = plain.muon(np.array([[2.0]]), np.array([[0.5]]), np.array([[-0.1]]), 0.1, 0.9, 0.5)
    assert np.isclose(m, 0.9 * -0.1 + 0.1 * 0.5)
    ahead = 0.9 * m[0, 0] + 0.1 * 0.5
    np.testing.assert_allclose(param, 2.0 - 0.1 * 0.5 * 2.0 - 0.1 * np.sign(ahead) * s, rtol=0, atol=1e-5)
    tall, _ = plain.muon(np.zeros((4, 1)), np.ones((4, 1)), np.zeros((4, 1)), 0.1, 0.0, 0.0)
    np.testing.assert_allclose(tall, -0.1 * 2 * s * np.full((4, 1), 0.5), rtol=0, atol=1e-6)


@given(
    seed=seeds,
    steps=st.integers(1, 4),
    momentum=st.sampled_from([0.0, 0.9, 0.95]),
    decay=st.sampled_from([0.0, 0.1]),
    n_layer=st.sampled_from([1, 2]),  # with one, each of the shapes is that of one matrix
)
def test_steps_agree(seed, steps, momentum, decay, n_layer):
    """On a whole model: blocks' matrices by Muon, the rest by AdamW, with rates that change."""
    model_config = ModelConfig(vocab_size=7, context_length=5, n_layer=n_layer, n_head=1, d_model=6, d_ff=11)
    config = TrainConfig(optimizer="muon", muon_momentum=momentum, weight_decay=decay, learning_rate=1e-2)
    random = np.random.default_rng(seed)
    params = {name: value.astype(np.float64) for name, value in init_params(model_config, 0).items()}
    model = Transformer(model_config, torch.float64).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    optimizer, moments = make_optimizer(model, config), plain_optim.zero_moments(params)
    for step in range(steps):
        gradients = {name: array(random, value.shape) for name, value in params.items()}
        rate = float(random.uniform(1e-3, 1e-1))
        params, moments = plain_optim.optimizer_step(params, gradients, moments, step, rate, config)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name])
        set_learning_rate(optimizer, torch.tensor(rate, dtype=torch.float64))
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach(), params[name], rtol=1e-10, atol=1e-10, err_msg=name)
        state = optimizer.state[parameter]
        np.testing.assert_allclose(state["exp_avg"], moments.m[name], rtol=1e-10, atol=1e-12)
        assert state["step"] == steps
        assert ("exp_avg_sq" in state) != is_muons(name, tuple(parameter.shape))
        assert moments.v[name].any() == ("exp_avg_sq" in state)


@given(seed=seeds, rate=st.sampled_from([1e-6, 1e-3]), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_model_in_half_precision_has_its_directions_from_there_and_its_steps_in_float32(seed, rate, dtype):
    """A step of 1e-6 times a direction is below what float16 can tell from 0, and rounded in bfloat16."""
    model = Transformer(ModelConfig(vocab_size=7, context_length=5, n_layer=1, n_head=1, d_model=6), dtype)
    model.initialise(0)
    config = TrainConfig(optimizer="muon", muon_momentum=0.0, weight_decay=0.0, muon_learning_rate=rate)
    optimizer, weight = make_optimizer(model, config), model.blocks[0].attention.proj.weight
    with torch.no_grad():
        weight.zero_()
    gradient = torch.from_numpy(array(np.random.default_rng(seed), (6, 6))).float()
    weight.grad = gradient.clone()
    set_learning_rate(optimizer, torch.tensor(config.learning_rate, dtype=torch.float64))
    optimizer.step()
    direction = fast.orthogonalise(gradient[None], dtype)[0].double()
    assert not torch.equal(direction, fast.orthogonalise(gradient[None])[0].double())
    np.testing.assert_allclose(-weight.detach().double(), rate * direction, rtol=1e-6, atol=0)


def test_muon_serves_the_matrices_of_blocks_alone():
    config = ModelConfig(vocab_size=7, context_length=5, n_layer=1, tied_embeddings=False)
    served = {name for name, shape in parameter_shapes(config).items() if is_muons(name, shape)}
    layers = ("attention.qkv", "attention.proj", "ffn.up", "ffn.down")
    assert served == {f"blocks.0.{layer}.weight" for layer in layers}
