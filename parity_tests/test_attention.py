"""Attention: parity under any mask, and the laws that a mask states."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from parity_tests.strategies import REGIMES, array, arrays, masks, seeds, sizes
from ref_numpy.attention import attention_backward, attention_forward
from ref_numpy.masks import causal_mask
from torch_impl import attention as fast
from torch_impl.attention import attention, attention_by_products

# Of q, k and v one at most is large. Where two are, products of theirs cancel, or a rounding moves a score by
# more than 1, and which key wins is luck.
SOFT = ("normal", "tiny", "ties", "constant_row", "one_hot")

# No offset of 1000 in queries or keys: a fused kernel stores the log-sum-exp of a row's scores, and makes the
# weights of the backward pass from it. Of a score of 1000 float32 holds 6e-5, and so does their
# sum of 1. Such keys showed an error of 0.04 in a gradient of 0.03; the plain formula errs by less than 1e-3.
LARGE = (*SOFT, "huge")
REGIMES_OF_QKV = ((LARGE, SOFT, SOFT), (SOFT, LARGE, SOFT), (SOFT, SOFT, REGIMES))


def has_small_scores(arguments) -> bool:
    """Rounding is judged where scores are small: of a weight, a float32 log-sum-exp of L loses 2^-24 L."""
    return np.abs(arguments["q"]).max() * np.abs(arguments["k"]).max() < 30


@st.composite
def attention_cases(draw):
    B, H, T, S, D = draw(sizes(5))
    mask = draw(masks(T, S))
    per_sequence = draw(st.sampled_from(["shared", "by_sequence", "by_head"]))
    if per_sequence != "shared":  # masks broadcast to (B, H, T, S) from wherever they begin
        leading = (B, 1) if per_sequence == "by_sequence" else (B, H)
        flips = np.random.default_rng(draw(seeds)).random((*leading, T, S)) < 0.3
        mask = mask ^ flips
    q_regimes, k_regimes, v_regimes = draw(st.sampled_from(REGIMES_OF_QKV))
    return {
        "q": draw(arrays((B, H, T, D), q_regimes)),
        "k": draw(arrays((B, H, S, D), k_regimes)),
        "v": draw(arrays((B, H, S, D), v_regimes)),
        "mask": mask,
    }


@given(arguments=attention_cases(), sloped=st.booleans(), seed=seeds)
def test_parity(agree, arguments, sloped, seed):
    n_head = arguments["q"].shape[1]
    slopes = tuple(2.0 / 3**h for h in range(n_head)) if sloped else None
    agree("attention", seed, has_small_scores(arguments), **arguments, slopes=slopes)


@given(arguments=attention_cases(), sloped=st.booleans(), seed=seeds)
def test_parity_of_products(agree, arguments, sloped, seed):
    """The way of bfloat16 on a processor that multiplies it, taken by all: it is chosen for large cases."""
    slopes = tuple(2.0 / 3**h for h in range(arguments["q"].shape[1])) if sloped else None
    with patch.object(fast, "products_pay", return_value=True):
        agree("attention", seed, has_small_scores(arguments), **arguments, slopes=slopes)


@given(
    arguments=attention_cases(),
    order=st.sampled_from(["mask", "bias", "causal"]),
    queries_at_once=st.sampled_from([1, 2, 5, 100]),
    scores_at_once=st.sampled_from([1, 100, 10**6]),
    seed=seeds,
)
def test_products_of_any_block_are_plain_attention(arguments, order, queries_at_once, scores_at_once, seed):
    """Values and gradients in float64."""
    q, k, v, mask = arguments.values()
    if order == "causal":
        k, v = (np.resize(tensor, q.shape) for tensor in (k, v))
        mask = causal_mask(q.shape[2])
    mask = mask | ~mask.any(axis=-1, keepdims=True)  # a row without keys is its caller's matter
    want, cache = attention_forward(q, k, v, mask)
    dy = array(np.random.default_rng(seed), want.shape)
    given = {"mask": torch.from_numpy(mask), "bias": torch.where(torch.from_numpy(mask), 0.0, -torch.inf)}
    leaves = [torch.tensor(tensor, requires_grad=True) for tensor in (q, k, v)]
    blocks = {"queries_at_once": queries_at_once, "scores_at_once": scores_at_once}
    y = attention_by_products(*leaves, given.get(order), is_causal=order == "causal", **blocks)
    got = [y, *torch.autograd.grad(y, leaves, torch.from_numpy(dy))]
    exact = [want, *attention_backward(dy, cache)]
    scale = max(np.abs(tensor).max() for tensor in (q, k, v, *exact))
    for result, wanted in zip(got, exact, strict=True):
        np.testing.assert_allclose(result.detach().numpy(), wanted, rtol=0, atol=1e-12 * max(scale, 1))


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_operators_of_products_keep_what_they_promise(sequences, is_causal):
    """PyTorch's own check: shapes and strides without numbers, gradients, nothing changed in place.

    Of one sequence the gradients once had the strides of keys whose heads lie side by side.
    """
    q, k, v = (torch.randn(sequences, 7, 3, 4).transpose(1, 2) for _ in range(3))
    rest = torch.zeros(sequences, 3, 7, 7), is_causal, 3, 10**6
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(fast._by_products, (*leaves, *rest), test_utils=checks)
    dy, *detached = (tensor.detach() for tensor in (v, q, k, v))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(fast._by_products_backward, (dy, *detached, *rest), test_utils=checks)


@pytest.mark.parametrize(
    ("dtype", "device", "length", "has_instructions", "pays"),
    [
        (torch.bfloat16, "cpu", 4096, True, True),
        (torch.bfloat16, "cpu", 4096, False, False),
        (torch.bfloat16, "cpu", 64, True, False),
        (torch.float32, "cpu", 4096, True, False),
        (torch.float16, "cpu", 4096, True, False),
        (torch.bfloat16, "meta", 4096, True, False),
    ],
)
def test_products_are_for_large_cases_and_processors_that_multiply_bfloat16(
    dtype, device, length, has_instructions, pays, monkeypatch
):
    monkeypatch.setattr(fast, "_HAS_BFLOAT16", has_instructions)
    assert fast.products_pay(torch.device(device), dtype, 2 * length * 64) == pays


def test_kernels_of_cudnn_have_causal_steps_alone(monkeypatch):
    """On Hopper, where PyTorch takes them first, each token of a search by beams was a shape of its own, for
    which they made a plan; and with a mask, low scores could make gradients NaN."""
    allowed = []

    def attend(q, *_, **settings):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    with FakeTensorMode():
        q = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16, device="cuda")
        mask = torch.ones(3, 3, dtype=torch.bool, device="cuda")
    fast.fused_attention(q, q, q, is_causal=True)
    fast.fused_attention(q, q, q)
    fast.fused_attention(q, q, q, mask)
    with torch.no_grad():
        fast.fused_attention(q, q, q, is_causal=True)
    assert allowed == [True, False, False, False] and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_query_that_sees_nothing_gets_zero_and_passes_nothing_back(offered):
    """The middle query is blind: a zero vector, and no gradient, while its neighbours are served."""
    random = np.random.default_rng(0)
    arguments = {name: array(random, (1, 1, 3, 4)) for name in "qkv"}
    mask = np.array([[True, False, True], [False, False, False], [True, True, True]])
    dy = array(random, (1, 1, 3, 4))
    y, cache = attention_forward(*arguments.values(), mask)
    assert y[0, 0, 1].tolist() == [0, 0, 0, 0]
    assert attention_backward(dy, cache)[0][0, 0, 1].tolist() == [0, 0, 0, 0]
    target, case = offered("attention"), arguments | {"mask": mask, "slopes": None}
    got = target.backend.run("attention", case, dy, "float64", target.mathematics_on)
    assert got.y[0, 0, 1].tolist() == [0, 0, 0, 0]
    assert got.gradients["q"][0, 0, 1].tolist() == [0, 0, 0, 0]


def test_where_there_are_no_keys_nothing_is_seen():
    """The reference failed on the largest of no scores."""
    q, k = np.ones((1, 2, 3, 4)), np.ones((1, 2, 0, 4))
    mask = np.ones((3, 0), bool)
    y, _ = attention_forward(q, k, k, mask)
    got = attention(*map(torch.from_numpy, (q, k, k, mask)))
    assert y.shape == got.shape == (1, 2, 3, 4) and not y.any() and not got.any()


@given(arguments=attention_cases(), data=st.data())
def test_what_a_mask_hides_has_no_influence(arguments, data):
    """Forbidden keys and values may be anything."""
    q, k, v, mask = arguments.values()
    hidden = ~np.broadcast_to(mask, (*q.shape[:-1], k.shape[-2])).any(axis=-2)[..., None]  # from every query
    y, _ = attention_forward(q, k, v, mask)
    other, _ = attention_forward(q, np.where(hidden, 77.0, k), np.where(hidden, -55.0, v), mask)
    np.testing.assert_array_equal(y, other)


@given(arguments=attention_cases(), seed=seeds)
def test_keys_have_no_order(arguments, seed):
    """Keys, values and mask permuted together: the same y, up to the order of the sum."""
    q, k, v, mask = arguments.values()
    order = np.random.default_rng(seed).permutation(k.shape[-2])
    y, _ = attention_forward(q, k, v, mask)
    permuted, _ = attention_forward(q, k[:, :, order], v[:, :, order], mask[..., order])
    np.testing.assert_allclose(permuted, y, rtol=0, atol=1e-11 * max(1, np.abs(v).max()))


def test_one_key_is_copied_and_equal_scores_are_averaged():
    v = np.array([[[[1.0, 2.0], [3.0, 6.0]]]])
    y, _ = attention_forward(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)), v, causal_mask(2))
    assert y[0, 0].tolist() == [[1, 2], [2, 4]]


def test_scores_of_any_size_are_weighed(offered):
    """Scores of 0, 10^4, 10^4 and of 0, -10^4, -10^4: exp of them alone would overflow, or leave nothing."""
    arguments = {
        "q": np.array([100.0, -100.0]).reshape(1, 1, 2, 1),
        "k": np.array([0.0, 100.0, 100.0]).reshape(1, 1, 3, 1),
        "v": np.array([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1),
        "mask": np.ones((2, 3), bool),
        "slopes": None,
    }
    y, _ = attention_forward(*arguments.values())
    assert y.ravel().tolist() == [3, 1]
    target = offered("attention")
    got = target.backend.run("attention", arguments, y, "float64", target.mathematics_on)
    assert got.y.ravel().tolist() == [3, 1]


@pytest.mark.parametrize("slopes", [None, (0.5,)])
def test_a_key_that_is_hidden_stays_hidden_below_any_score(slopes):
    """The key that is seen has the score -20000. Beside that, -10000 for hidden ones were a high score."""
    q, k, v = (np.array(x).reshape(1, 1, -1, 1) for x in ([200.0], [-100.0, 0.0], [1.0, 5.0]))
    mask = np.array([[True, False]])
    y, _ = attention_forward(q, k, v, mask, slopes)
    assert y.item() == 1
    assert attention(*map(torch.from_numpy, (q, k, v, mask)), slopes).item() == 1


def test_scores_are_divided_by_the_root_of_the_head_width():
    """q k = 8 over width 4: weights 1 : e^4."""
    q, k = np.full((1, 1, 1, 4), 2.0), np.stack([np.zeros(4), np.ones(4)])[None, None]
    v = np.array([0.0, 1.0])[None, None, :, None] * np.ones(4)
    y, _ = attention_forward(q, k, v, np.ones((1, 2), bool))
    assert y[0, 0, 0, 0] == pytest.approx(np.exp(4) / (1 + np.exp(4)), rel=1e-14)
