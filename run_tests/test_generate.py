"""Writing with a trained model from the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ref_numpy.config import SamplingConfig
from torch_impl import generate as generate_module

ROOT = Path(__file__).parents[1]


@pytest.fixture
def write(small_run, capsys):
    """Trains the small run, and then writes with it."""
    assert small_run("--out", "run").code == 0

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = generate_module.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_it_goes_on_from_the_prompt_and_the_seed_decides(write):
    flags = ("--model", "run", "--prompt", "The quick", "--max-new-tokens", 40)
    code, text, _ = write(*flags)
    assert code == 0 and text.startswith("The quick") and text.endswith("\n")
    assert write(*flags)[1] == text
    assert write(*flags, "--seed", 1)[1] != text


def test_temperature_0_always_takes_the_likeliest(write):
    flags = ("--model", "run/last", "--temperature", 0, "--max-new-tokens", 20)
    assert write(*flags)[1] == write(*flags, "--seed", 5)[1]


def test_best_is_taken_before_last_and_a_checkpoint_when_it_is_named(write):
    flags = ("--prompt", "a", "--max-new-tokens", 20)
    best = write("--model", "run/best", *flags)[1]
    assert write("--model", "run", *flags)[1] == best
    shutil.rmtree("run/best")
    assert write("--model", "run", *flags)[1] == write("--model", "run/last", *flags)[1]


def test_a_checkpoint_whose_writer_was_killed_between_its_renames_is_found(write):
    flags = ("--model", "run", "--max-new-tokens", 20)
    text = write(*flags)[1]
    shutil.move("run/best", "run/best.old")
    assert write(*flags)[1] == text
    assert Path("run/best.old").exists(), "reading must not tidy up under a run that writes"


def test_characters_of_several_bytes_come_whole(write, monkeypatch):
    """A dash is three tokens; the terminal must never get a third of it. A lone byte is no character."""
    dash = list("–".encode())
    monkeypatch.setattr(generate_module, "generate", lambda *_: iter([*dash, 0xE2, 0x41, 0xC3]))
    written = []
    monkeypatch.setattr("builtins.print", lambda *values, **_: written.extend(values))
    assert write("--model", "run", "--prompt", "x")[0] == 0
    assert [part for part in written if part] == ["x", "–", "\ufffdA", "\ufffd"]


def test_the_prompt_is_cut_to_the_context(write):
    assert write("--model", "run", "--prompt", "long " * 50, "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "nowhere"], "nowhere is no folder"),
        (["--model", "."], "holds no finished checkpoint"),
        (["--model", "run", "--temperature", "-1"], "temperature is -1.0"),
        (["--model", "run", "--temperature", "nan"], "temperature is nan"),
        (["--model", "run", "--top-p", "0"], "top_p is 0.0, but must lie in (0, 1]"),
        (["--model", "run", "--top-k", "-1"], "top_k is -1, but must be 0 (all tokens) or more"),
        (["--model", "run", "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--model", "run", "--seed", "-1"], "--seed is -1"),
        (["--model", "run", "--device", "cuda:99"], "CUDA finds"),
        (["--model", "run", "--prompt", "\udcff"], "--prompt is not valid text"),
        (["--model", "run", "--temp", "1"], "did you mean --temperature?"),
        (["--model", "run", "--beams", "-1"], "width is -1, but must be at least 1"),
        (["--model", "run", "--beams", "2", "--n-best", "3"], "n_best is 3, but must lie in [1, width 2]"),
        (["--model", "run", "--beams", "2", "--length-penalty", "nan"], "length_penalty is nan"),
        (["--model", "run", "--beams", "2", "--max-new-tokens", "0"], "a beam needs at least 1"),
        (["--model", "run", "--n-best", "2"], "need a search; add --beams 4"),
        (["--model", "run", "--beams", "2", "--stop", ""], "--stop '' is nothing that"),
        (["--model", "run", "--beams", "2", "--stop", "\udcff"], "--stop is not valid text"),
    ],
)
def test_a_mistake_is_one_line(write, arguments, message):
    code, out, err = write(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("generate: error: ") and message in err and len(err.splitlines()) == 1


def test_beams_write_the_n_best_with_their_scores(write):
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 6, "--beams", 4)
    code, best, _ = write(*flags)
    assert code == 0 and best.startswith("The")
    several = write(*flags, "--n-best", 3)[1]
    assert several.startswith("[1] score -") and several.split("\n", 1)[1].startswith(best)
    scores = [float(line.split()[-1]) for line in several.splitlines() if line.startswith("[")]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_a_beam_of_width_1_writes_what_temperature_0_does(write):
    flags = ("--model", "run", "--prompt", "long " * 5, "--max-new-tokens", 12)
    assert write(*flags, "--beams", 1)[1] == write(*flags, "--temperature", 0)[1]


def test_a_stop_text_ends_a_beam_and_is_not_written(write):
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 20, "--beams", 1)
    text = write(*flags)[1].removesuffix("\n")
    stop = text[5:7]
    assert write(*flags, "--stop", stop)[1] == text[: text.index(stop, 3)] + "\n"
    assert write(*flags, "--stop", "never", "seen")[1] == text + "\n"


def test_a_damaged_checkpoint_is_named(write):
    path = Path("run/best/model.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert "model.safetensors is damaged" in write("--model", "run")[2]


def test_a_tokenizer_of_another_model_is_refused(write):
    path = Path("run/best/config.json")
    config = json.loads(path.read_bytes())
    config["model"]["vocab_size"] = 300
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "has 256 tokens, but the model of config.json 300" in write("--model", "run")[2]


def test_a_reader_that_goes_away_ends_it_quietly(write, tmp_path):
    command = [sys.executable, "-m", "torch_impl.generate", "--model", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_the_library_function_is_what_the_command_line_prints(write):
    from torch_impl.training.checkpoint import load_model

    loaded = load_model(Path("run/best"), torch.float32, torch.device("cpu"))
    prompt = torch.from_numpy(loaded.tokenizer.encode("The"))
    ids = list(generate_module.generate(loaded.model, prompt, 30, SamplingConfig(0.8), 3))
    text = write("--model", "run", "--prompt", "The", "--max-new-tokens", 30, "--seed", 3)[1]
    assert text == "The" + loaded.tokenizer.decode(ids) + "\n"
