"""Parameters: the names and shapes of the fast side's model, and initial weights of the right size."""

from math import prod, sqrt

import numpy as np
import pytest
from hypothesis import given

from parity_tests.strategies import model_configs
from ref_numpy.config import ModelConfig
from ref_numpy.parameters import init_params, is_muons, parameter_shapes
from ref_numpy.rng import INIT, Key, normal
from torch_impl.seq2seq import make_model


@given(config=model_configs(architectures=("decoder", "encoder", "encoder-decoder")))
def test_names_and_shapes_are_those_of_the_model(config):
    built = {name: tuple(value.shape) for name, value in make_model(config).state_dict().items()}
    assert parameter_shapes(config) == built


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("options", [{}, {"norm_placement": "post", "activation": "swiglu", "qk_norm": True}])
def test_the_order_of_a_stack_by_hand(architecture, options):
    config = ModelConfig(
        architecture, n_layer=1, d_model=8, n_head=2, n_kv_head=1, tied_embeddings=False, **options
    )
    shapes = parameter_shapes(config)
    assert shapes["token_embedding.weight"] == shapes["head.weight"] == (256, 8)
    prefix = "decoder." if architecture == "encoder-decoder" else ""
    own = {name: shape for name, shape in shapes.items() if name.startswith(f"{prefix}blocks.0.")}
    assert own[f"{prefix}blocks.0.attention.qkv.weight"] == (16, 8)
    assert own[f"{prefix}blocks.0.ffn.down.weight"] == (8, 32)
    assert (f"{prefix}blocks.0.cross_attention.kv.weight" in own) == (prefix != "")
    assert (f"{prefix}norm.bias" in shapes) == (config.norm_placement == "pre")
    assert (f"{prefix}blocks.0.attention.q_norm.weight" in own) == config.qk_norm


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_initial_weights(architecture):
    """Parameter number i is drawn from stream i; what ends one of n branches is smaller by sqrt(n)."""
    config = ModelConfig(architecture, vocab_size=10, n_layer=3, d_model=8, n_head=2)
    params = init_params(config, 7)
    assert list(params) == list(parameter_shapes(config))
    for i, (name, value) in enumerate(params.items()):
        assert value.dtype == np.float32
        if name.endswith(".bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            branches = 9 if name.startswith("decoder.") else 6
            ends = name.endswith(("attention.proj.weight", "ffn.down.weight"))
            std = 0.02 / sqrt(branches) if ends else 0.02
            drawn = normal(Key(7, INIT, stream=i), prod(value.shape)).reshape(value.shape)
            np.testing.assert_allclose(value, std * drawn, rtol=1e-6)
    assert init_params(config, 7, np.float64)["token_embedding.weight"].dtype == np.float64


def test_muon_serves_matrices_of_blocks():
    served = {
        ("blocks.0.ffn.up.weight", (8, 2)): True,
        ("blocks.0.norm1.weight", (8,)): False,
        ("token_embedding.weight", (9, 2)): False,
        ("head.weight", (9, 2)): False,
    }
    assert {case: is_muons(*case) for case in served} == served
