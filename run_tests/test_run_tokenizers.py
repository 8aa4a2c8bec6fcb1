"""Runs with each kind of tokenizer: learned or loaded, encoded once, resumed, compared by bits per byte."""

import math
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tokenizers

from ref_numpy import bpe as ref
from run_tests.conftest import content, metrics
from torch_impl.bpe import BPETokenizer, train
from torch_impl.training import bpe_command, generate_command
from torch_impl.training.files import InputError
from torch_impl.training.tokenizer import ByteTokenizer, load_tokenizer

BPE = ("--tokenizer", "bpe", "--vocab-size", "280")
KINDS = {"bpe": BPE, "characters": ("--tokenizer", "characters"), "words": ("--tokenizer", "words")}


def cache_files() -> dict[str, tuple[int, int]]:
    """Name, inode and time of each file of the cache: what was made anew differs."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path("cache").iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_again_and_when_it_is_resumed(small_run, cli, kind, capsys):
    whole = small_run("--out", "whole", *KINDS[kind])
    assert whole.code == 0, whole.err
    made = cache_files()
    assert len(made) == 3  # a tokenizer, and the ids of two texts
    assert small_run("--out", "again", *KINDS[kind], "--steps", "8", "--warmup-steps", "1").code == 0
    assert cli("--resume", "again", "--steps", "12").code == 0
    assert cache_files() == made
    assert Path("again/last/tokenizer.json").read_bytes() == Path("whole/last/tokenizer.json").read_bytes()
    shutil.rmtree("cache")
    assert cli("--resume", "whole", "--steps", "14").code == 0
    assert len(cache_files()) == 2, "the checkpoint has the tokenizer"
    capsys.readouterr()
    assert generate_command.main(["--model", "whole", "--prompt", "The quick", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("The quick")


def test_bpe_stopped_and_resumed_equals_the_uninterrupted_run(small_run, cli, at_step):
    """Though the cache is damaged in between."""
    assert small_run("--out", "whole", *BPE).code == 0
    at_step(7, mock.Mock(side_effect=KeyboardInterrupt))
    assert small_run("--out", "stopped", *BPE).code == 130
    at_step(None)
    for path in Path("cache").glob("ids*"):
        path.write_bytes(path.read_bytes()[:-9])
    for path in Path("cache").glob("tokenizer*"):
        path.write_bytes(b"damaged")
    assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))


def test_bits_per_byte_compare_tokenizers(small_run, text):
    small_run("--out", "run", *BPE)
    held_out = text.read_text(encoding="utf-8")
    held_out = held_out[len(held_out) * 9 // 10 :]
    n = len(ref.encode(held_out, ref.load(Path("run/best/tokenizer.json"))))
    for row in metrics(Path("run")):
        expected = row["val_loss"] * n / math.log(2) / len(held_out.encode("utf-8"))
        assert row["bits_per_byte"] == pytest.approx(expected)


def test_tokens_that_lose_a_part_of_the_text_have_no_bits_per_byte(small_run):
    Path("strange.txt").write_text("The quick brown fox – so they say ☃\n", encoding="utf-8")
    for kind, message in (
        ("words", "which keeps no spaces"),
        ("characters", r"1 of the held-out tokens (2.78%)"),
    ):
        outcome = small_run("--out", kind, *KINDS[kind], "--valid-file", "strange.txt")
        assert outcome.code == 0 and message in outcome.out
        assert {row["bits_per_byte"] for row in metrics(Path(kind))} == {None}
        assert "bits per byte, " not in outcome.out


def test_what_a_prompt_has_that_the_tokenizer_does_not_know_is_told(small_run, capsys):
    """Such a prompt was read as something else, and answered without a word."""
    small_run("--out", "run", *KINDS["characters"])
    flags = ["--model", "run", "--max-new-tokens", "5", "--prompt"]
    for prompt, told in (("The quick", ""), ("☃ and ☃", "of 7 tokens the tokenizer does not know 2")):
        capsys.readouterr()
        assert generate_command.main([*flags, prompt]) == 0
        assert capsys.readouterr().err == (f"generate: --prompt: {told}\n" if told else "")


def test_bpe_learns_what_the_reference_learns_from_the_training_text_alone(small_run, text):
    small_run("--out", "run", *BPE, "--special-tokens", "fox")
    read = text.read_text(encoding="utf-8")
    vocabulary = ref.load(Path("run/best/tokenizer.json"))
    assert vocabulary == ref.train([read[: len(read) * 9 // 10]], 280, ["fox"])
    ids = [np.fromfile(path, np.uint16)[:-16] for path in Path("cache").glob("ids*")]
    longer = max(ids, key=len).tolist()
    assert longer == ref.encode(read[: len(read) * 9 // 10], vocabulary, ["fox"])
    assert vocabulary.special_tokens["fox"] in longer


def test_a_tokenizer_from_a_file(small_run, cli, text):
    vocabulary = train([text.read_text(encoding="utf-8")], 300, ["<|end|>"])
    BPETokenizer(vocabulary).save(Path("own.json"))
    assert small_run("--out", "run", "--tokenizer", "own.json", "--special-tokens", "<|end|>").code == 0
    assert load_tokenizer(Path("run/last/tokenizer.json")).vocabulary == vocabulary
    Path("own.json").unlink()
    assert cli("--resume", "run", "--steps", "14").code == 0, "the checkpoint has it"
    ByteTokenizer().save(Path("bytes.json"))
    assert small_run("--out", "bytes", "--tokenizer", "bytes.json").code == 0
    assert content(Path("bytes"))["best/tokenizer.json"] == Path("bytes.json").read_bytes()


def test_a_folder_with_gpt2s_two_files(small_run, cli, text, capsys):
    """GPT-2's vocabulary is handed on so, and the tokenizer's own command writes it: no run could take it."""
    train_bpe = ["train", str(text), "--vocab-size", "290", "--special-tokens", "<|end|>", "--workers", "1"]
    Path("own").mkdir()
    assert bpe_command.main([*train_bpe, "--out", "whole.json", "--out-gpt2", "own"]) == 0
    flags = "--special-tokens", "<|end|>", "--tokenizer"
    assert small_run("--out", "whole", *flags, "whole.json").code == 0
    made = cache_files()
    assert small_run("--out", "run", *flags, "own").code == 0
    assert cache_files() == made, "the same tokens of the same text"
    for name in ("best", "last"):
        for file in ("tokenizer.json", "model.safetensors"):
            assert Path("run", name, file).read_bytes() == Path("whole", name, file).read_bytes()
    oracle = tokenizers.ByteLevelBPETokenizer.from_file("own/vocab.json", "own/merges.txt")
    strange = text.read_text(encoding="utf-8") + "café ☃  \r\n\t123"
    assert load_tokenizer(Path("own")).encode(strange).tolist() == oracle.encode(strange).ids
    encode = ["encode", str(text), "--count", "--tokenizer"]
    capsys.readouterr()
    assert bpe_command.main([*encode, "own"]) == bpe_command.main([*encode, "whole.json"]) == 0
    counts = capsys.readouterr().out.split()
    assert counts[0] == counts[1]
    shutil.rmtree("own")
    assert cli("--resume", "run", "--steps", "14").code == 0, "the checkpoint has it"


def test_a_run_does_not_begin_with_half_of_a_tokenizer(small_run, text):
    """Of a folder with GPT-2's two files, one had been cut short."""
    train_bpe = ["train", str(text), "--vocab-size", "290", "--workers", "1"]
    Path("own").mkdir()
    assert bpe_command.main([*train_bpe, "--out", "whole.json", "--out-gpt2", "own"]) == 0
    Path("own/merges.txt").write_bytes(b"".join(Path("own/merges.txt").read_bytes().splitlines(True)[:11]))
    outcome = small_run("--out", "run", "--tokenizer", "own")
    assert outcome.code == 2 and not Path("run").exists()
    assert "merges.txt makes 10 of the 290 tokens in vocab.json; is it cut short?" in outcome.error


def test_a_folder_with_a_tokenizer_json_is_that_one():
    Path("folder").mkdir()
    for name in ("vocab.json", "merges.txt"):
        Path("folder", name).write_text("damaged", encoding="utf-8")
    with pytest.raises(InputError, match=r"vocab\.json with .*merges\.txt cannot be read.*it is damaged"):
        load_tokenizer(Path("folder"))
    Path("folder/merges.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"merges\.txt cannot be read as a tokenizer: 'utf-8' codec"):
        load_tokenizer(Path("folder"))
    ByteTokenizer().save(Path("folder/tokenizer.json"))
    assert isinstance(load_tokenizer(Path("folder")), ByteTokenizer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--tokenizer", "bpe"),
            r"runs out of pairs after \d+ merges; give it more text, or ask for --vocab-size \d+",
        ),
        (("--tokenizer", "bpe", "--special-tokens", ""), "a special token is the empty string"),
        (
            ("--tokenizer", "text.txt"),
            r"text\.txt is no tokenizer\.json; name one, or a folder with vocab\.json and merges\.txt$",
        ),
        (("--tokenizer", "cache"), r"cache holds no tokenizer; name a folder with tokenizer\.json, or with"),
        (
            ("--tokenizer", "good.json", "--special-tokens", "<x>"),
            r"<x>: .*good\.json has no such special token",
        ),
        (("--cache", "text.txt", *BPE), r"cannot keep the encoded text in text\.txt.*--cache"),
    ],
)
def test_what_cannot_be_is_one_line_and_makes_no_folder(small_run, flags, message):
    ByteTokenizer().save(Path("good.json"))
    Path("cache").mkdir()
    outcome = small_run("--out", "run", *flags)
    assert outcome.code == 2
    assert re.search(message, outcome.error)
    assert not Path("run").exists()
