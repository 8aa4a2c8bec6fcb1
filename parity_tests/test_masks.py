"""Masks: equal on both sides, and equal to what they say, place by place."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.strategies import documents
from ref_numpy import masks as plain
from ref_numpy.masks import PADDING
from torch_impl import masks as fast

packed = documents(3, 8).filter(lambda numbers: numbers is not None)


@given(length=st.integers(1, 9), before=st.integers(0, 5))
def test_parity_of_causal_mask(agree, length, before):
    agree("causal_mask", length=length, before=before)


@given(length=st.integers(1, 9), window=st.integers(1, 12), before=st.integers(0, 5))
def test_parity_of_window_mask(agree, length, window, before):
    agree("window_mask", length=length, window=window, before=before)


@given(numbers=packed, before=st.integers(0, 5))
def test_parity_of_document_mask(agree, numbers, before):
    agree("document_mask", documents=numbers, before=before)


@given(length=st.integers(1, 40))
def test_a_token_sees_what_came_before(length):
    want = [[key <= query for key in range(length)] for query in range(length)]
    assert plain.causal_mask(length).tolist() == want
    assert fast.causal_mask(length).tolist() == want


@given(length=st.integers(1, 20), window=st.integers(1, 22))
def test_a_window_counts_the_querys_own_key(length, window):
    want = [[key <= query and query - key < window for key in range(length)] for query in range(length)]
    assert plain.window_mask(length, window).tolist() == want
    assert fast.window_mask(length, window).tolist() == want
    seen = plain.window_mask(length, window).sum(axis=1)
    assert seen.tolist() == [min(query + 1, window) for query in range(length)]


def test_nobody_sees_padding():
    present = np.array([[True, True, False], [True, False, False]])
    want = np.array([[[[True, True, False]]], [[[True, False, False]]]])
    assert (plain.padding_mask(present) == want).all()
    assert (fast.padding_mask(torch.from_numpy(present)).numpy() == want).all()


@given(numbers=packed)
def test_documents_see_themselves_alone(numbers):
    mask = plain.document_mask(numbers)
    for b, t, s in np.ndindex(3, 8, 8):
        assert mask[b, 0, t, s] == (numbers[b, t] == numbers[b, s] and numbers[b, s] != PADDING)
    assert (fast.document_mask(torch.from_numpy(numbers)).numpy() == mask).all()


def test_documents_by_hand():
    want = [[True, False, False, False], [False, True, True, False], [False, True, True, False], [False] * 4]
    assert plain.document_mask(np.array([[0, 1, 1, -1]]))[0, 0].tolist() == want


@given(numbers=packed)
def test_places_begin_anew_with_each_document(numbers):
    places = plain.places_in_documents(numbers)
    assert (fast.places_in_documents(torch.from_numpy(numbers)).numpy() == places).all()
    for row, own in zip(numbers, places, strict=True):
        place = 0
        for t in range(8):
            place = place + 1 if t and row[t] == row[t - 1] else 0
            assert own[t] == place


def test_places_by_hand():
    assert plain.places_in_documents(np.array([[-1, -1, 5, 5, 5, 2, 5]])).tolist() == [[0, 1, 0, 1, 2, 0, 0]]
