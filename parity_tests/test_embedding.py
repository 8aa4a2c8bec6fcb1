"""Token embeddings: parity, with tokens that occur often and tokens that never do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import arrays, seeds, sizes
from ref_numpy.embedding import embedding_backward, embedding_forward


@given(shape=sizes(4), data=st.data(), seed=seeds)
def test_parity(agree, shape, data, seed):
    B, T, V, C = shape
    ids = np.random.default_rng(data.draw(seeds)).integers(V, size=(B, T))
    agree("embedding", seed, ids=ids, weight=data.draw(arrays((V, C))))


def test_a_token_that_occurs_twice_gets_both_gradients():
    _, cache = embedding_forward(np.array([[1, 1, 0]]), np.zeros((3, 2)))
    gradient = embedding_backward(np.array([[[1.0, 2.0], [10.0, 20.0], [5.0, 6.0]]]), cache)
    assert gradient.tolist() == [[5, 6], [11, 22], [0, 0]]


@pytest.mark.parametrize("token", [-1, 3, 4])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 3"):
        embedding_forward(np.array([[1, 0, token]]), np.zeros((3, 2)))
