"""Generation: the same token from the same logits and random number, the same text from the same model."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import arrays, model_configs, model_params, seeds
from ref_numpy.config import ModelConfig
from ref_numpy.generate import generate, sample_token
from ref_numpy.transformer import transformer_forward
from torch_impl import generate as fast
from torch_impl.transformer import Transformer

temperatures = st.sampled_from([0.0, 0.1, 0.8, 1.0, 5.0])


def model_of(config: ModelConfig, params: dict[str, np.ndarray]) -> Transformer:
    model = Transformer(config, torch.float64).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    return model


@given(
    logits=st.integers(1, 40).flatmap(lambda size: arrays((size,))),
    temperature=temperatures,
    u=st.floats(0, 1, exclude_max=True),
)
def test_sampled_tokens_are_equal(logits, temperature, u):
    assert fast.sample_token(torch.from_numpy(logits), temperature, u) == sample_token(logits, temperature, u)


@given(config=model_configs(), seed=seeds, prompt=st.integers(1, 15), temperature=temperatures)
def test_generated_texts_are_equal(config, seed, prompt, temperature):
    """Also beyond the context length, where the oldest tokens fall out of sight."""
    params = model_params(config, seed)
    ids = np.random.default_rng(seed).integers(config.vocab_size, size=prompt)
    want = list(generate(params, ids, config, 9, temperature, seed))
    got = list(fast.generate(model_of(config, params), torch.from_numpy(ids), 9, temperature, seed))
    assert got == want


def test_frequencies_follow_the_softmax():
    """20,000 evenly spread u: each token as often as its probability says."""
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    u = (np.arange(20_000) + 0.5) / 20_000
    for temperature, p in ((1.0, [0.5, 0.3, 0.2]), (0.5, np.array([25, 9, 4]) / 38)):
        counts = np.bincount([sample_token(logits, temperature, x) for x in u], minlength=3)
        np.testing.assert_allclose(counts / 20_000, p, atol=1e-4)


def test_greedy_takes_the_first_of_equals():
    logits = np.array([1.0, 3.0, 3.0, 2.0])
    assert sample_token(logits, 0.0, 0.99) == 1
    assert fast.sample_token(torch.from_numpy(logits), 0.0, 0.99) == 1


def test_a_slice_of_the_distribution_begins_with_its_own_boundary():
    """Two equal tokens, u = 1/2: the first owns [0, 1/2), so the second is drawn."""
    assert sample_token(np.zeros(2), 1.0, 0.5) == 1
    assert fast.sample_token(torch.zeros(2), 1.0, 0.5) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_token_is_drawn_in_float64_whatever_the_logits_are(dtype):
    """A million equal tokens, and u a millionth of a slice below and above a boundary in the middle."""
    logits, middle = np.zeros(1_000_000, dtype), 600_001
    for offset, token in ((-1e-12, middle - 1), (1e-12, middle)):
        u = middle / logits.size + offset
        assert sample_token(logits, 1.0, u) == token
        assert fast.sample_token(torch.from_numpy(logits), 1.0, u) == token


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_logits_of_any_size_are_sampled(temperature):
    """What all logits share has no say, so none may overflow."""
    for shift in (-1e5, 0.0, 1e5):
        logits = np.array([0.0, -1e4, 0.0]) + shift
        tokens = [sample_token(logits, temperature, u) for u in (0.0, 0.49, 0.51, 0.99)]
        same = [fast.sample_token(torch.from_numpy(logits), temperature, u) for u in (0.0, 0.49, 0.51, 0.99)]
        assert tokens == same == [0, 0, 2, 2]


def test_the_last_token_can_be_drawn_and_none_beyond_it():
    logits = np.zeros(3)
    assert sample_token(logits, 1.0, 1 - 2.0**-53) == 2
    assert sample_token(logits, 1.0, 0.0) == 0


def test_greedy_text_is_the_most_likely_next_token_again_and_again():
    config = ModelConfig(vocab_size=11, context_length=4, n_layer=1, n_head=1, d_model=6)
    params = model_params(config, 3)
    ids = [1, 2]
    for token in generate(params, np.array(ids), config, 6, temperature=0.0):
        logits, _ = transformer_forward(params, np.array(ids[-4:])[None], config)
        assert token == logits[0, -1].argmax()
        ids.append(token)


def test_an_empty_prompt_and_a_negative_temperature_are_refused():
    config = ModelConfig(vocab_size=3, context_length=4, n_layer=1, n_head=1, d_model=2)
    params = model_params(config, 0)
    for texts in (
        generate(params, np.array([], int), config, 1),
        fast.generate(model_of(config, params), torch.tensor([], dtype=torch.long), 1),
    ):
        with pytest.raises(ValueError, match="the prompt is empty"):
            next(texts)
    for sample, logits in ((sample_token, np.zeros(3)), (fast.sample_token, torch.zeros(3))):
        with pytest.raises(ValueError, match=r"temperature is -0\.5, but must be 0"):
            sample(logits, -0.5, 0.5)
        with pytest.raises(ValueError, match="temperature is nan, but must be 0"):
            sample(logits, float("nan"), 0.5)
