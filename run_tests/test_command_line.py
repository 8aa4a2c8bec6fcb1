"""Flags, presets and help."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from math import prod
from pathlib import Path
from unittest import mock

import pytest

import train_gpu
from ref_numpy.config import ConfigError, ModelConfig, TrainConfig
from ref_numpy.parameters import parameter_shapes
from torch_impl import chat, interop
from torch_impl.training import (
    account,
    bpe_command,
    command_line,
    generate_command,
    plot,
    quantise_command,
    sweep,
)
from torch_impl.training.command_line import parse
from torch_impl.training.config import RunConfig, RunSettings, TokenizerSettings, read_config
from torch_impl.training.files import InputError
from torch_impl.training.presets import PRESETS


def test_help_needs_neither_torch_nor_numpy():
    """Importing torch takes seconds; help must not wait for it."""
    code = (
        "import sys, train_gpu\n"
        "try: train_gpu.main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[1]
    finished = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, encoding="utf-8")
    assert finished.returncode == 0, finished.stderr
    assert "--learning-rate" in finished.stdout


def test_an_interrupt_while_torch_is_still_imported_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(train_gpu, "_train", mock.Mock(side_effect=KeyboardInterrupt))
    assert train_gpu.main([]) == 130
    assert capsys.readouterr().err == "train_gpu.py: error: interrupted\n"


@pytest.mark.parametrize(
    "program",
    [
        account.parse,
        bpe_command.main,
        chat.parse,
        command_line.parse,
        generate_command.parse,
        interop.export,
        plot.main,
        quantise_command.parse,
        sweep.sweep,
    ],
)
def test_help_is_for_people(program, capsys):
    """A comment for the linter was the description of the flags of a search, and then what their class is."""
    with pytest.raises(SystemExit):
        program(["--help"])
    text = capsys.readouterr().out
    assert "--help" in text and not re.search("noqa|Raises|command line", text)


@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_a_preset_names_every_flag_with_its_value_there(preset, capsys):
    with pytest.raises(SystemExit):
        parse([preset, "--help"])
    text = re.sub(r"[│|\s]+", " ", capsys.readouterr().out)
    config = PRESETS[preset]
    for part in (config.tokenizer, config.start, config.model, config.training, config.run):
        for field in fields(part):
            if part is config.model and field.name == "vocab_size":
                continue  # the tokenizer's is the flag
            flag = "--" + field.name.replace("_", "-")
            value = getattr(part, field.name)
            shown = re.search(rf" {flag}[ ,](?:(?! --(?!no-)).)*?\(default: ([^)]*)\)", text)
            assert shown, f"{flag} has no help"
            assert shown[1] == ("" if value == () else str(value) or "''")


def test_help_breaks_its_lines_for_the_terminal_alone(monkeypatch, capsys):
    """It broke them where the source does as well: `runs; deleting it` was a line, `costs only time` the
    next, and so in every second sentence. And before each line of the source that begins with no letter."""
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        parse(["cpu", "--help"])
    text = re.sub(r"[│ ]*\n[│ ]+", "\n", capsys.readouterr().out)
    assert "for later\nruns; deleting it costs only time. (default: cache)" in text
    assert '{"messages": [{"role", "content"}, ...]}' in text


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_help_has_no_colours_for_who_wants_none(no_color, coloured):
    """In a terminal, whatever NO_COLOR said, it had."""
    code = "import sys, train_gpu\nsys.stdout.isatty = lambda: True\ntrain_gpu.main(['--help'])\n"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TERM": "xterm", "NO_COLOR": no_color},
        capture_output=True,
        encoding="utf-8",
    )
    assert ("\x1b[" in finished.stdout) == coloured and "--learning-rate" in finished.stdout


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_alone_is_that_preset(preset):
    assert parse([preset]).config == PRESETS[preset]


def test_gpt2_has_124_million_parameters():
    model = ModelConfig(**{**vars(PRESETS["gpt2-124m"].model), "vocab_size": 50257})
    assert sum(map(prod, parameter_shapes(model).values())) == 124_439_808


def test_flags_override_the_preset():
    config = parse(["nanogpt-cpu", "--steps", "7", "--n-layer=3", "--bias", "--eval-every", "2"]).config
    assert (config.training.steps, config.model.n_layer, config.model.bias) == (7, 3, True)
    assert config.run.eval_every == 2
    assert config.model.d_model == PRESETS["nanogpt-cpu"].model.d_model


def test_a_size_of_the_vocabulary_stays_where_the_tokenizer_has_one():
    """A preset's size must not stand in the way of another tokenizer; a size that the user gives must."""
    for kind, size in (("words", 50_257), ("bytes", 0), ("characters", 0)):
        assert parse(["gpt2-124m", "--tokenizer", kind]).config.tokenizer.vocab_size == size
    with pytest.raises(ConfigError, match="only bpe and words"):
        parse(["gpt2-124m", "--tokenizer", "bytes", "--vocab-size", "300"])


def test_a_short_run_has_a_short_warm_up():
    assert parse(["cpu", "--steps", "50"]).config.training.warmup_steps == 5
    assert parse(["cpu", "--learning-rate", "1e-5"]).config.training.min_learning_rate == 1e-5 / 10
    with pytest.raises(ConfigError, match="warmup_steps is 60"):
        parse(["cpu", "--steps", "50", "--warmup-steps", "60"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gtp2"],
            r"unknown preset 'gtp2'; the presets are cpu, gpu, mps, nanogpt-cpu, char-fast, nanogpt-gpu",
        ),
        (["--wd", "0.1"], r"unknown flag --wd; did you mean --weight-decay\?"),
        (["--learning-rat", "3"], r"unknown flag --learning-rat; did you mean --learning-rate\?"),
        (
            ["nanogpt-cpu", "--vocab-size", "300"],
            r"vocab_size is 300, but only bpe and words .* is bytes; .*bpe",
        ),
        (
            ["--tokenizer", "bpe", "--vocab-size", "99"],
            r"vocab_size is 99, but must be at least 256: 256",
        ),
        (
            ["--tokenizer", "bpe", "--vocab-size", "257", "--special-tokens", "<a>", "<b>"],
            r"vocab_size is 257, but must be at least 258: 256 bytes and 2 special tokens",
        ),
        (["nanogpt-cpu", "--special-tokens", "<a>"], r"special_tokens are <a>, but bytes have none"),
        (
            ["--tokenizer", "bpr"],
            r"--tokenizer \S*bpr: no such file; use bytes, .* tokenizer.json",
        ),
        (["cpu", "gpu"], r"values of no flag: gpu"),
        (["--train-file", "a.txt", "b.txt", "c.txt"], r"values of no flag: b\.txt, c\.txt"),
        (["-lr", "3"], r"Unrecognized options: -lr, 3"),
        (["--steps", "many"], r"--steps: invalid literal for int.*'many'"),
        (["--steps"], r"Missing value for argument '--steps'"),
        (["--schedule", "cosin"], r"'cosin'.*'--schedule'.*'cosine'"),
        (["--d-model", "30"], r"d_model 30 does not divide into n_head 4 heads; try d_model 32"),
        (["--micro-batches", "5"], r"batch_size \d+ does not divide into 5 micro_batches"),
        (["--steps", "0"], r"steps is 0, but must be at least 1"),
        (["--steps", "10000001"], r"steps is 10000001, but must be at most 10000000"),
        # What no config.json may hold was trained with, and the model could not be read again.
        (["--patience", str(10**20)], r"patience is 10{20}, but must be below 2\*\*63"),
        (["--window", str(2**63), "--attention-pattern", "local"], r"window is \d+, but must be below 2\*"),
        (["--out", "a" * 300], r"a{300}: "),
        (["--init-from", "a" * 300], r"a{300}"),
        (["--eval-every", "0"], r"eval_every is 0, but must be at least 1"),
        (["--sample-tokens", "-1"], r"sample_tokens is -1, but must not be negative"),
        (["--seed", "-1"], r"seed is -1"),
        (["--learning-rate", "nan"], r"learning_rate is nan"),
        (["--out", "run\udcff"], r"--out is not valid text: surrogates not allowed at character 3"),
        (["--resume", "nowhere"], r"nowhere is no run folder"),
        (["cpu", "--resume", "nowhere"], r"leave out 'cpu'"),
        (["--out", "."], r"\. exists, and a run is never overwritten"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(cli, arguments, message):
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert re.search(message, outcome.error)
    assert len(outcome.err.splitlines()) == 1


def test_a_config_survives_json():
    for config in PRESETS.values():
        assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format_version": 1', b'"format_version": 2', "format_version is 2, but this program reads 1"),
        (b'"format_version": 1,', b"", "no format_version"),
        (b'"n_layer"', b'"n_layers"', "model: unknown: n_layers"),
        (b'"special_tokens": []', b'"special_tokens": [3]', r"special_tokens is \[3\], but must be a tuple"),
        (b'"tokenizer": "bpe"', b'"tokenizer": 3', "tokenizer is 3"),
        (b'"n_layer": 3', b'"n_layer": "3"', "n_layer is '3', but must be a int"),
        (b'"eval_every": 200', b'"eval_every": null', "eval_every is None"),
        (b'"device": "auto"', b'"device": 3', "device is 3, but must be a str"),
        (b'"precision": "auto"', b'"precision": "int4"', "precision is 'int4'"),
        (b"{", b"[", "not JSON"),
    ],
)
def test_a_damaged_config_is_named(old, new, message):
    content = PRESETS["cpu"].to_json()
    assert old in content
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_json(content.replace(old, new, 1))


def test_what_a_config_holds_does_nothing_to_a_terminal(tmp_path):
    """A stranger's file used to send its escape codes there, as they are, in what was said of it."""
    content = PRESETS["cpu"].to_json().replace(b'"n_layer"', rb'"\u001b[31m"')
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"model: unknown: \\x1b\[31m"):
        read_config(tmp_path)


def test_settings_and_configs_share_no_flag():
    parts = (ModelConfig, TrainConfig, RunSettings, TokenizerSettings)
    names = [field.name for part in parts for field in fields(part)]
    names.remove("vocab_size")  # the model's is none, since the tokenizer decides it
    assert len(names) == len(set(names))


def test_a_preset_of_another_task_is_not_dropped_for_the_sake_of_a_model(small_run, cli, text):
    """A decoder was trained, and nobody masked anything."""
    assert small_run("--out", "run", "--steps", 1).code == 0
    outcome = cli("masked", "--init-from", "run", "--train-file", text)
    assert outcome.code == 2
    assert "preset masked is for an architecture encoder, and the model in " in outcome.error


def test_where_a_new_run_may_not_be(tmp_path):
    """In a checkpoint it went when that was replaced; and the cache made the folder before the run did."""
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "training.json").touch()
    for out, message in (
        (tmp_path, "--resume it"),
        (tmp_path / "last" / "new" / "er", "lies in a checkpoint"),
    ):
        with pytest.raises(InputError, match=message):
            parse(["--out", str(out)])
    new = tmp_path / "new"
    for cache in (new, new / "cache"):
        with pytest.raises(InputError, match=r"lies in .*new, which the run makes; name another --cache"):
            parse(["--out", str(new), "--cache", str(cache)])
    new.mkdir()
    with pytest.raises(InputError, match=r"exists, and a run is never overwritten; name another --out$"):
        parse(["--out", str(new)])
    (new / "lock").touch()
    with pytest.raises(InputError, match=r"holds no checkpoint to go on from; unless .* delete it"):
        parse(["--out", str(new)])


def test_resume_refuses_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="has no last"):
        parse(["--resume", str(tmp_path)])
