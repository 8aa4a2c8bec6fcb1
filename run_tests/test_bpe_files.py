"""The tokenizer on files: parts, processes, the command line, and what is said about bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref_numpy import bpe as ref
from ref_numpy.bpe_format import SPLITS, TokenizerError
from torch_impl import bpe
from torch_impl.training import bpe_corpus, bpe_table
from torch_impl.training.bpe_command import main
from torch_impl.training.bpe_inspect import coloured
from torch_impl.training.files import InputError
from torch_impl.training.text import Text
from torch_impl.training.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    Tokenizer,
    WordTokenizer,
    count_unknown,
    load_tokenizer,
    parse_tokenizer,
)

CORPUS = "\n".join(topics.values())
SPECIAL = ["<end of text>", "<a>", "<a><b>", " <c> "]
pieces = st.one_of(
    st.sampled_from([*SPECIAL, " ", "  ", "\n", "\r\n", "\x1c", "\u00a0", "end of", "it's", "...\n", "é"]),
    st.text(max_size=4),
)


@pytest.fixture(scope="module")
def vocabulary():
    return bpe.train([CORPUS], 1000, SPECIAL)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8", newline="")
    return path


@pytest.mark.skipif(os.name == "nt", reason="Windows has no groups of processes that hear Ctrl-C")
@pytest.mark.parametrize("after", [0.1, 0.6, 3.0])
def test_ctrl_c_ends_workers_that_start_or_work(tmp_path, after):
    """A terminal tells all of them. Those that were starting died of it, each with a traceback, and once in
    a while the program waited for them for ever; for those at work it waited as long as they took."""
    script = tmp_path / "program.py"
    script.write_text(
        "import time\n"
        "from torch_impl.training.bpe_corpus import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    print('here', flush=True)\n"
        "    try:\n"
        "        list(ordered_map(time.sleep, [300] * 9, workers=2))\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n",
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bpe_corpus.__file__).parents[2])}
    program = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert program.stdout.readline() == b"here\n"
    time.sleep(after)
    os.killpg(program.pid, signal.SIGINT)
    assert program.communicate(timeout=60) == (b"interrupted\n", b"")


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    """They used to wait for work for ever, and with them whoever read the program's output to its end."""
    script = tmp_path / "program.py"
    script.write_text(
        "from torch_impl.training.bpe_corpus import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    for _ in ordered_map(print, iter(int, 1), workers=2):\n"
        "        print('working', flush=True)\n",
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bpe_corpus.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment)
    while b"working" not in process.stdout.readline():
        pass
    process.kill()
    process.wait()
    ended = Thread(target=process.stdout.read, daemon=True)  # that is, all who could write are gone
    ended.start()
    ended.join(60)
    assert not ended.is_alive()
    process.stdout.close()


@given(
    st.lists(pieces).map("".join),
    st.integers(1, 9),
    st.sampled_from([*SPLITS.values(), r"\w+\s*", None]),
    st.sets(st.sampled_from(SPECIAL)),
)
def test_parts_of_a_file_count_and_encode_as_the_whole(tmp_path_factory, text, size, split, special):
    path = tmp_path_factory.mktemp("parts") / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    told = []
    parts = list(bpe_corpus.read_parts([Text(path)], special, split, size, told.append))
    assert "".join(parts) == text and sum(told) == path.stat().st_size
    assert bpe.count_words(parts, special, split) == ref.count_words([text], special, split)
    cut = [ref.cut_at_special_tokens(part, special) for part in parts]
    assert [t for c in cut for t in c[1::2]] == ref.cut_at_special_tokens(text, special)[1::2]


def test_parts_are_small():
    text = "word " * 1000
    assert bpe_corpus.last_cut(text, [], SPLITS["gpt2"]) == len(text) - 1


def test_processes_count_and_encode_as_one(vocabulary, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(CORPUS * (2 * 2**23 // len(CORPUS) + 1), encoding="utf-8", newline="")
    assert bpe_corpus.worth_spawning([Text(path)], 2) == 2
    one, two = (bpe_corpus.count_texts([Text(path)], SPECIAL, workers=n) for n in (1, 2))
    assert one == two
    tokenizer = bpe.BPETokenizer(vocabulary)
    one, two = (np.concatenate(list(bpe_corpus.encode_texts(tokenizer, [Text(path)], (), n))) for n in (1, 2))
    assert np.array_equal(one, two) and one.dtype == two.dtype == np.uint16


def test_a_sample_is_a_part_spread_over_the_text(corpus):
    whole = bpe_corpus.count_texts([Text(corpus)])
    part = bpe_corpus.count_texts([Text(corpus)], sample=0.25)
    assert 0.2 < part.total() / whole.total() < 0.45
    assert not part - whole


@given(
    st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.integers(0, 2**31 - 2)),
    st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12)), min_size=1),
)
def test_ranks_of_many_pairs_are_those_of_each(ranks, asked):
    pairs = [left << 32 | right for left, right in ranks]
    table = bpe_table.Ranks(np.array(pairs, np.int64), np.array([*ranks.values()], np.int64))
    found = table.of(np.array([left << 32 | right for left, right in asked]))
    assert found.tolist() == [ranks.get(pair, bpe_table.NO_RANK) for pair in asked]


# --- the command line -----------------------------------------------------------------------------


def test_train_encode_decode(corpus, tmp_path, capsys):
    out = tmp_path / "tokenizer.json"
    special = ["--special-tokens", "<user>"]
    assert main(["train", str(corpus), "--vocab-size", "500", *special, "--out", str(out)]) == 0
    assert ref.load(out) == ref.train([CORPUS], 500, ["<user>"])
    source = ["--tokenizer", str(out)]
    ids = tmp_path / "ids.npy"
    assert main(["encode", str(corpus), *source, "--out", str(ids)]) == 0
    stored = np.load(ids)
    assert stored.dtype == np.uint16 and stored.tolist() == ref.encode(CORPUS, ref.load(out))
    capsys.readouterr()
    assert main(["encode", str(corpus), *source, "--count"]) == 0
    assert capsys.readouterr().out == f"{stored.size}\n"
    back = tmp_path / "back.txt"
    assert main(["decode", str(ids), *source, "--out", str(back)]) == 0
    assert back.read_bytes() == corpus.read_bytes()


def test_what_stands_beside_a_file_that_is_written_stays(corpus, tmp_path):
    """NAME.being-written was written over and removed, whoever it belonged to."""
    vocabulary, ids, text = (tmp_path / name for name in ("t.json", "ids.npy", "text.txt"))
    for path in (vocabulary, ids, text):
        path.with_name(path.name + ".being-written").write_bytes(b"the user's")
    assert main(["train", str(corpus), "--vocab-size", "300", "--out", str(vocabulary)]) == 0
    source = ["--tokenizer", str(vocabulary)]
    assert main(["encode", str(corpus), "--out", str(ids), *source]) == 0
    assert main(["decode", str(ids), "--out", str(text), *source]) == 0
    assert text.read_bytes() == corpus.read_bytes()
    for path in (vocabulary, ids, text):
        assert path.with_name(path.name + ".being-written").read_bytes() == b"the user's"


def test_ids_can_be_text(vocabulary, tmp_path, capfdbinary):
    bpe.BPETokenizer(vocabulary).save(tmp_path / "t.json")
    (tmp_path / "text.txt").write_text("plain <a> text\r\n", encoding="utf-8", newline="")
    source = ["--tokenizer", str(tmp_path / "t.json")]
    assert main(["encode", str(tmp_path / "text.txt"), *source, "--special-tokens", "<a>"]) == 0
    printed = capfdbinary.readouterr().out
    assert str(vocabulary.special_tokens["<a>"]).encode() in printed.split()
    (tmp_path / "ids.txt").write_bytes(printed)
    assert main(["decode", str(tmp_path / "ids.txt"), *source]) == 0
    assert capfdbinary.readouterr().out == b"plain <a> text\r\n"


def test_gpt2_files_are_written_and_read(corpus, tmp_path, capsys):
    arguments = [str(corpus), "--vocab-size", "400", "--out", str(tmp_path / "t.json"), "--workers", "1"]
    assert main(["train", *arguments, "--out-gpt2", str(tmp_path)]) == 0
    capsys.readouterr()
    source = ["--vocab", str(tmp_path / "vocab.json"), "--merges", str(tmp_path / "merges.txt")]
    assert main(["encode", str(corpus), *source, "--count"]) == 0
    assert int(capsys.readouterr().out) == len(ref.encode(CORPUS, ref.load(tmp_path / "t.json")))


def test_inspect_shows_compression_and_tokens(vocabulary, corpus, tmp_path, capsys):
    bpe.BPETokenizer(vocabulary).save(tmp_path / "t.json")
    source = ["--tokenizer", str(tmp_path / "t.json")]
    assert main(["inspect", str(corpus), *source, "--text", "the statement é"]) == 0
    shown = capsys.readouterr().out
    n = len(ref.encode(CORPUS, vocabulary))
    assert f"{n} tokens, {corpus.stat().st_size / n:.3f} bytes per token" in shown
    assert "the| statement|" in shown
    assert "\x1b[41" in coloured(bpe.BPETokenizer(vocabulary), "the", colour=True)


def test_what_a_tokenizer_holds_does_nothing_to_a_terminal(tmp_path, capsys):
    """Names of special tokens and the split used to be shown as they stand in the file."""
    bpe.BPETokenizer(bpe.train(["a"], 257, ["\x1b[31m"], "\x1b|a")).save(tmp_path / "t.json")
    assert main(["inspect", "--tokenizer", str(tmp_path / "t.json")]) == 0
    shown = capsys.readouterr().out
    assert r"special tokens: \x1b[31m" in shown and r"split: \x1b|a" in shown and "\x1b" not in shown


def test_bad_requests_are_one_line_and_write_nothing(vocabulary, corpus, tmp_path, capsys):
    out, good = tmp_path / "out.json", tmp_path / "good.json"
    bpe.BPETokenizer(vocabulary).save(good)
    characters = tmp_path / "characters.json"
    CharacterTokenizer.train(["abc"]).save(characters)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "damaged.json").write_text("{", encoding="utf-8")
    (tmp_path / "ids.txt").write_text("5 99999", encoding="utf-8")
    (tmp_path / "words.txt").write_text("five", encoding="utf-8")
    (tmp_path / "small.txt").write_text("aa", encoding="utf-8")
    (tmp_path / "half.txt").write_text(str(vocabulary.ordinary_ids[b"\xff"]), encoding="utf-8")
    np.save(tmp_path / "floats.npy", np.zeros(3))
    train = ["train", "--out", str(out)]
    source = ["--tokenizer", str(good)]
    cases = [
        ([*train, str(corpus), "--vocab-size", "255"], "vocab_size is 255, but must be at least 256"),
        ([*train, str(corpus), "--split", "("], "no regular expression"),
        # A byte that is no UTF-8 used to end in a traceback, for a split after all of the training.
        ([*train, str(corpus), "--special-tokens", "\udcff"], r"special token '\udcff' is no text"),
        ([*train, str(corpus), "--split", "a\udcff"], r"split pattern 'a\udcff' is no text at character 1"),
        (["inspect", *source, "--text", "\udcff"], "--text is not valid text"),
        ([*train, str(corpus), "--sample", "0"], "--sample is 0.0"),
        ([*train, str(corpus), "--workers", "-1"], "--workers is -1"),
        ([*train, str(tmp_path / "small.txt")], "runs out of pairs after 1 merge;"),
        ([*train, str(tmp_path / "none.txt")], "No such file"),
        ([*train, str(tmp_path)], "is a folder"),
        ([*train, str(tmp_path / "latin.txt")], "latin.txt is not UTF-8"),
        (train, "name one file or more"),
        ([*train, str(corpus), "--vocab-sise", "300"], "--vocab-sise"),
        ([*train, str(corpus), "--vocab-size", "many"], "many"),
        (["tran", str(corpus)], "tran"),
        (["train", str(corpus), "--out", str(good)], "good.json exists already"),
        (["train", str(corpus), "--out", str(tmp_path / "no" / "t.json")], "is no folder"),
        (["encode", str(corpus)], "name one tokenizer"),
        (["encode", str(corpus), "--vocab", str(good)], "name one tokenizer"),
        (
            ["encode", str(corpus), "--tokenizer", str(tmp_path / "damaged.json")],
            "damaged.json is no tokenizer.json; name one, or a folder with vocab.json and merges.txt",
        ),
        (["encode", str(corpus), "--tokenizer", str(tmp_path)], "holds no tokenizer"),
        (["encode", str(corpus), "--tokenizer", str(tmp_path / "none.json")], "none.json is missing"),
        (["encode", str(corpus), "--tokenizer", str(characters)], "is no byte pair encoding"),
        (["encode", str(corpus), *source, "--special-tokens", "<x>"], "'<x>' is no special token"),
        (["decode", str(tmp_path / "ids.txt"), *source], "id 99999 is no token"),
        (["decode", str(tmp_path / "words.txt"), *source], "words.txt holds no ids"),
        (["decode", str(tmp_path / "floats.npy"), *source], "one row of integers"),
        (["decode", str(tmp_path / "half.txt"), *source, "--strict"], "not UTF-8"),
    ]
    header = b"\x93NUMPY\x01\x00\x10\x00{'descr: ((((((("
    (tmp_path / "cut.npy").write_bytes(header)  # used to end in a traceback of Python's own tokenizer
    (tmp_path / "empty.npy").write_bytes(b"")
    cases += [
        (["decode", str(tmp_path / f"{name}.npy"), *source], "holds no ids") for name in ("cut", "empty")
    ]
    before = sorted(tmp_path.iterdir())
    for arguments, message in cases:
        assert main(arguments) != 0, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
    assert sorted(tmp_path.iterdir()) == before


# --- the simpler tokenizers -----------------------------------------------------------------------


@given(st.text())
def test_characters_come_back(text):
    tokenizer = CharacterTokenizer.train([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 1 + len(set(text))


def test_words_count_what_they_do_not_know():
    tokenizer = WordTokenizer.train(["the cat, the dog. the end"], vocab_size=4)
    assert tokenizer.tokens == ["<unk>", "the", "cat", ","]
    assert tokenizer.decode(tokenizer.encode("the cat, the bird!")) == "the cat , the <unk> <unk>"
    assert count_unknown(tokenizer, tokenizer.encode("the cat, the bird!")) == 2


@pytest.mark.parametrize(
    "tokenizer",
    [
        ByteTokenizer(),
        CharacterTokenizer.train(["some text\n"]),
        WordTokenizer.train(["some text"], 10),
        bpe.BPETokenizer(bpe.train(["some text some"], 260, ["<a b>"])),
    ],
    ids=lambda tokenizer: type(tokenizer).__name__,
)
def test_every_tokenizer_survives_its_file(tokenizer, tmp_path):
    import tokenizers

    assert isinstance(tokenizer, Tokenizer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
    text = "some text, xyz"
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert loaded.encode(text).dtype == np.uint8 if tokenizer.vocab_size <= 256 else np.uint16
    oracle = tokenizers.Tokenizer.from_file(str(path))
    assert oracle.encode(text).ids == tokenizer.encode(text).tolist()
    assert oracle.decode(oracle.encode("some text").ids) == tokenizer.decode(tokenizer.encode("some text"))


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"model": {"type": "WordLevel", "vocab": 3}})])
def test_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_model_without_a_type_is_of_pairs():
    """So it stands in the tokenizer.json that GPT-2 itself is handed on with, which was refused."""
    tokenizer = bpe.BPETokenizer(bpe.train(["some text some"], 260))
    described = json.loads(tokenizer.to_json())
    del described["model"]["type"]
    assert parse_tokenizer(json.dumps(described).encode()).vocabulary == tokenizer.vocabulary


def shifted(model):
    model["vocab"] = {token: id + 1 for token, id in model["vocab"].items()}


@pytest.mark.parametrize("kind", [CharacterTokenizer, WordTokenizer])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model"].update(unk_token="a"), "its unk_token"),
        (
            lambda c: c["model"]["vocab"].update({"<unk>": 1, "a": 0}),
            "ids must run from 0 to 2, beginning with",
        ),
        (lambda c: c["model"]["vocab"].update(b=3), "ids must run from 0 to 2"),
        (lambda c: c["model"]["vocab"].update(b=1), "ids must run from 0 to 2"),
        (lambda c: c["model"]["vocab"].pop("<unk>"), "ids must run from 0 to 2"),
        (lambda c: shifted(c["model"]), "ids must run from 0 to 2"),
        (lambda c: c.update(truncation={"max_length": 3}), "it uses truncation"),
        (lambda c: c.update(padding={"strategy": "BatchLongest"}), "it uses padding"),
        (lambda c: c.update(added_tokens=[{"id": 1, "content": "a"}]), "it uses added_tokens"),
        (
            lambda c: c["model"]["vocab"].update({"\ud800": 3}),
            r"its token '\\ud800' is half of a surrogate pair",
        ),
    ],
)
def test_characters_and_words_that_mean_other_ids_are_refused(kind, edit, message):
    """Ids used to be given anew in silence, and half of a surrogate pair ended in a traceback."""
    described = json.loads(kind(["a", "b"]).to_json())
    edit(described)
    with pytest.raises(TokenizerError, match=message):
        parse_tokenizer(json.dumps(described).encode())
