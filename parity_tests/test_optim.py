"""Optimizers, clipping and schedules: the same numbers on both sides, and the algorithms' own laws."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from parity_tests.strategies import array, seeds, sizes
from ref_numpy import optim as plain
from ref_numpy.config import TrainConfig
from torch_impl import optim as fast

SETTINGS = {
    "beta1": st.sampled_from([0.0, 0.9]),
    "beta2": st.sampled_from([0.9, 0.99, 0.999]),
    "epsilon": st.sampled_from([1e-8, 1e-3]),
    "clip": st.sampled_from([0.0, 0.1, 1.0, 100.0]),
}


@st.composite
def optimizer_configs(draw):
    adamw = draw(st.booleans())
    return TrainConfig(
        optimizer="adamw" if adamw else "adam",
        weight_decay=draw(st.sampled_from([0.0, 0.1, 0.5])) if adamw else 0.0,
        **{name: draw(values) for name, values in SETTINGS.items()},
    )


@st.composite
def schedules(draw):
    steps = draw(st.integers(1, 60))
    peak = draw(st.floats(1e-5, 1.0))
    return TrainConfig(
        steps=steps,
        warmup_steps=draw(st.integers(0, steps)),
        learning_rate=peak,
        min_learning_rate=peak * draw(st.sampled_from([0.0, 0.1, 1.0])),
        schedule=draw(st.sampled_from(["constant", "linear", "cosine"])),
    )


class Parameters(nn.Module):
    """A matrix and a vector: one that decays and one that does not."""

    def __init__(self, params: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(value.copy())))

    def give(self, gradients: dict[str, np.ndarray]) -> None:
        for name, parameter in self.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name].copy())

    def values(self) -> dict[str, np.ndarray]:
        return {name: parameter.detach().numpy() for name, parameter in self.named_parameters()}


@st.composite
def steps_of_adam(draw):
    """A matrix somewhere in its training."""
    random, shape = np.random.default_rng(draw(seeds)), tuple(draw(sizes(2)))
    return {
        "param": array(random, shape),
        "gradient": draw(st.sampled_from([1e-6, 1, 1e3])) * array(random, shape),
        "m": array(random, shape),
        "v": array(random, shape) ** 2,
        "t": draw(st.sampled_from([1, 2, 3, 10, 1000])),
        "learning_rate": draw(st.sampled_from([2.0**-10, 0.125])),  # on a GPU rates are in float32
        **{name: draw(SETTINGS[name]) for name in ("beta1", "beta2", "epsilon")},
    }


@given(arguments=steps_of_adam())
def test_parity_of_adam(agree, arguments):
    agree("adam", **arguments)


@given(arguments=steps_of_adam(), weight_decay=st.sampled_from([0.0, 0.1, 0.5]))
def test_parity_of_adamw(agree, arguments, weight_decay):
    agree("adamw", **arguments, weight_decay=weight_decay)


@given(shape=sizes(2), seed=seeds, size=st.sampled_from([1e-6, 1, 1e3]), limit=SETTINGS["clip"])
def test_parity_of_clipping(agree, shape, seed, size, limit):
    random = np.random.default_rng(seed)
    gradients = {"matrix": size * array(random, tuple(shape)), "vector": array(random, (shape[0],))}
    agree("clip_by_global_norm", gradients=gradients, limit=limit)


@given(
    config=optimizer_configs(),
    shape=sizes(2),
    seed=seeds,
    steps=st.integers(1, 5),
    size=st.sampled_from([1e-6, 1, 1e3]),
)
def test_steps_agree(config, shape, seed, steps, size):
    """Several steps with changing learning rates and gradients, clipped together, moments included."""
    random = np.random.default_rng(seed)
    params = {"matrix": array(random, tuple(shape)), "vector": array(random, (shape[0],))}
    moments = plain.zero_moments(params)
    model = Parameters(params)
    optimizer = fast.make_optimizer(model, config)
    for step in range(steps):
        gradients = {name: size * array(random, value.shape) for name, value in params.items()}
        rate = float(random.uniform(1e-3, 1e-1))
        clipped, norm = plain.clip_by_global_norm(gradients, config.clip)
        params, moments = plain.optimizer_step(params, clipped, moments, step, rate, config)
        model.give(gradients)
        got_norm = fast.clip_by_global_norm(model, config.clip)
        fast.set_learning_rate(optimizer, torch.tensor(rate, dtype=torch.float64))
        optimizer.step()
        np.testing.assert_allclose(got_norm, norm, rtol=1e-12)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach(), params[name], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(
            optimizer.state[parameter]["exp_avg"], moments.m[name], rtol=1e-10, atol=1e-12 * size
        )
        np.testing.assert_allclose(
            optimizer.state[parameter]["exp_avg_sq"], moments.v[name], rtol=1e-10, atol=1e-12 * size**2
        )


@given(config=optimizer_configs(), seed=seeds)
def test_a_step_of_the_reference_writes_to_nothing_and_keeps_the_precision(config, seed):
    random = np.random.default_rng(seed)

    def drawn() -> dict[str, np.ndarray]:
        arrays = {"matrix": array(random, (2, 3)), "vector": array(random, (3,))}
        arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
        for value in arrays.values():
            value.flags.writeable = False
        return arrays

    params, gradients, m = drawn(), drawn(), drawn()
    v = {name: value * value for name, value in m.items()}
    clipped, norm = plain.clip_by_global_norm(gradients, config.clip)
    new, moments = plain.optimizer_step(params, clipped, plain.Moments(m, v), 3, 0.01, config)
    kept = [norm, *(value for kind in (clipped, new, *moments) for value in kind.values())]
    assert {value.dtype for value in kept} == {np.dtype(np.float32)}


@given(config=schedules())
def test_learning_rates_are_equal(config):
    """Bit for bit: schedule values are numbers of Python on both sides."""
    want = [plain.learning_rate_at(step, config) for step in range(config.steps)]
    assert fast.learning_rates(config).tolist() == want


@given(config=schedules())
def test_a_schedule_rises_to_its_peak_and_falls_to_its_end(config):
    rates = [plain.learning_rate_at(step, config) for step in range(config.steps + 1)]
    warm = config.warmup_steps
    assert all(0 < rate <= config.learning_rate * (1 + 1e-12) for rate in rates[: config.steps])
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm] == pytest.approx(config.learning_rate) or warm == config.steps
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    if config.schedule != "constant" and warm < config.steps:
        assert rates[-1] == pytest.approx(config.min_learning_rate, abs=1e-12 * config.learning_rate)


def test_a_rate_is_set_for_matrices_and_vectors_alike():
    """They are groups of their own, since only the former decay."""
    optimizer = fast.make_optimizer(nn.Linear(2, 3), TrainConfig())
    fast.set_learning_rate(optimizer, torch.tensor(0.25))
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.25, 0.25]


def test_schedules_by_hand():
    """Peak 1, end 0.2, two steps of warm-up out of ten: after 2 + 4 of 8 steps half of the way down."""
    shared = {"steps": 10, "warmup_steps": 2, "learning_rate": 1.0, "min_learning_rate": 0.2}
    for schedule, at_4, at_6 in (
        ("constant", 1.0, 1.0),
        ("linear", 0.8, 0.6),
        ("cosine", 0.6 + 0.4 * 0.5**0.5, 0.6),
    ):
        config = TrainConfig(schedule=schedule, **shared)
        rates = [plain.learning_rate_at(step, config) for step in (0, 1, 2, 4, 6)]
        assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, at_4, at_6])


@given(seed=seeds, size=st.floats(1e-3, 1e3), weight_decay=st.sampled_from([0.0, 0.1]))
def test_the_first_step_has_the_size_of_the_learning_rate(seed, size, weight_decay):
    """Bias correction: m_hat / sqrt(v_hat) is the gradient's sign, however large the gradient is."""
    random = np.random.default_rng(seed)
    param, gradient = array(random, (5,)), size * array(random, (5,))
    assume(np.abs(gradient).min() > 1e-6)
    zeros = np.zeros(5)
    new, _, _ = plain.adamw(param, gradient, zeros, zeros, 1, 0.01, 0.9, 0.999, 0.0, weight_decay)
    np.testing.assert_allclose(
        new, param * (1 - 0.01 * weight_decay) - 0.01 * np.sign(gradient), rtol=0, atol=1e-12
    )


def test_decay_never_enters_the_moments_and_spares_vectors():
    """Without a gradient a matrix shrinks by lr * decay and a vector stays; the moments stay 0."""
    params = {"matrix": np.ones((2, 2)), "vector": np.ones(2)}
    gradients = {name: np.zeros_like(value) for name, value in params.items()}
    config = TrainConfig(weight_decay=0.5)
    new, moments = plain.optimizer_step(params, gradients, plain.zero_moments(params), 0, 0.1, config)
    assert new["matrix"] == pytest.approx(np.full((2, 2), 0.95)) and new["vector"].tolist() == [1, 1]
    assert all((value == 0).all() for kind in moments for value in kind.values())


def test_epsilon_stands_outside_the_root():
    """Gradient 1e-3, epsilon 1e-3: the step is lr g / (|g| + epsilon) = lr / 2."""
    one = np.array([0.0])
    new, _, _ = plain.adam(one, np.array([1e-3]), one, one, 1, 1.0, 0.9, 0.999, 1e-3)
    assert new == pytest.approx([-0.5])


@given(seed=seeds, limit=st.floats(0.01, 100))
def test_clipping_scales_all_gradients_alike(seed, limit):
    """Direction kept, norm at most the limit; and short gradients are left as they are."""
    random = np.random.default_rng(seed)
    gradients = {"a": array(random, (3, 4)), "b": 10 * array(random, (5,))}
    clipped, norm = plain.clip_by_global_norm(gradients, limit)
    joined = np.concatenate([gradients["a"].ravel(), gradients["b"]])
    after = np.concatenate([clipped["a"].ravel(), clipped["b"]])
    assert norm == pytest.approx(np.linalg.norm(joined))
    np.testing.assert_allclose(after, joined * min(1, limit / norm), rtol=1e-12)


def test_a_gradient_of_zero_survives_clipping():
    model = Parameters({"matrix": np.ones((2, 2))})
    model.give({"matrix": np.zeros((2, 2))})
    assert fast.clip_by_global_norm(model, 1.0) == 0
    assert model.matrix.grad.tolist() == [[0, 0], [0, 0]]
    assert plain.clip_by_global_norm({"matrix": np.zeros((2, 2))}, 1.0)[0]["matrix"].tolist() == [
        [0, 0],
        [0, 0],
    ]
