"""The key/value cache: any way of handing a text over gives the logits of the text as a whole."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import documents, model_configs, model_params, seeds
from ref_numpy.config import ModelConfig
from ref_numpy.kv_cache import advance, empty_cache
from ref_numpy.transformer import transformer_forward
from torch_impl.kv_cache import KVCache
from torch_impl.transformer import Transformer


@st.composite
def cases(draw):
    """A model, a text, perhaps of several documents with padding, and the chunks that it comes in."""
    config = draw(model_configs(architectures=("decoder",)))
    B, T = draw(st.sampled_from([(1, 7), (2, 7), (3, 5)]))
    cuts = sorted(draw(st.sets(st.integers(1, T - 1))))
    ids = np.random.default_rng(draw(seeds)).integers(config.vocab_size, size=(B, T))
    chunks = list(pairwise([0, *cuts, T]))
    return config, model_params(config, draw(seeds)), ids, draw(documents(B, T)), chunks


@given(case=cases())
def test_chunks_of_any_size_give_the_logits_of_the_whole(case):
    config, params, ids, numbers, chunks = case
    want, _ = transformer_forward(params, ids, config, documents=numbers)
    model = Transformer(config, torch.float64).double().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    past, fast_past = empty_cache(config, len(ids), np.float64), KVCache(config, len(ids), torch.float64)
    for start, stop in chunks:
        seen = None if numbers is None else numbers[:, :stop]
        new = ids[:, start:stop]
        got, _ = transformer_forward(params, new, config, documents=seen, past=past)
        past = advance(past, stop - start)
        np.testing.assert_allclose(got, want[:, start:stop], rtol=0, atol=1e-10)
        fast_seen = None if seen is None else torch.from_numpy(seen)
        fast_got = model(torch.from_numpy(new), documents=fast_seen, past=fast_past)
        np.testing.assert_allclose(fast_got, want[:, start:stop], rtol=0, atol=1e-10)
    known = slice(0, ids.shape[1])
    np.testing.assert_allclose(fast_past.k[:, :, :, known], past.k[:, :, :, known], rtol=0, atol=1e-10)


@given(case=cases())
def test_tokens_one_by_one_in_the_same_shapes_give_the_logits_of_the_whole(case):
    """What a replayed step on CUDA does: attention over all of the room, and a mask for what is in sight."""
    config, params, ids, _, chunks = case
    config = replace(config, positions="none" if config.positions == "alibi" else config.positions)
    want, _ = transformer_forward(params, ids, config)
    model = Transformer(config, torch.float64).double().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    past, known, tokens = KVCache(config, len(ids), torch.float64), chunks[0][1], torch.from_numpy(ids)
    model(tokens[:, :known], past=past)
    past.hold_shapes()
    for place in range(known, ids.shape[1]):
        got = model(tokens[:, place : place + 1], past=past)[:, 0]
        np.testing.assert_allclose(got, want[:, place], rtol=0, atol=1e-10)


def test_a_cleared_cache_is_as_new():
    """Also where it held shapes: what comes next may be many tokens again."""
    config = ModelConfig(vocab_size=5, context_length=4, n_head=1, d_model=4)
    model, past = Transformer(config).requires_grad_(False), KVCache(config, 1, torch.float32)
    model.initialise(0)
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids[:, :2], past=past)
    past.hold_shapes()
    model(ids[:, 2:3], past=past)
    past.clear()
    torch.testing.assert_close(model(ids, past=past), model(ids))


@given(case=cases())
def test_the_last_logits_alone_are_those_of_the_last_place(case):
    config, params, ids, _, _ = case
    model = Transformer(config).requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(value).float() for name, value in params.items()})
    ids = torch.from_numpy(ids)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


def test_memory_is_taken_once():
    config = ModelConfig(vocab_size=5, context_length=6, n_head=4, n_kv_head=2, d_model=8)
    past = empty_cache(config, 3, np.float32)
    assert past.k.shape == past.v.shape == (2, 3, 2, 6, 2) and past.k.dtype == np.float32
    params = {name: value.astype(np.float32) for name, value in model_params(config, 0).items()}
    after = past
    for _ in range(6):
        transformer_forward(params, np.zeros((3, 1), int), config, past=after)
        after = advance(after, 1)
    assert after.k is past.k and after.v is past.v and after.length == 6


def test_a_full_cache_is_refused_on_both_sides():
    config = ModelConfig(vocab_size=5, context_length=3, n_head=1, d_model=4)
    params, message = model_params(config, 0), "a sequence of 4 is longer than the context length of 3"
    past = advance(empty_cache(config, 1, np.float64), 3)
    with pytest.raises(ValueError, match=message):
        transformer_forward(params, np.zeros((1, 1), int), config, past=past)
    full = KVCache(config, 1, torch.float32)
    full.advance(3)
    with pytest.raises(ValueError, match=message):
        Transformer(config)(torch.zeros(1, 1, dtype=torch.long), past=full)


@pytest.mark.parametrize("rows", [[2, 0, 2], [1], [0, 0, 1, 2]])
def test_sequences_change_places(rows):
    config = ModelConfig(vocab_size=5, context_length=3, n_head=1, d_model=4)
    past = KVCache(config, 3, torch.float32)
    past.k[:], past.v[:] = torch.randn(2, *past.k.shape, generator=torch.Generator().manual_seed(0))
    past.advance(2)
    k, v = past.k.clone(), past.v.clone()
    past.reorder(torch.tensor(rows))
    for now, before in ((past.k, k), (past.v, v)):
        torch.testing.assert_close(now[:, :, :, :2], before[:, rows, :, :2])
