"""Training beside nanoGPT, in one run: python -m benchmarks.training --nanogpt FOLDER --text FILE [--full].

FOLDER is a checkout of https://github.com/karpathy/nanoGPT. Its model.py is imported, and trained here as its
train.py does. Both sides train the model of the preset nanogpt-cpu, which is the line for CPUs in nanoGPT's
README, on the bytes of one text. Each has a process to itself, as it would in use; they take turns, block of
steps by block of steps, so that a busy machine slows both alike.
"""

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from benchmarks.command import check_files, command, text_of
from benchmarks.peers import load_nanogpt, peer_side
from benchmarks.rows import Measured, row, table, write_rows
from benchmarks.sides import torch_side
from benchmarks.turns import ask, leaving_out, served
from torch_impl.training.corpus import python_reference
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS

CONFIG = PRESETS["nanogpt-cpu"]


@dataclass(frozen=True)
class Flags:
    nanogpt: str = ""
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


def compare(flags: Flags, text: bytes) -> list[dict]:
    """The rows; prints how far the ratio varied from turn to turn. Where a side fails on the way, the turns
    before it count. Raises InputError where there were none."""
    total = CONFIG.training.steps if flags.full else flags.steps
    sides = {"ours": partial(torch_side, config=CONFIG), "nanoGPT": partial(peer_side, config=CONFIG)}
    turns: list[dict[str, float]] = []
    losses: dict[str, float] = {}
    with (
        served(sides, np.frombuffer(text, np.uint8).astype(np.int64), flags.nanogpt, flags.threads) as pipes,
        tqdm(total=total, unit="step", dynamic_ncols=True) as bar,
    ):
        for first in range(0, total, flags.block):
            steps = min(flags.block, total - first)
            turn: dict[str, float] = {}
            for side in list(pipes)[:: 1 if len(turns) % 2 else -1]:
                with leaving_out(pipes, side):
                    turn[side] = ask(pipes[side], steps) / steps
            if len(pipes) < len(sides):
                break
            turns.append(turn)
            bar.update(steps)
        for side in list(pipes) if flags.full else ():
            with leaving_out(pipes, side):
                losses[side] = ask(pipes[side], "loss")

    if len(turns) < 2:
        raise InputError("a side has failed before anything was timed; its error stands above")
    tokens = CONFIG.training.batch_size * CONFIG.model.context_length
    mine, theirs = (Measured(tokens, [turn[side] for turn in turns[1:]]) for side in sides)
    ratios = sorted(turn["nanoGPT"] / turn["ours"] for turn in turns[1:])
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"{len(ratios)} turns of {flags.block} steps; four in five ratios lie in {low:.3f} to {high:.3f}")
    rows = [row("training, beside nanoGPT", mine.speed, theirs.speed, "tokens/s", mine.ratio(theirs))]
    if len(losses) == len(sides):
        name = f"held-out loss after {total} steps, beside nanoGPT"
        rows.append(row(name, losses["ours"], losses["nanoGPT"], "nats/token"))
    return rows


@command("benchmarks.training")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.training", __doc__)
    if flags.block < 1 or not 2 * flags.block <= flags.steps <= CONFIG.training.steps:
        raise InputError(
            f"--steps {flags.steps}, --block {flags.block}: there must be two blocks at least, and "
            f"no more than {CONFIG.training.steps} steps"
        )
    if flags.threads < 0:
        raise InputError(f"--threads {flags.threads}: it is 0, or how many a side has")
    load_nanogpt(flags.nanogpt)
    text = text_of(flags.text, least=1000) if flags.text else python_reference().encode("utf-8")
    check_files(flags.json)
    rows = compare(flags, text)
    print(table(rows))
    write_rows(flags.json, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
