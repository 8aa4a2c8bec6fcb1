"""Sweeps: a run for each combination, a table, and what happens when something goes wrong in between."""

import errno
import json
import signal
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

import pytest

import train_gpu
from run_tests.conftest import SMALL, metrics
from torch_impl.training import plot, sweep_results
from torch_impl.training import sweep as sweep_module
from torch_impl.training.sweep import launch
from torch_impl.training.sweep_plan import Plan, make_plan

ALONE = "losses per token of different tokenizers cannot be compared"
GRID = ("--vary", "learning_rate=1e-3,1e-2,2e-2")


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """The runs that were started; in this process, which is quicker."""
    started = []

    def here(arguments: list[str]) -> int:
        started.append(arguments)
        return train_gpu.main(arguments)

    monkeypatch.setattr(sweep_module, "launch", here)
    return started


@pytest.fixture
def sweep(cli, text, launched):
    return lambda *flags: cli("sweep", *SMALL.split(), "--train-file", text, "--sample-tokens", 0, *flags)


def results(folder: str) -> list[dict]:
    return json.loads(Path(folder, "results.json").read_bytes())["combinations"]


def test_a_grid_with_seeds_becomes_a_table_best_first(sweep, launched):
    outcome = sweep("--vary", "learning_rate=1e-3,1e-2", "--seeds", 2, "--out", "swept", "--seed", 5)
    assert outcome.code == 0 and len(launched) == 4
    assert {path.name for path in Path("swept").iterdir() if path.is_dir()} == {
        f"learning_rate={rate},seed={seed}" for rate in ("1e-3", "1e-2") for seed in (5, 6)
    }
    found = results("swept")
    for combination in found:
        losses = []
        for run in combination["runs"]:
            losses.append(min(row["val_loss"] for row in metrics(Path("swept", run["folder"]))))
            assert run["best_val_loss"] == losses[-1] and run["ended"] == "finished"
        assert combination["mean_val_loss"] == pytest.approx(mean(losses))
        assert combination["spread_val_loss"] == pytest.approx(stdev(losses)) and stdev(losses) > 0
    assert found[0]["mean_val_loss"] < found[1]["mean_val_loss"]
    *_, heading, first, second, _, _, _, name = outcome.out.splitlines()
    assert heading.split() == ["learning_rate", "loss", "spread", "runs", "parameters", "time", "ended"]
    for row, combination in ((first, found[0]), (second, found[1])):
        rate, loss, spread, runs, *_, ended = row.split()
        assert (rate, runs, ended) == (combination["settings"]["learning_rate"], "2", "finished")
        assert float(loss) == pytest.approx(combination["mean_val_loss"], abs=1e-4)
        assert float(spread) == pytest.approx(combination["spread_val_loss"], abs=1e-4)
    assert name == str(Path("swept/table.md"))
    table = Path("swept/table.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(first.split()[:4])} |" in table and "--seeds 2" in table
    assert ALONE not in table
    assert Path("swept/curves.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_different_tokenizers_are_compared_by_bits_per_byte(sweep, monkeypatch):
    """By nats per token the worse model was named the best: its tokens hold less text, so each costs less."""
    drawn = []

    def draw(curves, x, y, log):
        drawn.append((y, [[row.get(y) for row in curve.rows] for curve in curves]))
        return plot.draw(curves, x, y, log)

    monkeypatch.setattr(sweep_results, "draw", draw)
    flags = (
        "--tokenizer",
        "bpe",
        "--vary",
        "vocab_size=258,280",
        "--seeds",
        2,
        "--steps",
        4,
        "--out",
        "swept",
    )
    outcome = sweep(*flags)
    large, small = results("swept")
    assert large["settings"] == {"vocab_size": "280"} and small["settings"] == {"vocab_size": "258"}
    assert large["mean_val_loss"] > small["mean_val_loss"]
    told = outcome.out[outcome.out.index("4 of 4 runs") :]
    _, heading, *lines = told.splitlines()
    assert heading.split()[:4] == ["vocab_size", "bits/byte", "spread", "loss"]
    for combination, line, curve in zip((large, small), lines, drawn[-1][1], strict=False):
        bits = [run["best_bits_per_byte"] for run in combination["runs"]]
        assert combination["mean_bits_per_byte"] == mean(bits)
        losses = [run["best_val_loss"] for run in combination["runs"]]
        assert line.split()[1:4] == [f"{mean(bits):.4f}", f"{stdev(bits):.4f}", f"{mean(losses):.4f}"]
        assert combination["spread_bits_per_byte"] == stdev(bits)
        assert combination["spread_val_loss"] == stdev(losses)
        assert min(curve) == pytest.approx(mean(bits))
    assert [y for y, _ in drawn] == ["val_loss"] * 2 + ["bits_per_byte"] * 2
    assert "in bits per byte" in told and ALONE in " ".join(told.split())


def told_of(plan: Plan, monkeypatch, *runs: tuple[str, list[float | None], list[float | None]]) -> dict:
    """What a sweep whose runs have ended so, with these losses and bits per byte at every tenth step, tells
    on the terminal, draws, and has in results.json."""
    for trial, (ended, losses, bits) in zip(plan.trials, runs, strict=True):
        folder = plan.folder / trial.name
        folder.mkdir(parents=True)
        rows = [
            {"step": 10 * i, "train_loss": None, "val_loss": loss, "bits_per_byte": bit}
            for i, (loss, bit) in enumerate(zip(losses, bits, strict=True))
        ]
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        best = min(rows, key=lambda row: row["val_loss"])
        report = dict.fromkeys(sweep_results._KEPT) | {"ended": ended, "best_val_loss": best["val_loss"]}
        report |= {"best_bits_per_byte": best["bits_per_byte"], "seconds": 1.0, "parameters": 9}
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    drawn = []

    def draw(curves, *asked, **more):
        drawn.append(plot.draw(curves, *asked, **more))
        return drawn[-1]

    monkeypatch.setattr(sweep_results, "draw", draw)
    told = sweep_results.tell(plan, {})
    lines = [line for line in drawn[-1].axes[0].lines if not line.get_label().startswith("_")]
    return {
        "told": " ".join(told.split()),
        "table": [line.split() for line in told.splitlines()[2:] if line][: 1 + len(plan.trials)],
        "curves": {line.get_label(): line.get_ydata().tolist() for line in lines},
        "results": json.loads((plan.folder / "results.json").read_bytes()),
    }


def test_the_picture_agrees_with_the_table_where_runs_end_at_different_steps(monkeypatch):
    """It drew the mean of those steps that all had come to, so that the worse one seemed the better: 4.0 at
    the step where one seed of the first stopped, beside 3.0."""
    plan = make_plan(["cpu", "--vary", "n_layer=1,2", "--seeds", "2", "--out", "swept"])
    early = ("stopped early", [5.0, 4.0, 4.5], [None] * 3)
    long = ("finished", [5.0, 4.0, 3.0, 1.0, 2.0], [None] * 5)
    other = ("finished", [5.0, 3.0, 3.0, 3.0, 3.0], [None] * 5)
    found = told_of(plan, monkeypatch, early, long, other, other)
    assert [line[:3] for line in found["table"][1:3]] == [
        ["1", "2.5000", "2.1213"],
        ["2", "3.0000", "0.0000"],
    ]
    assert found["curves"] == {
        "n_layer 1: best 2.500 at step 30": [5.0, 4.0, 3.5, 2.5, 2.5],
        "n_layer 2: best 3.000 at step 10": [5.0, 3.0, 3.0, 3.0, 3.0],
    }


def test_a_run_that_diverged_is_in_the_picture_no_more_than_in_the_table(monkeypatch):
    """Its last evaluation ended the curve of the others; where there are none, it is drawn, and named."""
    plan = make_plan(["cpu", "--vary", "n_layer=1,2", "--seeds", "2", "--out", "swept"])
    diverged = ("diverged", [5.0, 4.0], [None] * 2)
    finished = ("finished", [5.0, 4.5, 2.0], [None] * 3)
    found = told_of(plan, monkeypatch, diverged, finished, diverged, diverged)
    assert [line[:2] for line in found["table"][1:3]] == [["1", "2.0000"], ["2", "–"]]
    assert found["curves"] == {
        "n_layer 1 (1 of 2 runs): best 2.000 at step 20": [5.0, 4.5, 2.0],
        "n_layer 2 (diverged): best 4.000 at step 10": [5.0, 4.0],
    }


def test_losses_of_tokenizers_that_lose_text_are_said_not_to_compare(sweep):
    """They have no bits per byte, and stood below each other as if the first were the best."""
    outcome = sweep("--tokenizer", "words", "--vary", "vocab_size=6,12", "--out", "swept")
    assert outcome.code == 0 and "loss" in outcome.out.split("2 of 2 runs")[1].splitlines()[1].split()
    table = Path("swept/table.md").read_text(encoding="utf-8")
    assert "in nats per token" in table and ALONE in table
    assert [combination["mean_bits_per_byte"] for combination in results("swept")] == [None, None]


def test_a_combination_without_bits_per_byte_comes_after_those_with_them(monkeypatch):
    """All were put back to losses: words, whose tokens hold the most text but not all of it, were the worst,
    and bytes better than byte pairs, which hold more text each."""
    plan = make_plan(
        ["cpu", "--vary", "tokenizer=bytes,words,bpe", "--vary", "n_layer=1,2", "--out", "swept"]
    )
    runs = [(2.0, 2.9), (2.1, 3.045), (6.0, None), (5.0, None), (4.0, 1.9), (4.1, 1.9475)]
    found = told_of(plan, monkeypatch, *(("finished", [loss], [bits]) for loss, bits in runs))
    assert [line[:4] for line in found["table"]] == [
        ["tokenizer", "n_layer", "bits/byte", "loss"],
        ["bpe", "1", "1.9000", "4.0000"],
        ["bpe", "2", "1.9475", "4.1000"],
        ["bytes", "1", "2.9000", "2.0000"],
        ["bytes", "2", "3.0450", "2.1000"],
        ["words", "2", "–", "5.0000"],
        ["words", "1", "–", "6.0000"],
    ]
    assert "in bits per byte" in found["told"] and ALONE in found["told"]
    assert found["results"]["compared_by"] == "best_bits_per_byte"
    assert list(found["curves"])[-1] == "tokenizer words, n_layer 1 (has none)"


@pytest.mark.parametrize("bits", [(3.0, 2.5), (3.0, 2.25), (None, None)])
def test_held_out_texts_that_differ_are_what_the_note_is_about(monkeypatch, bits):
    """It blamed different tokenizers, of which there was one."""
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("A text.\n", encoding="utf-8")
    plan = make_plan(["cpu", "--train-file", "a.txt", "--vary", "valid_file=a.txt,b.txt", "--out", "swept"])
    runs = (("finished", [loss], [bit]) for loss, bit in zip((2.0, 1.5), bits, strict=True))
    told = told_of(plan, monkeypatch, *runs)["told"]
    assert "the held-out texts differ" in told and ALONE not in told


def test_a_sweep_that_was_stopped_goes_on_where_it_was(sweep, launched, at_step):
    assert sweep(*GRID, "--out", "whole").code == 0
    wanted = results("whole")
    begun = len(launched)
    at_step(7, lambda: len(launched) - begun == 2 and signal.raise_signal(signal.SIGINT))
    outcome = sweep(*GRID, "--out", "swept")
    assert outcome.code == 130 and len(launched) - begun == 2
    told = outcome.out.splitlines()[-1]
    assert told.startswith("stopped; to go on: python train_gpu.py sweep cpu ") and "--out swept" in told
    assert "2 of 3 runs" in outcome.out and "stopped" in outcome.out
    at_step(None)
    begun = len(launched)
    assert sweep(*GRID, "--out", "swept").code == 0
    again = launched[begun:]
    assert len(again) == 2 and "--resume" in again[0] and "--resume" not in again[1]

    def timeless(combination: dict) -> dict:
        clocks = ("seconds", "tokens_per_second", "told", "peak_memory")
        runs = [{k: v for k, v in run.items() if k not in clocks} for run in combination["runs"]]
        return {**combination, "runs": runs}

    assert list(map(timeless, results("swept"))) == list(map(timeless, wanted))
    begun = len(launched)
    assert sweep(*GRID, "--out", "swept").code == 0 and len(launched) == begun, "all is done"
    error = sweep(*GRID, "--out", "swept", "--d-model", 32).error
    assert "has d_model 16, and this sweep 32; name another --out" in error and len(launched) == begun


def test_a_run_that_fails_is_a_row_and_not_the_end(sweep, launched, monkeypatch):
    """One diverges, and is not tried again; one is killed at once, and is."""
    here = sweep_module.launch
    monkeypatch.setattr(
        sweep_module, "launch", lambda args: -9 if "--learning-rate=2e-3" in args else here(args)
    )
    flags = ("--clip", 0, "--warmup-steps", 0, "--vary", "learning_rate=1e30,2e-3,1e-3", "--out", "swept")
    outcome = sweep(*flags)
    assert outcome.code == 0
    ends = {run["settings"]["learning_rate"]: run["runs"][0]["ended"] for run in results("swept")}
    assert ends == {"1e-3": "finished", "1e30": "diverged", "2e-3": "killed by signal 9"}
    assert results("swept")[0]["settings"] == {"learning_rate": "1e-3"}
    monkeypatch.setattr(sweep_module, "launch", here)
    before = len(launched)
    assert sweep(*flags).code == 0
    assert [args[-4] for args in launched[before:]] == ["--learning-rate=2e-3"]
    assert sweep("--vary", "learning_rate=1e30,1e31", *flags[:4], "--out", "bad").code == 1


def test_a_disk_that_fills_up_beneath_a_sweep(sweep, launched, on_file_operation):
    """What went on from there was not said."""

    def full(event, path):
        if path.name == "table.md.being-written" and launched:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    on_file_operation(full)
    outcome = sweep(*GRID, "--out", "swept")
    on_file_operation(None)
    assert outcome.code == 1 and "the disk is full, writing swept" in outcome.error
    assert "; to go on: python train_gpu.py sweep " in outcome.error and len(launched) == 1
    assert sweep(*GRID, "--out", "swept").code == 0


def test_a_sweep_that_was_killed_while_it_wrote_its_first_file_begins_again(sweep):
    """It was said to be no sweep."""
    Path("swept").mkdir()
    Path("swept/lock.json.being-written").touch()
    assert sweep("--vary", "learning_rate=1e-3", "--out", "swept").code == 0


def test_a_request_that_the_system_can_never_meet_begins_nothing(sweep):
    """The same command was said to go on from there."""
    outcome = sweep(*GRID, "--out", "x" * 300)
    assert outcome.code == 2 and "File name too long" in outcome.error and "goes on" not in outcome.error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--vary", "learning_rat=1,2"],
            "learning_rat=1: unknown flag --learning-rat; did you mean --learning-rate",
        ),
        (["--vary", "lr=1,2"], "--vary lr=1: unknown flag --lr; did you mean --learning-rate?"),
        (["--vary", "n_layer=2,two"], "--vary n_layer=two: Error parsing --n-layer: invalid literal"),
        (["--vary", "n_head=1,3"], "--vary n_head=3: d_model 16 does not divide into n_head 3 heads"),
        (["--vary", "bias=true,2"], "--vary bias=2: it is a switch; write true or false"),
        (["--vary", "n_layer"], "--vary n_layer: write it as NAME=VALUE,VALUE"),
        (["--vary", "n_layer=1,"], "--vary n_layer=1,: write it as NAME=VALUE,VALUE"),
        (["--vary", "n_layer=1,1"], "a value stands there twice"),
        (["--vary", "n_layer=1", "--vary", "n-layer=2"], "names a setting twice"),
        (["--vary", "out=a,b"], "out is no setting"),
        (["--vary", "train_file=nowhere.txt"], "nowhere.txt: no such file"),
        (["--vary", "seed=1,2", "--seeds", "2"], "--vary seed and --seeds both name seeds"),
        (["--seeds", "0"], "--seeds 0, but there must be 1 at least"),
        (["--seeds", "many"], "--seeds: invalid int value: 'many'"),
        ([], "nothing to compare"),
        (["--vary", "n_layer=1", "--resume", "run"], "leave out 'cpu'"),
        (["--vary", "n_layer=1", "--colour", "red"], "unknown flag --colour"),
    ],
)
def test_a_mistake_is_told_before_anything_is_run(sweep, launched, flags, message):
    outcome = sweep("--out", "swept", *flags)
    assert outcome.code == 2 and message in outcome.error and len(outcome.err.splitlines()) == 1
    assert not launched and not Path("swept").exists()


@pytest.mark.parametrize("flags", [("--eval-tokens", 20), ("--precision", "bfloat16"), ("--patience", 3)])
def test_a_sweep_with_settings_that_change_its_losses_is_another(sweep, launched, flags):
    """A loss on twenty tokens and one on the whole text stood in one table, the best first."""
    same = ("--vary", "learning_rate=1e-3", "--seeds", 1, "--out", "swept")
    assert sweep(*same).code == 0
    assert "this sweep" in (outcome := sweep(*same, *flags)).error and outcome.code == 2
    assert len(launched) == 1


def test_a_folder_of_something_else_is_refused(sweep, launched, text):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("Dear reader", encoding="utf-8")
    for folder in ("mine", text):
        assert "exists, and is no sweep; name another --out" in sweep("--seeds", 2, "--out", folder).error
    assert not launched


def test_values_with_commas_and_switches_and_paths_have_folders_of_their_own(text):
    quoted = 'attention_pattern=local,"local, full"'
    varied = ["--vary", quoted, "--vary", "bias=true,false", "--vary", f"train_file={text}", "--window", "4"]
    trials = make_plan(["cpu", *varied, "--out", "swept"]).trials
    patterns = [trial.request.config.model.attention_pattern for trial in trials]
    assert patterns == ["local", "local", "local, full", "local, full"]
    assert [trial.request.config.model.bias for trial in trials] == [True, False] * 2
    assert all("/" not in trial.name and " " not in trial.name for trial in trials)
    assert len({trial.name for trial in trials}) == 4


def test_a_run_is_a_process_of_its_own(capfd):
    assert launch(["cpu", "--n-layer", "0"]) == 2
    assert "n_layer is 0" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_what_asks_a_sweep_to_stop_asks_its_run(monkeypatch):
    """A terminal that was closed ended the sweep, and left its run training."""
    passed_on, asked = [], (signal.SIGTERM, signal.SIGHUP)
    process = mock.Mock(send_signal=passed_on.append)
    process.wait = lambda: [signal.raise_signal(number) for number in asked] and 143
    monkeypatch.setattr(sweep_module.subprocess, "Popen", lambda command: process)
    before = [signal.getsignal(number) for number in asked]
    assert launch([]) == 143 and passed_on == list(asked)
    assert [signal.getsignal(number) for number in asked] == before
