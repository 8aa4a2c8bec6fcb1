"""Feed-forward layers: parity with every activation."""

from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import arrays, seeds, sizes


@st.composite
def cases(draw):
    B, T, C, F = draw(sizes(4))
    return {
        "x": draw(arrays((B, T, C))),
        "up_weight": draw(arrays((F, C), ("normal",))) / C**0.5,
        "up_bias": None,
        "down_weight": draw(arrays((C, F), ("normal",))) / F**0.5,
        "down_bias": None,
        "activation": draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"])),
    }


@given(arguments=cases(), bias=st.booleans(), data=st.data(), seed=seeds)
def test_parity(agree, arguments, bias, data, seed):
    if bias:
        arguments["up_bias"] = data.draw(arrays(arguments["up_weight"].shape[:1], ("normal",)))
        arguments["down_bias"] = data.draw(arrays(arguments["down_weight"].shape[:1], ("normal",)))
    agree("ffn", seed, judge_rounding=arguments["activation"] != "relu", **arguments)
