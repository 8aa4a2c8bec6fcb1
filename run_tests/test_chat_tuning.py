"""Tuning on conversations: what is learned, what the run folder holds, and files that cannot be used."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import train_gpu
from ref_numpy.bpe_format import new_vocabulary
from ref_numpy.config import ModelConfig
from ref_numpy.conversation import SPECIAL_TOKENS, from_record
from run_tests.conftest import SMALL, content, metrics
from torch_impl import chat
from torch_impl.bpe import BPETokenizer
from torch_impl.interop import from_hf, to_hf
from torch_impl.training import quantise_command, report
from torch_impl.training.checkpoint import load_model
from torch_impl.training.conversation_file import read_conversations
from torch_impl.transformer import initialised

WORDS = ("one", "two", "three", "four", "five")
CHAT = """chat --device cpu --context-length 40 --sample-tokens 5 --steps 8 --batch-size 4 --eval-every 4
    --checkpoint-every 3 --log-every 3"""


def record(a: str, b: str) -> dict:
    """In turns in both ways to write a conversation down."""
    if a < b:
        return {"instruction": f"after {a}", "input": "", "output": b}
    turns = (("system", "count"), ("user", f"after {a}"), ("assistant", b))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "conversations.jsonl"
    records = [record(a, b) for a in WORDS for b in WORDS]
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model that was trained on text, in a run folder that no test writes to."""
    folder = tmp_path_factory.mktemp("base")
    text = folder / "text.txt"
    text.write_text("after one comes two\n" * 40, encoding="utf-8")
    flags = (*SMALL.split(), "--context-length", "40", "--sample-tokens", "0", "--eval-every", "12")
    assert train_gpu.main([*flags, "--train-file", str(text), "--out", str(folder / "run")]) == 0
    return str(folder / "run")


@pytest.fixture
def tune(cli, conversations):
    return lambda *flags: cli(*CHAT.split(), "--train-file", conversations, *flags)


def load(folder: str) -> tuple[dict[str, torch.Tensor], BPETokenizer]:
    loaded = load_model(Path(folder), torch.float32, torch.device("cpu"))
    return loaded.model.state_dict(), loaded.tokenizer


def test_a_base_model_is_tuned_and_its_run_folder_has_the_special_tokens(tune, base):
    outcome = tune("--init-from", base, "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "22 conversations to train on, 3 conversations held out" in outcome.out
    assert outcome.out.endswith("finished; talk to it: python -m torch_impl.chat --model run\n")
    sample = Path("run/sample.txt").read_text(encoding="utf-8")
    assert re.match(r"user: after five\nassistant: .*\(in the file: three\)", sample, re.DOTALL)
    losses = [row["val_loss"] for row in metrics(Path("run"))]
    assert losses[-1] < losses[0]
    params, tokenizer = load("run/last")
    assert [*tokenizer.special_tokens.items()] == [(token, 256 + n) for n, token in enumerate(SPECIAL_TOKENS)]
    assert params["token_embedding.weight"].shape[0] == tokenizer.vocab_size == 260


def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(tune, cli, base, stop_at):
    assert tune("--init-from", base, "--out", "whole").code == 0
    stop_at(5)
    assert tune("--init-from", base, "--out", "stopped").code == 130
    stop_at(None)
    assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))
    refused = cli("--resume", "stopped", "--content", "text")
    assert "--content text: the run in stopped has conversations" in refused.error


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_a_model_from_hugging_face_grows_by_rows_that_are_the_mean_of_the_old_ones(tune, layout):
    kind = {
        "gpt2": {},
        "llama": {"positions": "rope", "activation": "swiglu", "norm": "rmsnorm", "bias": False},
    }
    config = ModelConfig(vocab_size=258, context_length=40, n_layer=1, n_head=2, d_model=8, **kind[layout])
    config = ModelConfig(**{**vars(config), "tied_embeddings": layout == "gpt2"})
    tokenizer = BPETokenizer(new_vocabulary([(b"e", b"r")], ["<|endoftext|>"]))
    to_hf(initialised(config, 1), Path("hf"), tokenizer)
    flags = ("--steps", 1, "--learning-rate", "1e-12", "--dropout", 0, "--out", "run")
    assert tune("--init-from", "hf", *flags).code == 0
    params, tuned = load("run/last")
    before = from_hf("hf").state_dict()
    for name in ("token_embedding.weight", "head.weight")[: 1 if layout == "gpt2" else 2]:
        old, new = params[name][:258], params[name][258:]
        torch.testing.assert_close(old, before[name], rtol=0, atol=1e-9)
        torch.testing.assert_close(new, before[name].mean(0).expand(4, -1), rtol=0, atol=1e-7)
    assert tuned.special_tokens == {
        "<|endoftext|>": 257,
        **{t: 258 + n for n, t in enumerate(SPECIAL_TOKENS)},
    }


def test_a_tuned_model_is_tuned_again_with_the_tokens_that_it_has_and_quantised(
    tune, base, capsys, monkeypatch
):
    assert tune("--init-from", base, "--out", "run").code == 0
    assert tune("--init-from", "run", "--steps", 1, "--out", "again").code == 0
    assert load("again/last")[1].vocabulary == load("run/last")[1].vocabulary
    assert metrics(Path("again"))[0]["val_loss"] == min(row["val_loss"] for row in metrics(Path("run")))
    assert quantise_command.main(["run", "--out", "small", "--tokens", "0"]) == 0
    assert "talk to it: python -m torch_impl.chat --model small" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"after one\n"), "utf-8"))
    assert chat.main(["--model", "small", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_without_a_base_a_model_begins_at_random_and_learns_its_tokens_from_what_is_said(tune):
    outcome = tune("--tokenizer", "bpe", "--vocab-size", 270, "--n-layer", 1, "--d-model", 16, "--out", "run")
    assert outcome.code == 0, outcome.err
    tokens = load("run/last")[1].vocabulary.tokens
    assert b" three" not in tokens and b"er" in tokens and not any(b"content" in token for token in tokens)


def test_held_out_conversations_that_do_not_fill_a_context_are_looked_at(tune, monkeypatch):
    """Attention maps took the numbers of packed conversations for tokens too, and that of padding is -1."""
    seen, draw = [], report.draw_attention
    monkeypatch.setattr(report, "draw_attention", lambda maps: seen.extend(maps) or draw(maps))
    lines = [json.dumps({"instruction": word, "output": word}) for word in WORDS]
    Path("few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    outcome = tune("--train-file", "few.jsonl", "--vocab-size", 260, "--looks", 1, "--out", "run")
    assert outcome.code == 0, outcome.error
    assert "".join(seen[0].queries) == "<user>five<end_of_tur…<assistant>five"
    assert seen[0].weights.shape[1:] == (11, 11)


def test_an_array_of_records_is_read_as_lines_are(conversations):
    lines, want = conversations.read_text(encoding="utf-8").splitlines(), read_conversations(conversations)
    assert want == [from_record(json.loads(line)) for line in lines]
    for text in (
        "[" + ",".join(lines) + "]",
        "\ufeff [\n" + ",\n\n".join(lines) + "\n]\n",
        "\n" + "\r\n\n".join(lines),
    ):
        conversations.write_text(text, encoding="utf-8")
        assert read_conversations(conversations) == want


def test_exchanges_longer_than_the_context_are_left_out_and_counted(tune, base, conversations):
    long = {"instruction": "x" * 50, "output": "y"}
    with conversations.open("a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    outcome = tune("--init-from", base, "--steps", 1, "--out", "run")
    told = "3 conversations held out (2 pieces of them; exchanges left out, longer than the context of 40: 1)"
    assert told in outcome.out
    conversations.write_text(json.dumps(long) + "\n" + json.dumps(long), encoding="utf-8")
    told = "of 1 conversation to train on none has an exchange that fits into the context of 40 tokens; "
    error = tune("--init-from", base, "--out", "none").error  # its positions are learned, and no more than 40
    assert told + "shorten them, or begin with a model of a larger one" in error
    error = tune("--tokenizer", "bytes", "--out", "none").error
    assert told + "shorten them, or use a larger --context-length" in error


GOOD = '{"instruction": "q", "output": "a"}\n'
TURNS = '{"messages": [{"role": "user", "content": "q"}, {"role": "%s", "content": "%s"}]}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", r"bad.jsonl is empty; a conversation is a JSON object"),
        ("[]", r"bad.jsonl is empty"),
        (GOOD, r"bad.jsonl has one conversation, but the last is held out"),
        (GOOD + "{", r"line 2 is broken JSON: .*, column 2; mend it, or take the record out$"),
        ("Hi", r'line 1 is broken JSON: .*; a record is \{"messages": .*\} or \{"instruction": .*\}$'),
        ('{"conversations": []}', r'line 1: .* no messages; a record is \{"messages": '),
        (
            GOOD + "\n" + GOOD[:-1] + GOOD,
            r"line 3 is broken JSON: '\{\"instruction\": .* comes after the end",
        ),
        (
            "[" + GOOD + GOOD + "]",
            r"line 2 is broken JSON: after a record comes '\{\"instruction.*, not a comma",
        ),
        ("[" + GOOD + ",\n\n" + '{"instruction": }]', r"line 4 is broken JSON: Expecting value, column 17"),
        ("[" + GOOD, r"line 2 is broken JSON: after a record comes ''"),
        ("[" + GOOD + "]]", r"line 2 is broken JSON: '\]' comes after the end of the array"),
        ("[" + GOOD + ",\n\n7]", r"line 4: 7 is no object"),
        (GOOD + "[" * 100_000, r"line 2 is broken JSON"),
        (GOOD + "9" * 10_000, r"line 2 is broken JSON"),
        (
            GOOD + TURNS % ("user", "a"),
            r"line 2: message 2 is by the user, but after the user speaks the assistant",
        ),
        (GOOD + TURNS % ("bot", "a"), r"line 2: message 2 has the role 'bot'; use system, user, assistant"),
        (GOOD + TURNS % ("assistant", ""), r"line 2: message 2, by the assistant, is '', and so empty"),
        (GOOD + '{"text": "a"}', r"line 2: \{'text': 'a'\} has no instruction, and no messages"),
    ],
)
def test_a_file_of_conversations_that_cannot_be_used(cli, lines, message):
    Path("bad.jsonl").write_text(lines, encoding="utf-8")
    outcome = cli("chat", "--train-file", "bad.jsonl", "--out", "run")
    assert outcome.code == 2 and re.search(message, outcome.error), outcome.error
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("chat", "--train-file is missing; name a file of conversations"),
        ("chat --train-file nowhere.jsonl", "nowhere.jsonl: No such file"),
        (
            "chat --architecture encoder",
            "--content conversations is for a decoder, and the model is an encoder",
        ),
        ("dates --content conversations", "--content conversations is for a decoder"),
        ("chat --tokenizer words", "--tokenizer words cannot write every text"),
        ("chat --content talk", "--content"),
    ],
)
def test_a_contradiction_is_one_line(cli, arguments, message):
    outcome = cli(*arguments.split(), "--out", "run")
    assert outcome.code == 2 and message in outcome.error
    assert not Path("run").exists()


def test_a_base_whose_tokens_are_characters_cannot_be_tuned(tune, small_run):
    assert small_run("--tokenizer", "characters", "--context-length", 40, "--out", "base").code == 0
    error = tune("--init-from", "base", "--out", "run").error
    assert "conversations need a tokenizer that can write any text" in error
