"""Random numbers: the same bits on both sides, and the bits that Philox's authors publish."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import seeds
from ref_numpy import rng as plain
from ref_numpy.rng import DATA, DROPOUT, INIT, MASK, SAMPLE, Key
from torch_impl import rng as fast

# philox4x32-10 in kat_vectors of Random123: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

keys = st.builds(
    Key,
    seed=st.integers(0, 2**64 - 1),
    purpose=st.sampled_from([INIT, DATA, DROPOUT, SAMPLE, MASK]),
    step=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**32 - 1),
)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_no_two_purposes_share_their_bits():
    """Else a model's first weights and the places of its first batch would be made of the same numbers.

    Nor does a purpose change its number, or no run could be repeated that was made before.
    """
    uses = (INIT, DATA, DROPOUT, SAMPLE, MASK)
    assert uses == (0, 1, 2, 3, 4)
    block = np.arange(1, dtype=np.uint64)
    assert len({tuple(plain.random_bits(Key(0, use), block)[0]) for use in uses}) == 5


@given(key=keys, streams=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5))
def test_the_first_numbers_of_several_streams_are_those_of_each(key, streams):
    want = [plain.uniform(key._replace(stream=stream), 1)[0] for stream in streams]
    assert fast.first_uniform(key, torch.tensor(streams)).tolist() == want


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    in_numpy = plain.philox(np.array(words(counter), np.uint64)[:, None], tuple(words(key)))
    assert in_numpy[:, 0].tolist() == words(result)
    in_torch = fast.philox(tuple(torch.tensor([word]) for word in words(counter)), tuple(words(key)))
    assert [word.item() for word in in_torch] == words(result)


@given(key=keys, blocks=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
def test_bits_are_equal(ours, key, blocks):
    want = plain.random_bits(key, np.array(blocks, np.uint64))
    got = fast.random_bits(key, torch.tensor(blocks, device=ours.device))
    assert torch.stack(got, dim=1).tolist() == want.tolist()


@given(key=keys, n=st.integers(1, 40))
def test_uniforms_are_equal_and_normals_agree(key, n):
    assert fast.uniform(key, n).numpy().tolist() == plain.uniform(key, n).tolist()
    np.testing.assert_allclose(fast.normal(key, n).numpy(), plain.normal(key, n), rtol=1e-13, atol=1e-13)


@given(key=keys, n=st.integers(1, 30), more=st.integers(0, 30))
def test_a_longer_draw_begins_with_the_shorter_one(key, n, more):
    assert plain.uniform(key, n + more)[:n].tolist() == plain.uniform(key, n).tolist()
    assert plain.normal(key, n + more)[:n].tolist() == plain.normal(key, n).tolist()


@given(key=keys)
def test_a_step_may_be_a_tensor(key):
    with_tensor = fast.uniform(key._replace(step=torch.tensor(key.step)), 5)
    assert with_tensor.tolist() == fast.uniform(key, 5).tolist()


@given(key=keys, field=st.sampled_from(["seed", "purpose", "step", "stream"]), bit=st.integers(0, 31))
def test_another_address_has_other_bits(key, field, bit):
    """Each field reaches the cipher whole: one changed bit of it changes the draw."""
    other = key._replace(**{field: getattr(key, field) ^ (1 << bit)})
    block = np.arange(1, dtype=np.uint64)
    assert plain.random_bits(key, block).tolist() != plain.random_bits(other, block).tolist()
    high = key._replace(seed=key.seed ^ (1 << (32 + bit)))
    assert plain.random_bits(key, block).tolist() != plain.random_bits(high, block).tolist()


def test_a_uniform_is_made_of_the_high_bits_of_two_words():
    """By hand, from the first known answer: 6627e8d5 and e169c58d, 27 bits of one and 26 of the other."""
    want = ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    assert plain.uniform(Key(0, INIT), 1).tolist() == [want]


@given(seed=seeds)
def test_distributions(seed):
    """Moments of 20,000 draws, each within six standard deviations of what theory says."""
    n = 20_000
    u, z = plain.uniform(Key(seed, DATA), n), plain.normal(Key(seed, INIT), n)
    assert u.min() >= 0 and u.max() < 1
    moments = [
        (u, 1, 1 / 2, 1 / 3),
        (u, 2, 1 / 3, 1 / 5),
        (z, 1, 0, 1),
        (z, 2, 1, 3),
        (z, 3, 0, 15),
        (z, 4, 3, 105),
    ]
    for draws, power, expected, of_the_square in moments:
        deviation = np.sqrt((of_the_square - expected**2) / n)
        assert abs((draws**power).mean() - expected) < 6 * deviation
    neighbours = (z[1:] * z[:-1]).mean()
    assert abs(neighbours) < 6 / np.sqrt(n)


@pytest.mark.parametrize("beyond", [2**32, 2**32 + 1])
def test_a_stream_ends_at_its_last_block(beyond):
    with pytest.raises(ValueError, match=rf"block {beyond} .* 2\*\*32"):
        plain.random_bits(Key(0, INIT), np.array([0, beyond], np.uint64))
