"""Feed-forward layers: parity with every activation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.strategies import array, arrays, seeds, sizes


@st.composite
def cases(draw):
    B, T, C, F = draw(sizes(4))
    return {
        "x": draw(arrays((B, T, C))),
        "up_weight": draw(arrays((F, C), ("normal",))) / C**0.5,
        "up_bias": None,
        "down_weight": draw(arrays((C, F), ("normal",))) / F**0.5,
        "down_bias": None,
    }


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@settings(max_examples=12)
@given(arguments=cases(), bias=st.booleans(), data=st.data(), seed=seeds)
def test_parity(agree, activation, arguments, bias, data, seed):
    """By name, not drawn: of thirty draws one in a hundred has no case of some activation."""
    if bias:
        arguments["up_bias"] = data.draw(arrays(arguments["up_weight"].shape[:1], ("normal",)))
        arguments["down_bias"] = data.draw(arrays(arguments["down_weight"].shape[:1], ("normal",)))
    agree("ffn", seed, judge_rounding=activation != "relu", **arguments, activation=activation)


@given(arguments=cases(), bias=st.booleans(), seed=seeds)
def test_parity_of_swiglu(agree, arguments, bias, seed):
    random = np.random.default_rng(seed)
    F, C = arguments["up_weight"].shape
    names = {"gate": F, "up": F, "down": C}
    biases = {f"{name}_bias": array(random, (size,)) if bias else None for name, size in names.items()}
    case = {"x": arguments["x"], "gate_weight": array(random, (F, C)) / C**0.5, **arguments, **biases}
    order = ["x", *(f"{name}_{kind}" for name in names for kind in ("weight", "bias"))]
    agree("swiglu", seed, **{name: case[name] for name in order})
