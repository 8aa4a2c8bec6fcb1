"""Benchmarks as commands: their mistakes, their files, and what is kept of one that is stopped."""

import importlib
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest

from benchmarks import attention_memory, bpe, trajectory, turns
from benchmarks.command import command
from benchmarks.rows import row, table, write_rows
from run_tests.test_benchmarks import NANOGPT

BENCHMARKS = sorted(
    path.stem
    for path in Path(turns.__file__).parent.glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.fixture
def call(tmp_path, capfd):
    """Runs a benchmark in this process: its exit code, and what it writes to stdout and stderr."""
    (tmp_path / "model.py").write_text(NANOGPT, encoding="utf-8")
    (tmp_path / "text.txt").write_text("Some words, and some more of them.\n" * 300, encoding="utf-8")

    def run(name: str, *flags: str) -> tuple[int, str, str]:
        module = importlib.import_module(f"benchmarks.{name}")
        takes = {"nanogpt": str(tmp_path), "text": str(tmp_path / "text.txt")}
        known = [f"--{flag}={value}" for flag, value in takes.items() if hasattr(module.Flags(), flag)]
        code = module.main([*known, *["--device=cpu"] * (name == "train_gpu"), *flags])
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(call, name):
    """What was measured in minutes was lost, with a traceback."""
    assert len(BENCHMARKS) == 9
    Path("folder").mkdir()
    for path, reason in (
        ("nowhere/x.json", "x.json: No such file"),
        ("folder", "is a folder; name a"),
    ):
        code, out, err = call(name, "--json", path)
        assert code == 2 and reason in err and len(err.splitlines()) == 1 and not out
    assert not list(Path("folder").iterdir())


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("attention_memory", ["--contexts", "64", "0"], "--contexts 0: it must be 1 at least"),
        ("attention_memory", ["--kinds", "casual"], "invalid choice 'casual' for argument '--kinds'"),
        ("attention_memory", ["--device", "tpu"], "--device tpu is not here"),
        ("bpe", ["--rounds", "0"], "--rounds 0: there must be one at least"),
        ("bpe", ["--copies", "0"], "--copies 0: there must be one at least"),
        ("bpe", ["--vocab", "vocab.json"], "name both, or neither"),
        ("bpe", [], "of 10,000 tokens; take a longer one"),
        ("trajectory", ["--steps", "0"], "--steps 0: there must be one at least"),
        ("trajectory", ["--out", "picture.gif"], "must end in .png, .svg or .pdf"),
        ("time_to_loss", ["--out", "nowhere/x.png"], "x.png: No such file"),
        ("time_to_loss", ["--threads", "-1"], "--threads -1: it is 0, or how many"),
        ("training", ["--threads", "-1"], "--threads -1: it is 0, or how many"),
        ("train_gpu", ["--peak-tflops", "-1"], "--peak-tflops -1.0: it is 0, or those"),
        ("train_cpu", ["--text", "short.txt"], "short.txt has 5 bytes; it needs 10,000 at least"),
    ],
)
def test_a_mistake_is_one_line(call, name, flags, message):
    Path("short.txt").write_text("short", encoding="utf-8")
    code, out, err = call(name, *flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


def test_what_there_is_not_is_null_in_json_and_a_dash_in_the_table():
    """A ratio to nothing was a traceback, and NaN is no JSON."""
    rows = [
        row("nothing", 0.0, 0.0, "MiB"),
        row("failed", 3.5, math.nan, "MiB"),
        row("alone", 2.0, None, "s"),
        row("diverged", math.inf, 2.0, "nats/token", ratio=math.nan),
        row("both", 2.0, 4.0, "MiB"),
    ]
    write_rows("rows.json", rows)
    write_rows("rows.json", [])  # of a benchmark that was stopped before its first
    found = json.loads(Path("rows.json").read_bytes(), parse_constant=pytest.fail)
    assert [tuple(each[name] for name in ("ours", "peer", "ratio")) for each in found] == [
        (0, 0, None),
        (3.5, None, None),
        (2, None, None),
        (None, 2, None),
        (2, 4, 2),
    ]
    assert [line.split() for line in table(rows).splitlines()] == [
        ["nothing", "0.000", "0.000", "MiB", "–"],
        ["failed", "3.500", "–", "MiB", "–"],
        ["alone", "2.000", "–", "s", "–"],
        ["diverged", "–", "2.000", "nats/token", "–"],
        ["both", "2.000", "4.000", "MiB", "2.000x"],
    ]


def test_an_attention_that_finds_no_memory_is_a_row_with_a_dash(call):
    """NaN was written, and its process told a traceback."""
    huge = str(10**14)
    code, _, err = call("attention_memory", "--contexts", huge, "--kinds", "causal", "--json", "rows.json")
    assert code == 0 and "Traceback" not in err
    assert "plain: it has failed, as where memory is short" in err
    for each in json.loads(Path("rows.json").read_bytes(), parse_constant=pytest.fail):
        assert each["ours"] is None and each["peer"] is None and each["ratio"] is None


def test_contexts_that_are_measured_by_an_interruption_are_kept(call, monkeypatch):
    """All were written at the end. A short context takes no memory beyond what was there: it divided by 0."""
    answers = iter([(0.0, 0.5), (0.0, 1.0), (8.0, 1.0)])

    def measured(*arguments):
        if (answer := next(answers, None)) is None:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(attention_memory, "in_a_process", measured)
    code, out, err = call("attention_memory", "--contexts", "64", "128", "--json", "rows.json")
    assert code == 130 and "other contexts are not measured" in err and "–" in out
    memory, time = json.loads(Path("rows.json").read_bytes())
    assert memory["name"].endswith("context 64, memory") and memory["ratio"] is None and time["ratio"] == 2


def test_a_limit_of_time_loses_no_more_than_ctrl_c_does(capsys):
    """SIGTERM ended a benchmark of ten minutes at once, with all that it had measured."""
    before, kept = signal.getsignal(signal.SIGTERM), []

    @command("benchmarks.x", "the rest is not measured")
    def main(arguments: list[str]) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # timeout sends it to a command, and to its group
            kept.append("what is measured")

    assert main([]) == 130 and kept
    assert "interrupted; the rest is not measured" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_rows_of_the_tokenizer_are_kept_where_it_is_interrupted(call, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bpe, "VOCAB_SIZE", 260)
    monkeypatch.setattr(bpe, "training", lambda *_: [bpe.beside("train", 1.0, "tokenizers", 2.0, "s")])
    monkeypatch.setattr(bpe, "coding", interrupted)
    code, out, err = call("bpe", "--json", "rows.json")
    assert code == 130 and "other rows are not measured" in err and "2.000x" in out
    (kept,) = json.loads(Path("rows.json").read_bytes())
    assert kept == row("train, beside tokenizers", 1.0, 2.0, "s") and kept["ratio"] == 2


def test_trajectories_have_a_row_for_each_precision(call):
    """--json was an unknown flag."""
    code, out, _ = call("trajectory", "--steps", "2", "--json", "rows.json", "--out", "docs/both.png")
    rows = json.loads(Path("rows.json").read_bytes())
    assert code == 0 and [each["name"].split(":")[0] for each in rows] == ["float64", "float32"]
    for each, most in zip(rows, (1e-12, 1e-5), strict=True):
        apart = abs(each["ours"] - each["peer"])
        assert apart < most and f"at most {apart:.1e} apart over 2 steps" in out
        assert each["unit"] == "nats/token" and each["ratio"] == pytest.approx(1, abs=most)
    assert Path("docs/both.png").read_bytes().startswith(b"\x89PNG")


def test_the_row_of_a_trajectory_is_of_the_step_that_is_furthest_apart():
    found = trajectory.furthest("float64", np.array([3.0, 2.0, 1.0]), np.array([3.0, 2.5, 1.25]))
    assert (found["ours"], found["peer"], found["ratio"]) == (2.5, 2.0, 0.8)
