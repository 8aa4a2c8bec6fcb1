"""Is it nanoGPT's training? python -m benchmarks.same_losses --nanogpt FOLDER --text FILE.

FOLDER is a checkout of https://github.com/karpathy/nanoGPT. Its model, with its optimizer, its clipping and
its schedule, begins here with our weights of the preset nanogpt-cpu and reads our batches: every step's loss
has to be ours, as far as float32 tells. What is between the two in benchmarks.training is then which weights
and batches each of them drew.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.command import check_files, command, text_of
from benchmarks.peers import load_nanogpt, nanogpts_model
from benchmarks.rows import row, table, write_rows
from torch_impl.data import sample_batch
from torch_impl.optim import learning_rates
from torch_impl.train import start, train_steps
from torch_impl.training.config import RunConfig
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS
from torch_impl.transformer import initialised


@dataclass(frozen=True)
class Flags:
    nanogpt: str = ""
    """Folder of nanoGPT, with its model.py."""
    text: str = ""
    """Text to train on, its last tenth left out."""
    steps: int = 300
    """Steps to compare."""
    json: str = ""
    """File that the rows are written to."""


def losses(config: RunConfig, folder: str, tokens: Tensor) -> Iterator[tuple[float, float]]:
    """Our loss and nanoGPT's, step by step."""
    training = config.training
    ours, theirs = initialised(config.model, training.seed), nanogpts_model(folder, config)
    with torch.no_grad():  # both list their parameters in the order in which they use them
        for mine, peer in zip(ours.parameters(), theirs.parameters(), strict=True):
            peer.copy_(mine)
    betas = (training.beta1, training.beta2)
    with redirect_stdout(io.StringIO()):
        optimizer = theirs.configure_optimizers(training.weight_decay, training.learning_rate, betas, "cpu")
    sample = partial(sample_batch, tokens, config.model.context_length)
    rates = learning_rates(training).tolist()
    for step, metrics in enumerate(train_steps(start(ours, training), sample, training)):
        ids, targets = (part[0].contiguous() for part in sample(step, training))
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        _, loss = theirs(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield metrics.loss.item(), loss.item()


def compare(flags: Flags, text: bytes) -> list[dict]:
    """The rows: the loss of the last step, and how far apart those of any step were."""
    config = PRESETS["nanogpt-cpu"]
    tokens = torch.from_numpy(np.frombuffer(text, np.uint8)[: len(text) * 9 // 10].copy())
    steps = islice(losses(config, flags.nanogpt, tokens), flags.steps)
    pairs = list(tqdm(steps, total=flags.steps, unit="step", dynamic_ncols=True))
    apart = max(abs(mine - peer) for mine, peer in pairs)
    print(f"{flags.steps} steps from the same weights on the same batches: losses at most {apart:.1e} apart")
    return [row(f"loss of step {flags.steps}, beside nanoGPT", *pairs[-1], "nats/token")]


@command("benchmarks.same_losses")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.same_losses", __doc__)
    most = PRESETS["nanogpt-cpu"].training.steps
    if not 1 <= flags.steps <= most:
        raise InputError(f"--steps {flags.steps}: it must be from 1 to {most}, the preset's")
    load_nanogpt(flags.nanogpt)
    text = text_of(flags.text, least=1000)
    check_files(flags.json)
    rows = compare(flags, text)
    print(table(rows))
    write_rows(flags.json, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
