"""Checkpoints beside the best and the last one, and losses that leap."""

import errno
import json
import math
from pathlib import Path
from random import Random

import pytest
import torch

from ref_numpy.config import ModelConfig, TrainConfig
from run_tests.conftest import content
from torch_impl.optim import clip_by_global_norm
from torch_impl.seq2seq import make_model
from torch_impl.train import start
from torch_impl.training import keeping
from torch_impl.training import run as run_module
from torch_impl.training.keeping import keep, keep_newest, kept_checkpoints
from torch_impl.training.spikes import SpikeWatch


def steps_in(run: str) -> list[int]:
    """The steps of the kept checkpoints, as they themselves tell."""
    return [json.loads((path / "training.json").read_bytes())["step"] for path in kept_checkpoints(Path(run))]


def test_the_newest_are_kept_and_never_fewer_than_the_best_and_the_last(small_run, cli):
    assert small_run("--out", "run", "--keep-checkpoints", 2).code == 0  # they are of steps 0, 5, 10, 12
    assert steps_in("run") == [10, 12] == [int(path.name[5:]) for path in kept_checkpoints(Path("run"))]
    assert Path("run/last").is_dir() and Path("run/best").is_dir()
    assert cli("--resume", "run", "--steps", 14, "--keep-checkpoints", 1).code == 0
    assert steps_in("run") == [14]
    assert small_run("--out", "none").code == 0
    assert not kept_checkpoints(Path("none")) and content(Path("none"))


def test_a_kept_checkpoint_is_whole_and_a_place_to_begin_from(small_run, cli, text):
    small_run("--out", "run", "--keep-checkpoints", 3)
    for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json", "config.json"):
        assert (Path("run/step-12") / name).read_bytes() == (Path("run/last") / name).read_bytes()
    flags = ("--train-file", text, "--steps", 1, "--device", "cpu", "--sample-tokens", 0)
    assert cli("cpu", "--init-from", "run/step-10", *flags).code == 0


def test_what_is_no_checkpoint_is_not_removed_as_one(tmp_path):
    """A run of another name inside this one was."""
    for name, file in (("last", "training.json"), ("step-3", "last"), ("step-5", "training.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    keep_newest(tmp_path, 7, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-3", "step-7"]


def test_a_disk_without_links_keeps_copies(tmp_path, monkeypatch):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "file").write_bytes(b"content")
    monkeypatch.setattr(keeping.os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    keep(tmp_path / "last", tmp_path / "step-1")
    (tmp_path / "last" / "file").write_bytes(b"other")
    assert (tmp_path / "step-1" / "file").read_bytes() == b"content"


def test_a_run_that_gets_no_better_ends_early_and_keeps_its_best(small_run, cli):
    """A learning rate far too high: the first evaluation stays the best, and patience ends at the third."""
    flags = ("--learning-rate", 3, "--warmup-steps", 0, "--steps", 40)
    outcome = small_run("--out", "run", "--patience", 2, *flags)
    assert outcome.code == 0 and "stopped early" in outcome.out and "finished" in outcome.out
    best, last = (json.loads(Path("run", name, "training.json").read_bytes()) for name in ("best", "last"))
    assert last["best_step"] == best["step"] and last["step"] == best["step"] + 2 * 4 < 40
    assert small_run("--out", "patient", *flags).code == 0
    assert json.loads(Path("patient/last/training.json").read_bytes())["step"] == 40


@pytest.fixture
def leaping(monkeypatch):
    """Losses leap at steps 60, 70 and 77, and stay high for a while; from step 60 on, so does a gradient."""
    train_steps = run_module.train_steps

    def leaping(state, sample, config):
        for metrics in train_steps(state, sample, config):
            if state.step == 59:
                state.model.blocks[0].ffn.up.weight.register_hook(lambda gradient: 100 * gradient)
            high = any(first <= state.step < first + 4 for first in (60, 70, 77))
            yield metrics._replace(loss=metrics.loss * 4) if high else metrics

    monkeypatch.setattr(run_module, "train_steps", leaping)
    return "--steps", 80, "--eval-every", 80, "--checkpoint-every", 30


def test_a_leap_of_the_loss_is_told_once_and_what_was_before_the_last_two_is_kept(small_run, leaping):
    outcome = small_run("--out", "run", *leaping)
    assert outcome.code == 0 and outcome.out.count("the loss leaps to") == 3
    [told] = [line for line in outcome.out.splitlines() if line.startswith("step 70: the loss leaps to ")]
    assert told.endswith(f"is kept as {Path('run/before-step-70')}")
    kept = kept_checkpoints(Path("run"), "before-step")
    assert [path.name for path in kept] == ["before-step-70", "before-step-77"]
    assert json.loads((kept[0] / "training.json").read_bytes())["step"] == 60
    [told] = [line for line in outcome.out.splitlines() if line.startswith("step 60: the loss leaps to ")]
    assert "; going on. The gradients that grew most: blocks.0.ffn.up.weight " in told


def test_a_full_disk_at_a_leap_of_the_loss_does_not_end_the_run(small_run, leaping, on_file_operation):
    def full(event, path):
        if path.name.startswith("before-step"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    on_file_operation(full)
    outcome = small_run("--out", "run", *leaping)
    assert outcome.code == 0 and outcome.out.count("could not be kept: No space left on device") == 3
    assert not list(Path("run").glob("before-step*"))


def test_the_checkpoint_that_was_just_kept_stays_where_later_ones_are_from_another_course(small_run):
    small_run("--out", "run")
    for step in (6, 500, 600):
        keep_newest(Path("run"), step, 2)
    keep_newest(Path("run"), 7, 2)
    names = [path.name for path in kept_checkpoints(Path("run"))]
    assert names == ["step-7", "step-500", "step-600"]


def test_what_a_killed_run_was_keeping_is_removed_by_the_next(small_run, cli):
    small_run("--out", "run")
    stale = [f"step-5.0a1b2c3d.being-{done}" for done in ("written", "removed")]
    stale.append("before-step-70.0a1b2c3d.being-written")
    for name in (*stale, "step-5.old"):  # the last is the user's own
        Path("run", name).mkdir()
        Path("run", name, "model.safetensors").touch()
    assert cli("--resume", "run", "--steps", 13).code == 0
    assert [path.name for path in Path("run").glob("*step-*.*")] == ["step-5.old"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_gradient_that_leaps_is_told_from_those_that_are_large(optimizer):
    """Although clipping leaves it no larger than the others were, together."""
    config = ModelConfig(vocab_size=5, context_length=4, n_layer=1, n_head=1, d_model=8)
    state, watch = start(make_model(config), TrainConfig(optimizer=optimizer)), SpikeWatch()
    random = torch.Generator().manual_seed(0)

    def step(**factors: float) -> None:
        for name, parameter in state.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random) + 5 * (name == "token_embedding.weight")
            parameter.grad = factors.get(name.replace(".", "_"), 1.0) * noise
        clip_by_global_norm(state.model, 1.0)
        state.optimizer.step()

    for _ in range(SpikeWatch.AFTER):
        assert not watch.leaps(2.0) and not watch.grown(state)
        step()
        watch.remember_gradients(state)
    step(norm_weight=1000)
    (first, times), (_, next_times), *_ = watch.grown(state)
    assert first == "norm.weight" and times > 2 and next_times < 1


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_loss_that_falls_has_no_leaps(seed):
    """A thousand losses that fall from 5 to 2, with the noise of small batches."""
    random, watch = Random(seed), SpikeWatch()
    losses = [2 + 3 * math.exp(-step / 200) + random.gauss(0, 0.15) for step in range(1000)]
    assert not any(watch.leaps(loss) for loss in losses)
    assert watch.leaps(losses[-1] + 3) and not watch.leaps(losses[-1] + 3)
