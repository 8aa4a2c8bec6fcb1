"""Transformer blocks: parity over the product of options, and the residual path."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.strategies import array, dropout_keys, masks, model_configs, model_params, seeds
from ref_numpy.block import block_forward, within
from ref_numpy.config import ModelConfig
from ref_numpy.masks import causal_mask


@st.composite
def cases(draw, causal=False):
    config = draw(model_configs())
    layer = draw(st.integers(0, config.n_layer - 1))
    prefix = f"blocks.{layer}."
    params = {
        name.removeprefix(prefix): value
        for name, value in model_params(config, draw(seeds)).items()
        if name.startswith(prefix)
    }
    B, T = draw(st.sampled_from([(1, 3), (2, 5), (3, 7), (2, 1)]))
    return {
        "x": array(np.random.default_rng(draw(seeds)), (B, T, config.d_model)),
        "params": params,
        "config": config,
        "mask": causal_mask(T) if causal else draw(masks(T, T)),
        "places": np.arange(T),
        "layer": layer,
        "key": draw(st.none() | dropout_keys()),
    }


@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("block", seed, judge_rounding=arguments["config"].activation != "relu", **arguments)


@settings(max_examples=settings().max_examples // 4)
@given(layer=st.integers(1, 9), key=dropout_keys(), seed=seeds)
def test_parity_of_the_masks_of_later_layers(agree, layer, key, seed):
    """Layer l drops at the sites 2 l + 1 and 2 l + 2; the first layer's cannot tell 2 from 3."""
    config = ModelConfig(n_layer=1, d_model=8, n_head=2, dropout=0.5)
    params = within(model_params(config, seed), "blocks.0")
    case = {"x": array(np.random.default_rng(seed), (2, 3, 8)), "params": params, "config": config}
    case |= {"mask": causal_mask(3), "places": np.arange(3)}
    agree("block", seed, judge_rounding=False, **case, layer=layer, key=key)
    first, _ = block_forward(**case, key=key)
    np.testing.assert_array_equal(first, block_forward(**case, layer=0, key=key)[0])


@given(arguments=cases(causal=True), place=st.integers(0, 6))
def test_the_future_leaves_the_past_alone(arguments, place):
    x, T = arguments["x"], arguments["x"].shape[1]
    place = min(place, T - 1)
    changed = x.copy()
    changed[:, place] += 1
    y, _ = block_forward(*arguments.values())
    other, _ = block_forward(*(arguments | {"x": changed}).values())
    np.testing.assert_allclose(other[:, :place], y[:, :place], rtol=0, atol=1e-12)
    assert (np.abs(other - y).max(axis=(0, 2))[place:] > 1e-9).any()


@given(arguments=cases())
def test_without_its_sublayers_a_pre_norm_block_hands_x_through(arguments):
    config = arguments["config"]
    ends = ("attention.proj.weight", "attention.proj.bias", "ffn.down.weight", "ffn.down.bias")
    params = {name: np.zeros_like(v) if name in ends else v for name, v in arguments["params"].items()}
    y, _ = block_forward(*(arguments | {"params": params}).values())
    if config.norm_placement == "pre":
        np.testing.assert_array_equal(y, arguments["x"])
    else:  # norm2(norm1(x)) instead
        assert y.shape == arguments["x"].shape
