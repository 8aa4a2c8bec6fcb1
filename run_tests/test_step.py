"""A training step never waits for the device, and compiles in one piece."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ref_numpy.config import ModelConfig, TrainConfig
from torch_impl.data import sample_batch
from torch_impl.train import start, train_step, train_steps
from torch_impl.transformer import Transformer

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(vocab_size=31, context_length=8, n_layer=2, n_head=2, d_model=8, dropout=0.1)
TRAINING = TrainConfig(steps=5, batch_size=6, micro_batches=3, warmup_steps=2, label_smoothing=0.1)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_reads_nothing_back(precision):
    """Tensors without values stand in for the device's: whatever asks for one raises.

    The learning rate was looked up with rates[clock] once, which reads the clock on the host.
    """
    with FakeTensorMode():
        state = start(Transformer(MODEL, precision), TRAINING)
        clock = torch.zeros((), dtype=torch.long) + 1  # a plain torch.tensor(1) would remember its value
        places = torch.zeros(3, 2, 8, dtype=torch.long)
        metrics = train_step(state, (places, places), clock, TRAINING)
        for metric in metrics:
            with pytest.raises(DataDependentOutputException):
                metric.item()


def test_the_batches_of_many_steps_read_nothing_back():
    with FakeTensorMode():
        state = start(Transformer(MODEL), TRAINING)
        tokens = torch.zeros(100, dtype=torch.long)
        assert len(list(train_steps(state, partial(sample_batch, tokens, 8), TRAINING))) == TRAINING.steps


COMPILED_LOSS = """
import sys, torch
from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from torch_impl.train import model_loss
from torch_impl.transformer import initialised

config = ModelConfig(
    vocab_size=31, context_length=8, n_layer=2, n_head=2, d_model=8, dropout=0.1, norm_placement=sys.argv[1]
)
inputs, targets = torch.randint(31, (2, 3, 8), generator=torch.Generator().manual_seed(0))
compiled = torch.compile(model_loss, backend="aot_eager", fullgraph=True)
results = []
for loss_function in (model_loss, compiled):
    model, losses = initialised(config, 0), []
    for step in (0, 1):  # the second step is served by the graph of the first
        key = DropoutKey(7, torch.tensor(step), first_row=torch.tensor(3))
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = loss_function(model, (inputs, targets), key, 0.1, torch.tensor(24))
        loss.backward()
        losses.append(loss.detach())
    assert losses[0] != losses[1], "every step has its own masks"
    results.append([*losses, *(parameter.grad for parameter in model.parameters())])
for eager, graph in zip(*results, strict=True):
    torch.testing.assert_close(graph, eager)
"""


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_the_loss_compiles_in_one_graph(norm_placement):
    """fullgraph raises at a graph break; aot_eager traces forward and backward, and needs no C++ compiler.

    In a process of its own, as the shape checks of this one are themselves no code that compiles.
    """
    command = [sys.executable, "-c", COMPILED_LOSS, norm_placement]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert outcome.returncode == 0, outcome.stderr
