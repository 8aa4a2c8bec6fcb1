"""FlashAttention: any tiles give plain attention, and every path of the fast side is what a pattern says."""

import tracemalloc
from math import ceil
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests import tolerances
from parity_tests.strategies import array, arrays, seeds, sizes
from parity_tests.test_attention import attention_cases, has_small_scores
from parity_tests.tolerances import PRECISIONS
from ref_numpy.attention import attention_backward, attention_forward
from ref_numpy.flash_attention import flash_attention_backward, flash_attention_forward
from ref_numpy.masks import causal_mask
from torch_impl import attention
from torch_impl import flash_attention as fast
from torch_impl.flash_attention import AttentionPattern, Path, choose_path, flash_attention

tile_sizes = st.tuples(
    *[st.sampled_from([1, 2, 3, 4, 7, 13, 100])] * 2
)  # cases have up to 13 rows and columns


@given(arguments=attention_cases(), tile=tile_sizes, seed=seeds)
def test_parity(agree, arguments, tile, seed):
    agree("flash_attention", seed, has_small_scores(arguments), **arguments, bias=None, tile=tile)


@given(arguments=attention_cases(), tile=tile_sizes, seed=seeds)
def test_tiles_of_any_size_give_plain_attention(arguments, tile, seed):
    """Values and gradients, to 1e-12 of the largest number of the case."""
    want, cache = attention_forward(**arguments)
    dy = array(np.random.default_rng(seed), want.shape)
    y, tiled_cache = flash_attention_forward(**arguments, tile=tile)
    wanted = [want, *attention_backward(dy, cache)]
    got = [y, *flash_attention_backward(dy, tiled_cache)]
    scale = max(np.abs(value).max() for value in (*wanted, arguments["q"], arguments["k"], arguments["v"]))
    for value, exact in zip(got, wanted, strict=True):
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-12 * max(scale, 1))


def sdpa_in_float64(q, k, v, dy, added):
    """y and gradients by PyTorch's plain implementation, with scores to be added."""
    leaves = [torch.tensor(value, requires_grad=True) for value in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(*leaves, attn_mask=torch.tensor(added))
    gradients = torch.autograd.grad(y, leaves, torch.tensor(dy))
    return [value.detach().numpy() for value in (y, *gradients)]


@given(
    arguments=attention_cases(), width=st.sampled_from(["T S", "H T S", "S"]), tile=tile_sizes, data=st.data()
)
def test_biases_are_added_as_pytorch_adds_them(arguments, width, tile, data):
    """Any scores added, from wherever they broadcast, beside an implementation that is not ours."""
    (_, H, T, _), S = arguments["q"].shape, arguments["k"].shape[2]
    lengths = {"H": H, "T": T, "S": S}
    bias = 3 * data.draw(arrays(tuple(lengths[name] for name in width.split())))
    q, k, v, mask = arguments.values()
    dy = data.draw(arrays(q.shape, ("normal",)))
    y, cache = flash_attention_forward(**arguments, bias=bias, tile=tile)
    got = [y, *flash_attention_backward(dy, cache)]
    wanted = sdpa_in_float64(q, k, v, dy, np.where(mask, bias, -np.inf) + np.zeros((1, 1, 1, 1)))
    scale = max(np.abs(value).max() for value in (q, k, v, *wanted)) + np.abs(bias).max()
    for value, exact in zip(got, wanted, strict=True):
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-10 * np.abs(exact).max() + 1e-13 * scale)


def test_a_tile_in_which_nothing_is_allowed_is_never_read():
    """Beyond the diagonal lies what would turn everything into NaN."""
    random = np.random.default_rng(0)
    q, k, v, dy = (array(random, (1, 2, 8, 4)) for _ in range(4))
    k[:, :, 4:], v[:, :, 4:] = np.nan, np.nan
    mask = causal_mask(8)
    mask[4:, 4:] = False
    y, cache = flash_attention_forward(q, k, v, mask, tile=4)
    dq, dk, dv = flash_attention_backward(dy, cache)
    assert np.isfinite(np.concatenate([y, dq, dk, dv])).all()
    assert not dk[:, :, 4:].any() and not dv[:, :, 4:].any()


class SlowMemory(np.ndarray):
    """An array that counts the elements that are taken out of it and put into it."""

    moved = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        SlowMemory.moved += part.size
        return part

    def __setitem__(self, key, value):
        here = self.view(np.ndarray)
        SlowMemory.moved += here[key].size
        here[key] = value


@pytest.mark.parametrize(
    ("T", "S", "R", "N"), [(24, 36, 8, 12), (23, 37, 8, 12), (5, 7, 100, 100), (6, 4, 1, 1)]
)
def test_the_docstring_counts_what_is_moved(T, S, R, N):
    random, D = np.random.default_rng(0), 4
    q, dy = (array(random, (1, 1, T, D)).view(SlowMemory) for _ in range(2))
    k, v = (array(random, (1, 1, S, D)).view(SlowMemory) for _ in range(2))
    SlowMemory.moved = 0
    _, cache = flash_attention_forward(q, k, v, np.ones((T, S), bool), tile=(R, N))
    assert SlowMemory.moved == 2 * T * D + T + ceil(T / R) * 2 * S * D
    SlowMemory.moved = 0
    flash_attention_backward(dy, cache)
    # 3 T D + T are moved before the tiles: y and dy read, delta written, dq filled with zeros.
    assert SlowMemory.moved == 4 * S * D + ceil(S / N) * (4 * T * D + 2 * T)


def test_no_scores_are_held():
    """4096 queries and keys, forward and backward, in a sixteenth of what their scores alone would take."""
    random = np.random.default_rng(0)
    q, k, v, dy = (array(random, (1, 1, 4096, 8)) for _ in range(4))
    mask = np.ones((1, 1), bool)
    tracemalloc.start()
    try:
        _, cache = flash_attention_forward(q, k, v, mask, tile=64)
        flash_attention_backward(dy, cache)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4096 * 4096 * 8 / 16


# The fast side's patterns, by their definitions.


def definition(pattern, B, H, T, S):
    """What a pattern allows, and its bias, as arrays over all (B, H, T, S)."""
    t, s = np.arange(T)[:, None], np.arange(S)
    mask = np.ones((B, H, T, S), bool)
    if pattern.causal:
        mask &= s <= t
    if pattern.window:
        mask &= s > t - pattern.window
    if pattern.documents is not None:
        documents = pattern.documents.numpy()
        mask &= (documents[:, :, None] == documents[:, None, :])[:, None]
    if pattern.key_mask is not None:
        mask &= pattern.key_mask.numpy()[:, None, None]
    bias = None
    if pattern.alibi_slopes is not None:
        bias = -pattern.alibi_slopes.numpy()[:, None, None] * np.abs(t - s)
    return mask, bias


@st.composite
def patterns(draw, B, H, T):
    random = np.random.default_rng(draw(seeds))
    causal = draw(st.booleans())
    documents = torch.from_numpy(np.sort(random.integers(0, 4, (B, T)), axis=-1))
    if draw(st.booleans()):  # numbers need not be in order
        documents = documents[:, torch.from_numpy(random.permutation(T))]
    return AttentionPattern(
        causal=causal,
        window=draw(st.sampled_from([0, 1, 3, T, T + 1])) if causal else 0,
        alibi_slopes=draw(st.none() | st.just(torch.from_numpy(random.random(H)))),
        documents=draw(st.none() | st.just(documents)),
        key_mask=draw(st.none() | st.just(torch.from_numpy(random.random((B, T)) < 0.6))),
    )


@st.composite
def pattern_cases(draw):
    B, T, D, group = draw(sizes(4))
    K = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(seeds))
    shapes = [(B, K * group, T, D), (B, K, T, D), (B, K, T, D), (B, K * group, T, D)]
    q, k, v, dy = (array(random, shape) for shape in shapes)
    return q, k, v, dy, draw(patterns(B, K * group, T))


def by_the_reference(q, k, v, dy, pattern, tile=5):
    """y, dq, dk, dv. Head h looks at key/value head h // group, whose gradient is the sum over its group."""
    (B, H, T, D), K = q.shape, k.shape[1]
    mask, bias = definition(pattern, B, H, T, k.shape[2])
    repeated = [np.repeat(value, H // K, axis=1) for value in (k, v)]
    y, cache = flash_attention_forward(q, *repeated, mask, bias, tile)
    dq, *repeated = flash_attention_backward(dy, cache)
    return [y, dq, *(value.reshape(B, K, H // K, -1, D).sum(axis=2) for value in repeated)]


def by_autograd(attend, q, k, v, dy, dtype="float64", device="cpu"):
    """y, dq, dk, dv of a function of tensors, in float64 again."""
    *leaves, dy = (torch.tensor(value, dtype=getattr(torch, dtype), device=device) for value in (q, k, v, dy))
    y = attend(*(leaf.requires_grad_() for leaf in leaves))
    gradients = torch.autograd.grad(y, leaves, dy)
    return [value.detach().cpu().double().numpy() for value in (y, *gradients)]


@pytest.mark.parametrize("by_products", [False, True])
@given(case=pattern_cases(), queries_at_once=st.sampled_from([1, 2, 5, 100]))
def test_patterns_mean_what_they_say(by_products, case, queries_at_once):
    """All of them together, and groups of heads, in blocks of any size: values and gradients in float64."""
    q, k, v, dy, pattern = case
    wanted = by_the_reference(q, k, v, dy, pattern)
    with patch.object(attention, "products_pay", return_value=by_products):
        got = by_autograd(lambda *qkv: flash_attention(*qkv, pattern, queries_at_once), q, k, v, dy)
    for value, exact in zip(got, wanted, strict=True):
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-11)


def on(device, pattern):
    """The pattern's tensors, moved."""
    return AttentionPattern(
        *(part.to(device) if isinstance(part, torch.Tensor) else part for part in pattern)
    )


@pytest.mark.parametrize("by_products", [False, True])
@given(data=st.data(), seed=seeds)
def test_patterns_are_well_rounded(ours, by_products, data, seed):
    """Errors of at most twice (gradients: three times) those of the plain formulas on the same large case."""
    B, K, group, T, D = 2, 2, 3, 37, 16
    random = np.random.default_rng(seed)
    pattern = data.draw(patterns(B, K * group, T))
    shapes = [(B, K * group, T, D), (B, K, T, D), (B, K, T, D), (B, K * group, T, D)]
    for precision in ours.precisions:
        p = PRECISIONS[precision]
        dtype = getattr(torch, p.torch_dtype)
        q, k, v, dy = (torch.tensor(array(random, shape)).to(dtype).double().numpy() for shape in shapes)
        wanted = by_the_reference(q, k, v, dy, pattern)
        mask, bias = (
            None if part is None else torch.tensor(part).to(ours.device)
            for part in definition(pattern, B, K * group, T, T)
        )

        def plain(q, k, v, mask=mask, bias=bias):
            repeated = (value.repeat_interleave(group, dim=1) for value in (k, v))
            bias = None if bias is None else bias.to(q.dtype)
            return ours.plain.module.flash_attention(q, *repeated, mask, bias, None)

        def fused(q, k, v):
            return flash_attention(q, k, v, on(ours.device, pattern), queries_at_once=10)

        yardstick = by_autograd(plain, q, k, v, dy, p.torch_dtype, ours.device)
        with patch.object(attention, "products_pay", return_value=by_products):
            got = by_autograd(fused, q, k, v, dy, p.torch_dtype, ours.device)
        scale = max(np.abs(value).max() for value in (q, k, v, dy, *wanted))
        for i, (value, exact, honest) in enumerate(zip(got, wanted, yardstick, strict=True)):
            error = np.abs(honest - exact).max()
            bound = tolerances.rounding(exact, error, scale, p, is_gradient=i > 0)
            assert np.abs(value - exact).max() <= bound


def examples(B, H, T):
    """One pattern of each kind, and all at once."""
    random = torch.Generator().manual_seed(0)
    slopes = 2.0 ** -torch.arange(1, H + 1)
    documents = torch.randint(0, 3, (B, T), generator=random).sort().values
    key_mask = torch.rand(B, T, generator=random) < 0.8
    key_mask[-1] = False
    return {
        "causal": AttentionPattern(causal=True),
        "window": AttentionPattern(causal=True, window=50),
        "wide window": AttentionPattern(causal=True, window=300),
        "alibi": AttentionPattern(causal=True, alibi_slopes=slopes),
        "alibi, both ways": AttentionPattern(alibi_slopes=slopes),
        "documents": AttentionPattern(causal=True, documents=documents),
        "documents, both ways": AttentionPattern(documents=documents),
        "padding": AttentionPattern(causal=True, key_mask=key_mask),
        "padding, both ways": AttentionPattern(key_mask=key_mask),
        "all": AttentionPattern(True, 50, slopes, documents, key_mask),
    }


@pytest.mark.parametrize("name", examples(1, 1, 1))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_the_pattern(name, ours, monkeypatch):
    """On CUDA the compiled kernel and its gradients; elsewhere, where it cannot train, its formulas."""
    random = np.random.default_rng(0)
    B, K, H, T, D = 2, 2, 4, 300, 16
    q, dy = (array(random, (B, H, T, D)) for _ in range(2))
    k, v = (array(random, (B, K, T, D)) for _ in range(2))
    pattern = examples(B, H, T)[name]
    wanted = by_the_reference(q, k, v, dy, pattern, tile=64)
    moved = on(ours.device, pattern)
    if ours.device.startswith("cuda"):
        got = by_autograd(lambda *qkv: fast._flex(*qkv, moved), q, k, v, dy, "float32", ours.device)
    else:
        monkeypatch.setattr(fast, "_compiled", lambda kernel: kernel)
        got = [fast._flex(*(torch.tensor(value) for value in (q, k, v)), pattern).numpy()]
    for value, exact in zip(got, wanted, strict=False):
        np.testing.assert_allclose(value, exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", examples(1, 1, 1))
@pytest.mark.parametrize("T", [128, 300, 513])
def test_tiles_that_flex_attention_skips_or_does_not_ask_in(name, T):
    """What a pattern allows lies in tiles called possible; those called certain allow everything."""
    B, H, edge = 2, 4, fast._FLEX_TILE
    pattern = examples(B, H, T)[name]
    mask, _ = definition(pattern, B, H, T, T)
    missing = -T % edge
    padded = np.pad(mask, ((0, 0), (0, 0), (0, missing), (0, missing)))
    tiles = padded.reshape(B, H, (T + missing) // edge, edge, (T + missing) // edge, edge)
    possible, certain = (
        part.expand(B, H, -1, -1).numpy() for part in fast._tiles(pattern, T, T, torch.device("cpu"))
    )
    assert not (tiles.any((3, 5)) & ~possible).any()
    assert not (certain & ~tiles.all((3, 5))).any()
    if name in (
        "causal",
        "window",
        "wide window",
    ):  # where positions decide alone, nothing more is looked at either
        np.testing.assert_array_equal(possible, tiles.any((3, 5)))
        np.testing.assert_array_equal(certain, tiles.all((3, 5)))


@pytest.mark.parametrize(
    "name", ["causal", "window", "alibi", "documents", "padding", "padding, both ways", "all"]
)
def test_no_tensor_is_quadratic_in_the_context(name):
    """The largest tensor of a forward and a backward pass has H scores for each query of a block, and key."""
    T, H, D, queries_at_once = 1024, 2, 8, 32
    pattern = examples(1, H, T)[name]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            results = function(*arguments, **(options or {}))
            for result in results if isinstance(results, tuple | list) else [results]:
                if isinstance(result, torch.Tensor):
                    largest = max(largest, result.untyped_storage().nbytes() // result.element_size())
            return results

    q, k, v = (torch.randn(1, H, T, D, requires_grad=True) for _ in range(3))
    with Watch():
        flash_attention(q, k, v, pattern, queries_at_once).sum().backward()
    assert largest <= H * queries_at_once * T


_SLOPES, _NUMBERS, _KEYS = (
    torch.ones(4),
    torch.ones(2, 8, dtype=torch.int64),
    torch.ones(2, 8, dtype=torch.bool),
)


@pytest.mark.parametrize(
    ("pattern", "on_cpu", "on_cuda"),
    [
        (AttentionPattern(), Path.FULL, Path.FULL),
        (AttentionPattern(causal=True), Path.CAUSAL, Path.CAUSAL),
        (AttentionPattern(key_mask=_KEYS), Path.BLOCKS, Path.BLOCKS),
        (AttentionPattern(mask=_KEYS), Path.BLOCKS, Path.BLOCKS),
        (AttentionPattern(causal=True, window=4), Path.BLOCKS, Path.FLEX),
        (AttentionPattern(causal=True, key_mask=_KEYS), Path.BLOCKS, Path.FLEX),
        (AttentionPattern(alibi_slopes=_SLOPES), Path.BLOCKS, Path.FLEX),
        (AttentionPattern(documents=_NUMBERS), Path.BLOCKS, Path.FLEX),
    ],
)
def test_the_path_of_a_pattern(pattern, on_cpu, on_cuda, monkeypatch):
    monkeypatch.setattr(fast, "HAS_TRITON", True)
    cpu, mps, cuda = (torch.device(name) for name in ("cpu", "mps", "cuda"))
    assert choose_path(pattern, cpu, torch.float32, 64) == on_cpu
    assert choose_path(pattern, mps, torch.float32, 64) == on_cpu
    assert choose_path(pattern, cuda, torch.bfloat16, 64) == on_cuda
    assert choose_path(pattern, cuda, torch.bfloat16, 8) == on_cpu  # flex_attention begins at 16
    assert choose_path(pattern, cuda, torch.float64, 64) == on_cpu
    monkeypatch.setattr(fast, "HAS_TRITON", False)
    assert choose_path(pattern, cuda, torch.bfloat16, 64) == on_cpu


@pytest.mark.parametrize(
    ("pattern", "shape_of_k", "message"),
    [
        (AttentionPattern(window=3), (1, 4, 8, 2), "a window of 3 keys needs causal order"),
        (AttentionPattern(causal=True), (1, 4, 9, 2), "8 queries and 9 keys"),
        (AttentionPattern(alibi_slopes=_SLOPES), (1, 4, 9, 2), "8 queries and 9 keys"),
        (AttentionPattern(), (1, 3, 8, 2), "3 key/value heads do not divide 4 heads"),
    ],
)
def test_contradictions_are_named(pattern, shape_of_k, message):
    q, k = torch.zeros(1, 4, 8, 2), torch.zeros(shape_of_k)
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, k, pattern)


def test_queries_and_keys_of_different_lengths_with_padding():
    """Cross attention: each sentence of one length looks at one of another, and the third at nothing."""
    random = np.random.default_rng(0)
    q, dy = (array(random, (3, 2, 5, 4)) for _ in range(2))
    k, v = (array(random, (3, 2, 7, 4)) for _ in range(2))
    pattern = AttentionPattern(key_mask=torch.arange(7) < torch.tensor([[7], [3], [0]]))
    wanted = by_the_reference(q, k, v, dy, pattern)
    got = by_autograd(lambda *qkv: flash_attention(*qkv, pattern), q, k, v, dy)
    for value, exact in zip(got, wanted, strict=True):
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-12)
    assert not got[0][2].any() and not got[1][2].any()
