"""Benchmarks: what is on the clock, what becomes of sides that fail, what stands beside what and is kept."""

import importlib
import json
import math
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import attention_memory, bpe, same_losses, time_to_loss, trajectory, turns
from benchmarks.command import command
from benchmarks.peers import peer_side
from benchmarks.rows import Measured, paired, row, table, write_rows
from benchmarks.time_to_loss import Flags, Runner, seconds_to
from torch_impl.training.presets import PRESETS


class FakePipe:
    """To a side whose first steps take a hundred seconds each, and whose others one; its loss falls by one a
    step. It dies once it has done as many steps as it may."""

    def __init__(self, pace: float = 1.0, may: float = float("inf"), slow: int = 3) -> None:
        self.pace, self.may, self.slow = pace, may, slow
        self.steps, self.questions = 0, []

    def send(self, question: int | str) -> None:
        if self.steps >= self.may:
            raise BrokenPipeError
        self.questions.append(question)

    def recv(self) -> float:
        match self.questions[-1]:
            case "loss":
                return 100.0 - self.steps
            case "rest":
                return 0.0
            case int(steps):
                first, self.steps = self.steps, self.steps + steps
                if self.steps >= self.may:
                    raise EOFError
                return sum(100.0 if step < self.slow else self.pace for step in range(first, self.steps))


@pytest.fixture
def curves_of(monkeypatch):
    """The curves of fake sides, each of which trains twenty steps in four looks."""

    def call(**pipes: FakePipe) -> dict[str, time_to_loss.Curve]:
        @contextmanager
        def served(*_):
            yield dict(pipes)

        monkeypatch.setattr(time_to_loss, "served", served)
        curves: dict[str, time_to_loss.Curve] = {}
        runners = {name: Runner(20, lambda: None) for name in pipes}
        time_to_loss.train(runners, b"", Flags(looks=4), curves)
        return curves

    return call


def test_compilation_is_told_and_is_not_on_the_clock(curves_of):
    curve = curves_of(ours=FakePipe(pace=2.0))["ours"]
    assert curve.first_steps == 304 and curve.steps == 20
    assert curve.points == [(10, 95), (20, 90), (30, 85), (40, 80)]  # (seconds, loss), of five steps each


def test_a_side_that_dies_keeps_its_points_and_the_others_go_on(curves_of, capsys):
    curves = curves_of(ours=FakePipe(), nanoGPT=FakePipe(may=13), stillborn=FakePipe(may=0))
    assert curves["ours"].points == [(5, 95), (10, 90), (15, 85), (20, 80)]
    assert curves["nanoGPT"].points == [(5, 95), (10, 90)] and curves["nanoGPT"].steps == 10
    assert curves["stillborn"].points == []
    err = capsys.readouterr().err
    assert "nanoGPT: it has failed" in err and "stillborn: it has failed" in err and "ours" not in err


def test_a_side_that_never_comes_to_the_loss_is_a_row_without_its_number(curves_of, capsys):
    curves = curves_of(ours=FakePipe(), short=FakePipe(may=13), nanoGPT=FakePipe(pace=3.0))
    ours, short = time_to_loss.tell(curves, 82.5)
    assert ours == row("ours, time to 82.5, beside nanoGPT", 17.5, 52.5, "s") and ours["ratio"] == 3
    assert short == row("short, time to 82.5, beside nanoGPT", None, 52.5, "s") and short["ratio"] is None
    assert "82.5 never; 90.0000 after 10 steps" in capsys.readouterr().out
    del curves["nanoGPT"]
    assert [(each["ours"], each["peer"]) for each in time_to_loss.tell(curves, 82.5)] == [
        (17.5, None),
        (None, None),
    ]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0, 10))
def test_a_loss_is_reached_between_the_looks_around_it(losses, loss):
    """At the first look that is low enough, or on the line from the one before; never before the curve."""
    reached = seconds_to(loss, [(1.0 + look, each) for look, each in enumerate(losses)])
    low = [look for look, each in enumerate(losses) if each <= loss]
    if not low:
        assert reached is None
    elif low[0] == 0:
        assert reached == 1
    else:
        assert low[0] <= reached <= low[0] + 1
        fell = (losses[low[0] - 1] - loss) / (losses[low[0] - 1] - losses[low[0]])
        assert reached == pytest.approx(low[0] + fell)


NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)

    def forward(self, ids, targets):
        logits = self.table(ids)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), lr=rate, betas=betas, weight_decay=decay)
"""


def test_a_peer_trains_and_is_asked_for_its_loss(tmp_path):
    """Evaluations had come to ask a model for its device, which this one could not tell: in time_to_loss
    nanoGPT failed, and was left out."""
    (tmp_path / "model.py").write_text(NANOGPT, encoding="utf-8")
    text = np.frombuffer(b"abab" * 50, np.uint8).copy()
    config = PRESETS["nanogpt-cpu"]
    model = replace(config.model, vocab_size=128, context_length=8)
    training = replace(config.training, steps=40, warmup_steps=1, learning_rate=0.5)
    config = replace(config, model=model, training=training)
    side = peer_side(text[:160], text[160:], str(tmp_path), config)
    assert side.held_out_loss() == pytest.approx(math.log(128))
    for _ in side.steps:
        pass
    assert side.held_out_loss() < 0.1


OURS_AS_NANOGPT = (
    NANOGPT.partition("class GPT(")[0]
    + """
from ref_numpy.config import ModelConfig
from torch_impl.transformer import initialised

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "d_model": config.n_embd}
        model = ModelConfig(context_length=config.block_size, bias=config.bias, activation="gelu", **sizes)
        self.model = initialised(model, seed=9)

    def forward(self, ids, targets):
        return None, self.model.loss((ids, targets))

    def configure_optimizers(self, decay, rate, betas, device):
        matrices = [each for each in self.parameters() if each.ndim > 1]
        norms = [each for each in self.parameters() if each.ndim == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT * decay}, {"params": norms, "weight_decay": 0}]
        return torch.optim.AdamW(groups, lr=rate, betas=betas)
"""
)


@pytest.mark.parametrize(("weight", "apart"), [(1, 0.0), (500, 1e-4)])
def test_a_peer_from_our_weights_on_our_batches_has_our_losses(tmp_path, weight, apart):
    """Unless it trains otherwise: here with another weight decay."""
    model = OURS_AS_NANOGPT.replace("WEIGHT", str(weight))
    (tmp_path / "model.py").write_text(model, encoding="utf-8")
    config = PRESETS["nanogpt-cpu"]
    config = replace(config, training=replace(config.training, batch_size=2, warmup_steps=1))
    tokens = torch.arange(300) * 7 % 256
    ours, peers = zip(*islice(same_losses.losses(config, str(tmp_path), tokens), 5), strict=True)
    differ = max(abs(mine - theirs) for mine, theirs in zip(ours, peers, strict=True))
    assert differ <= 1e-5 if apart == 0 else differ > apart


def test_turns_time_every_side_alike_and_leave_out_those_that_fail(capsys):
    pipes = {"nanoGPT": FakePipe(), "ours": FakePipe(0.5), "late": FakePipe(may=12), "early": FakePipe(may=1)}
    ours = pipes["ours"]
    timings = turns.take_turns(pipes, "toy", turns=3, seconds=4, most=1000, last="loss")
    assert list(timings) == list(pipes) == ["nanoGPT", "ours"]
    assert timings["nanoGPT"] == (100, [1, 1, 1], 80) and timings["ours"] == (100, [0.5, 0.5, 0.5], 80)
    assert ours.questions == ["rest", 1, 3, 1, "rest", *(1, 4, "rest") * 3, "loss"]
    assert capsys.readouterr().err.count("it has failed") == 2


def test_a_side_that_dies_while_it_starts_is_left_out():
    """It was waited for forever, since it never read its text. Here no process finds the program again, which
    comes by stdin."""
    program = """
import numpy as np
from benchmarks.turns import ask, leaving_out, served

with served({"ours": None}, np.zeros(100_000), "") as pipes:
    with leaving_out(pipes, "ours"):
        ask(pipes["ours"], 1)
print(pipes)
"""
    house = Path(turns.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-"], input=program, cwd=house, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "{}\n" and "ours: it has failed" in done.stderr


def test_turns_end_before_the_training_does():
    pipe = FakePipe()
    turns.take_turns({"ours": pipe}, "toy", turns=5, seconds=1000, most=100, last="loss")
    assert 90 <= pipe.steps <= 100


def test_rows_set_ours_beside_each_peer_of_the_same_shape():
    def measured(seconds: float, memory: float) -> Measured:
        return Measured(10, [seconds, 2 * seconds, 9 * seconds], 3.0, {"memory": (memory, "GiB")})

    results = {
        "small": {"nanoGPT": measured(2, 4), "torch_impl": measured(1, 1), "transformers": measured(4, 2)},
        "large": {"torch_impl": measured(1, 1), "torch_impl, bfloat16": measured(1, 1)},  # peers failed
    }
    assert paired(results) == [
        {"name": "small: torch_impl beside nanoGPT", "ours": 5, "peer": 2.5, "ratio": 2, "unit": "tokens/s"},
        {"name": "small: torch_impl beside nanoGPT, memory", "ours": 1, "peer": 4, "ratio": 4, "unit": "GiB"},
        {"name": "small: torch_impl beside transformers", "ours": 5, "peer": 1.25, "ratio": 4}
        | {"unit": "tokens/s"},
        {"name": "small: torch_impl beside transformers, memory", "ours": 1, "peer": 2, "ratio": 2}
        | {"unit": "GiB"},
    ]


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
