"""The byte tokenizer and its file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_impl.training.files import InputError
from torch_impl.training.tokenizer import ByteTokenizer, load_tokenizer


@given(st.text())
def test_decoding_what_was_encoded_gives_the_text(text):
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.uint8
    assert ByteTokenizer().decode(ids) == text
    assert ByteTokenizer().decode(list(map(int, ids))) == text


def test_bytes_that_are_no_text_decode_with_a_replacement_character():
    assert ByteTokenizer().decode([0x61, 0xC3, 0x62]) == "a\ufffdb"
    assert ByteTokenizer().decode_bytes([0x61, 0xC3, 0x62]) == b"a\xc3b"


def test_saved_file_loads_again(tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.json"), ByteTokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"model": 3}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"tokenizer\.json is damaged: "):
        load_tokenizer(path)
