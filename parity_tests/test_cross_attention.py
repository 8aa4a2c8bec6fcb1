"""Cross-attention: parity, and what the memory may and may not tell."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import array, arrays, masks, seeds, sizes
from ref_numpy.cross_attention import cross_attention_forward

# No memory of large numbers: where keys and values both are, products of theirs cancel.
MEMORIES = ("normal", "tiny", "ties", "constant_row", "one_hot")


@st.composite
def cases(draw):
    B, T, S, n_head, head_width = draw(sizes(5))
    C, random = n_head * head_width, np.random.default_rng(draw(seeds))
    params = {
        f"{name}.weight": array(random, (n * C, C)) / C**0.5 for name, n in (("q", 1), ("kv", 2), ("proj", 1))
    }
    if draw(st.booleans()):
        params |= {f"{name}.bias": array(random, (n * C,)) for name, n in (("q", 1), ("kv", 2), ("proj", 1))}
    return {
        "x": draw(arrays((B, T, C), ("normal", "tiny", "ties", "one_hot"))),
        "memory": draw(arrays((B, S, C), MEMORIES)),
        "params": params,
        "n_head": n_head,
        "mask": draw(masks(T, S)),
    }


@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("cross_attention", seed, **arguments)


@given(arguments=cases(), seed=seeds)
def test_a_memory_has_no_order(arguments, seed):
    order = np.random.default_rng(seed).permutation(arguments["memory"].shape[1])
    y, _ = cross_attention_forward(*arguments.values())
    shuffled = {"memory": arguments["memory"][:, order], "mask": arguments["mask"][:, order]}
    other, _ = cross_attention_forward(*(arguments | shuffled).values())
    np.testing.assert_allclose(other, y, rtol=0, atol=1e-10)


@given(arguments=cases())
def test_what_the_mask_hides_has_no_influence(arguments):
    hidden = ~arguments["mask"].any(axis=0)[:, None]
    y, _ = cross_attention_forward(*arguments.values())
    changed = np.where(hidden, 77.0, arguments["memory"])
    other, _ = cross_attention_forward(*(arguments | {"memory": changed}).values())
    np.testing.assert_array_equal(other, y)
