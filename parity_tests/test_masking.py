"""Masked tokens: the same masks on both sides, and one training run."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import model_configs, model_params, seeds
from parity_tests.test_train import TRAINING, require_one_trajectory, state_of
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.loss import IGNORE, cross_entropy_forward
from ref_numpy.masking import mask_tokens, sample_masked_batch
from ref_numpy.rng import MASK, Key
from ref_numpy.transformer import transformer_forward
from torch_impl import masking as fast
from torch_impl.train import held_out_windows

MODEL = ModelConfig(
    architecture="encoder", vocab_size=30, context_length=11, n_layer=2, n_head=3, d_model=12, dropout=0.1
)
ENCODERS = model_configs(architectures=("encoder",))


@given(config=ENCODERS, seed=seeds, step=st.integers(0, 2**32 - 1), micro_batches=st.sampled_from([1, 2, 3]))
def test_masked_batches_are_equal(config, seed, step, micro_batches):
    training = TrainConfig(batch_size=6, micro_batches=micro_batches, seed=seed)
    tokens = np.random.default_rng(seed).integers(config.text_tokens, size=60)
    want = sample_masked_batch(tokens, config, step, training)
    for given_step in (step, torch.tensor(step)):
        got = fast.sample_masked_batch(torch.from_numpy(tokens), config, given_step, training)
        for a, b in zip(got, want, strict=True):
            assert a.tolist() == b.tolist()


def test_of_the_chosen_places_most_are_masked_some_replaced_and_some_left():
    """15 %, and of these 80, 10 and 10 %. A replacement is any token of the text's, also the true one."""
    tokens = np.arange(100_000) % MODEL.text_tokens
    inputs, targets = mask_tokens(tokens, MODEL, Key(3, MASK))
    chosen = targets != IGNORE
    assert (targets[chosen] == tokens[chosen]).all()
    assert (inputs[~chosen] == tokens[~chosen]).all()
    assert inputs.max() == MODEL.mask_token
    masked = inputs == MODEL.mask_token
    other = chosen & ~masked & (inputs != tokens)
    assert chosen.mean() == pytest.approx(0.15, abs=0.006)  # five standard deviations
    assert masked.sum() / chosen.sum() == pytest.approx(0.8, abs=0.017)
    assert other.sum() / chosen.sum() == pytest.approx(0.1 * 28 / 29, abs=0.013)
    assert set(inputs[other]) == set(range(MODEL.text_tokens))


def test_masks_differ_between_steps_and_not_between_splits_of_a_batch():
    tokens, whole = np.arange(300) % 29, TrainConfig(batch_size=6, seed=4)
    first, _ = sample_masked_batch(tokens, MODEL, 0, whole)
    split, _ = sample_masked_batch(tokens, MODEL, 0, replace(whole, micro_batches=3))
    assert split.reshape(first.shape).tolist() == first.tolist()
    masks = [sample_masked_batch(tokens * 0, MODEL, step, whole)[1].tolist() for step in (0, 1)]
    assert masks[0] != masks[1]


def test_thirty_steps_agree(ours):
    """Each third of a batch hides another number of tokens; the loss is the mean over all of them."""
    tokens = np.arange(500) % 3 * 11  # a token tells its neighbours
    sample = partial(sample_masked_batch, tokens, MODEL)
    fast_sample = partial(fast.sample_masked_batch, torch.from_numpy(tokens), MODEL)
    require_one_trajectory(ours, MODEL, replace(TRAINING, steps=30), sample, fast_sample)


@given(config=ENCODERS, seed=seeds, length=st.integers(2, 60), batch_size=st.sampled_from([1, 2, 64]))
def test_evaluation_guesses_what_the_reference_guesses(config, seed, length, batch_size):
    params = model_params(config, seed)
    tokens = np.random.default_rng(seed).integers(config.text_tokens, size=length)
    total, right, count = 0.0, 0, 0
    windows = held_out_windows(torch.from_numpy(tokens), config.context_length, batch_size)
    for number, window in enumerate(windows):
        inputs, targets = mask_tokens(window[:, :-1].numpy(), config, Key(0, MASK, number, 2))
        logits, _ = transformer_forward(params, inputs, config)
        total += cross_entropy_forward(logits, targets, count=1)[0]
        right += (logits.argmax(-1) == targets).sum()
        count += (targets != IGNORE).sum()
    model = state_of(params, config, TRAINING).model
    got = fast.evaluate_masked(model, torch.from_numpy(tokens), batch_size)
    assert got.loss == pytest.approx(total / max(count, 1), rel=1e-9)
    assert got.accuracy == right / max(count, 1)
