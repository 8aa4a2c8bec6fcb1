"""Sides take turns: each in a process of its own, as it would be in use, and only one of them at a time.

A busy machine then slows all alike, and none meets the threads, the allocator or the precision of another.
One that fails, as when memory is short, is named and left out; the others go on.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.sides import Side

FIRST_STEPS = 5
"""In which kernels are compiled, buffers are made, and a CUDA graph is recorded."""

_PATIENCE = 10  # seconds for a process to end by itself


def serve(pipe: Connection, make: Callable[..., Side], threads: int) -> None:
    """The process of a side: it is told what to make it of, and answers until the other end of its pipe is
    closed."""
    if threads:
        torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        side = make(*pipe.recv())
        with closing(side.steps):
            while True:
                pipe.send(_answer(side, pipe.recv()))


def _answer(side: Side, question: int | str) -> float:
    if question == "loss":
        return side.held_out_loss()
    on_cuda = torch.cuda.is_initialized()
    if question == "rest":
        if on_cuda:  # the next side may need what this one would keep for its next turn
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated() if on_cuda else 0
    begin = time.perf_counter()
    for _ in range(question):
        next(side.steps)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def ask(pipe: Connection, question: int | str) -> float:
    """What a side answers: to a number of steps, the seconds that they took; to "loss", the loss on the
    held-out text; to "rest", which hands spare memory of the GPU back, the most bytes it had there at once.

    Raises EOFError or ConnectionError where the side has died.
    """
    pipe.send(question)
    return pipe.recv()


@contextmanager
def served(
    sides: Mapping[str, Callable[..., Side]], tokens: np.ndarray, nanogpt: str, threads: int = 0
) -> Iterator[dict[str, Connection]]:
    """A process for each side, and the pipes to them. The last tenth of the tokens is held out.

    However the block ends, the processes end with it.
    """
    train, valid = np.split(tokens, [len(tokens) * 9 // 10])
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for name, make in sides.items():
            pipes[name], there = context.Pipe()
            process = context.Process(target=serve, args=(there, make, threads), daemon=True)
            process.start()
            processes.append(process)
            there.close()  # a side that dies is then noticed
            with suppress(ConnectionError):  # by the pipe, since start would wait forever for one that dies
                pipes[name].send((train, valid, nanogpt))
        yield dict(pipes)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(_PATIENCE)
            process.kill()
            process.join()


@contextmanager
def leaving_out(pipes: dict[str, Connection], side: str) -> Iterator[None]:
    """Around questions to a side: where it has died, it is named, and leaves the pipes."""
    try:
        yield
    except (EOFError, ConnectionError):
        del pipes[side]
        tqdm.write(f"{side}: it has failed, and is left out", file=sys.stderr)


class Timing(NamedTuple):
    """What the clock found of a side."""

    first_step: float  # seconds, compilation included
    seconds: list[float]  # of a step, by turns
    last: float  # the answer to a last question


def take_turns(
    pipes: dict[str, Connection], name: str, turns: int, seconds: float, most: int, last: str
) -> dict[str, Timing]:
    """Times the sides in turns of about so many seconds of the first of them, with no more than `most` steps
    in all. Those that fail on the way are not in what is returned, and leave the pipes.

    Every second turn goes through the sides backwards. A turn begins with a step that is not timed, for which
    memory has to be fetched again, and ends with a rest.
    """
    for side in list(pipes):  # none starts while another is timed
        with leaving_out(pipes, side):
            ask(pipes[side], "rest")
    first, usual = {}, {}
    for side in tqdm(list(pipes), desc=f"{name}: first steps", unit="side", dynamic_ncols=True, leave=False):
        with leaving_out(pipes, side):
            first[side], _, usual[side] = (ask(pipes[side], steps) for steps in (1, FIRST_STEPS - 2, 1))
            ask(pipes[side], "rest")
    wanted = round(seconds / next(iter(usual.values()), 1.0))
    steps = max(min(wanted, (most - FIRST_STEPS) // turns - 1), 1)

    taken: dict[str, list[float]] = {side: [] for side in pipes}
    for turn in tqdm(range(turns), desc=name, unit="turn", dynamic_ncols=True, leave=False):
        for side in list(pipes)[:: 1 if turn % 2 else -1]:
            with leaving_out(pipes, side):
                ask(pipes[side], 1)
                taken[side].append(ask(pipes[side], steps) / steps)
                ask(pipes[side], "rest")
    answers = {}
    for side in list(pipes):
        with leaving_out(pipes, side):
            answers[side] = ask(pipes[side], last)
    return {side: Timing(first[side], taken[side], answers[side]) for side in pipes}
