"""A training step never waits for the device, and compiles in one piece."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ref_numpy.config import ModelConfig, TrainConfig
from torch_impl.data import sample_batch
from torch_impl.masking import sample_masked_batch
from torch_impl.pairs import Pairs, sample_pairs
from torch_impl.seq2seq import make_model
from torch_impl.train import start, train_step, train_steps
from torch_impl.training.recompute import recompute_blocks
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


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
def test_the_batches_of_many_steps_read_nothing_back(architecture):
    model_config, training = replace(MODEL, architecture=architecture), replace(TRAINING, steps=2)
    with FakeTensorMode():
        state = start(make_model(model_config), training)
        tokens = torch.zeros(100, dtype=torch.long)
        pairs = Pairs(torch.zeros(9, 7, dtype=torch.int32), torch.zeros(9, 6, dtype=torch.int32))
        sample = {
            "decoder": partial(sample_batch, tokens, 8),
            "encoder": partial(sample_masked_batch, tokens, model_config),
            "encoder-decoder": partial(sample_pairs, pairs, model_config),
        }[architecture]
        assert len(list(train_steps(state, sample, training))) == 2


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_blocks_that_are_computed_again_give_the_same_bits_and_keep_less(architecture):
    """With dropout, whose masks have to be the same the second time."""
    config = replace(MODEL, architecture=architecture, n_layer=4, d_model=16)
    pairs = Pairs(torch.arange(63).view(9, 7) % 28, torch.arange(54).view(9, 6) % 28)
    sample = {
        "decoder": partial(sample_batch, torch.arange(100) % 28, 8),
        "encoder-decoder": partial(sample_pairs, pairs, config),
    }[architecture]
    results, kept = [], []
    for recomputed in (False, True):
        model = make_model(config)
        model.initialise(0)
        if recomputed:
            recompute_blocks(model)
        state, tensors = start(model, TRAINING), []
        with saved_tensors_hooks(lambda t, tensors=tensors: tensors.append(t.numel()) or t, lambda t: t):
            losses = [metrics.loss for metrics in train_steps(state, sample, TRAINING)]
        results.append([*losses, *model.parameters()])
        kept.append(sum(tensors))
    assert all(map(torch.equal, *results)) and kept[1] < 0.6 * kept[0]


COMPILED_LOSS = """
import sys, torch
from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from torch_impl.float8 import use_float8
from torch_impl.seq2seq import make_model

config = ModelConfig(
    vocab_size=31, context_length=8, n_layer=1, n_head=2, d_model=8, dropout=0.1, norm_placement=sys.argv[1],
    architecture=sys.argv[2],
)
source, inputs, targets = torch.randint(31, (3, 3, 8), generator=torch.Generator().manual_seed(0))
batch = inputs, targets
if config.architecture == "encoder-decoder":
    batch = source, source < 20, inputs, targets
results = []
for compiled in (False, True):
    model, losses = make_model(config), []
    if sys.argv[3:]:
        use_float8(model)
    loss_function = torch.compile(model.loss, backend="aot_eager", fullgraph=True) if compiled else model.loss
    model.initialise(0)
    for step in (0, 1):  # the second step is served by the graph of the first
        key = DropoutKey(7, torch.tensor(step), first_row=torch.tensor(3))
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = loss_function(batch, key, 0.1, torch.tensor(24))
        loss.backward()
        losses.append(loss.detach())
    assert losses[0] != losses[1], "every step has its own masks"
    results.append([*losses, *(parameter.grad for parameter in model.parameters())])
for eager, graph in zip(*results, strict=True):
    torch.testing.assert_close(graph, eager)
"""


@pytest.mark.parametrize(
    "arguments", [("pre", "decoder"), ("post", "encoder-decoder"), ("pre", "decoder", "float8")]
)
def test_the_loss_compiles_in_one_graph(arguments):
    """fullgraph raises at a graph break; aot_eager traces forward and backward, and needs no C++ compiler.

    In a process of its own, as the shape checks of this one are themselves no code that compiles.
    """
    command = [sys.executable, "-c", COMPILED_LOSS, *arguments]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert outcome.returncode == 0, outcome.stderr


COMPILED_CHOICE = """
import torch
from torch_impl.flash_attention import AttentionPattern, choose_path

@torch.compile(backend="eager", fullgraph=True)
def chosen(x):
    pattern = AttentionPattern(causal=True, window=4)
    return x, choose_path(pattern, torch.device("cuda"), torch.bfloat16, 64)

chosen(torch.zeros(1))
"""


def test_the_choice_of_a_kernel_compiles():
    """It once looked for Triton each time, and by PyTorch 2.11 no model with a window compiled on CUDA."""
    command = [sys.executable, "-c", COMPILED_CHOICE]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert outcome.returncode == 0, outcome.stderr


class Recorded:
    """Stands in for CUDA's graphs: a replay is the step itself, whose results are then overwritten."""

    def __init__(self):
        self.ran = 0
        self.recorded = 0

    def run(self, step):
        self.ran += 1
        return step()

    def record(self, step):
        self.recorded += 1
        held = None

        def replay():
            nonlocal held
            metrics = step()
            if held is None:
                held = metrics
            for old, new in zip(held, metrics, strict=True):
                old.copy_(new)
            return held

        return replay


def test_steps_that_are_replayed_are_the_steps():
    """Dropout, schedule and all; and what a step gave is not overwritten by the next."""
    losses, recorder = [], Recorded()
    for chosen in (None, recorder):
        model = make_model(MODEL)
        model.initialise(0)
        state = start(model, TRAINING)
        state.recorder = chosen
        sample = partial(sample_batch, torch.arange(100) % 28, 8)
        losses.append([metrics.loss for metrics in train_steps(state, sample, TRAINING)])
    assert losses[0] == losses[1] and len(set(losses[1])) == 5
    assert (recorder.ran, recorder.recorded) == (3, 1)
