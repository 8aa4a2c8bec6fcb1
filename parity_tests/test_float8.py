"""Linear layers in float8: the same numbers and products on both sides, and how far they may be off."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests import tolerances
from parity_tests.strategies import array, seeds
from ref_numpy import float8 as plain
from ref_numpy.config import ModelConfig
from ref_numpy.linear import linear_backward, linear_forward
from torch_impl import float8 as fast
from torch_impl.linear import Linear, linear
from torch_impl.transformer import initialised

FORMATS = {"E4M3": (plain.E4M3, fast.E4M3), "E5M2": (plain.E5M2, fast.E5M2)}
REGIMES = ("normal", "zeros", "outlier", "ties")
EXTREMES = ("subnormal", "huge", "tiny")
SMALL = st.tuples(st.integers(1, 5), st.integers(1, 9))


@st.composite
def matrices(draw, shapes=SMALL, regimes=REGIMES):
    """Where everything but one is rounded to zero, where a half is, where the scale is at its limits."""
    shape = draw(shapes)
    random, regime = np.random.default_rng(draw(seeds)), draw(st.sampled_from(regimes))
    values = array(random, shape)
    if regime == "zeros":
        values[:] = 0
    if regime == "outlier":
        values[0, 0] = draw(st.sampled_from([1e3, 1e6]))
    if regime == "ties":  # with a largest magnitude of 448 or 57344 the scale is 1
        values = np.ldexp(random.integers(-64, 65, shape), random.integers(-12, 3, shape)).astype(float)
        values[0, 0] = draw(st.sampled_from([448.0, 57344.0]))
    sizes = {"subnormal": 1e-41, "huge": 3e37, "tiny": 1e-30}
    return (np.clip(values, -4, 4) * sizes[regime] if regime in sizes else values).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
@given(x=matrices(regimes=REGIMES + EXTREMES))
def test_values_and_scales_are_equal(ours, format, x):
    mine, theirs = FORMATS[format]
    want = plain.to_float8(x, mine)
    values, scale = fast.to_float8(torch.from_numpy(x).to(ours.device), theirs)
    assert scale.item() == want.scale and want.values.dtype == np.float32
    np.testing.assert_array_equal(values.float().cpu(), want.values)
    assert np.abs(want.values).max() <= mine.largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@given(x=matrices())
def test_numbers_of_half_precision_are_rounded_once(dtype, format, x):
    """Divided in their own precision they would be rounded to it before they are rounded to the format."""
    mine, theirs = FORMATS[format]
    x = torch.from_numpy(x).clamp(-6e4, 6e4).to(dtype)
    want = plain.to_float8(x.float().numpy(), mine)
    values, scale = fast.to_float8(x, theirs)
    assert scale.dtype == torch.float32 and scale.item() == want.scale
    np.testing.assert_array_equal(values.float(), want.values)


@pytest.mark.parametrize("format", FORMATS)
def test_every_number_of_a_format_stays_and_what_is_between_goes_to_the_nearest(format):
    """All 256 of them, by PyTorch's table; halves go to the even neighbour, whose last bit is 0."""
    mine, theirs = FORMATS[format]
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits.view(theirs).float().numpy()
    bits, numbers = (each[np.isfinite(numbers)] for each in (bits.numpy(), numbers))
    np.testing.assert_array_equal(plain.round_to(numbers, mine), numbers)
    order = np.argsort(numbers[numbers >= 0])
    low, high = numbers[numbers >= 0][order][:-1], numbers[numbers >= 0][order][1:]
    even = np.where(bits[numbers >= 0][order][:-1] % 2 == 0, low, high)
    for share, nearest in ((0.49, low), (0.5, even), (0.51, high)):
        between = (low + share * (high - low)).astype(np.float32)
        np.testing.assert_array_equal(plain.round_to(between, mine), nearest)
        np.testing.assert_array_equal(plain.round_to(-between, mine), -nearest)


def test_a_number_is_off_by_one_part_in_sixteen_at_most():
    """Or eight in E5M2, down to the smallest normal number, and by half the smallest step below it."""
    x = np.geomspace(1e-9, 448, 5000).astype(np.float32)
    for format, part, step in ((plain.E4M3, 2**-4, 2**-9), (plain.E5M2, 2**-3, 2**-16)):
        off = np.abs(plain.round_to(x, format) - x)
        assert (off <= np.maximum(part * x, step / 2)).all()
        assert (off > 0.9 * part * x).any()


@st.composite
def layers(draw):
    """Of any sizes: kernels want multiples of 16, and are given zeros besides."""
    places = draw(st.sampled_from([(), (1,), (7,), (16,), (2, 8), (3, 11)]))
    inputs, outputs = draw(st.sampled_from([1, 5, 16, 48])), draw(st.sampled_from([1, 9, 32]))
    rows = int(np.prod(places))
    shapes = (rows, inputs), (outputs, inputs), (rows, outputs)
    x, weight, dy = (draw(matrices(st.just(shape))) for shape in shapes)
    bias = draw(st.none() | st.just(array(np.random.default_rng(0), (outputs,)).astype(np.float32)))
    return x.reshape(*places, inputs), weight, bias, dy.reshape(*places, outputs)


def device_of(ours) -> torch.device:
    """The device that was asked for; a GPU that has no products in float8 leaves them to the CPU."""
    device = torch.device(ours.device)
    lacks = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    return torch.device("cpu") if lacks else device


def by_torch(device, *arrays):
    tensors = [None if each is None else torch.from_numpy(each).to(device) for each in arrays]
    leaves, dy = [None if each is None else each.requires_grad_() for each in tensors[:3]], tensors[3]
    y = fast.float8_linear(*leaves)
    y.backward(dy)
    return y.detach().cpu().numpy(), *(leaf.grad.cpu().numpy() for leaf in leaves if leaf is not None)


@given(layer=layers())
def test_products_are_those_of_the_rounded_matrices(ours, layer):
    """Up to their sums, which are float32 on both sides: bounded as any contraction is, twice over. Hopper's
    tensor cores keep fourteen bits of a sum (DeepSeek-AI 2024, DeepSeek-V3, section 3.3.2)."""
    device = device_of(ours)
    u_sum = 2.0**-13 if device.type == "cuda" else 2.0**-24
    precision = tolerances.PRECISIONS["float32"]._replace(u_sum=u_sum)
    x, weight, bias, dy = layer
    y, cache = plain.float8_linear_forward(x, weight, bias)
    want = y, *(each for each in plain.float8_linear_backward(dy, cache) if each is not None)
    rows = dy.reshape(-1, dy.shape[-1])
    dy8 = plain.to_float8(rows, plain.E5M2)
    x8, w8, dy8 = ((each.values * each.scale).astype(float) for each in (*cache[:2], dy8))
    factors = (x8, w8.T), (dy8, w8), (dy8.T, x8)
    found = by_torch(device, *layer)
    assert [each.shape for each in found] == [each.shape for each in want] and len(want) == 3 + (
        bias is not None
    )
    for got, wanted, (a, b) in zip(found, want, factors, strict=False):
        magnitude = (np.abs(a) @ np.abs(b)).reshape(wanted.shape) + (0 if bias is None else np.abs(wanted))
        bound = 2 * tolerances.contraction(magnitude, a.shape[1], precision)
        assert (np.abs(got - wanted) <= bound).all()
    for dbias in (*want[3:], *found[3:]):  # is no product, and knows dy as it was
        off = np.abs(dbias - rows.sum(axis=0, dtype=float))
        assert (off <= 1e-5 * np.abs(rows).max(initial=0)).all()


@given(seed=seeds, rows=st.integers(1, 3), inputs=st.integers(1, 5))
def test_an_ordinary_layer_is_near(seed, rows, inputs):
    """|y8 - y| <= [(1 + u)(1 + v) - 1] |x| |W^T| + what is lost below the smallest normal number, u and v
    being the roundoffs of both factors: 2^-4, of gradients 2^-3."""
    random = np.random.default_rng(seed)
    x, weight, dy = (
        array(random, shape) for shape in ((16 * rows, 16 * inputs), (16, 16 * inputs), (16 * rows, 16))
    )
    y, cache = linear_forward(x, weight, None)
    exact = y, *linear_backward(dy, cache)[:2]
    y8, cache8 = plain.float8_linear_forward(x, weight, None)
    near = y8, *plain.float8_linear_backward(dy, cache8)[:2]
    digits = 2.0**-4, 2.0**-4, 2.0**-3  # of x, W and dy
    lost = [np.abs(m).max() * 2.0**-10 / largest for m, largest in ((x, 448), (weight, 448))]
    lost.append(np.abs(dy).max() * 2.0**-17 / 57344)
    for got, wanted, (a, b), (i, j) in zip(
        near, exact, ((x, weight.T), (dy, weight), (dy.T, x)), ((0, 1), (2, 1), (2, 0)), strict=True
    ):
        a, b = np.abs(a), np.abs(b)
        a_off, b_off = digits[i] * a + lost[i], digits[j] * b + lost[j]
        bound = a_off @ b + a @ b_off + a_off @ b_off
        error = np.abs(got - wanted)
        assert (error <= bound * (1 + 1e-5)).all()
        assert error.max() > 1e-4 * bound.max(), "nothing was rounded"


def test_the_layers_of_blocks_alone_compute_in_float8():
    """Neither embeddings nor the head; and the gradients are still near those of float32."""
    config = ModelConfig(
        vocab_size=32, context_length=16, n_layer=1, n_head=2, d_model=32, tied_embeddings=False
    )
    ids = torch.arange(32).reshape(2, 16)
    plainly, in_float8 = (initialised(config, 3) for _ in range(2))
    fast.use_float8(in_float8)
    served = {
        name for name, m in in_float8.named_modules() if isinstance(m, Linear) and m.multiply is not linear
    }
    assert served == {
        f"blocks.0.{name}" for name in ("attention.qkv", "attention.proj", "ffn.up", "ffn.down")
    }
    for model in (plainly, in_float8):
        model.loss((ids, ids.roll(1, 1))).backward()
    for (name, wanted), got in zip(plainly.named_parameters(), in_float8.parameters(), strict=True):
        off = (got.grad - wanted.grad).norm() / wanted.grad.norm()
        assert off < 0.2 or wanted.ndim == 1, name  # sums over places cancel
    assert not torch.equal(plainly.blocks[0].ffn.up.weight.grad, in_float8.blocks[0].ffn.up.weight.grad)
    with torch.no_grad():  # an evaluation is of the model as it will be used
        assert torch.equal(plainly(ids), in_float8(ids))


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 31), (5, 48)])
def test_kernels_are_given_multiples_of_sixteen(shape):
    """Which CUDA's insist on."""
    x, weight, dy = torch.randn(shape), torch.randn(7, shape[1]), torch.randn(shape[0], 7)
    for matrix in (x, weight, dy):
        filled = fast._filled(matrix)
        assert all(
            size % 16 == 0 and 0 <= size - own < 16
            for size, own in zip(filled.shape, matrix.shape, strict=True)
        )
        assert torch.equal(filled[: matrix.shape[0], : matrix.shape[1]], matrix)
        assert filled.abs().sum() == pytest.approx(matrix.abs().sum())
