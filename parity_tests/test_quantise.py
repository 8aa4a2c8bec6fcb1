"""Quantisation: equal to the bit on both sides, never off by more than half a step; and its products."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests import tolerances
from parity_tests.strategies import array, model_configs, model_params, seeds
from ref_numpy import quantise as plain
from ref_numpy.transformer import transformer_forward
from torch_impl import quantise as fast
from torch_impl.transformer import Transformer

REGIMES = ("normal", "zeros", "outlier", "ties", "subnormal", "huge", "mixed_rows")


def matrix(random: np.random.Generator, shape: tuple[int, int], regime: str, dtype: type) -> np.ndarray:
    """Weights of a regime: where a scale vanishes, one takes the whole range, or a half is rounded."""
    values = array(random, shape)
    tiny, largest = np.finfo(dtype).tiny, np.finfo(dtype).max
    if regime == "zeros":
        values[random.random(shape[0]) < 0.7] = 0.0
    if regime == "outlier":
        values[random.integers(shape[0]), random.integers(shape[1])] = 1e6
    if regime == "ties":  # with a largest magnitude of 127 or 7 the scale is 1, and halves are ties
        values = random.integers(-6, 7, shape) + 0.5
        values[:, 0] = 127.0 if random.random() < 0.5 else 7.0
        values *= random.choice([1.0, 237.0])  # the scale then; halves times 1 / 237 are halves no more
    if regime == "subnormal":
        values = values * tiny * random.choice([1e-7, 1e-3, 1.0, 100.0], shape)
    if regime == "huge":
        values = np.clip(values, -3, 3) * (largest / 4)
    if regime == "mixed_rows":
        values *= 10.0 ** random.integers(-30, 30, (shape[0], 1))
    return values.astype(dtype)


@st.composite
def cases(draw):
    """A matrix with odd sizes too, its bits, and a group size: with a rest or without, 0, too large."""
    shape = draw(st.integers(1, 7)), draw(st.integers(1, 19))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    weight = matrix(np.random.default_rng(draw(seeds)), shape, draw(st.sampled_from(REGIMES)), dtype)
    return weight, draw(st.sampled_from([8, 4])), draw(st.sampled_from([0, 1, 2, 3, 4, 8, 100]))


@given(case=cases())
def test_values_bytes_and_scales_are_equal(case):
    weight, bits, group_size = case
    want = plain.quantise(weight, bits, group_size)
    got = fast.quantise(torch.from_numpy(weight), bits, group_size)
    assert got.values.numpy().dtype == want.values.dtype and got.scales.numpy().dtype == want.scales.dtype
    np.testing.assert_array_equal(got.values, want.values)
    np.testing.assert_array_equal(got.scales, want.scales)
    assert got[2:] == want[2:]
    np.testing.assert_array_equal(fast.dequantise(got), plain.dequantise(want))


@given(case=cases())
def test_no_weight_is_off_by_more_than_half_a_step(case):
    """|w - q s| <= s / 2. Quotient and product are rounded besides, by u of what is at most L s each."""
    weight, bits, group_size = case
    quantised = plain.quantise(weight, bits, group_size)
    scales = np.repeat(quantised.scales, quantised.group_size, axis=1)[:, : weight.shape[1]]
    rounding = 2 * plain.LIMITS[bits] * np.finfo(weight.dtype).eps
    back = plain.dequantise(quantised)
    with np.errstate(under="ignore"):
        error = np.abs(weight / scales - back / scales)
    assert back.dtype == weight.dtype and (error <= 0.5 + rounding).all()
    assert (back[weight == 0] == 0).all()


@given(case=cases())
def test_laws(case):
    """Quantising what was quantised changes nothing; -W has -q; values keep to their range, in any order."""
    weight, bits, group_size = case
    quantised = plain.quantise(weight, bits, group_size)
    values = quantised.values if bits == 8 else plain.unpack(quantised.values, weight.shape[1])
    assert np.abs(values.astype(int)).max() <= plain.LIMITS[bits]
    negative = plain.quantise(-weight, bits, group_size)
    np.testing.assert_array_equal(plain.dequantise(negative), -plain.dequantise(quantised))
    if (quantised.scales > 2 * np.finfo(weight.dtype).tiny).all():  # else 0 has the smallest scale there is
        again = plain.quantise(plain.dequantise(quantised), bits, group_size)
        np.testing.assert_array_equal(again.values, quantised.values)
    flipped = plain.quantise(weight[::-1], bits, group_size)
    np.testing.assert_array_equal(flipped.values, quantised.values[::-1])


@given(seed=seeds, outputs=st.integers(1, 5), inputs=st.integers(1, 9))
def test_packing_keeps_every_number_at_its_place(seed, outputs, inputs):
    values = np.random.default_rng(seed).integers(-7, 8, (outputs, inputs), np.int8)
    packed = plain.pack(values)
    half = -(-inputs // 2)
    assert packed.shape == (outputs, half)
    np.testing.assert_array_equal(packed & 15, values[:, :half] % 16)
    np.testing.assert_array_equal((packed >> 4)[:, : inputs - half], values[:, half:] % 16)
    np.testing.assert_array_equal(plain.unpack(packed, inputs), values)
    np.testing.assert_array_equal(fast.pack(torch.from_numpy(values)), packed)
    np.testing.assert_array_equal(fast.unpack(torch.from_numpy(packed), inputs), values)


def test_by_hand():
    """Largest magnitude 7 makes the scale 1: 0.5 goes to 0 and 1.5 to 2. A group of zeros stays zero."""
    weight = np.array([[7.0, 0.5, 1.5, -2.5, 0.0, 0.0]])
    quantised = plain.quantise(weight, 4, group_size=4)
    assert quantised.scales.tolist() == [[1.0, np.finfo(float).tiny]]
    assert plain.unpack(quantised.values, 6).tolist() == [[7, 0, 2, -2, 0, 0]]
    assert quantised.values.tolist() == [[7 | (14 << 4), 0, 2]]
    assert plain.dequantise(quantised).tolist() == [[7, 0, 2, -2, 0, 0]]
    assert plain.quantise(np.array([[1.0, -127.0]]), 8).values.tolist() == [[1, -127]]


@pytest.mark.parametrize("side", ["plain", "fast"])
@pytest.mark.parametrize(
    ("weight", "bits", "group_size", "message"),
    [
        (1.0, 5, 0, "bits is 5, but must be 8 or 4"),
        (1.0, 8, -1, "group_size is -1, but must be 0"),
        (np.nan, 8, 0, "no finite number"),
        (-np.inf, 4, 0, "no finite number"),
    ],
)
def test_what_cannot_be_quantised(side, weight, bits, group_size, message):
    array = np.full((2, 3), weight)
    with pytest.raises(ValueError, match=message):
        if side == "plain":
            plain.quantise(array, bits, group_size)
        else:
            fast.quantise(torch.from_numpy(array), bits, group_size)


@given(
    seed=seeds,
    rows=st.sampled_from([(), (1,), (2, 3), (9,)]),
    shape=st.sampled_from([(5, 7), (16, 32), (3, 257)]),
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([0, 4, 100]),
    has_bias=st.booleans(),
    at_once=st.sampled_from([1, 20, 1 << 19]),
)
def test_products(ours, seed, rows, shape, bits, group_size, has_bias, at_once):
    """By the rounding rule for products: in float64 the same mathematics, below within their condition.

    However many rows at a time. Below float64 the dequantised weight is rounded before it is multiplied, or
    the product before it is scaled: one rounding more than the bound of a plain product has, and the scale's.
    """
    random = np.random.default_rng(seed)
    drawn = plain.quantise(array(random, shape), bits, group_size)
    x, bias = array(random, (*rows, shape[1])), array(random, (shape[0],)) if has_bias else None
    usual, fast._NUMBERS_AT_ONCE = fast._NUMBERS_AT_ONCE, at_once
    try:
        for name in ("float64", *ours.precisions):
            precision = tolerances.PRECISIONS[name]
            dtype = getattr(torch, precision.torch_dtype)
            device = "cpu" if name == "float64" else ours.device
            scales = torch.from_numpy(drawn.scales).to(torch.float64 if name == "float64" else torch.float32)
            inputs = torch.from_numpy(x).to(dtype)
            added = torch.from_numpy(bias).to(dtype) if has_bias else None
            values = torch.from_numpy(drawn.values).to(device)
            got = fast.quantised_linear(
                inputs.to(device),
                fast.Quantised(values, scales.to(device), *drawn[2:]),
                added.to(device) if has_bias else None,
            )
            assert got.dtype == dtype
            exact = drawn._replace(scales=scales.double().numpy())
            oracle_x = inputs.double().numpy()
            oracle_bias = added.double().numpy() if has_bias else None
            want = plain.quantised_linear(oracle_x, exact, oracle_bias)
            magnitude = np.abs(oracle_x) @ np.abs(plain.dequantise(exact)).T
            magnitude = magnitude + (np.abs(oracle_bias) if has_bias else 0)
            bound = tolerances.contraction(magnitude, shape[1] + 1, precision) + 2 * precision.u * magnitude
            assert (np.abs(got.cpu().double().numpy() - want) <= bound).all(), name
    finally:
        fast._NUMBERS_AT_ONCE = usual


@given(config=model_configs(), seed=seeds, bits=st.sampled_from([8, 4]), group_size=st.sampled_from([0, 3]))
def test_a_quantised_model_is_the_reference_with_dequantised_weights(config, seed, bits, group_size):
    """Also one that is put together again from its state, whose tensors have the described shapes."""
    params = model_params(config, seed)
    model = Transformer(config, torch.float64).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    fast.quantise_model(model, bits, group_size)
    state = model.state_dict()
    shapes = {name: shape for name, (_, shape) in fast.quantised_shapes(config, bits, group_size).items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes

    for name, value in params.items():
        module = name.removesuffix(".weight")
        if f"{module}.values" in state:
            own_bits = fast.bits_of(module, bits)
            params[name] = plain.dequantise(plain.quantise(value, own_bits, group_size))
    unchanged = {name for name in params if name in state}
    assert all(name.endswith("bias") or "norm" in name or "position" in name for name in unchanged)

    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 5))
    want, _ = transformer_forward(params, ids, config)
    loaded = Transformer(config, torch.float64).double()
    fast.load_quantised(loaded, state, bits, group_size)
    with torch.no_grad():
        for each in (model, loaded):
            got = each(torch.from_numpy(ids)).numpy()
            assert (np.abs(got - want) <= tolerances.mathematics(want, np.abs(want).max())).all()
    np.testing.assert_array_equal(model.token_embedding.weight, params["token_embedding.weight"])
