"""Multi-head attention: parity over its variants, and who reads what."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import array, arrays, masks, model_configs, model_params, seeds
from ref_numpy.block import within
from ref_numpy.config import ModelConfig
from ref_numpy.masks import causal_mask
from ref_numpy.multi_head_attention import multi_head_attention_forward
from torch_impl.block import Block
from torch_impl.cross_block import CrossBlock
from torch_impl.flash_attention import AttentionPattern
from torch_impl.multi_head_attention import MultiHeadAttention, attend_by


@st.composite
def cases(draw):
    config = draw(model_configs())
    B, T = draw(st.sampled_from([(1, 3), (2, 5), (3, 7), (2, 1)]))
    return {
        "x": draw(arrays((B, T, config.d_model), ("normal", "tiny", "ties", "one_hot"))),
        "params": within(model_params(config, draw(seeds)), "blocks.0.attention"),
        "config": config,
        "mask": draw(masks(T, T)),
        "places": draw(st.sampled_from([np.arange(T), np.arange(B * T).reshape(B, T)[::-1]])),
    }


@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("multi_head_attention", seed, **arguments)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_queries_and_keys_are_normalised_before_they_turn(agree, layout):
    """The other way round the weights of the norm, one for each feature, would meet turned features, and
    scores would no more depend on distances alone. A case that is drawn seldom has both.
    """
    config = ModelConfig(n_head=2, n_kv_head=1, d_model=8, positions="rope", rope_layout=layout, qk_norm=True)
    params = within(model_params(config, 0), "blocks.0.attention")
    case = {"x": array(np.random.default_rng(0), (2, 5, 8)), "params": params, "config": config}
    y, shifted = (
        multi_head_attention_forward(**case, mask=causal_mask(5), places=np.arange(5) + shift)[0]
        for shift in (0, 3)
    )
    np.testing.assert_allclose(shifted, y, rtol=0, atol=1e-13)
    agree("multi_head_attention", 0, **case, mask=causal_mask(5), places=np.arange(5))


def test_parity_with_alibi(agree):
    """Of the ways to know a place it is the only one here beside rotation, and drawn seldom too."""
    config = ModelConfig(n_head=3, d_model=6, positions="alibi")
    params = within(model_params(config, 0), "blocks.0.attention")
    case = {"x": array(np.random.default_rng(0), (2, 5, 6)), "params": params, "config": config}
    agree("multi_head_attention", 0, **case, mask=causal_mask(5), places=np.arange(5))


@given(seed=seeds, head=st.integers(0, 2))
def test_heads_own_consecutive_features(seed, head):
    """Head h is made from rows h D to (h + 1) D of q, of k and of v: without those of v it is silent."""
    config, random, C = ModelConfig(n_head=3, d_model=6, bias=False), np.random.default_rng(seed), 6
    x = array(random, (1, 6, C))
    params = {"qkv.weight": array(random, (3 * C, C)), "proj.weight": np.eye(C)}
    silenced = {**params, "qkv.weight": params["qkv.weight"].copy()}
    silenced["qkv.weight"][2 * C + 2 * head : 2 * C + 2 * head + 2] = 0  # the values of one head
    y, other = (
        multi_head_attention_forward(x, p, config, causal_mask(6), np.arange(6))[0]
        for p in (params, silenced)
    )
    own = slice(2 * head, 2 * head + 2)
    assert np.abs(other[..., own]).max() == 0
    np.testing.assert_array_equal(np.delete(other, own, axis=-1), np.delete(y, own, axis=-1))


@given(config=model_configs(), seed=seeds)
def test_grouped_queries_are_many_heads_with_equal_keys(config, seed):
    """Repeat the rows of each key/value head for every head that reads it: the same function."""
    H, K, D, C = config.n_head, config.kv_heads, config.head_width, config.d_model
    params = within(model_params(config, seed), "blocks.0.attention")
    x, T = array(np.random.default_rng(seed), (2, 4, C)), 4

    def repeated(rows):
        q, k, v = np.split(rows, [H * D, (H + K) * D])
        k, v = (part.reshape(K, D, -1).repeat(H // K, axis=0).reshape(H * D, -1) for part in (k, v))
        return np.concatenate([q.reshape(H * D, -1), k, v]).reshape(3 * C, *rows.shape[1:])

    many = {name: repeated(value) if name.startswith("qkv") else value for name, value in params.items()}
    y, _ = multi_head_attention_forward(x, params, config, causal_mask(T), np.arange(T))
    want, _ = multi_head_attention_forward(
        x, many, replace(config, n_kv_head=0), causal_mask(T), np.arange(T)
    )
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


def test_without_a_word_who_sees_what_attention_is_causal():
    """In the fast half, where each module has that default."""
    config = ModelConfig(vocab_size=5, context_length=6, n_layer=1, n_head=2, d_model=4)
    torch.manual_seed(0)
    x, memory = torch.randn(1, 6, 4), torch.randn(1, 3, 4)
    for module, *others in (
        (MultiHeadAttention(config),),
        (Block(config, 0),),
        (CrossBlock(config, 0), memory, torch.ones(1, 1, 6, 3, dtype=torch.bool)),
    ):
        for param in module.parameters():
            torch.nn.init.normal_(param)
        with torch.no_grad():
            whole, part = (
                module(x[:, :length], *(m[:, :, :length] if m.ndim == 4 else m for m in others))
                for length in (6, 4)
            )
            seeing_all = module(x, *others, attend=attend_by(AttentionPattern()))
        torch.testing.assert_close(whole[:, :4], part)
        assert not torch.allclose(whole, seeing_all)
