"""Runs that begin from other models, and end as models that others load."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ref_numpy.config import ModelConfig
from run_tests.conftest import Gone, content, metrics
from torch_impl import interop
from torch_impl.interop import from_hf, to_hf
from torch_impl.training import generate_command
from torch_impl.training.checkpoint import load_model
from torch_impl.training.tokenizer import ByteTokenizer
from torch_impl.transformer import initialised

BEGIN = """cpu --device cpu --batch-size 4 --steps 12 --eval-every 4 --checkpoint-every 5 --log-every 3
    --sample-tokens 5 --warmup-steps 2"""
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2}


@pytest.fixture
def begin(cli, text):
    """Runs with the small run's training, but no model of its own."""
    return lambda *flags: cli(*BEGIN.split(), "--train-file", text, *flags)


def model_folder(name: str, tokenizer: ByteTokenizer | None, **options: object) -> Path:
    """A folder as transformers writes it."""
    shape = {"context_length": 8, "n_layer": 1, "d_model": 16} | options
    to_hf(initialised(ModelConfig(**shape), 3), name, tokenizer)
    return Path(name)


def weights(checkpoint: str) -> dict[str, torch.Tensor]:
    return load_file(Path(checkpoint) / "model.safetensors")


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_a_model_comes_trains_on_and_goes_back(begin, capsys, options):
    folder = model_folder("hf", ByteTokenizer(), **options)
    outcome = begin("--init-from", "hf", "--out", "run", "--eval-every", 12)
    assert outcome.code == 0 and f"weights from {folder.absolute()}" in outcome.out
    first, last = metrics(Path("run"))[0], metrics(Path("run"))[-1]
    assert first["val_loss"] > last["val_loss"]
    assert interop.main(["--model", "run", "--out", "back"]) == 0
    for model in (from_hf("back"), load_model(Path("back"), torch.float32, torch.device("cpu")).model):
        trained = model.state_dict()
        assert set(trained) == set(weights("run/best"))
        for name, value in weights("run/best").items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=0)
    assert Path("back/tokenizer.json").read_bytes() == Path("run/best/tokenizer.json").read_bytes()
    capsys.readouterr()
    texts = []
    for place in ("run", "back"):
        assert generate_command.main(["--model", place, "--prompt", "The", "--max-new-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("place", ["run", "run/last"])
def test_a_run_begins_where_another_ended(small_run, begin, place):
    """With the other's weights, tokenizer and special tokens, and a training of its own."""
    bpe = ("--tokenizer", "bpe", "--vocab-size", "280", "--special-tokens", "fox")
    assert small_run("--out", "run", *bpe).code == 0
    assert begin("--init-from", place, "--out", "next", "--dropout", "0.2").code == 0
    assert metrics(Path("next"))[0]["val_loss"] == pytest.approx(metrics(Path("run"))[-1]["val_loss"])
    settings = json.loads(Path("next/last/config.json").read_bytes())
    assert settings["model"]["dropout"] == 0.2 and settings["tokenizer"]["special_tokens"] == ["fox"]
    assert Path("next/last/tokenizer.json").read_bytes() == Path("run/last/tokenizer.json").read_bytes()


def test_such_a_run_is_resumed_without_what_it_began_from(begin, cli):
    folder = model_folder("hf", ByteTokenizer())
    flags = ("--init-from", "hf", "--schedule", "constant")
    assert begin(*flags, "--out", "whole").code == 0
    assert begin(*flags, "--out", "run", "--steps", "8").code == 0
    shutil.rmtree(folder)
    assert cli("--resume", "run", "--steps", "12").code == 0
    assert content(Path("run"), history=False) == content(Path("whole"), history=False)
    error = cli("--resume", "run", "--init-from", "whole").error
    assert "--resume goes on in run; leave out --init-from" in error


def test_a_shorter_context_uses_the_first_positions(begin):
    model_folder("hf", ByteTokenizer())
    assert begin("--init-from", "hf", "--out", "run", "--context-length", "5").code == 0
    assert weights("run/last")["position_embedding.weight"].shape == (5, 16)
    error = begin("--init-from", "hf", "--out", "long", "--context-length", "9").error
    assert re.search(r"--context-length 9: the model in .*hf has 8; leave the flag out", error)


def test_a_longer_context_by_linear_position_interpolation(begin):
    model_folder("hf", ByteTokenizer(), **LLAMA)
    flags = ("--context-length", "16", "--rope-scale", "2")
    assert begin("--init-from", "hf", "--out", "run", *flags).code == 0
    assert interop.main(["--model", "run", "--out", "back"]) == 0
    config = from_hf("back").config
    assert (config.context_length, config.rope_scale) == (16, 2.0)


def test_a_folder_without_a_tokenizer_needs_one_by_name(begin):
    model_folder("hf", None)
    error = begin("--init-from", "hf", "--out", "run").error
    assert "hf has no tokenizer.json; name the one that its model was trained with by --tokenizer" in error
    assert begin("--init-from", "hf", "--out", "run", "--tokenizer", "bytes").code == 0
    model_folder("other", None, vocab_size=300)
    error = begin("--init-from", "other", "--out", "none", "--tokenizer", "bytes").error
    assert re.search(r"bytes has 256 tokens, but the model in .*other 300: they do not belong", error)
    assert not Path("none").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--d-model", "32"), r"--d-model 32: the model in .*hf has 16; leave the flag out, or train a new"),
        (("--positions", "sinusoidal"), r"--positions sinusoidal: the model in .*hf has learned"),
        (("--no-bias",), r"--bias False: the model in .*hf has True"),
        (("--tokenizer", "bytes"), r"--tokenizer bytes: the model in .*hf comes with its own; leave"),
        (("--vocab-size", "300"), r"vocab_size is 300, but only bpe and words learn so many tokens"),
        (("--special-tokens", "<x>"), r"<x>: .*tokenizer\.json has no such special token"),
    ],
)
def test_flags_that_the_weights_do_not_fit(begin, flags, message):
    model_folder("hf", ByteTokenizer())
    outcome = begin("--init-from", "hf", "--out", "run", *flags)
    assert outcome.code == 2 and re.search(message, outcome.error)
    assert not Path("run").exists()


def test_a_folder_that_is_no_model(begin, capsys):
    Path("empty").mkdir()
    assert "empty holds no finished checkpoint" in begin("--init-from", "empty").error
    assert "nowhere is no folder" in begin("--init-from", "nowhere").error
    folder = model_folder("hf", ByteTokenizer())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert re.search(r"hf.model\.safetensors is damaged", begin("--init-from", "hf").error)
    assert generate_command.main(["--model", "hf"]) == 2
    assert "is damaged" in capsys.readouterr().err
    described = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(described | {"model_type": "bert"}), encoding="utf-8")
    assert "model_type is 'bert', but must be one of gpt2, llama" in begin("--init-from", "hf").error
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "run"], "--out is missing"),
        (["--model", "nowhere", "--out", "hf"], "nowhere is no folder"),
        (["--model", ".", "--out", "hf"], "holds no finished checkpoint"),
        (["--model", "run", "--out", "run"], "run exists, and is not overwritten"),
        (["--model", "run", "--to", "hf"], "unknown flag --to"),
        (["--model", "post", "--out", "hf"], "norm_placement is post, but Hugging Face's gpt2 layout"),
        (["--model", "gaps", "--out", "hf"], "architecture is encoder, but"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(small_run, capsys, arguments, message):
    assert small_run("--out", "run").code == 0
    assert small_run("--out", "post", "--norm-placement", "post").code == 0
    assert small_run("--out", "gaps", "--architecture", "encoder").code == 0
    capsys.readouterr()
    assert interop.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("interop: error: ") and message in error and len(error.splitlines()) == 1
    assert not Path("hf").exists()


def test_an_export_that_nobody_hears_of_is_written(small_run, monkeypatch):
    """A reader of its output that had left made it say that nothing was written, when all was."""
    assert small_run("--out", "run").code == 0
    monkeypatch.setattr("sys.stdout", Gone())
    assert interop.main(["--model", "run", "--out", "hf"]) == 0 and Path("hf/config.json").is_file()


def test_an_export_that_is_interrupted_or_fails_leaves_nothing(small_run, capsys, monkeypatch):
    assert small_run("--out", "run").code == 0
    before = set(Path().iterdir())
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)):

        def fails(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(interop, "write_tensors", fails)
        assert interop.main(["--model", "run", "--out", "hf"]) == code
        told = capsys.readouterr().err
        assert "nothing was written" in told and (code == 130 or "is full, writing hf; make room;" in told)
        assert set(Path().iterdir()) == before
