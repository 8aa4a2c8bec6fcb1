"""Training beside nanoGPT, in one run: python -m benchmarks.training --peer FOLDER --text FILE [--full].

FOLDER is a checkout of https://github.com/karpathy/nanoGPT. Its model.py is imported, and trained here as its
train.py does. Both sides train the model of the preset nanogpt-cpu, which is the line for CPUs in nanoGPT's
README, on the bytes of one text. Each has a process to itself, as it would in use; they take turns, block of
steps by block of steps, so that a busy machine slows both alike.
"""

import importlib.util
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from torch_impl.data import sample_batch
from torch_impl.float8 import use_float8
from torch_impl.optim import learning_rates
from torch_impl.train import evaluate, start, train_steps
from torch_impl.training.captured import CudaGraphs
from torch_impl.training.config import RunConfig
from torch_impl.training.files import InputError, write_file
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS
from torch_impl.transformer import initialised

MODEL, TRAINING = PRESETS["nanogpt-cpu"].model, PRESETS["nanogpt-cpu"].training


@dataclass(frozen=True)
class Flags:
    peer: str = ""
    """Folder of nanoGPT, with its model.py."""
    text: str = ""
    """Text to train on, whose last tenth is held out; without it, the Python language reference."""
    full: bool = False
    """Train all steps of the preset, and compare the loss on the held-out text as well."""
    steps: int = 400
    """Steps of each side without --full."""
    block: int = 20
    """Steps of a turn; the first turn of each side is not timed."""
    threads: int = 0
    """Threads of each side; 0 leaves the choice to PyTorch."""
    json: str = ""
    """File that the rows are written to."""


class Side(NamedTuple):
    """A model in training: its steps, one by one, and its loss on the held-out text so far."""

    steps: Iterator[None]
    held_out_loss: Callable[[], float]


def ours(
    train: np.ndarray,
    valid: np.ndarray,
    _: str,
    config: RunConfig = PRESETS["nanogpt-cpu"],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    compiled: bool = False,
    float8: bool = False,
    cuda_graph: bool = False,
) -> Side:
    """torch_impl, driven as a run drives it."""
    model = initialised(config.model, config.training.seed, dtype, device)
    if float8:
        use_float8(model)
    tokens = torch.from_numpy(train).to(device)
    sample = partial(sample_batch, tokens, config.model.context_length)

    def steps() -> Iterator[None]:
        state = start(model, config.training, compiled)
        if cuda_graph:
            state.recorder = CudaGraphs()
        for step, metrics in enumerate(train_steps(state, sample, config.training)):
            if step % config.run.log_every == 0:
                metrics.loss.item()
            yield

    return Side(steps(), lambda: evaluate(model, torch.from_numpy(valid).to(device)))


def nanogpt(
    train: np.ndarray, valid: np.ndarray, folder: str, config: RunConfig = PRESETS["nanogpt-cpu"]
) -> Side:
    """nanoGPT's model, not compiled."""
    return nanogpts_loop(nanogpts_model(folder, config), train, valid, config)


def nanogpts_model(folder: str, config: RunConfig) -> Any:
    """nanoGPT's model of a config's shape, which has its own optimizer."""
    peer, model = load_peer(folder), config.model
    torch.manual_seed(1337)
    with redirect_stdout(io.StringIO()):
        return peer.GPT(
            peer.GPTConfig(
                block_size=model.context_length,
                vocab_size=model.vocab_size,
                n_layer=model.n_layer,
                n_head=model.n_head,
                n_embd=model.d_model,
                dropout=model.dropout,
                bias=model.bias,
            )
        )


def nanogpts_loop(
    model: Any,
    train: np.ndarray,
    valid: np.ndarray,
    config: RunConfig,
    compiled: bool = False,
    half: bool = False,
    device: str = "cpu",
) -> Side:
    """The batches, the optimizer and the steps of nanoGPT's train.py, for its own model or another's with
    `(ids, targets) -> (logits, loss)` and `configure_optimizers`. half: in bfloat16, by autocast."""
    training, T = config.training, config.model.context_length
    model = model.to(device)
    with redirect_stdout(io.StringIO()):
        betas = (training.beta1, training.beta2)
        optimizer = model.configure_optimizers(training.weight_decay, training.learning_rate, betas, device)
    rates = learning_rates(training).tolist()
    forward = torch.compile(model) if compiled else model
    precision = partial(torch.autocast, device, torch.bfloat16, enabled=half)

    def get_batch(path: Path) -> tuple[Tensor, Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - T, (training.batch_size,))
        x = torch.stack([torch.from_numpy((data[i : i + T]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + T]).astype(np.int64)) for i in ix])
        if device == "cpu":
            return x, y
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in (x, y))

    def steps() -> Iterator[None]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            path = Path(temporary) / "train.bin"
            train.astype(np.uint16).tofile(path)
            x, y = get_batch(path)
            for step, rate in enumerate(rates):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with precision():
                    _, loss = forward(x, y)
                x, y = get_batch(path)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if step % config.run.log_every == 0:
                    loss.item()
                yield

    class WithLoss:
        """The model as evaluate() asks one."""

        config = SimpleNamespace(context_length=T)

        def loss(self, batch: tuple[Tensor, Tensor], count: int) -> Tensor:
            ids, targets = batch
            with precision():
                return model(ids, targets.contiguous())[1] * (targets.numel() / count)

    def held_out_loss() -> float:
        model.eval()  # without dropout
        loss = evaluate(WithLoss(), torch.from_numpy(valid).to(device))
        model.train()
        return loss

    return Side(steps(), held_out_loss)


def load_peer(folder: str) -> ModuleType:
    """nanoGPT's model.py. Raises InputError where the folder has none, or another's."""
    path = Path(folder) / "model.py"
    if not folder or not path.is_file():
        raise InputError(f"--peer {folder or 'is missing'}: name a checkout of nanoGPT, with its model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--peer {folder}: model.py cannot be imported: {error}") from error
    if not hasattr(module, "GPT") or not hasattr(module, "GPTConfig"):
        raise InputError(f"--peer {folder}: its model.py is not nanoGPT's, it has no GPT and GPTConfig")
    return module


def serve(pipe: Connection, make: Callable[..., Side], threads: int, *arguments: object) -> None:
    """The process of a side. Answers a number of steps with the seconds they took, 0 with the loss, and -1
    with the most memory that it has had on a GPU, in bytes."""
    if threads:
        torch.set_num_threads(threads)
    side = make(*arguments)
    while (steps := pipe.recv()) is not None:
        if steps < 0:
            pipe.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
            continue
        begin = time.perf_counter()
        for _ in range(steps):
            next(side.steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - begin if steps else side.held_out_loss())
    side.steps.close()


@contextmanager
def served(
    sides: Sequence[Callable[..., Side]], tokens: np.ndarray, peer: str, threads: int
) -> Iterator[list[Connection]]:
    """A process for each side, and the pipes to them. The last tenth of the tokens is held out."""
    train, valid = np.split(tokens, [len(tokens) * 9 // 10])
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for make in sides:
        here, there = context.Pipe()
        arguments = (there, make, threads, train, valid, peer)
        processes.append(context.Process(target=serve, args=arguments, daemon=True))
        processes[-1].start()
        there.close()  # a side that dies is then noticed
        pipes.append(here)
    yield pipes
    for pipe, process in zip(pipes, processes, strict=True):
        with suppress(OSError):  # one that has died
            pipe.send(None)
        process.join()


def tokens_of(text: bytes) -> np.ndarray:
    """Its bytes."""
    return np.frombuffer(text, np.uint8).astype(np.int64)


def ask(pipe: Connection, steps: int) -> float:
    """What `serve` answers."""
    pipe.send(steps)
    return pipe.recv()


def take_turns(pipes: Sequence[Connection], steps: int, turns: int, name: str) -> list[list[float]]:
    """Seconds that a step takes, by turn and side; every second turn goes through the sides backwards."""
    seconds = []
    for turn in tqdm(range(turns), desc=name, unit="turn", dynamic_ncols=True):
        numbers = range(len(pipes)) if turn % 2 else reversed(range(len(pipes)))
        taken = {number: ask(pipes[number], steps) / steps for number in numbers}
        seconds.append([taken[number] for number in range(len(pipes))])
    return seconds


def speed_rows(speeds: Sequence[Any]) -> list[dict]:
    """The rows of sides at shapes: each has shape, side, tokens per second, its peer's and their ratio."""
    return [
        {"name": f"{each.shape}: {each.side}", "ours": each.tokens, "peer": each.peer, "ratio": each.ratio}
        | {"unit": "tokens/s"}
        for each in speeds
    ]


def compare(flags: Flags, text: bytes) -> list[dict]:
    """The rows; prints how far the ratio varied from turn to turn."""
    total = TRAINING.steps if flags.full else flags.steps
    seconds: list[list[float]] = []
    with (
        served((ours, nanogpt), tokens_of(text), flags.peer, flags.threads) as pipes,
        tqdm(total=total, unit="step", dynamic_ncols=True) as bar,
    ):
        for first in range(0, total, flags.block):
            steps = min(flags.block, total - first)
            turn = [0.0, 0.0]
            for side in (0, 1) if len(seconds) % 2 else (1, 0):
                turn[side] = ask(pipes[side], steps) / steps
            seconds.append(turn)
            bar.update(steps)
        losses = [ask(pipe, 0) for pipe in pipes] if flags.full else None

    timed = seconds[1:]
    ratios = sorted(theirs / mine for mine, theirs in timed)
    tokens_per_step = TRAINING.batch_size * MODEL.context_length
    speeds = [tokens_per_step / statistics.median(side) for side in zip(*timed, strict=True)]
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"{len(ratios)} turns of {flags.block} steps; four in five ratios lie in {low:.3f} to {high:.3f}")
    rows = [row("training", speeds[0], speeds[1], statistics.median(ratios), "tokens/s")]
    if losses:
        name = f"held-out loss after {total} steps"
        rows.append(row(name, losses[0], losses[1], losses[1] / losses[0], "nats/token"))
    return rows


def row(name: str, ours: float, peer: float, ratio: float, unit: str) -> dict:
    """ratio above 1: ours is ahead."""
    return {"name": f"{name}, beside nanoGPT", "ours": ours, "peer": peer, "ratio": ratio, "unit": unit}


def main(arguments: list[str]) -> int:
    try:
        flags = parse_flags(Flags(), arguments, "python -m benchmarks.training", __doc__)
        if flags.block < 1 or not 2 * flags.block <= flags.steps <= TRAINING.steps:
            raise InputError(
                f"--steps {flags.steps}, --block {flags.block}: there must be two blocks at least, and "
                f"no more than {TRAINING.steps} steps"
            )
        load_peer(flags.peer)
        text = Path(flags.text).read_bytes() if flags.text else "\n".join(topics.values()).encode("utf-8")
        if len(text) < 1000:
            raise InputError(f"--text {flags.text} has {len(text)} bytes; it needs 1,000 at least")
        rows = compare(flags, text)
        if flags.json:
            write_file(Path(flags.json), json.dumps(rows, indent=1).encode("utf-8"))
    except (InputError, OSError) as error:
        print(f"benchmarks.training: error: {error}", file=sys.stderr)
        return 2
    for each in rows:
        print(
            f"{each['name']:52} {each['ours']:10.3f} {each['peer']:10.3f} {each['unit']:10}"
            f" {each['ratio']:6.3f}x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
