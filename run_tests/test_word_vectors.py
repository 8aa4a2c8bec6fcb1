"""Pretrained word vectors: the files that people have, the rows they go to, and runs that begin with them."""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from run_tests.conftest import content
from torch_impl.training.files import InputError
from torch_impl.training.tokenizer import WordTokenizer, load_tokenizer
from torch_impl.training.word_vectors import (
    WordVectors,
    coverage,
    place_word_vectors,
    read_word_vectors,
    vector_width,
)

WIDTH = 16
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "dog",
    ".",
    "bird",
)  # and not: –, so, they, say, lazy
WITH_VECTORS = ("--tokenizer", "words", "--lowercase", "--word-vectors", "vectors.txt")
TABLE = "token_embedding.weight"


def lines(words=WORDS, width: int = WIDTH, seed: int = 0) -> list[str]:
    numbers = 0.4 * np.random.default_rng(seed).standard_normal((len(words), width))
    return [f"{word} {' '.join(f'{x:.5f}' for x in row)}" for word, row in zip(words, numbers, strict=True)]


def write(rows: list[str] | bytes, name: str = "vectors.txt") -> Path:
    path = Path(name)
    path.write_bytes(rows if isinstance(rows, bytes) else "".join(f"{row}\n" for row in rows).encode("utf-8"))
    return path


def read(rows: list[str] | bytes, *words: str) -> WordVectors:
    return read_word_vectors(write(rows), {word: row for row, word in enumerate(words)})


def table(run: str, checkpoint: str = "last") -> torch.Tensor:
    return load_file(Path(run) / checkpoint / "model.safetensors")[TABLE]


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", " \n"])
def test_words_go_to_their_rows(ending):
    content = ending.join(["the 1 2.5", "– -3 4e-1", "cat 5 6", ""]).encode("utf-8")
    got = read(content, "cat", "dog", "–")
    assert got.found.tolist() == [True, False, True]
    assert got.vectors.tolist() == [[5, 6], [0, 0], [-3, np.float32(0.4)]]
    assert vector_width(Path("vectors.txt")) == 2
    whole = read(content.rstrip(), "cat")  # the last line need not end
    assert whole.found.all()


def test_a_header_is_skipped_and_kept_to():
    assert read(["2 3", "2 1 2 3", "b 4 5 6"], "2", "b").vectors.tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(
        InputError, match=r"line 1 promises 3 vectors, but there are 2; is the file cut short"
    ):
        read(["3 3", "a 1 2 3", "b 4 5 6"], "a")


def test_the_first_word_may_be_a_number():
    assert read(["1 10 20", "2 30 40"], "2", "1").vectors.tolist() == [[30, 40], [10, 20]]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_words_with_spaces_end_where_the_numbers_begin(place):
    """As in glove.840B.300d."""
    rows = ["a 1 2 3", "b 4 5 6"]
    rows.insert(place, ". . . 7 8 9")
    rows.append("at name@domain.com 1 1 1")
    got = read(rows, "a", "b", ". . .", "at name@domain.com", ".")
    assert got.found.tolist() == [True, True, True, True, False]
    assert got.vectors[2].tolist() == [7, 8, 9]


def test_spaces_that_are_not_ascii_belong_to_words():
    assert read(["a\u00a0b 1 2", "\u0085 3 4"], "a\u00a0b", "\u0085").vectors.tolist() == [[1, 2], [3, 4]]


def test_of_a_word_that_stands_twice_the_first_is_taken():
    assert read(["a 1 2", "a 3 4"], "a").vectors.tolist() == [[1, 2]]


@given(
    words=st.lists(st.text(st.characters(exclude_characters="\n\r "), min_size=1), unique=True, min_size=1),
    width=st.integers(2, 5),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_what_is_written_is_read(tmp_path_factory, words, width, seed, data):
    words = [word.encode("utf-8", "ignore").decode("utf-8") or "x" for word in words]
    words = list(dict.fromkeys(words))
    vectors = np.random.default_rng(seed).standard_normal((len(words), width)).astype(np.float32)
    path = tmp_path_factory.mktemp("vectors") / "v.txt"
    rows = (f"{word} {' '.join(map(repr, row.tolist()))}\n" for word, row in zip(words, vectors, strict=True))
    path.write_bytes("".join(rows).encode("utf-8"))
    wanted = [*data.draw(st.permutations(words)), "not there"]
    got = read_word_vectors(path, {word: row for row, word in enumerate(wanted)})
    assert got.found.tolist() == [True] * len(words) + [False]
    order = [words.index(word) for word in wanted[:-1]]
    np.testing.assert_array_equal(got.vectors[:-1], vectors[order])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"c 1 2", "line 3 has 2 numbers, but the first vector has 3"),
        (b"c 1 2 3 4", "line 3 has 4 numbers, but the first vector has 3"),
        (b"c", "line 3 has 0 numbers, but the first vector has 3"),
        (b"c 1 two 3", "line 3: 'two' is no number"),
        (b"c 1 1_0 3", "line 3: '1_0' is no number"),
        (b"c 1 \xff 3", "line 3: '\ufffd' is no number"),
        (b"c 1 nan 3", "line 3: nan is no finite number"),
        (b"c 1 -inf 3", "line 3: -inf is no finite number"),
        (b"c 1 2 Infinity", "line 3: Infinity is no finite number"),
        (b"", "line 3 is empty; remove it"),
        (b"  ", "line 3 is empty; remove it"),
        (b" 1 2 3", "line 3 has no word before its numbers"),
        (b"caf\xe9 1 2 3", "line 3 is not UTF-8: byte 0xe9 in its word"),
    ],
)
@pytest.mark.parametrize("wanted", ["c", "a"])
def test_a_bad_line_is_named_whether_its_word_is_wanted_or_not(bad, message, wanted):
    with pytest.raises(InputError, match=r"vectors\.txt, " + re.escape(message)):
        read(b"a 1 2 3\nb 4 5 6\n" + bad + b"\nd 7 8 9\n", wanted)


def test_a_number_that_float32_has_no_room_for():
    with pytest.raises(InputError, match="line 1: 1e39 is no finite number"):
        read(["a 1e39 2"], "a")


@pytest.mark.parametrize("content", [b"", b"\n", b"no numbers here\n", b"alone\n", b"\x00\x01\x02"])
def test_a_file_that_holds_no_vectors(content):
    write(content)
    with pytest.raises(InputError, match=r"vectors\.txt, line 1 is no word with numbers after it"):
        vector_width(Path("vectors.txt"))


def test_a_file_that_cannot_be_read():
    Path("folder").mkdir()
    for name, message in (("folder", "folder is a folder"), ("nowhere.txt", "cannot read nowhere.txt")):
        with pytest.raises(InputError, match=message):
            vector_width(Path(name))


def test_memory_is_that_of_the_wanted_words(monkeypatch):
    """A file of 20 MB, of which three words are wanted."""
    import tracemalloc

    rows = lines([f"word{i}" for i in range(2000)], width=100)
    write(rows * 13)
    assert Path("vectors.txt").stat().st_size > 2e7
    tracemalloc.start()
    assert read_word_vectors(Path("vectors.txt"), {"word1": 0, "word7": 1, "word1999": 2}).found.all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6


# --- the embedding --------------------------------------------------------------------------------


def test_vectors_take_the_size_of_the_rows_that_they_replace_and_keep_their_angles():
    random = np.random.default_rng(0)
    initial = torch.from_numpy(0.02 * random.standard_normal((50, 8)).astype(np.float32))
    vectors = random.standard_normal((50, 8)).astype(np.float32) * random.uniform(0.1, 9, (50, 1))
    found = random.random(50) < 0.6
    changed = initial.clone()
    place_word_vectors(changed, WordVectors(vectors.astype(np.float32), found))
    assert torch.equal(changed[~found], initial[~found])
    factors = changed[found] / torch.from_numpy(vectors[found])
    torch.testing.assert_close(factors, factors[0, 0].expand_as(factors).float(), check_dtype=False)
    assert changed[found].square().mean() == pytest.approx(initial[found].square().mean().item())


def test_vectors_of_zeros_stay_so():
    changed = torch.ones(2, 3)
    place_word_vectors(changed, WordVectors(np.zeros((2, 3), np.float32), np.array([True, False])))
    assert changed.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_missing_words_are_reported_with_their_shares_the_most_frequent_first():
    read = WordVectors(np.zeros((4, 2), np.float32), np.array([False, True, False, True]))
    line = coverage(read, ["<unk>", "the", "of", "and"], np.array([5, 50, 15, 30]))
    assert line == (
        "word vectors: 2 of 4 words are found; 2 are not, 50.00% of the vocabulary and 20.00% of the running "
        "text, and begin at random: of <unk>"
    )
    all_found = WordVectors(np.zeros((1, 2), np.float32), np.array([True]))
    assert coverage(all_found, ["the"], np.array([1])) == "word vectors: 1 of 1 words are found"


# --- the tokenizer --------------------------------------------------------------------------------


def test_signs_are_words_of_their_own_and_words_may_be_in_lower_case(tmp_path):
    import tokenizers

    text = '"Don\'t – ΣΟΦΟΣ!?", said the İ-fox (THE fox).'
    for lowercase, count in ((False, 1), (True, 2)):
        tokenizer = WordTokenizer.train([text], 50, lowercase)
        words = tokenizer.decode(tokenizer.encode(text)).split(" ")
        assert words.count("the") == count and {'"', "!", "?", ")", "."} <= set(words)
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
        oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert oracle.encode(text).ids == tokenizer.encode(text).tolist()


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", ["--tied-embeddings", "--no-tied-embeddings"])
def test_frozen_vectors_are_the_same_bits_after_training_and_after_a_resume(small_run, cli, at_step, tied):
    """The story of a run: it begins with vectors, is stopped, loses the file of vectors, and is resumed."""
    write(lines())
    flags = (*WITH_VECTORS, "--freeze-embeddings", tied, "--vocab-size", "14")
    begun = small_run("--out", "begun", *flags, "--steps", 1, "--warmup-steps", 0)
    assert begun.code == 0, begun.err
    words = load_tokenizer(Path("begun/last/tokenizer.json")).tokens
    assert "word vectors: 8 of 14 words are found; 6 are not, 42.86% of the vocabulary" in begun.out
    assert "begin at random: – so they say lazy <unk>" in begun.out
    assert ("output projection" in begun.out) == (tied == "--tied-embeddings")

    assert small_run("--out", "whole", *flags).code == 0
    at_step(7, mock.Mock(side_effect=KeyboardInterrupt))
    assert small_run("--out", "stopped", *flags).code == 130
    at_step(None)
    Path("vectors.txt").unlink()
    assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))

    rows = read(lines(), *words)
    initial = table("begun")
    assert all(
        torch.equal(table(run, name), initial) for run in ("whole", "stopped") for name in ("last", "best")
    )
    factors = initial[rows.found] / torch.from_numpy(rows.vectors[rows.found])
    torch.testing.assert_close(factors, factors[0, 0].expand_as(factors))
    assert initial.square().mean().sqrt() == pytest.approx(0.02, rel=0.2)
    trained = load_file("whole/last/model.safetensors")
    before = load_file("begun/best/model.safetensors")
    assert not torch.equal(trained["blocks.0.ffn.up.weight"], before["blocks.0.ffn.up.weight"])
    assert f"{TABLE}.exp_avg" not in load_file("whole/last/optimizer.safetensors")
    assert ("head.weight" in trained) == (tied == "--no-tied-embeddings")


def test_vectors_are_trained_unless_they_are_frozen(small_run, cli, at_step):
    write(lines())
    assert small_run("--out", "whole", *WITH_VECTORS).code == 0
    assert small_run("--out", "frozen", *WITH_VECTORS, "--freeze-embeddings").code == 0
    assert (table("frozen") != table("whole")).any(dim=1).all(), "every row is in the logits, so all learn"
    at_step(6, mock.Mock(side_effect=KeyboardInterrupt))
    assert small_run("--out", "stopped", *WITH_VECTORS).code == 130
    at_step(None)
    assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))
    assert small_run("--out", "random", *WITH_VECTORS[:3]).code == 0
    assert not torch.equal(table("random"), table("whole"))


def test_a_tokenizer_of_words_from_a_file_will_do_and_one_of_bytes_will_not(small_run):
    write(lines())
    assert small_run("--out", "words", *WITH_VECTORS[:3]).code == 0
    shutil.copy("words/last/tokenizer.json", "own.json")
    vectors = ("--word-vectors", "vectors.txt")
    outcome = small_run("--out", "own", "--tokenizer", "own.json", *vectors)
    assert outcome.code == 0 and "8 of 14 words are found" in outcome.out
    assert small_run("--out", "bytes").code == 0
    outcome = small_run("--out", "no", "--tokenizer", "bytes/last/tokenizer.json", *vectors)
    assert "--word-vectors are of words, but" in outcome.error
    assert not Path("no").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (*WITH_VECTORS, "--d-model", "24"),
            "vectors.txt have 16 numbers each, but d_model is 24; use --d-model 16",
        ),
        (
            (*WITH_VECTORS, "--d-model", "24", "--n-head", "3"),
            "--d-model 16, and an --n-head that divides it",
        ),
        (
            ("--word-vectors", "vectors.txt"),
            "are of words, but the tokenizer is bytes; use --tokenizer words",
        ),
        (("--tokenizer", "words", "--freeze-embeddings"), "would freeze random numbers"),
        (("--lowercase",), "lowercase is for words, and the tokenizer is bytes"),
        ((*WITH_VECTORS[:3], "--word-vectors", "nowhere.txt"), "nowhere.txt: No such file"),
        ((*WITH_VECTORS[:3], "--word-vectors", "bad.txt"), "bad.txt, line 2: 'x' is no number"),
        ((*WITH_VECTORS[:3], "--word-vectors", "foreign.txt"), "has none of the text's words; does it need"),
    ],
)
def test_what_does_not_fit_is_one_line_and_makes_no_folder(small_run, flags, message):
    write(lines())
    write([*lines()[:1], "quick x" + " 0.1" * 15], "bad.txt")
    write(lines(["der", "schnelle"]), "foreign.txt")
    outcome = small_run("--out", "run", *flags)
    assert outcome.code == 2 and message in outcome.error
    assert not Path("run").exists()


@pytest.mark.parametrize("flag", [("--word-vectors", "other.txt"), ("--no-freeze-embeddings",)])
def test_a_resumed_run_keeps_its_choice(small_run, cli, flag):
    write(lines())
    assert small_run("--out", "run", *WITH_VECTORS, "--freeze-embeddings").code == 0
    assert f"{flag[0].replace('--no-', '--')} " in cli("--resume", "run", *flag).error
    assert json.loads(Path("run/last/config.json").read_bytes())["training"]["freeze_embeddings"] is True
