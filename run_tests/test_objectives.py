"""Runs of encoders and encoder-decoders: what they learn, write, resume and refuse."""

import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import exp
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.functional import one_hot

from ref_numpy.config import ModelConfig, SamplingConfig
from run_tests.conftest import SMALL, content, metrics
from run_tests.test_chat_tuning import CHAT
from torch_impl.bpe import BPETokenizer, train_on_words
from torch_impl.generate import answer
from torch_impl.training import generate_command, quantise_command
from torch_impl.training import run as run_module
from torch_impl.training.checkpoint import LoadedModel, load_model
from torch_impl.training.filling import fill_gaps
from torch_impl.training.pair_file import load_pairs
from torch_impl.training.presets import PRESETS
from torch_impl.training.ranks import Ranks
from torch_impl.training.tokenizer import ByteTokenizer, WordTokenizer

WORDS = ("one", "two", "three", "four", "five", "six", "seven")


@pytest.fixture
def pairs(tmp_path):
    """Words and the same words backwards."""
    path = tmp_path / "pairs.tsv"
    lines = [f"{a}-{b}\t{b} {a}" for a in WORDS for b in WORDS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(cli, text, pairs):
    """A small run of a kind: an encoder on text, or an encoder-decoder on pairs."""

    def call(kind, *flags):
        source = ("--train-file", text if kind == "encoder" else pairs, "--context-length", 16)
        return cli(*SMALL.split(), *source, "--architecture", kind, *flags)

    return call


@pytest.fixture
def write(call_main):
    return partial(call_main, generate_command.main)


@pytest.mark.parametrize(("kind", "share"), [("encoder", "accuracy"), ("encoder-decoder", "exact_match")])
@pytest.mark.parametrize("step", [4, 7])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(run, cli, stop_at, kind, share, step):
    assert run(kind, "--out", "whole").code == 0
    assert all(0 <= row[share] <= 1 for row in metrics(Path("whole")))
    stop_at(step)
    assert run(kind, "--out", "stopped").code == 130
    stop_at(None)
    assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))
    assert Path("stopped/sample.txt").read_bytes() == Path("whole/sample.txt").read_bytes()


def test_a_model_has_the_tokens_of_its_tokenizer_and_its_own(run):
    for kind, own in (("encoder", 1), ("encoder-decoder", 3)):
        assert run(kind, "--out", kind).code == 0
        assert json.loads(Path(kind, "last/config.json").read_bytes())["model"]["vocab_size"] == 256 + own


def test_weights_of_a_run_are_a_place_to_begin_from(run, cli, text, pairs):
    """The first evaluation of the second run is the best one of the first."""
    for kind in ("encoder", "encoder-decoder"):
        assert run(kind, "--out", kind, "--learning-rate", "1e-2").code == 0
        flags = ("--device", "cpu", "--steps", 1, "--init-from", kind, "--out", f"{kind}-2")
        assert cli("cpu", *flags, "--train-file", text if kind == "encoder" else pairs).code == 0
        best = min(row["val_loss"] for row in metrics(Path(kind)))
        assert metrics(Path(f"{kind}-2"))[0]["val_loss"] == best


def test_an_encoder_decoder_learns_pairs_and_answers(run, write):
    flags = ("--steps", 300, "--eval-every", 300, "--learning-rate", "1e-2", "--d-model", 32, "--dropout", 0)
    flags += ("--batch-size", 32, "--checkpoint-every", 300, "--sample-tokens", 12)
    assert run("encoder-decoder", "--out", "run", "--tokenizer", "words", *flags).code == 0
    for a, b in (("one", "two"), ("six", "five")):
        assert write("--model", "run/last", "--prompt", f"{a}-{b}", "--temperature", 0)[1] == f"{b} {a}\n"


def test_an_answer_is_what_the_library_answers_and_the_seed_decides(run, write):
    assert run("encoder-decoder", "--out", "run").code == 0
    flags = ("--model", "run", "--prompt", "two-six", "--temperature", 2)
    code, out, _ = write(*flags, "--seed", 3)
    loaded = load_model(Path("run/best"), torch.float32, torch.device("cpu"))
    source = torch.from_numpy(loaded.tokenizer.encode("two-six"))
    sampling = SamplingConfig(temperature=2.0)
    ids = list(answer(loaded.model, source, 500, sampling, 3))
    assert (code, out) == (0, loaded.tokenizer.decode(ids) + "\n")
    assert write(*flags, "--seed", 4)[1] != out


def test_examples_are_of_the_held_out_part(run, pairs):
    assert run("encoder-decoder", "--out", "pairs", "--sample-tokens", 4).code == 0
    shown = Path("pairs/sample.txt").read_text(encoding="utf-8").split("\n")
    held_out = pairs.read_text(encoding="utf-8").split("\n")[44:]
    for line, pair in zip(shown, held_out[:5], strict=True):
        source, target = pair.split("\t")
        assert line.startswith(f"{source} -> ") and line.endswith((f"(wrong: {target})", "(right)"))
    assert run("encoder", "--out", "gaps", "--sample-tokens", 14).code == 0
    gaps, filled, text = Path("gaps/sample.txt").read_text(encoding="utf-8").split("\n")
    assert gaps.startswith("gaps:   ") and filled.startswith("filled: ") and text.startswith("text:   ")
    assert gaps.count("[") == filled.count("[") == text.count("[")
    outside = re.compile(r"\[.*?\]")
    assert outside.sub("", gaps)[8:] == outside.sub("", filled)[8:] == outside.sub("", text)[8:]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"a\tb\nplain text\n", r"bad.tsv, line 2 has no TAB; .*--architecture decoder"),
        (b"a\tb\n\na\tb\n", r"bad.tsv, line 2 has no TAB"),
        (b"a\tb\nc\td\te\n", r"bad.tsv, line 2 has 2 TABs, but a pair has one"),
        (b"a\tb\n\tb\nc\td\n", r"bad.tsv, line 2 has nothing before its TAB"),
        (
            b"a\tb\n" * 20 + b"abcdefghijklmnopq\tb",
            r"bad.tsv, line 21: its source has 17 tokens, .* 17 or more",
        ),
        (b"a\tb\nb\tabcdefghijklmnop\r\n", r"bad.tsv, line 2: its target has 16 tokens and an end, .* 17 or"),
        (b"a\tb\n", r"bad.tsv has one pair, but the last is held out"),
        (b"", r"bad.tsv is empty"),
        (b"a\t\xff\n", r"bad.tsv is not UTF-8 text: byte 2 is 0xff"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_used(run, lines, message):
    Path("bad.tsv").write_bytes(lines)
    outcome = run("encoder-decoder", "--train-file", "bad.tsv", "--out", "run")
    assert outcome.code == 2 and re.search(message, outcome.error)
    assert not Path("run").exists()


def test_an_editors_mark_is_no_part_of_the_first_pair():
    Path("marked.tsv").write_bytes(b"\xef\xbb\xbfa\tb\nc\td\n")
    assert "".join(load_pairs("marked.tsv", "").train.parts()) == "a\tb"


def test_lines_of_a_held_out_file_have_its_own_numbers(run):
    Path("bad.tsv").write_bytes(b"a\tb\nabcdefghijklmnopq\tb\n")
    assert "bad.tsv, line 2: its source" in run("encoder-decoder", "--valid-file", "bad.tsv").error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dates --architecture decoder", "preset dates is of pairs, which a model of architecture decoder"),
        (
            "cpu --architecture encoder --attention-pattern local --window 4",
            "window is 4, but encoder layers have",
        ),
        (
            "dates --attention-pattern local --window 4",
            "window is 4, but encoder-decoder layers have no causal",
        ),
        ("dates --tokenizer bpe --special-tokens <a>", "--special-tokens <a>: pairs have none"),
        (
            "dates --context-length 20",
            "the dates, line 3: its source has 23 tokens, but context_length is 20",
        ),
    ],
)
def test_a_contradiction_is_one_line(cli, arguments, message):
    outcome = cli(*arguments.split(), "--out", "run")
    assert outcome.code == 2 and message in outcome.error
    assert not Path("run").exists()


def test_plain_text_is_no_file_of_pairs(run, text):
    error = run("encoder-decoder", "--train-file", text, "--out", "run").error
    assert "text.txt, line 1 has no TAB" in error and "--architecture decoder" in error


@pytest.mark.parametrize(
    ("tokenizer", "gaps", "whole"),
    [
        (ByteTokenizer(), "o<mask>er th<mask>", "over the"),
        (
            BPETokenizer(train_on_words(Counter({" brown": 9, " fox": 9}), 263)),
            "a <mask> fox<mask>",
            "a brown fox!",
        ),
        (WordTokenizer.train(["the quick brown fox"], 9), "<mask> brown <mask>", "quick brown fox"),
    ],
    ids=["bytes", "bpe", "words"],
)
def test_gaps_are_filled_with_the_likeliest_tokens(tokenizer, gaps, whole):
    """A model that knows the text is asked about the places of its own tokens: with their spaces."""
    config = ModelConfig("encoder", vocab_size=tokenizer.vocab_size + 1, context_length=12)
    known, asked = torch.from_numpy(tokenizer.encode(whole).astype("int64")), []

    def knowing(ids):
        asked.append(ids[0].clone())
        return 9.0 * one_hot(known, config.vocab_size)[None].double()

    model = mock.Mock(side_effect=knowing, token_embedding=torch.nn.Embedding(1, 1))
    run_config = replace(PRESETS["masked"], model=config)
    text, guesses = fill_gaps(LoadedModel(run_config, tokenizer, model), gaps)
    (read,) = asked
    hidden = read == config.mask_token
    assert text == whole and len(guesses) == hidden.sum() == 2
    assert torch.equal(torch.where(hidden, known, read), known)
    for token, tokens in zip(known[hidden].tolist(), guesses, strict=True):
        assert tokens[0] == (
            tokenizer.decode([token]),
            pytest.approx(1 / (1 + tokenizer.vocab_size / exp(9))),
        )
        assert len(tokens) == 5


def test_an_encoder_fills_gaps_on_the_command_line(run, write):
    assert run("encoder", "--out", "run").code == 0
    code, out, err = write("--model", "run", "--prompt", "f<mask>x")
    first, *gaps = out.splitlines()
    assert code == 0 and not err and first[0] + first[-1] == "fx"
    assert len(gaps) == 1 and gaps[0].startswith("  gap 1: ") and gaps[0].count("%") == 5
    Path("prompts.txt").write_text("f<mask>x\n<mask>o<mask>\n", encoding="utf-8")
    code, out, _ = write("--model", "run", "--prompts", "prompts.txt", "--json")
    one, two = map(json.loads, out.splitlines())
    assert one["prompt"] == "f<mask>x" and one["text"] == first and len(two["gaps"]) == 2
    probabilities = [p for _, p in one["gaps"][0]]
    assert 0 < sum(probabilities) <= 1 and probabilities == sorted(probabilities, reverse=True)


def test_what_an_encoder_and_a_source_cannot_do(run, write, capsys):
    assert run("encoder", "--out", "encoder").code == 0
    assert run("encoder-decoder", "--out", "pairs").code == 0
    for arguments, message in (
        (("encoder", "--prompt", "fox"), "'fox' has no <mask>, and an encoder fills gaps; write <mask> in"),
        (("encoder", "--prompt", "<mask>" + "x" * 16), "has 17 tokens, but the model reads at most 16"),
        (("encoder", "--prompt", "<mask>", "--stop", "."), "--stop is for writing, and this model is an enc"),
        (("encoder", "--prompt", "<mask>", "--temperature", 0), "--temperature is for writing"),
        (("encoder", "--prompt", "<mask>", "--beams", 2), "--beams is for writing"),
        (("pairs",), "--prompt is missing; an encoder-decoder answers"),
        (("pairs", "--prompt", "x" * 17), "--prompt has 17 tokens, but the model reads at most 16"),
    ):
        code, out, err = write("--model", *arguments)
        assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1
    for name in ("encoder", "pairs"):
        assert quantise_command.main([name, "--out", "small"]) == 2
        assert "only decoders are quantised" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder", "conversations"])
def test_an_evaluation_is_divided_among_the_processes_of_the_run(run, small_run, cli, monkeypatch, kind):
    class OfTheRun(Ranks):
        pass

    dividing = []
    monkeypatch.setattr(run_module, "joined", lambda on_cuda: nullcontext(OfTheRun()))
    monkeypatch.setattr(
        Ranks, "dealt", lambda self, parts: dividing.append(self) or ((p, True) for p in parts)
    )
    if kind == "decoder":
        assert small_run("--out", "run").code == 0
    elif kind == "conversations":
        lines = [json.dumps({"instruction": word, "output": word}) for word in WORDS]
        Path("said.jsonl").write_text("\n".join(lines), encoding="utf-8")
        flags = ("--train-file", "said.jsonl", "--vocab-size", 260, "--out", "run")
        assert cli(*CHAT.split(), *flags).code == 0
    else:
        assert run(kind, "--out", "run").code == 0
    assert len(dividing) > 1 and all(isinstance(each, OfTheRun) for each in dividing)


@pytest.mark.parametrize("preset", ["dates", "masked"])
def test_a_preset_runs(cli, preset):
    flags = ("--steps", 2, "--batch-size", 4, "--eval-tokens", 500, "--device", "cpu", "--out", "run")
    outcome = cli(preset, *flags)
    assert outcome.code == 0, outcome.err
    assert "generate --model run --prompt " in outcome.out
    assert ("<mask>" in outcome.out) == (preset == "masked")
    assert metrics(Path("run"))[-1]["step"] == 2
