"""Batches: the same windows on both sides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.data import sample_batch
from torch_impl import data as fast
from torch_impl.masking import sample_masked_batch
from torch_impl.packing import Packed, sample_packed
from torch_impl.pairs import Pairs, sample_pairs


@st.composite
def cases(draw):
    micro_batches, rows = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    config = TrainConfig(
        batch_size=micro_batches * rows, micro_batches=micro_batches, seed=draw(st.integers(0, 2**64 - 1))
    )
    T = draw(st.integers(1, 9))
    tokens = draw(st.integers(T + 1, 300))
    return np.arange(tokens), T, draw(st.integers(0, 2**32 - 1)), config


@given(case=cases())
def test_batches_are_equal(case):
    tokens, T, step, config = case
    want = sample_batch(tokens, T, step, config)
    for given_step in (step, torch.tensor(step)):
        got = fast.sample_batch(torch.from_numpy(tokens), T, given_step, config)
        for a, b in zip(got, want, strict=True):
            assert a.tolist() == b.tolist()


def test_batches_of_a_long_text_are_equal():
    """Of a uniform number rounded to float32, one start in ten would be another among four million places."""
    tokens, config = np.arange(2**22, dtype=np.int32), TrainConfig(batch_size=1000)
    want, _ = sample_batch(tokens, 1, 0, config)
    got, _ = fast.sample_batch(torch.from_numpy(tokens), 1, 0, config)
    np.testing.assert_array_equal(got, want)


ENCODER, SEQ2SEQ = (ModelConfig(kind, vocab_size=300) for kind in ("encoder", "encoder-decoder"))


@pytest.mark.parametrize(
    "sample",
    [
        lambda ids, *step: fast.sample_batch(ids.flatten(), 9, *step),
        lambda ids, *step: sample_masked_batch(ids.flatten().to(torch.uint8), ENCODER, *step),
        lambda ids, *step: sample_pairs(Pairs(ids, ids.to(torch.int16)), SEQ2SEQ, *step),
        lambda ids, *step: sample_packed(Packed(ids, ids, ids), *step),
    ],
    ids=["text", "masked", "pairs", "packed"],
)
def test_compiled_batches_are_the_same(ours, sample):
    """As a compiled run on CUDA draws them. The CPU, which may lack a C++ compiler, traces them alone."""
    backend = "aot_eager" if torch.device(ours.device).type == "cpu" else "inductor"
    ids, config = torch.randint(250, (50, 12), dtype=torch.int32), TrainConfig(batch_size=8, seed=2**64 - 3)
    clock = torch.tensor(7, device=ours.device)
    batch = torch.compile(lambda: sample(ids.to(ours.device), clock, config), backend=backend, fullgraph=True)
    for _ in range(2):
        for part, want in zip(batch(), sample(ids, clock.cpu(), config), strict=True):
            assert torch.equal(part.cpu(), want)
        clock.add_(1)


@given(case=cases())
def test_targets_are_the_inputs_one_token_on(case):
    tokens, T, step, config = case
    inputs, targets = sample_batch(tokens, T, step, config)
    assert inputs.shape == (config.micro_batches, config.batch_size // config.micro_batches, T)
    assert (targets == inputs + 1).all()  # tokens[i] is i
    assert inputs.min() >= 0 and targets.max() < tokens.size
    assert (np.diff(inputs, axis=-1) == 1).all()


@given(case=cases(), parts=st.integers(1, 4))
def test_micro_batches_share_out_one_batch(case, parts):
    tokens, T, step, config = case
    whole = TrainConfig(batch_size=12, seed=config.seed)
    split = TrainConfig(batch_size=12, micro_batches=parts, seed=config.seed)
    want, _ = sample_batch(tokens, T, step, whole)
    got, _ = sample_batch(tokens, T, step, split)
    assert got.reshape(12, T).tolist() == want.reshape(12, T).tolist()


def test_every_window_is_drawn_first_and_last_included():
    """Four windows fit into six tokens with T = 2; over many draws each comes up about equally often."""
    inputs, targets = sample_batch(np.arange(6), 2, 0, TrainConfig(batch_size=4000))
    starts, counts = np.unique(inputs[0, :, 0], return_counts=True)
    assert starts.tolist() == [0, 1, 2, 3] and targets.max() == 5
    assert (np.abs(counts - 1000) < 6 * np.sqrt(750)).all()


def test_a_text_without_a_window_is_refused_on_both_sides():
    message = r"a text of 5 tokens has no window of 5 \+ 1"
    with pytest.raises(ValueError, match=message):
        sample_batch(np.arange(5), 5, 0, TrainConfig())
    with pytest.raises(ValueError, match=message):
        fast.sample_batch(torch.arange(5), 5, 0, TrainConfig())
