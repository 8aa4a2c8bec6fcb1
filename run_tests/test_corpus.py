"""Texts beyond memory, and what is made of them once and kept."""

import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_impl.training.cache import cached
from torch_impl.training.corpus import encoded
from torch_impl.training.files import InputError
from torch_impl.training.text import Text, file_text
from torch_impl.training.tokenizer import ByteTokenizer

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(texts, st.integers(0, 10), st.integers(1, 9))
def test_a_text_is_split_by_characters_whatever_the_blocks(text, tenths, size):
    told = []
    first, rest = Text(text.encode("utf-8")).split(tenths, told.append, size)
    cut = len(text) * tenths // 10
    assert "".join(first.parts(size)) == text[:cut] and "".join(rest.parts(size)) == text[cut:]
    assert first.size() + rest.size() == sum(told) == len(text.encode("utf-8"))


@given(texts, texts, texts, st.integers(0, 10), st.integers(1, 9))
def test_a_stretch_of_a_text_is_split_as_if_it_stood_alone(before, text, after, tenths, size):
    start, end = len(before.encode()), len((before + text).encode())
    first, rest = Text(f"{before}{text}{after}".encode(), start, end).split(tenths, block_size=size)
    cut = len(text) * tenths // 10
    assert "".join(first.parts()) == text[:cut] and "".join(rest.parts()) == text[cut:]


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_an_editors_mark_is_no_part_of_a_text(blocks):
    Path("marked.txt").write_bytes(b"\xef\xbb\xbfa text")
    text = file_text("marked.txt")
    assert "".join(text.parts(blocks)) == "a text" and text.size() == 6
    first, rest = text.split(5, block_size=blocks)
    assert "".join(first.parts()) == "a t" and "".join(rest.parts()) == "ext"


@given(st.binary(min_size=1), st.integers(1, 5))
def test_the_first_byte_that_is_no_text_is_named(content, size):
    try:
        assert "".join(Text(content).parts(size)) == content.decode("utf-8")
    except InputError as error:
        with pytest.raises(UnicodeDecodeError) as expected:
            content.decode("utf-8")
        assert f"byte {expected.value.start} is" in str(error)


@given(texts, texts, st.integers(1, 5))
def test_a_nul_is_named(before, after, size):
    content = f"{before}\0{after}".encode()
    with pytest.raises(InputError, match=f"byte {len(before.encode())} is NUL"):
        Text(content).split(9, block_size=size)


def test_a_text_that_is_written_to_while_it_is_read_is_not_kept(tmp_path):
    """Its tokens stood in the cache under the name of the text as it was before, for every later run."""
    path, cache = tmp_path / "text.txt", tmp_path / "cache"
    path.write_bytes(b"a text " * 50)
    text = Text(path)
    digest = text.sha256()
    path.write_bytes(b"A TEXT " * 50)
    with pytest.raises(InputError, match=r"text\.txt has changed while it was read"):
        encoded(text, digest, ByteTokenizer(), (), cache)
    path.write_bytes(b"a text " * 50)
    assert bytes(encoded(text, digest, ByteTokenizer(), (), cache)) == b"a text " * 50


# --- the cache ------------------------------------------------------------------------------------


class Maker:
    """Yields its content, and counts how often it has to."""

    def __init__(self, *content: bytes):
        self.content, self.made = content, 0

    def __call__(self):
        self.made += 1
        yield from self.content


def content_of(path: Path, size: int) -> bytes:
    return path.read_bytes()[:size]


def test_what_was_made_is_used_again(tmp_path):
    make, other = Maker(b"one", b"two"), Maker(b"other")
    for _ in range(3):
        assert content_of(*cached(tmp_path / "cache", "ids", {"text": "a"}, make)) == b"onetwo"
    assert content_of(*cached(tmp_path / "cache", "ids", {"text": "b"}, other)) == b"other"
    assert content_of(*cached(tmp_path / "cache", "tokenizer", {"text": "a"}, other)) == b"other"
    assert (make.made, other.made) == (1, 2)


def test_a_file_that_is_damaged_or_anothers_is_made_anew(tmp_path):
    make = Maker(b"some content")
    path, size = cached(tmp_path, "ids", {}, make)
    whole = path.read_bytes()
    another, _ = cached(tmp_path, "ids", {"text": "another"}, Maker(b"anything else"))
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in (0, 5, size, len(whole) - 1)]
    damages = [b"", whole[:5], whole[:-1], whole + b"x", b"x" * 100, another.read_bytes(), *flipped]
    for times, damage in enumerate(damages, 1):
        path.write_bytes(damage)
        assert cached(tmp_path, "ids", {}, make) == (path, size)
        assert path.read_bytes() == whole and make.made == times + 1


def test_making_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield b"half"
        raise InputError("the text is no text")

    with pytest.raises(InputError, match="the text is no text"):
        cached(tmp_path, "ids", {}, broken)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_do_not_disturb_each_other(tmp_path):
    def slow():
        yield b"con"
        cached(tmp_path, "ids", {}, Maker(b"con", b"tent"))  # another process, from its begin to its end
        yield b"tent"

    assert content_of(*cached(tmp_path, "ids", {}, slow)) == b"content"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_is_not(tmp_path):
    path, _ = cached(tmp_path, "ids", {}, Maker(b"content"))
    path.unlink()
    abandoned, living, foreign = (
        tmp_path / f"{name}.being-written" for name in (f"{path.name}.a", f"{path.name}.b", "x")
    )
    for file in (abandoned, living, foreign):
        file.write_bytes(b"half")
    for file in (abandoned, foreign):
        os.utime(file, (time.time() - 9999,) * 2)
    cached(tmp_path, "ids", {}, Maker(b"content"))
    assert set(tmp_path.iterdir()) == {path, living, foreign}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot keep .*file.*name another folder with --cache") as error:
        cached(tmp_path / "file", "ids", {}, Maker(b"content"))
    assert not re.search(r"\n", str(error.value))
