"""Training: the trajectory of both sides from one seed, and the laws of a step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.parity import Target
from parity_tests.steps import Step, require_same_step
from parity_tests.strategies import model_configs, model_params, seeds
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.data import sample_batch
from ref_numpy.loss import IGNORE, cross_entropy_forward
from ref_numpy.optim import zero_moments
from ref_numpy.parameters import init_params
from ref_numpy.train import loss_and_gradients, train, train_step
from ref_numpy.transformer import transformer_forward
from torch_impl import data as fast_data
from torch_impl import train as fast
from torch_impl.seq2seq import make_model
from torch_impl.transformer import initialised

MODEL = ModelConfig(vocab_size=29, context_length=11, n_layer=2, n_head=3, d_model=12, dropout=0.1)
TRAINING = TrainConfig(
    steps=50,
    batch_size=6,
    micro_batches=3,
    learning_rate=3e-2,
    min_learning_rate=3e-3,
    warmup_steps=10,
    weight_decay=0.1,
    clip=1.6,
    seed=1234567890123,
)


def state_of(
    params: dict[str, np.ndarray], model_config: ModelConfig, config: TrainConfig
) -> fast.TrainState:
    model = make_model(model_config, torch.float64).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    return fast.start(model, config)


def tensors(*arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.from_numpy, arrays))


def samples(tokens: np.ndarray) -> tuple[partial, partial]:
    """Where both sides take the batches of a text from."""
    T = MODEL.context_length
    return partial(sample_batch, tokens, T), partial(fast_data.sample_batch, torch.from_numpy(tokens), T)


def unevenly_counted(targets: np.ndarray, seed: int) -> np.ndarray:
    """Targets of which a different share counts in each micro-batch, none at all in the last but one."""
    random = np.random.default_rng(seed)
    shares = np.linspace(0.1, 1.0, len(targets))
    hidden = random.random(targets.shape) > shares[:, None, None]
    if len(targets) > 2:
        hidden[-2] = True
    return np.where(hidden, IGNORE, targets)


def values(state: fast.TrainState) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in state.model.state_dict().items()}


def require_one_trajectory(
    ours: Target, model_config: ModelConfig, config: TrainConfig, sample: Callable, fast_sample: Callable
) -> None:
    """Both loops, each with batches of its own: losses, norms, parameters agree, and they learn."""
    params = init_params(model_config, config.seed, np.float64)
    state, losses = state_of(params, model_config, config), []
    loops = train(params, sample, model_config, config), fast.train_steps(state, fast_sample, config)
    for step, (want, got) in enumerate(zip(*loops, strict=True)):
        step_of = Step(step, sample(step, config), params, model_config, config)
        require_same_step(ours, step_of, want, (values(state), got))
        params, metrics = want
        losses.append(metrics.loss)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1, "nothing was learned, so little was tested"


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_fifty_steps_agree(ours, schedule):
    """Dropout, decay, clipping, warm-up, uneven micro-batches, tied embeddings."""
    config = replace(TRAINING, schedule=schedule)
    params = init_params(MODEL, config.seed, np.float64)
    tokens = np.random.default_rng(5).integers(MODEL.vocab_size, size=400)
    tokens[1::2] = tokens[0::2]  # something to learn: every second token repeats the one before it
    state, moments = state_of(params, MODEL, config), zero_moments(params)
    losses, norms = [], []
    for step in range(config.steps):
        inputs, targets = sample_batch(tokens, MODEL.context_length, step, config)
        targets = unevenly_counted(targets, step)
        step_of = Step(step, (inputs, targets), params, MODEL, config)
        params, moments, want = train_step(params, moments, (inputs, targets), step, MODEL, config)

        clock = torch.tensor(step)
        fast_inputs, _ = fast_data.sample_batch(torch.from_numpy(tokens), MODEL.context_length, clock, config)
        got = fast.train_step(state, (fast_inputs, torch.from_numpy(targets)), clock, config)
        require_same_step(ours, step_of, (params, want), (values(state), got))
        losses.append(want.loss)
        norms.append(want.grad_norm)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1, "nothing was learned, so little was tested"
    assert min(norms) < config.clip < max(norms), "clipping has to act on some steps and not on others"


def test_the_loops_agree():
    """The loops themselves: whole batches of a text, as train and train_steps draw them.

    train_steps is left after three steps and called again, and goes on where it was.
    """
    config = replace(TRAINING, steps=7, warmup_steps=2)
    params = init_params(MODEL, config.seed, np.float64)
    tokens = np.random.default_rng(6).integers(MODEL.vocab_size, size=300)
    state = state_of(params, MODEL, config)
    sample, fast_sample = samples(tokens)
    first, rest = (
        islice(fast.train_steps(state, fast_sample, config), 3),
        fast.train_steps(state, fast_sample, config),
    )
    for (after, want), got in zip(train(params, sample, MODEL, config), chain(first, rest), strict=True):
        assert got.loss.item() == pytest.approx(want.loss, rel=1e-9)
        for name, value in values(state).items():
            np.testing.assert_allclose(value, after[name], rtol=1e-8, atol=1e-9)


@settings(max_examples=10)
@given(
    model_config=model_configs(),
    seed=seeds,
    smoothing=st.sampled_from([0.0, 0.1]),
    optimizer=st.sampled_from(["adam", "adamw"]),
    micro_batches=st.sampled_from([1, 2, 3, 6]),
    freeze=st.booleans(),
    packed=st.booleans(),
)
def test_a_step_agrees_for_any_model(model_config, seed, smoothing, optimizer, micro_batches, freeze, packed):
    """Also where several documents share a row.

    With an epsilon of 1 the step is as long as the gradient: with a small one, where the gradient is 0 (a
    bias of keys, which softmax ignores), Adam would take a whole step in the direction of its rounding."""
    config = replace(
        TRAINING,
        label_smoothing=smoothing,
        optimizer=optimizer,
        weight_decay=0.1 if optimizer == "adamw" else 0.0,
        epsilon=1.0,
        micro_batches=micro_batches,
        freeze_embeddings=freeze,
        seed=seed,
    )
    params = model_params(model_config, seed)
    tokens = np.random.default_rng(seed).integers(model_config.vocab_size, size=99)
    inputs, targets = sample_batch(tokens, model_config.context_length, 0, config)
    targets = unevenly_counted(targets, seed)
    documents = (np.arange(inputs.size).reshape(inputs.shape) // 4,) if packed else ()
    batch = (inputs, *documents, targets)
    after, _, want = train_step(params, zero_moments(params), batch, 0, model_config, config)
    state = state_of(params, model_config, config)
    got = fast.train_step(state, tensors(*batch), torch.tensor(0), config)
    assert got.loss.item() == pytest.approx(want.loss, rel=1e-9)
    assert got.grad_norm.item() == pytest.approx(want.grad_norm, rel=1e-8)
    for name, value in values(state).items():
        np.testing.assert_allclose(value, after[name], rtol=1e-8, atol=1e-9)
    if freeze:
        np.testing.assert_array_equal(after["token_embedding.weight"], params["token_embedding.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_embeddings_stay_and_have_no_part_in_the_clipped_norm(tied):
    """Several steps with weight decay and moments; the norm is that of the other gradients."""
    model_config = replace(MODEL, tied_embeddings=tied, dropout=0.0)
    config = replace(TRAINING, freeze_embeddings=True, steps=5, warmup_steps=0, clip=0.5)
    params = init_params(model_config, 3, np.float64)
    tokens = np.random.default_rng(6).integers(MODEL.vocab_size, size=300)
    inputs, targets = sample_batch(tokens, MODEL.context_length, 0, config)
    _, gradients = loss_and_gradients(params, (inputs, targets), 0, model_config, config)
    norm = sum((g * g).sum() for name, g in gradients.items() if name != "token_embedding.weight") ** 0.5
    state = state_of(params, model_config, config)
    sample, fast_sample = samples(tokens)
    fast_steps = fast.train_steps(state, fast_sample, config)
    plain_steps = train(params, sample, model_config, config)
    for step, ((after, want), got) in enumerate(zip(plain_steps, fast_steps, strict=True)):
        assert got.loss.item() == pytest.approx(want.loss, rel=1e-9)
        assert got.grad_norm.item() == pytest.approx(want.grad_norm, rel=1e-8)
        if step == 0:
            assert want.grad_norm == pytest.approx(norm)
        for side in (after, values(state)):
            np.testing.assert_array_equal(side["token_embedding.weight"], params["token_embedding.weight"])
        assert (after["norm.weight"] != params["norm.weight"]).all()


@settings(max_examples=10)
@given(model_config=model_configs(), seed=seeds, micro_batches=st.sampled_from([2, 3, 6]))
def test_any_split_into_micro_batches_gives_one_gradient(model_config, seed, micro_batches):
    """Also where the parts count different numbers of tokens, and with dropout."""
    params = model_params(model_config, seed)
    tokens = np.random.default_rng(seed).integers(model_config.vocab_size, size=99)
    inputs, targets = sample_batch(tokens, model_config.context_length, 3, replace(TRAINING, micro_batches=6))
    targets = unevenly_counted(targets, seed)

    def cut(ids: np.ndarray, parts: int) -> np.ndarray:
        return ids.reshape(parts, -1, ids.shape[-1])

    want_loss, want = loss_and_gradients(params, (cut(inputs, 1), cut(targets, 1)), 3, model_config, TRAINING)
    parts = cut(inputs, micro_batches), cut(targets, micro_batches)
    loss, gradients = loss_and_gradients(params, parts, 3, model_config, TRAINING)
    assert loss == pytest.approx(want_loss, rel=1e-12)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, want[name], rtol=1e-9, atol=1e-12)


def test_dropout_of_a_step_is_its_own():
    """The same batch at two steps: other units are dropped, so another loss; without dropout, the same."""
    params = init_params(MODEL, 0, np.float64)
    inputs, targets = sample_batch(np.arange(29).repeat(20), MODEL.context_length, 0, TRAINING)
    losses = [loss_and_gradients(params, (inputs, targets), step, MODEL, TRAINING)[0] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_step_of_the_reference_in_float32_is_in_float32_throughout():
    params = init_params(MODEL, 0)
    inputs, targets = sample_batch(np.arange(29).repeat(20), MODEL.context_length, 0, TRAINING)
    _, gradients = loss_and_gradients(params, (inputs, targets), 0, MODEL, TRAINING)
    after, moments, _ = train_step(params, zero_moments(params), (inputs, targets), 0, MODEL, TRAINING)
    found = {value.dtype for kind in (gradients, after, *moments) for value in kind.values()}
    assert found == {np.dtype(np.float32)}


@given(length=st.integers(2, 60), seed=seeds, batch_size=st.sampled_from([1, 2, 64]))
def test_evaluation_predicts_every_token_but_the_first_once(length, seed, batch_size):
    """By the reference: windows of the context length side by side, the last one shorter."""
    config = replace(MODEL, n_layer=1)
    params = model_params(config, seed)
    tokens = np.random.default_rng(seed).integers(config.vocab_size, size=length)
    T, total = config.context_length, 0.0
    for start in range(0, length - 1, T):
        window = tokens[start : start + T + 1]
        logits, _ = transformer_forward(params, window[None, :-1], config)
        total += cross_entropy_forward(logits, window[None, 1:])[0] * (window.size - 1)
    model = state_of(params, config, TRAINING).model
    assert fast.evaluate(model, torch.from_numpy(tokens), batch_size) == pytest.approx(total / (length - 1))


def test_an_evaluation_takes_fewer_sequences_at_a_time_the_longer_they_are():
    """64 of 8,192 tokens took fifty times the memory of a training step on one."""
    assert [fast.sequences_at_once(length) for length in (1, 1024, 1025, 8192, 10**6)] == [64, 64, 63, 8, 1]
    assert fast.sequences_at_once(512, logits=50_257) == 10 and fast.sequences_at_once(64, logits=512) == 64
    assert fast.sequences_at_once(64, logits=512, most=256) == 256


def test_an_evaluation_of_a_part_spreads_over_the_text():
    """Four windows' worth of a text whose second half is another language: two come from each half."""
    config = replace(MODEL, n_layer=1)
    model = state_of(model_params(config, 1), config, TRAINING).model
    T = config.context_length
    tokens = torch.cat([torch.zeros(10 * T, dtype=torch.long), torch.ones(10 * T + 1, dtype=torch.long)])
    halves = [fast.evaluate(model, tokens[: 5 * T + 1]), fast.evaluate(model, tokens[-5 * T - 1 :])]
    assert fast.evaluate(model, tokens, max_tokens=4 * T) == pytest.approx(sum(halves) / 2)
    text = tokens[5 * T : 15 * T - 3]  # of which the whole is asked for, and more
    whole = fast.evaluate(model, text)
    for more in (text.numel(), 100 * T):
        assert fast.evaluate(model, text, max_tokens=more) == whole


def test_a_text_with_nothing_to_predict_is_refused():
    model = state_of(init_params(MODEL, 0), MODEL, TRAINING).model
    with pytest.raises(ValueError, match="a text of 1 tokens has nothing to predict; it needs 2"):
        fast.evaluate(model, torch.tensor([3]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_gradients_are_those_of_float32_and_an_overflow_costs_one_step(optimizer):
    """The scale is in no result. Where it makes a gradient infinite, no weight moves, and it is halved."""
    config = replace(TRAINING, micro_batches=2, clip=0.1, optimizer=optimizer)
    inputs, targets = sample_batch(np.arange(29).repeat(20), MODEL.context_length, 0, config)
    batch = tensors(inputs, targets), torch.tensor(0)

    def state_in(precision: torch.dtype) -> fast.TrainState:
        return fast.start(initialised(MODEL, 0, precision), config)

    want = fast.train_step(state_in(torch.float32), *batch, config)
    state = state_in(torch.float16)
    before = {name: value.copy() for name, value in values(state).items()}
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    scales, moved = [], []
    for _ in range(16):
        got = fast.train_step(state, *batch, config)
        scales.append(state.scaler.get_scale())
        moved.append(any((value != before[name]).any() for name, value in values(state).items()))
        if moved[-1]:
            break
    assert moved == [False] * (len(moved) - 1) + [True] and len(moved) > 1
    assert scales[:-1] == [2.0 ** (23 - i) for i in range(len(scales) - 1)]
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-3)
    assert got.grad_norm.item() == pytest.approx(want.grad_norm.item(), rel=1e-2)
    assert all(np.isfinite(value).all() for value in values(state).values())
