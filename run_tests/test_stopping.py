"""Signals that ask a run to stop, and readers of its output that leave."""

import errno
import json
import os
import signal
import sys
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import pytest

import train_gpu
from run_tests import rank_worker
from run_tests.conftest import SMALL
from run_tests.test_ranks import forking
from torch_impl.training import anomaly, stopping
from torch_impl.training import run as run_module
from torch_impl.training.stopping import stop_requests
from torch_impl.training.terminal import lasting_output

on_posix = pytest.mark.skipif(os.name == "nt", reason="there is no SIGHUP")


def test_a_signal_that_comes_while_processes_agree_is_not_forgotten():
    """It used to be overwritten by what they agreed on without it. The others do not know of it before the
    next step, so neither may this one."""

    def largest(asked: int) -> int:
        signal.raise_signal(signal.SIGTERM)
        return asked

    with stop_requests() as stop:
        stop.agree(largest)
        assert stop.signal is None
        stop.agree(lambda asked: asked)
        assert stop.signal == signal.SIGTERM and stop.exit_code == 143


@on_posix
def test_a_request_that_comes_from_two_at_once_is_one(monkeypatch):
    """Who ends a job sends SIGTERM to all of its processes, and torchrun, which is one, passes it on: the
    second one killed the run before it had saved."""
    killed = []
    with stop_requests() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        stop.agree(lambda asked: asked)
        assert stop.signal == signal.SIGTERM and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        monkeypatch.setattr(stopping, "_AT_ONCE", -1.0)
        monkeypatch.setattr(stopping.signal, "raise_signal", killed.append)
        os.kill(os.getpid(), signal.SIGTERM)
        assert killed == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@on_posix
def test_a_dropped_connection_stops_a_run_and_its_second_signal_does_not_kill_it():
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        stop.agree(lambda asked: asked)
        assert stop.exit_code == 129 and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


@on_posix
def test_a_run_under_nohup_outlives_its_connection():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.agree(lambda asked: asked)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.xdist_group("ranks")  # whose processes start quickly
def test_a_reader_that_dies_of_the_same_ctrl_c_does_not_take_the_run_with_it(text, tmp_path):
    """2>&1 | tee log: the handler's message met a broken pipe, and raised in the middle of a step."""
    arguments = [*SMALL.split(), "--train-file", str(text), "--out", "run"]
    process = forking().Process(target=rank_worker.unheard, args=(arguments, str(tmp_path), 7))
    process.start()
    process.join(60)
    assert process.exitcode == 130
    assert json.loads(Path("run/last/training.json").read_bytes())["step"] == 7
    assert json.loads(Path("run/report.json").read_bytes())["ended"] == "stopped"


def test_a_run_needs_no_stdout_and_no_stderr(text, monkeypatch):
    """As with 2>&- or without a console: a wrapper around None met the first who wrote, and so did the bar of
    an evaluation that takes its time."""
    monkeypatch.setattr(run_module, "_SILENT", 0)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train_gpu.main([*SMALL.split(), "--train-file", str(text), "--out", "run"]) == 0


@pytest.mark.parametrize(("number", "heard"), [(errno.ENOSPC, "onethree"), (errno.EPIPE, "one")])
def test_a_full_disk_costs_a_line_of_the_log_and_a_reader_that_left_all_others(tmp_path, number, heard):
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as log, redirect_stderr(log), lasting_output():
        print("one", end="", file=sys.stderr, flush=True)
        with mock.patch.object(log, "write", side_effect=OSError(number, "no")):
            print("two", end="", file=sys.stderr)
        print("three", end="", file=sys.stderr)
    assert path.read_text(encoding="utf-8") == heard


def test_ctrl_c_ends_the_search_for_the_cause_of_a_loss_that_is_none(small_run, monkeypatch):
    """Step 10 fails, and is found by repeating those since step 5. The first Ctrl-C was noted, and nobody
    looked."""
    train_steps, repeated = run_module.train_steps, []

    def poisoned(state, sample, config):
        for metrics in train_steps(state, sample, config):
            yield metrics._replace(loss=metrics.loss * float("nan")) if state.step == 10 else metrics

    def interrupted(state, sample, config):
        for metrics in train_steps(state, sample, config):
            repeated.append(state.step)
            signal.raise_signal(signal.SIGINT)
            yield metrics

    monkeypatch.setattr(run_module, "train_steps", poisoned)
    monkeypatch.setattr(anomaly, "train_steps", interrupted)
    error = small_run("--out", "run").error
    assert "step 10: the loss is nan: the search for the cause was stopped" in error
    assert "The last good checkpoint is" in error and repeated == [6]
