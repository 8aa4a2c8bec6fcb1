"""Benchmarks: what is on the clock, what becomes of sides that fail, and what stands beside what."""

import math
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

from benchmarks import same_losses, time_to_loss, turns
from benchmarks.peers import peer_side
from benchmarks.rows import Measured, paired, row
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
