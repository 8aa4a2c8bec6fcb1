"""A trained run, quantised from the command line: what is written, reported, loaded again and refused."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from run_tests.conftest import Gone, content, metrics
from torch_impl import interop
from torch_impl.quantise import dequantise, quantise
from torch_impl.training import generate_command, quantise_command
from torch_impl.training.checkpoint import load_model


@pytest.fixture
def quantised(small_run, call_main):
    """Trains the small run, and then calls the command."""
    assert small_run("--out", "run", "--steps", 40).code == 0
    return partial(call_main, quantise_command.main)


def load(folder: str) -> torch.nn.Module:
    return load_model(Path(folder), torch.float32, torch.device("cpu")).model


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (8, 0), (4, 5), (4, 0)])
def test_a_run_is_quantised_measured_and_writes(quantised, capsys, bits, group_size):
    before = content(Path("run"))
    flags = ("--bits", bits, "--group-size", group_size, "--tokens", 10)
    code, out, _ = quantised("run", "--out", "small", *flags)
    assert code == 0
    sizes = [Path(f"{folder}/model.safetensors").stat().st_size for folder in ("run/best", "small")]
    assert f"{sizes[0]:,} bytes are now {sizes[1]:,}" in out
    found = re.findall(r"(before|after): ([\d.]+) nats per token, ([\d.]+) bits per byte, .* per second", out)
    assert [when for when, *_ in found] == ["before", "after"]
    assert float(found[0][2]) == pytest.approx(
        min(row["bits_per_byte"] for row in metrics(Path("run"))), abs=1e-4
    )
    assert float(found[1][2]) == pytest.approx(float(found[0][2]), abs=0.02 if bits == 8 else 0.5)
    assert content(Path("run")) == before
    assert sorted(path.name for path in Path("small").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]

    original, small = load("run/best"), load("small")
    weight = original.blocks[0].ffn.up.weight.detach()
    stored = small.blocks[0].ffn.up.quantised()
    assert torch.equal(dequantise(stored), dequantise(quantise(weight, bits, group_size)))
    assert stored.values.dtype == (torch.int8 if bits == 8 else torch.uint8)
    table = original.token_embedding.weight.detach()
    assert torch.equal(small.token_embedding.weight, dequantise(quantise(table, 8, group_size)))

    assert generate_command.main(["--model", "small", "--prompt", "The quick", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out.startswith("The quick")


def test_an_untied_head_is_quantised_too(small_run, capsys):
    assert small_run("--out", "untied", "--no-tied-embeddings", "--positions", "sinusoidal").code == 0
    assert quantise_command.main(["untied", "--out", "small", "--bits", "4", "--tokens", "0"]) == 0
    assert "written per second" not in capsys.readouterr().out
    tensors = load_file("small/model.safetensors")
    assert tensors["head.values"].dtype == tensors["token_embedding.values"].dtype == torch.int8
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8} == {
        f"blocks.0.{name}.values" for name in ("attention.qkv", "attention.proj", "ffn.up", "ffn.down")
    }


def test_a_text_of_ones_own_and_no_other_is_read(quantised, text):
    text.unlink()
    code, _, error = quantised("run", "--out", "small")
    assert code == 2 and "cannot read" in error and not Path("small").exists()
    Path("own.txt").write_text("The lazy dog jumps over the quick brown fox.\n", encoding="utf-8")
    code, out, _ = quantised("run", "--out", "small", "--valid-file", "own.txt", "--tokens", 3)
    assert code == 0 and "45 tokens of held-out text" in out


def test_words_have_no_bits_per_byte(small_run, capsys):
    small_run("--out", "words", "--tokenizer", "words")
    capsys.readouterr()
    assert quantise_command.main(["words", "--out", "small", "--tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "nats per token" in out and "bits per byte" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run folder is named"),
        (["run"], "--out is missing"),
        (["nowhere", "--out", "small"], "nowhere is no folder"),
        ([".", "--out", "small"], "holds no finished checkpoint"),
        (["run", "--out", "run"], "run exists, and is not overwritten"),
        (["run", "--out", "no/small"], "no is no folder; make it first"),
        (["run", "--out", "small", "--bits", "3"], "3"),
        (["run", "--out", "small", "--group-size", "-1"], "group_size is -1, but must be 0"),
        (["run", "--out", "small", "--tokens", "-1"], "--tokens is -1"),
        (["run", "--out", "small", "--device", "cuda:99"], "CUDA finds"),
        (["run", "--out", "small", "--valid-file", "none.txt"], "cannot read none.txt"),
        (["run", "--out", "small", "--valid-file", "one.txt"], "has 1 token, but needs at least 2"),
        (["run", "--out", "small", "--bitz", "8"], "unknown flag --bitz; did you mean --bits?"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(quantised, arguments, message):
    Path("one.txt").write_text("a", encoding="utf-8")
    code, out, error = quantised(*arguments)
    last = error.splitlines()[-1]
    assert code == 2 and out == ""
    assert last.startswith("quantise: error: ") and message in last and "Traceback" not in error
    assert not list(Path().glob("small*"))


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_measured(quantised, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    code, out, error = quantised("run", "--out", "small")
    assert code == 2 and out == "" and "cannot be written to; name another --out" in error


def test_no_more_tokens_are_told_than_are_looked_at(small_run, capsys):
    """All of the held-out text was said to be measured, of which the run looks at a part."""
    assert small_run("--out", "part", "--eval-tokens", 40).code == 0
    capsys.readouterr()
    assert quantise_command.main(["part", "--out", "less", "--tokens", "0"]) == 0
    assert ", 40 tokens of held-out text:" in capsys.readouterr().out


def test_a_folder_that_is_no_run_does_not_tell_its_text(quantised):
    """It was measured on the text that a run has which names none, and was said to have held that out."""
    assert interop.main(["--model", "run", "--out", "hf"]) == 0
    code, _, error = quantised("hf", "--out", "small")
    assert code == 2 and "hf does not tell what it was trained on; name a --valid-file" in error


def test_weights_that_are_no_numbers_are_refused(quantised):
    path = Path("run/best/model.safetensors")
    tensors = load_file(path)
    tensors["blocks.0.ffn.up.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    code, _, error = quantised("run", "--out", "small")
    assert code == 2 and "model.safetensors: a weight is no finite number" in error
    assert not Path("small").exists()


def test_a_model_in_shards_is_quantised(quantised):
    """Its size was asked of a model.safetensors that is not there, when the smaller model was written."""
    assert interop.main(["--model", "run", "--out", "hf"]) == 0
    tensors = load_file("hf/model.safetensors")
    Path("hf/model.safetensors").unlink()
    places = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == file}, Path("hf", file))
    index = Path("hf/model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    Path("own.txt").write_text("The lazy dog jumps over the quick brown fox.\n", encoding="utf-8")
    code, out, _ = quantised("hf", "--out", "small", "--valid-file", "own.txt", "--tokens", 3)
    size = sum(path.stat().st_size for path in Path("hf").glob("*.safetensors"))
    assert code == 0 and f"{size:,} bytes are now" in out


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_model_whose_logits_are_not_numbers_is_told_and_not_written(quantised, tokens):
    """A norm is not quantised, so nothing looked at it: there was a traceback, and a model in --out."""
    path = Path("run/best/model.safetensors")
    tensors = load_file(path)
    tensors["norm.weight"][:] = float("nan")
    save_file(tensors, path)
    code, _, error = quantised("run", "--out", "small", "--tokens", tokens)
    assert code == 2 and len(error.splitlines()) == 1
    assert "run, before it is quantised: the model's logits are not numbers" in error
    assert not list(Path().glob("small*"))


def test_a_reader_that_goes_away_does_not_end_it(quantised, monkeypatch):
    """It failed with a broken pipe, as of | head, before or after it had written the model."""
    monkeypatch.setattr("sys.stdout", Gone())
    assert quantise_command.main(["run", "--out", "small", "--tokens", "0"]) == 0
    assert load("small")


def test_folders_of_like_names_are_the_users(quantised):
    """What was called like a leftover was taken for one, and removed."""
    for name in ("small.old", "small.being-written"):
        Path(name).mkdir()
        Path(name, "thesis.txt").write_text(name, encoding="utf-8")
    assert quantised("run", "--out", "small", "--tokens", 0)[0] == 0
    for name in ("small.old", "small.being-written"):
        assert Path(name, "thesis.txt").read_text(encoding="utf-8") == name
    assert {path.name for path in Path().glob("small*")} == {"small", "small.being-written", "small.old"}


def test_a_full_disk_leaves_nothing(quantised, on_file_operation):
    def full(event, path):
        if path.name == "tokenizer.json" and path.parent.name.startswith("small."):
            raise OSError(28, "No space left on device", str(path))

    on_file_operation(full)
    code, _, error = quantised("run", "--out", "small")
    on_file_operation(None)
    assert code == 1 and re.search(r"the disk is full, writing .*small; make room\n$", error)
    assert not list(Path().glob("small*"))


@pytest.fixture
def small(quantised):
    """A quantised model, and its tensors to be changed."""
    assert quantised("run", "--out", "small", "--bits", 4, "--tokens", 0)[0] == 0
    return load_file("small/model.safetensors")


def complaint(capsys) -> str:
    capsys.readouterr()
    assert generate_command.main(["--model", "small"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1
    return error


def test_damaged_or_contradictory_tensors_are_refused(small, capsys):
    path = Path("small/model.safetensors")
    changes = {
        "blocks.0.ffn.up.scales": (
            torch.full((64, 1), -1.0),
            "is damaged: a number of blocks.0.ffn.up.scales",
        ),
        "blocks.0.ffn.up.values": (
            torch.zeros(64, 16, dtype=torch.int8),
            "is I8 [64, 16], but must be U8",
        ),
        "token_embedding.scales": (torch.ones(256, 2), "is F32 [256, 2], but must be F32 [256, 1]"),
        "blocks.0.attention.qkv.weight": (torch.zeros(48, 16), "is missing or too many"),
    }
    for name, (tensor, message) in changes.items():
        save_file({**small, name: tensor}, path)
        assert message in complaint(capsys)
    save_file(small, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged" in complaint(capsys)


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        ({"bits": 8, "group_size": 64}, "does not fit config.json"),
        ({"bits": 4, "group_size": 4}, "does not fit config.json"),
        (None, "does not fit config.json"),
        ({"bits": 3, "group_size": 64}, "bits is 3, but must be one of"),
        ({"bits": 4, "group_size": -1}, "group_size is -1"),
        ([], "quantisation is [], but must be an object"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(small, capsys, quantisation, message):
    path = Path("small/config.json")
    config = json.loads(path.read_bytes())
    assert config["quantisation"] == {"bits": 4, "group_size": 64}
    path.write_text(json.dumps({**config, "quantisation": quantisation}), encoding="utf-8")
    assert message in complaint(capsys)


def test_what_is_quantised_is_neither_trained_nor_quantised_again(small, quantised, cli):
    code, _, error = quantised("small", "--out", "smaller")
    assert code == 2 and "small is quantised already" in error
    assert "small has no last" in cli("--resume", "small").error
    shutil.rmtree("run/last")
    shutil.copytree("small", "run/last")
    assert "run is quantised, and only generates" in cli("--resume", "run").error
