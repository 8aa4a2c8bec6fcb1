"""A decoder's block with a memory: parity over the product of options."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.strategies import array, dropout_keys, masks, model_configs, model_params, seeds
from ref_numpy.block import within
from ref_numpy.config import ModelConfig
from ref_numpy.cross_block import cross_block_forward
from ref_numpy.dropout import DropoutKey


@st.composite
def cases(draw):
    config = draw(model_configs(architectures=("encoder-decoder",)))
    B, T, S = draw(st.sampled_from([(1, 3, 4), (2, 5, 3), (3, 2, 7), (2, 1, 1)]))
    random = np.random.default_rng(draw(seeds))
    return {
        "x": array(random, (B, T, config.d_model)),
        "memory": array(random, (B, S, config.d_model)),
        "params": within(model_params(config, draw(seeds)), "decoder.blocks.0"),
        "config": config,
        "mask": draw(masks(T, T)),
        "memory_mask": draw(masks(T, S)),
        "places": np.arange(T),
        "site": draw(st.integers(0, 9)),
        "key": draw(st.none() | dropout_keys()),
    }


@settings(max_examples=settings().max_examples // 2)
@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("cross_block", seed, judge_rounding=arguments["config"].activation != "relu", **arguments)


def test_without_a_site_the_masks_are_those_after_the_embedding():
    config = ModelConfig(architecture="encoder-decoder", d_model=8, n_head=2, dropout=0.5)
    random = np.random.default_rng(0)
    case = {
        "x": array(random, (2, 3, 8)),
        "memory": array(random, (2, 4, 8)),
        "params": within(model_params(config, 0), "decoder.blocks.0"),
        "config": config,
        "mask": np.ones((3, 3), bool),
        "memory_mask": np.ones((3, 4), bool),
        "places": np.arange(3),
        "key": DropoutKey(seed=1, step=2),
    }
    y, _ = cross_block_forward(**case)
    np.testing.assert_array_equal(y, cross_block_forward(**case, site=0)[0])
