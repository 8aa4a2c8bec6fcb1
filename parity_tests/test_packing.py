"""Packed conversations: the same sequences on both sides, and each conversation as it would be alone."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.strategies import model_configs, model_params, seeds
from parity_tests.test_train import MODEL, TRAINING, require_one_trajectory, state_of, tensors, values
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.conversation import Tokens
from ref_numpy.loss import IGNORE, cross_entropy_forward
from ref_numpy.masks import PADDING
from ref_numpy.optim import zero_moments
from ref_numpy.packing import Packed, assign_rows, pack, sample_packed
from ref_numpy.train import loss_and_gradients, train_step
from ref_numpy.transformer import transformer_forward
from torch_impl import packing as fast
from torch_impl import train as fast_train

DECODERS = model_configs(architectures=("decoder",))


def some_conversations(config: ModelConfig, seed: int, count: int = 6) -> list[Tokens]:
    """Of all lengths, the shortest and the longest among them; some targets count, and one at least."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, config.context_length + 2, size=count)
    lengths[:2] = 2, config.context_length + 1
    found = []
    for n in lengths:
        counts = random.random(n) < 0.6
        counts[-1] = True
        found.append(Tokens(random.integers(config.vocab_size, size=n), counts))
    return found


def on_both_sides(conversations: list[Tokens], length: int) -> tuple[Packed, fast.Packed]:
    return pack(conversations, length), fast.pack([tensors(*tokens) for tokens in conversations], length)


@given(lengths=st.lists(st.integers(1, 13), max_size=40), room=st.integers(13, 20))
def test_rows_are_equal_and_hold_everything_once(lengths, room):
    rows = assign_rows(lengths, room)
    assert fast.assign_rows(lengths, room) == rows
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= room for row in rows)
    free = [room - sum(lengths[number] for number in row) for row in rows]
    for row, numbers in enumerate(rows):  # no row had to be begun: what is in it fits nowhere before
        assert all(lengths[numbers[0]] > left for left in free[:row])


def test_the_best_fit_fills_a_row_that_the_first_fit_would_not():
    assert assign_rows([6, 5, 5, 4, 4], 10) == [[0, 3], [1, 2], [4]]
    assert assign_rows([7, 6, 2, 1, 3], 10) == [[0, 4], [1, 2, 3]]


@given(config=DECODERS, seed=seeds, step=st.integers(0, 2**32 - 1), micro_batches=st.sampled_from([1, 2, 3]))
def test_batches_are_equal(config, seed, step, micro_batches):
    training = TrainConfig(batch_size=6, micro_batches=micro_batches, seed=seed)
    packed, fast_packed = on_both_sides(some_conversations(config, seed), config.context_length)
    want = sample_packed(packed, step, training)
    for given_step in (step, torch.tensor(step)):
        got = fast.sample_packed(fast_packed, given_step, training)
        assert got._fields == want._fields
        for a, b in zip(got, want, strict=True):
            assert a.tolist() == b.tolist()


@settings(max_examples=15)
@given(config=DECODERS, seed=seeds)
def test_a_packed_conversation_is_what_it_is_alone(config, seed):
    """Its logits, and so its loss, whatever stands beside it; and every counted token is there once."""
    params = model_params(config, seed)
    conversations = some_conversations(config, seed)
    packed = pack(conversations, config.context_length)
    logits, _ = transformer_forward(params, packed.ids, config, documents=packed.documents)
    rows = assign_rows([ids.size - 1 for ids, _ in conversations], config.context_length)
    total = 0.0
    for row, numbers in enumerate(rows):
        for document, number in enumerate(numbers):
            ids, counts = conversations[number]
            place = packed.documents[row] == document
            alone, _ = transformer_forward(params, ids[None, :-1], config)
            np.testing.assert_allclose(logits[row, place], alone[0], rtol=0, atol=1e-10)
            targets = np.where(counts, ids, IGNORE)[1:]
            assert packed.targets[row, place].tolist() == targets.tolist()
            total += cross_entropy_forward(alone[0], targets, count=1)[0]
    assert (packed.targets[packed.documents == PADDING] == IGNORE).all()
    assert cross_entropy_forward(logits, packed.targets, count=1)[0] == pytest.approx(total)


@settings(max_examples=10)
@given(config=DECODERS, seed=seeds, micro_batches=st.sampled_from([1, 2, 3, 6]))
def test_a_step_on_packed_conversations_agrees(config, seed, micro_batches):
    """Its mean is over all tokens that count, and the gradient that of the conversations one by one.

    epsilon is 1 for the reason that test_train gives.
    """
    training = replace(TRAINING, micro_batches=micro_batches, epsilon=1.0, seed=seed)
    params = model_params(config, seed)
    packed, fast_packed = on_both_sides(some_conversations(config, seed), config.context_length)
    batch = sample_packed(packed, 0, training)
    after, _, want = train_step(params, zero_moments(params), batch, 0, config, training)
    state = state_of(params, config, training)
    clock = torch.tensor(0)
    got = fast_train.train_step(state, fast.sample_packed(fast_packed, clock, training), clock, training)
    assert got.loss.item() == pytest.approx(want.loss, rel=1e-9)
    assert got.grad_norm.item() == pytest.approx(want.grad_norm, rel=1e-8)
    for name, value in values(state).items():
        np.testing.assert_allclose(value, after[name], rtol=1e-8, atol=1e-9)


@settings(max_examples=10)
@given(config=DECODERS, seed=seeds)
def test_gradients_of_packed_conversations_are_those_of_each_alone(config, seed):
    config = replace(config, dropout=0.0)
    params = model_params(config, seed)
    conversations = some_conversations(config, seed, count=4)
    packed = pack(conversations, config.context_length)
    batch = Packed(*(part[None] for part in packed))
    loss, gradients = loss_and_gradients(params, batch, 0, config, TRAINING)
    count = sum(int(counts[1:].sum()) for _, counts in conversations)
    total, sums = 0.0, {name: np.zeros_like(value) for name, value in params.items()}
    for ids, counts in conversations:
        own = int(counts[1:].sum())
        alone = ids[None, None, :-1], np.where(counts, ids, IGNORE)[None, None, 1:]
        own_loss, own_gradients = loss_and_gradients(params, alone, 0, config, TRAINING)
        total += own_loss * own / count
        for name, gradient in own_gradients.items():
            sums[name] += gradient * own / count
    assert loss == pytest.approx(total)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, sums[name], rtol=1e-8, atol=1e-9)


def test_fifteen_steps_agree(ours):
    """A token is followed by itself: something to learn, of which each third counts another share."""
    random = np.random.default_rng(5)
    conversations = [
        Tokens(
            random.integers(1, MODEL.vocab_size, size=6).repeat(2)[: 3 + n % 9], np.arange(3 + n % 9) > n % 3
        )
        for n in range(40)
    ]
    packed, fast_packed = on_both_sides(conversations, MODEL.context_length)
    config = replace(TRAINING, steps=15, label_smoothing=0.05)
    require_one_trajectory(
        ours, MODEL, config, partial(sample_packed, packed), partial(fast.sample_packed, fast_packed)
    )


@settings(max_examples=15)
@given(config=DECODERS, seed=seeds, batch_size=st.sampled_from([1, 2, 64]))
def test_evaluation_is_the_mean_over_the_tokens_that_count(config, seed, batch_size):
    params = model_params(config, seed)
    packed, fast_packed = on_both_sides(some_conversations(config, seed), config.context_length)
    logits, _ = transformer_forward(params, packed.ids, config, documents=packed.documents)
    model = state_of(params, config, TRAINING).model
    want, _ = cross_entropy_forward(logits, packed.targets)
    assert fast.evaluate_packed(model, fast_packed, batch_size) == pytest.approx(want, rel=1e-9)
    first, _ = cross_entropy_forward(logits[:2], packed.targets[:2])
    part = fast.evaluate_packed(model, fast_packed, batch_size, max_tokens=2 * config.context_length)
    assert part == pytest.approx(first, rel=1e-9)
    one, _ = cross_entropy_forward(logits[:1], packed.targets[:1])
    assert fast.evaluate_packed(model, fast_packed, max_tokens=1) == pytest.approx(one, rel=1e-9)  # at least


@pytest.mark.parametrize("n", [0, 1, 13])
def test_a_conversation_that_does_not_fit_is_refused_on_both_sides(n):
    fine, odd = (Tokens(np.zeros(size, int), np.ones(size, bool)) for size in (12, n))
    message = f"conversation 2 has {n} tokens, not 2 to 12"
    with pytest.raises(ValueError, match=message):
        pack([fine, odd], 11)
    with pytest.raises(ValueError, match=message):
        fast.pack([tensors(*fine), tensors(*odd)], 11)
