"""ALiBi: equal on both sides, and the slopes that its authors publish."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ref_numpy import alibi as plain
from torch_impl import alibi as fast


@given(n_head=st.integers(1, 130))
def test_slopes_are_equal(n_head):
    slopes = plain.alibi_slopes(n_head)
    np.testing.assert_allclose(fast.alibi_slopes(n_head), slopes, rtol=1e-15)
    assert len(slopes) == n_head and all(0 < slope < 1 for slope in slopes) and len(set(slopes)) == n_head


def test_published_slopes():
    """Press et al., section 3: 8 heads have 1/2 to 1/256, 16 begin with 2^-0.5; 12 as in their code."""
    assert plain.alibi_slopes(8) == tuple(1 / 2**h for h in range(1, 9))
    np.testing.assert_allclose(plain.alibi_slopes(16), [2 ** (-h / 2) for h in range(1, 17)], rtol=1e-15)
    twelve = [
        1 / 2,
        1 / 4,
        1 / 8,
        1 / 16,
        1 / 32,
        1 / 64,
        1 / 128,
        1 / 256,
        2**-0.5,
        2**-1.5,
        2**-2.5,
        2**-3.5,
    ]
    np.testing.assert_allclose(plain.alibi_slopes(12), twelve, rtol=1e-15)
    assert plain.alibi_slopes(3) == (1 / 16, 1 / 256, 1 / 4)


def test_a_model_in_double_precision_has_slopes_that_were_not_rounded_before():
    module = fast.AlibiSlopes(16)
    assert module.slopes.dtype == torch.float32 and not module.state_dict()
    assert module.double().slopes.tolist() == list(plain.alibi_slopes(16))
    assert module.bfloat16().slopes.dtype == torch.float32


@given(n_head=st.integers(1, 9), queries=st.integers(1, 9), keys=st.integers(1, 9))
def test_biases_are_equal(n_head, queries, keys):
    slopes = plain.alibi_slopes(n_head)
    want = plain.alibi_bias(slopes, queries, keys, np.float64)
    for h, t, s in np.ndindex(n_head, queries, keys):
        assert want[h, t, s] == -slopes[h] * abs(keys - queries + t - s), (
            "the last query stands at the last key"
        )
    np.testing.assert_array_equal(fast.alibi_bias(slopes, queries, keys, torch.float64), want)
    in_float32 = plain.alibi_bias(slopes, queries, keys, np.float32)
    np.testing.assert_allclose(
        fast.alibi_bias(slopes, queries, keys, torch.float32), in_float32, rtol=2.0**-22
    )


def test_biases_are_rounded_once():
    """In bfloat16 slopes and distances were rounded before their product: a model that wrote scored otherwise
    than where it learned."""
    slopes = plain.alibi_slopes(12)
    precise = fast.alibi_bias(slopes, 3, 2000, torch.float32)
    assert torch.equal(fast.alibi_bias(slopes, 3, 2000, torch.bfloat16), precise.bfloat16())
