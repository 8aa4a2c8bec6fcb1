"""A run that was stopped, or killed at any moment, and resumed ends as the run that never was."""

import errno
import functools
import json
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from run_tests import rank_worker
from run_tests.conftest import SMALL, content, metrics
from run_tests.test_ranks import forking
from torch_impl.train import start
from torch_impl.training import run as run_module
from torch_impl.training.checkpoint import load_model, put_back
from torch_impl.training.progress import load_progress
from torch_impl.training.ranks import Ranks
from torch_impl.training.repeating import Resumed


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a signal while a given step is computed."""
    train_steps = run_module.train_steps

    def arrange(step: int | None, number: int = signal.SIGINT) -> None:
        def interrupted(state, tokens, config):
            for step_metrics in train_steps(state, tokens, config):
                if state.step == step:
                    signal.raise_signal(number)
                    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a Ctrl-C now leaves at once"
                yield step_metrics

        monkeypatch.setattr(run_module, "train_steps", interrupted)

    return arrange


@pytest.mark.parametrize("step", [1, 4, 7, 10, 11])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(small_run, cli, stop_at, step):
    assert small_run("--out", "whole").code == 0
    stop_at(step)
    stopped = small_run("--out", "stopped")
    assert stopped.code == 130
    assert f"stopped after step {step}; to go on: python train_gpu.py --resume stopped" in stopped.out
    stop_at(None)
    resumed = cli("--resume", "stopped")
    assert resumed.code == 0
    assert f"going on after step {step} of 12" in resumed.out
    assert content(Path("stopped")) == content(Path("whole"))
    assert Path("stopped/sample.txt").read_bytes() == Path("whole/sample.txt").read_bytes()


@pytest.mark.parametrize("batch", range(1, 9))
def test_an_evaluation_need_not_be_waited_for(small_run, cli, monkeypatch, batch):
    """There are four evaluations of two batches, and at each batch somebody asks to stop: what is left is
    done by whoever goes on. It used to be waited for, and not every cluster does."""
    assert small_run("--out", "whole").code == 0
    dealt, evaluated = Ranks.dealt, []

    def interrupted(ranks, parts):
        for part in dealt(ranks, parts):
            evaluated.append(part)
            if len(evaluated) == batch:
                signal.raise_signal(signal.SIGTERM)
            yield part

    monkeypatch.setattr(Ranks, "dealt", interrupted)
    assert small_run("--out", "stopped").code == (0 if batch == 8 else 143)
    owes = json.loads(Path("stopped/last/training.json").read_bytes())["owed"] is not None
    assert owes == (batch in (3, 5, 7)) and len(evaluated) == batch
    monkeypatch.setattr(Ranks, "dealt", dealt)
    if batch < 8:
        assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))


def test_an_evaluation_may_be_put_off_again_and_then_cut_off(small_run, cli, monkeypatch, stop_at):
    """Patience that was asked for where it was put off again used to be forgotten; an evaluation that was
    written, but not saved, was twice in TensorBoard; and a kept checkpoint owed for ever."""
    flags = ["--checkpoint-every", 4, "--keep-checkpoints", 9, "--patience", 9]
    assert small_run("--out", "whole", *flags).code == 0
    stop_at(8)
    assert small_run("--out", "run", *flags[:-2]).code == 130
    stop_at(None)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_save", mock.Mock(side_effect=KeyboardInterrupt))
        with suppress(KeyboardInterrupt):
            cli("--resume", "run")
    dealt = Ranks.dealt
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "dealt", lambda *them: signal.raise_signal(signal.SIGINT) or dealt(*them))
        assert cli("--resume", "run", "--patience", 9).code == 130
    assert cli("--resume", "run").code == 0
    assert content(Path("run"), history=False) == content(Path("whole"), history=False)
    assert load_progress(Path("run/last")).resumed == [Resumed(8, {"patience": 0}, 1, 1)]
    told = [event.step for event in EventAccumulator("run/tensorboard").Reload().Scalars("val_loss")]
    assert told == [0, 4, 8, 12]
    for step in (4, 8):
        kept, wanted = (load_progress(Path(run) / f"step-{step}") for run in ("run", "whole"))
        assert len(kept.resumed) == (step == 8)
        assert replace(kept, seconds=0.0, resumed=[]) == replace(wanted, seconds=0.0)


@pytest.mark.parametrize("owed", [5, [], False, {"learning_rate": "", "grad_norm": []}, {"grad_norm": 1.0}])
def test_an_evaluation_that_is_owed_in_other_words_is_refused(small_run, cli, owed):
    """What was no object at all used to be taken for one."""
    assert small_run("--out", "run").code == 0
    path = Path("run/last/training.json")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"owed": owed}), encoding="utf-8")
    assert "training.json: a value" in cli("--resume", "run").error


def test_patience_may_end_with_an_evaluation_that_was_owed(small_run, cli, stop_at):
    flags = ["--learning-rate", 1.0, "--warmup-steps", 0, "--patience", 1, "--steps", 40]
    stop_at(4)
    assert small_run("--out", "run", *flags).code == 130
    stop_at(None)
    resumed = cli("--resume", "run")
    assert "no evaluation was better than that of step 0" in resumed.out + resumed.err
    assert "stopped early, after step 4 of 40" in resumed.out + Path("run/report.html").read_text("utf-8")
    assert [row["step"] for row in metrics(Path("run"))] == [0, 4]


_WEARY = ("--learning-rate", 3, "--warmup-steps", 0, "--steps", 40, "--checkpoint-every", 3)


def test_a_run_that_patience_ended_trains_no_further(small_run, cli, monkeypatch):
    """One that was killed while it wrote its sample used to go on training when it was resumed."""
    assert small_run("--out", "whole", "--patience", 2, *_WEARY).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_write_sample", mock.Mock(side_effect=KeyboardInterrupt))
        assert small_run("--out", "killed", "--patience", 2, *_WEARY).code == 130
    for _ in range(2):
        resumed = cli("--resume", "killed")
        assert "stopped early" in resumed.out and "going on" not in resumed.out and resumed.code == 0
        assert content(Path("killed")) == content(Path("whole"))
        assert json.loads(Path("killed/report.json").read_bytes())["ended"] == "stopped early"
    more = cli("--resume", "killed", "--patience", 3)
    assert more.code == 0 and [row["step"] for row in metrics(Path("killed"))] == [0, 4, 8, 12]


def test_patience_counts_evaluations_however_far_apart(small_run, cli, stop_at):
    """It used to divide steps by the eval_every of today, and so to end a run at once, or late."""
    stop_at(8)
    assert small_run("--out", "run", "--patience", 4, *_WEARY).code == 130
    stop_at(None)
    assert cli("--resume", "run", "--eval-every", 1).code == 0
    assert [row["step"] for row in metrics(Path("run"))] == [0, 4, 8, 9, 10]


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float8"])
def test_low_precision_resumes_bit_for_bit_with_its_loss_scale(small_run, cli, stop_at, precision):
    assert small_run("--out", "whole", "--precision", precision).code == 0
    stop_at(7)
    assert small_run("--out", "stopped", "--precision", precision).code == 130
    stop_at(None)
    assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))
    scale = json.loads(Path("whole/last/training.json").read_bytes())["loss_scale"]
    assert (scale is not None) == (precision == "float16")


def test_muon_resumes_bit_for_bit_with_its_momentum(small_run, cli, stop_at):
    """Its matrices have no second moment, which a checkpoint once expected of every parameter."""
    assert small_run("--out", "whole", "--optimizer", "muon").code == 0
    stop_at(7)
    assert small_run("--out", "stopped", "--optimizer", "muon").code == 130
    stop_at(None)
    assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))


def test_an_overflow_of_float16_is_left_out_and_the_scale_recovers(small_run, monkeypatch):
    """A loss scale of 2^40 overflows at once, and is halved until it does not: the run then learns."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    assert small_run("--out", "run", "--precision", "float16", "--steps", 60, "--eval-every", 15).code == 0
    kept = json.loads(Path("run/last/training.json").read_bytes())["loss_scale"]
    assert 1 <= kept["scale"] < 2.0**40
    rows = metrics(Path("run"))
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.1
    assert rows[1]["grad_norm"] is None and rows[-1]["grad_norm"] > 0  # infinite, and a number


def test_a_resumed_run_does_not_live_in_the_files_of_its_checkpoint(small_run):
    """Safetensors maps a file into memory: the moments used to stay there, in a file that Windows then lets
    nobody replace, and in which whoever writes to it changes them."""
    small_run("--out", "run")
    folder = Path("run/last")
    loaded = load_model(folder, torch.float32, torch.device("cpu"))
    state = start(loaded.model, loaded.config.training)
    put_back(folder, state, load_progress(folder))
    kept = [*state.model.parameters(), *(m for each in state.optimizer.state.values() for m in each.values())]
    for name in ("model", "optimizer"):
        with (folder / f"{name}.safetensors").open("r+b") as file:
            file.write(bytes(Path(file.name).stat().st_size))
    assert len(kept) > 10 and all(tensor.any() for tensor in kept)


def test_a_run_takes_kernels_whose_sums_have_one_order_where_that_is_asked_for(small_run, monkeypatch):
    """On the CPU they have it anyway."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked, train_steps = [], run_module.train_steps

    def watched(*arguments):
        asked.append(
            (torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        )
        return train_steps(*arguments)

    monkeypatch.setattr(run_module, "train_steps", watched)
    assert small_run("--out", "ordered", "--deterministic").code == 0
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert small_run("--out", "run").code == 0
    assert asked == [(True, ":4096:8"), (False, None)]
    for name in ("model", "optimizer"):
        first, second = (Path(run, f"last/{name}.safetensors").read_bytes() for run in ("ordered", "run"))
        assert first == second


def test_sigterm_stops_as_ctrl_c_does(small_run, stop_at):
    stop_at(3, signal.SIGTERM)
    assert small_run("--out", "run").code == 143
    assert json.loads(Path("run/last/training.json").read_bytes())["step"] == 3


def test_the_signal_handlers_are_put_back(small_run):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert small_run("--out", "run").code == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.xdist_group("ranks")  # whose processes start quickly
@pytest.mark.parametrize("fatal", [35, 90, 118, 150])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(small_run, cli, text, tmp_path, fatal):
    """The process dies at one of its file operations, all through the run."""
    assert small_run("--out", "whole").code == 0
    arguments = [*SMALL.split(), "--train-file", str(text), "--out", str(tmp_path / "killed")]
    arguments += ["--cache", str(tmp_path / "cache")]
    process = forking().Process(target=rank_worker.dying, args=(arguments, str(tmp_path), fatal))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert cli("--resume", "killed").code == 0
    assert content(Path("killed")) == content(Path("whole"))
    assert not [path for path in Path("killed").iterdir() if path.suffix.startswith(".being-")]


def test_a_run_that_an_earlier_version_left_between_its_renames_goes_on(small_run, cli):
    for name in ("whole", "run"):
        assert small_run("--out", name, "--keep-checkpoints", 2, "--steps", 5).code == 0
    assert cli("--resume", "whole", "--steps", 12).code == 0
    Path("run/last").rename("run/last.old")
    assert cli("--resume", "run").code == 0, "nothing is left to do"
    assert not Path("run/last").exists()
    assert cli("--resume", "run", "--steps", 12).code == 0
    assert content(Path("run")) == content(Path("whole"))


def test_a_copy_that_somebody_made_of_a_checkpoint_survives_the_run(small_run, cli):
    """run/last.old was removed by the next save, be it a whole run of its own."""
    assert small_run("--out", "run").code == 0
    shutil.copytree("run/last", "run/last.old")
    assert small_run("--out", "run/last.new").code == 0
    assert cli("--resume", "run", "--steps", 14).code == 0
    assert json.loads(Path("run/last.old/training.json").read_bytes())["step"] == 12
    assert Path("run/last.new/best/model.safetensors").is_file()


@pytest.mark.parametrize(
    "name",
    ["last", "best", "last.being-replaced", "step-40", "before-step-7/a", "tensorboard", "report.html/a/b"],
)
def test_a_new_run_takes_no_name_of_the_one_around_it(small_run, name):
    """Its folder was removed by the other's next save, or stood in its way."""
    assert small_run("--out", "run", "--steps", 1).code == 0
    Path("elsewhere").mkdir()
    for path in ("last", "best", "tensorboard"):
        shutil.rmtree(Path("run", path))
    Path("run/report.html").unlink()
    outcome = small_run("--out", f"run/{name}")
    assert outcome.code == 2 and not Path("run", name).exists()
    assert "is a name that the run in " in outcome.error and "run takes itself; name another" in outcome.error
    assert small_run("--out", f"elsewhere/{name}", "--steps", 1).code == 0, "no run is around it there"


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
def fails_after_an_evaluation(small_run, cli, monkeypatch):
    """A run of 12 steps that is to go on to step 20, and finds the disk full after step 17."""
    train_steps, asked = run_module.train_steps, ("--steps", 20, "--checkpoint-every", 20)

    def steps(state, sample, config):
        for step_metrics in train_steps(state, sample, config):
            if state.step == 17:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield step_metrics

    for folder in ("whole", "run"):
        assert small_run("--out", folder, "--learning-rate", 1e-2).code == 0
    assert cli("--resume", "whole", *asked).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train_steps", steps)
        assert cli("--resume", "run", *asked).code == 1
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


def test_the_loss_does_not_depend_on_when_it_is_read(small_run):
    small_run("--out", "often", "--log-every", 1)
    small_run("--out", "seldom", "--log-every", 1000)
    assert metrics(Path("often")) == metrics(Path("seldom"))
    assert torch.equal(*(_embedding(name) for name in ("often", "seldom")))


def _embedding(run: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(Path(run) / "last" / "model.safetensors")["token_embedding.weight"]
