"""A process that plays a rank of torchrun, again and again, so that its start is paid for once."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._dynamo  # what a first optimizer loads, before the processes divide
import torch.distributed as dist

import torch_impl.training.engines  # noqa: F401  (the same)
import train_gpu
from ref_numpy.config import ModelConfig, TrainConfig
from torch_impl.data import sample_batch
from torch_impl.ffn import FFN
from torch_impl.masking import evaluate_masked, sample_masked_batch
from torch_impl.packing import evaluate_packed, pack
from torch_impl.pairs import evaluate_pairs, make_pairs, sample_pairs
from torch_impl.seq2seq import make_model
from torch_impl.train import evaluate, start, train_steps
from torch_impl.training import run as run_module
from torch_impl.training.against_reference import Comparison
from torch_impl.training.ranks import joined, whole

MODEL = ModelConfig(vocab_size=31, context_length=8, n_layer=2, n_head=2, d_model=8, dropout=0.1)
TRAINING = TrainConfig(
    steps=5, batch_size=8, warmup_steps=2, learning_rate=3e-2, label_smoothing=0.1, clip=0.5
)


def serve(requests: Connection, rank: int) -> None:
    """Answers (function's name, size, port, arguments) until there are no more of them."""
    torch.set_num_threads(1)
    while True:
        try:
            name, size, port, arguments = requests.recv()
        except EOFError:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            answer: Any = globals()[name](rank, **arguments)
        except Exception as error:
            answer = error
        if dist.is_initialized():
            dist.destroy_process_group()
        requests.send(answer)


def trajectory(rank: int, shard: bool, **changes: Any) -> list[float]:
    """Losses and norms of the gradient of some steps in float64, an evaluation, and the sum of the weights'
    magnitudes."""
    of_training = {name: changes.pop(name) for name in ("micro_batches", "optimizer") if name in changes}
    training = replace(TRAINING, **of_training)
    config = replace(MODEL, **changes)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(28, (300,), generator=random)
    lengths = torch.randint(1, 8, (40,), generator=random).tolist()
    rows = [tokens[i : i + length] for i, length in enumerate(lengths)]
    backwards = [row.flip(0) for row in rows]
    sample = {
        "decoder": partial(sample_batch, tokens, 8),
        "encoder": partial(sample_masked_batch, tokens, config),
        "encoder-decoder": partial(sample_pairs, make_pairs(rows, backwards, config), config),
    }[config.architecture]
    with joined(on_cuda=False) as ranks:
        model = make_model(config, torch.float64)
        model.initialise(0)
        state = start(model.double(), training, False, ranks, torch.device("cpu") if shard else None)
        told = [value.item() for step in train_steps(state, sample, training) for value in step[:2]]
        # Five batches to evaluate, three of whole sequences: neither divides among two or four processes.
        if config.architecture == "encoder-decoder":
            told += evaluate_pairs(model, make_pairs(rows, backwards, config), 9, ranks=ranks)
        elif config.architecture == "encoder":
            told += evaluate_masked(model, tokens, 12, ranks=ranks)
        else:
            packed = pack([(row, row >= 0) for row in rows if len(row) > 1], 8)
            told += [evaluate(model, tokens, 12, ranks=ranks), evaluate_packed(model, packed, 8, ranks=ranks)]
        return [*told, sum(whole(p.detach()).abs().sum().item() for p in model.parameters())]


def held(rank: int, shard: bool) -> tuple[int, int]:
    """Numbers of the weights, and of the moments after a step, that lie in this process."""
    tokens = torch.arange(100) % 31
    with joined(on_cuda=False) as ranks:
        model = make_model(MODEL)
        model.initialise(0)
        state = start(model, TRAINING, False, ranks, torch.device("cpu") if shard else None)
        next(train_steps(state, partial(sample_batch, tokens, 8), TRAINING))
        moments = [m for values in state.optimizer.state.values() for m in values.values() if m.ndim]
        return _local(model.parameters()), _local(moments)


def compiled(rank: int, n_layer: int) -> list[int]:
    """How often blocks run compiled, counted by a backend of its own, in an evaluation and in two steps."""
    runs, compile = 0, torch.compile

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        def run(*inputs: torch.Tensor) -> tuple:
            nonlocal runs
            runs += 1
            return graph(*inputs)

        return run

    def counted(act: Callable[[], object]) -> int:
        before = runs
        act()
        return runs - before

    tokens, told = torch.arange(100) % 31, []
    with joined(on_cuda=False) as ranks:
        model = make_model(replace(MODEL, n_layer=n_layer))
        model.initialise(0)
        torch.compile = partial(compile, backend=backend)
        try:
            state = start(model, TRAINING, True, ranks, torch.device("cpu"))
            steps = train_steps(state, partial(sample_batch, tokens, 8), TRAINING)
            for act in (lambda: evaluate(model, tokens[:20]), lambda: next(steps), lambda: next(steps)):
                told.append(counted(act))
        finally:
            torch.compile = compile
    return told


def departures(rank: int, shard: bool, broken: int | None) -> list[str]:
    """What this process finds to depart from the reference in a step, where one has a broken layer."""
    tokens, forward = torch.arange(100) % 31, FFN.forward
    with joined(on_cuda=False) as ranks:
        model = make_model(MODEL)
        model.initialise(0)
        start(model, TRAINING, False, ranks, torch.device("cpu") if shard else None)
        comparison = Comparison(model)
        if rank == broken:
            FFN.forward = lambda self, x: forward(self, x) * float("nan")
        try:
            with comparison.watching():
                inputs, targets = sample_batch(tokens, 8, torch.tensor(0), TRAINING)
                model.loss((inputs[0, rank::2], targets[0, rank::2])).backward()
        finally:
            FFN.forward = forward
    return comparison.broken + comparison.departures


def _local(tensors: Iterable[torch.Tensor]) -> int:
    return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)


def command(
    rank: int, arguments: list[str], stop: tuple[int, int] | None = None, die: tuple[int, int] | None = None
) -> tuple[int, str, str]:
    """train_gpu.py's exit code and what it says. Ctrl-C, or a sudden death, at (rank, step). {rank} in an
    argument is the process's own."""
    arguments = [argument.replace("{rank}", str(rank)) for argument in arguments]
    train_steps_undisturbed = run_module.train_steps

    def disturbed(state, sample, config):
        for metrics in train_steps_undisturbed(state, sample, config):
            if (rank, state.step) == die:
                os._exit(9)
            if (rank, state.step) == stop:
                signal.raise_signal(signal.SIGINT)
            yield metrics

    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = lambda **changes: None
    run_module.train_steps = disturbed
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = train_gpu.main(arguments)
    finally:
        run_module.train_steps = train_steps_undisturbed
    return code, out.getvalue(), err.getvalue()


def alone(arguments: list[str], folder: str) -> None:
    """train_gpu.py as a process of its own, in a folder, silently."""
    torch.set_num_threads(1)
    os.chdir(folder)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        sys.stdout = sys.stderr = nowhere
        code = train_gpu.main(arguments)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(code)


def dying(arguments: list[str], folder: str, fatal: int) -> None:
    """The same, but it dies at a file operation below the folder, which it counts."""
    count = 0

    def hook(event: str, details: tuple) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove"):
            count += str(details[0]).startswith(folder)
            if count == fatal:
                os._exit(9)  # as SIGKILL: no handler and no cleaning up

    sys.addaudithook(hook)
    alone(arguments, folder)


def unheard(arguments: list[str], folder: str, stop: int) -> None:
    """The same, but its reader dies of the Ctrl-C that stops it at a step."""
    train_steps_undisturbed = run_module.train_steps
    reader, writer = os.pipe()

    def disturbed(state, sample, config):
        for metrics in train_steps_undisturbed(state, sample, config):
            if state.step == stop:
                os.close(reader)
                signal.raise_signal(signal.SIGINT)
            yield metrics

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(writer), "w", encoding="utf-8") for _ in range(2))
    run_module.train_steps = disturbed
    sys.exit(train_gpu.main(arguments))
