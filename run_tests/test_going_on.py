"""What a --resume finds, and what it may ask for: more steps, other settings, texts that have moved."""

import errno
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest

from run_tests.conftest import content, metrics
from torch_impl.training.progress import load_progress


def test_a_finished_run_says_so(small_run, cli):
    small_run("--out", "run")
    before = content(Path("run"))
    Path("run/losses.png").unlink()  # a run may be killed after its last checkpoint and before its picture
    outcome = cli("--resume", "run")
    assert outcome.code == 0
    assert "finished already, at step 12; a larger --steps trains on" in outcome.out
    assert content(Path("run")) == before
    assert Path("run/losses.png").exists()


def test_more_steps_train_on(small_run, cli):
    small_run("--out", "run")
    assert cli("--resume", "run", "--steps", 20, "--eval-every", 10, "--micro-batches", 2).code == 0
    assert [row["step"] for row in metrics(Path("run"))] == [0, 4, 8, 12, 20]


@pytest.fixture
def fails_after_an_evaluation(small_run, cli, at_step):
    """A run of 12 steps that is to go on to step 20, and finds the disk full after step 17."""
    asked = ("--steps", 20, "--checkpoint-every", 20)
    for folder in ("whole", "run"):
        assert small_run("--out", folder, "--learning-rate", 1e-2).code == 0
    assert cli("--resume", "whole", *asked).code == 0
    at_step(17, mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert cli("--resume", "run", *asked).code == 1
    at_step(None)
    assert [load_progress(Path("run", name)).step for name in ("last", "best")] == [12, 16]


@pytest.mark.usefixtures("fails_after_an_evaluation")
def test_what_a_resume_asked_for_is_not_forgotten_when_it_fails(cli):
    """The next one found the run finished, at step 12, and best/ as the failed session had left it."""
    assert cli("--resume", "run").code == 0
    assert content(Path("run")) == content(Path("whole"))


@pytest.mark.usefixtures("fails_after_an_evaluation")
def test_a_best_that_other_flags_would_never_find_again_does_not_stay(cli):
    assert cli("--resume", "run", "--steps", 13).code == 0
    best, rows = load_progress(Path("run/best")), metrics(Path("run"))
    assert [row["step"] for row in rows] == [0, 4, 8, 12, 13]
    assert rows[:4] == metrics(Path("whole"))[:4], "what was measured stays"
    assert (best.step, best.best_val_loss) == (13, rows[-1]["val_loss"])
    assert json.loads(Path("run/report.json").read_bytes())["best_step"] == 13


def test_the_last_step_is_evaluated_though_it_is_called_so_afterwards(small_run, cli, stop_at):
    """The run had stopped after a step between two evaluations, and was told that it was its last."""
    stop_at(6)
    small_run("--out", "run")
    stop_at(None)
    assert cli("--resume", "run", "--steps", 6).code == 0
    assert [row["step"] for row in metrics(Path("run"))] == [0, 4, 6]
    before = content(Path("run"))
    assert cli("--resume", "run").code == 0 and content(Path("run")) == before


def test_evaluations_beyond_the_checkpoint_and_half_a_line_are_made_again(small_run, cli, stop_at):
    small_run("--out", "whole")
    stop_at(6)
    small_run("--out", "run")
    with Path("run/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "train_loss": 1.0, "val_loss": 9.0}\n{"step": 12, "tra')
    stop_at(None)
    assert cli("--resume", "run").code == 0
    assert metrics(Path("run")) == metrics(Path("whole"))


def test_a_damaged_line_is_named_and_nothing_is_lost(small_run, cli):
    small_run("--out", "run")
    path = Path("run/metrics.jsonl")
    damaged = path.read_bytes().replace(b'"step": 4', b'"step" 4')
    path.write_bytes(damaged)
    assert "metrics.jsonl, line 2 is damaged" in cli("--resume", "run").error
    assert path.read_bytes() == damaged


def test_a_run_can_be_moved_with_its_text(small_run, cli, stop_at, text, tmp_path):
    small_run("--out", "whole")
    stop_at(6)
    small_run("--out", "run")
    stop_at(None)
    shutil.move("run", tmp_path / "elsewhere")
    shutil.move(text, tmp_path / "moved.txt")
    error = cli("--resume", "elsewhere").error
    assert f"cannot read {text}, " in error and "if it has moved, say where by --train-file" in error
    assert cli("--resume", "elsewhere", "--train-file", tmp_path / "moved.txt").code == 0
    assert metrics(Path("elsewhere")) == metrics(Path("whole"))


def test_a_run_finds_its_held_out_text_where_it_has_moved(small_run, cli, stop_at, text):
    valid = Path(shutil.copy(text, "valid.txt"))
    small_run("--valid-file", valid, "--out", "whole")
    stop_at(6)
    small_run("--valid-file", valid, "--out", "run")
    stop_at(None)
    valid.rename("moved.txt")
    assert "if it has moved, say where by --valid-file" in cli("--resume", "run").error
    text.rename("other.txt")
    flags = ("--train-file", "other.txt", "--valid-file")
    assert "nowhere.txt: No such file" in cli("--resume", "run", *flags, "nowhere.txt").error
    assert cli("--resume", "run", *flags, "moved.txt").code == 0
    assert metrics(Path("run")) == metrics(Path("whole"))


def test_another_text_is_refused(small_run, cli, text):
    small_run("--out", "run")
    before = content(Path("run"))
    text.write_text(text.read_text(encoding="utf-8") + "!", encoding="utf-8")
    assert "the text has changed since the run in run began" in cli("--resume", "run").error
    assert content(Path("run")) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--d-model", "32"], "--d-model 32: the run in run has 16"),
        (["--learning-rate", "1"], "--learning-rate 1.0: the run in run has 0.00"),
        (["--batch-size", "8"], "--batch-size 8: the run in run has 4"),
        (["--tokenizer", "bpe"], "--tokenizer bpe: the run in run has bytes"),
        (["--seed", "1"], "--seed 1: the run in run has 0"),
        (["--eval-tokens", "50"], "--eval-tokens 50: the run in run has 0"),
        (["--out", "other"], "leave out --out"),
        (["--steps", "11"], "--steps 11, but the run in run has done 12; use a larger one"),
        (["--steps", "1"], "--steps 1: the run in run warms up for 2 steps; use a larger one"),
        (
            ["--micro-batches", "3"],
            "--micro-batches 3: the run in run has batch_size 4, which does not divide",
        ),
        # What cannot change is told before what contradicts it.
        (["--learning-rate", "1e-5", "--steps", "1"], "--learning-rate 1e-05: the run in run has 0.00"),
        (["--vocab-size", "3", "--eval-every", "0"], "--vocab-size 3: the run in run has 0"),
    ],
)
def test_what_makes_it_another_run_is_refused(small_run, cli, flags, message):
    small_run("--out", "run", "--warmup-steps", 2)
    assert message in cli("--resume", "run", *flags).error


@pytest.mark.parametrize("name", ["best", "last", "step-10"])
def test_a_checkpoint_is_no_run_to_go_on_with(small_run, cli, name):
    small_run("--out", "run", "--keep-checkpoints", 2)
    error = cli("--resume", Path("run", name)).error
    assert "a run goes on from its last one: --resume run; " in error


def test_where_the_last_checkpoint_is_gone_the_best_is_pointed_at(small_run, cli, text):
    """It lay whole beside the gap, and nobody was told."""
    small_run("--out", "run")
    shutil.rmtree("run/last")
    refused = cli("--resume", "run")
    assert refused.code == 2
    assert "run has no last/ to go on from" in refused.error and "best: --init-from run" in refused.error
    assert cli("--init-from", "run", "--steps", 2, "--train-file", text, "--out", "new").code == 0
