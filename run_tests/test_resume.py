"""A run that was stopped, or killed at any moment, and resumed ends as the run that never was."""

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
from torch_impl.training.history import Resumed
from torch_impl.training.progress import load_progress
from torch_impl.training.ranks import Ranks


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


@pytest.mark.parametrize(
    "flags",
    [("--precision", name) for name in ("float16", "bfloat16", "float8")] + [("--optimizer", "muon")],
)
def test_loss_scale_and_momentum_are_resumed_bit_for_bit(small_run, cli, stop_at, flags):
    """Muon's matrices have no second moment, which a checkpoint once expected of every parameter."""
    assert small_run("--out", "whole", *flags).code == 0
    stop_at(7)
    assert small_run("--out", "stopped", *flags).code == 130
    stop_at(None)
    assert cli("--resume", "stopped").code == 0
    assert content(Path("stopped")) == content(Path("whole"))
    scale = json.loads(Path("whole/last/training.json").read_bytes())["loss_scale"]
    assert (scale is not None) == ("float16" in flags)


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


def test_the_loss_does_not_depend_on_when_it_is_read(small_run):
    small_run("--out", "often", "--log-every", 1)
    small_run("--out", "seldom", "--log-every", 1000)
    assert metrics(Path("often")) == metrics(Path("seldom"))
    assert torch.equal(*(_embedding(name) for name in ("often", "seldom")))


def _embedding(run: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(Path(run) / "last" / "model.safetensors")["token_embedding.weight"]
