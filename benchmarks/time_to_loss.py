"""Time until a model is good: python -m benchmarks.time_to_loss --nanogpt FOLDER --text FILE [--out FILE].

A preset made for it, a preset with nanoGPT's settings, and nanoGPT itself (FOLDER is a checkout) train on the
bytes of one text, of which the last tenth is held out: the sizes of nanoGPT's line for CPUs, or with --device
cuda of its character model. Each side has a process to itself; they take turns, and only their own steps are
on their clock, not the evaluations between. The first five steps, in which kernels are compiled and a CUDA
graph is recorded, count there as the next ones do; the time that they took is told beside it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.command import check_files, command, text_of, write_picture
from benchmarks.peers import load_nanogpt, peer_side
from benchmarks.rows import row, table, write_rows
from benchmarks.sides import Side, torch_side
from benchmarks.turns import FIRST_STEPS, ask, leaving_out, served
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS

LOSSES = {"cpu": 1.898, "cuda": 1.4697}
"""What nanoGPT reaches: its line for CPUs, as it came out here, and its character model, by its README."""


@dataclass(frozen=True)
class Flags:
    nanogpt: str = ""
    """Folder of nanoGPT, with its model.py."""
    text: str = ""
    """Text to train on, such as Tiny Shakespeare."""
    device: str = "cpu"
    """cpu or cuda, where the models are larger."""
    loss: float = 0.0
    """Held-out loss to be reached, in nats per byte; 0 for 1.898 on the CPU and 1.4697 on CUDA."""
    looks: int = 16
    """Evaluations of each side, evenly over its steps."""
    threads: int = 0
    """Threads of each side; 0 leaves the choice to PyTorch."""
    out: str = ""
    """Picture of the curves that is written (.png, .svg, .pdf)."""
    json: str = ""
    """File that the rows are written to."""


class Runner(NamedTuple):
    """A side, and how long it trains."""

    steps: int
    make: Callable[..., Side]


@dataclass
class Curve:
    """What became of a side."""

    steps: int = 0  # that it has done
    first_steps: float = 0.0  # seconds that FIRST_STEPS took
    points: list[tuple[float, float]] = field(default_factory=list)  # seconds of training, held-out loss

    def look(self, steps: int, seconds: float, loss: float) -> None:
        """Write down a look after so many more steps. On the clock the first of them take as long as the
        next ones, so that the first look stands at 0 until the second comes."""
        if not self.points:
            self.first_steps = seconds
            self.points.append((0.0, loss))
        else:
            if len(self.points) == 1:
                self.points[0] = (seconds / steps * self.steps, self.points[0][1])
            self.points.append((self.points[-1][0] + seconds, loss))
        self.steps += steps


def runners(device: str) -> dict[str, Runner]:
    """The sides on a device, by name."""

    def runner(preset: str, make: Callable[..., Side], **settings: object) -> Runner:
        config = PRESETS[preset]
        return Runner(config.training.steps, partial(make, config=config, **settings))

    if device == "cpu":
        return {
            "char-fast": runner("char-fast", torch_side),
            "nanogpt-cpu": runner("nanogpt-cpu", torch_side),
            "nanoGPT": runner("nanogpt-cpu", peer_side),
        }
    recorded = {"dtype": torch.bfloat16, "device": device, "cuda_graph": True}
    return {
        "char-fast-gpu": runner("char-fast-gpu", torch_side, compiled=True, **recorded),
        "char-fast-gpu, not compiled": runner("char-fast-gpu", torch_side, **recorded),
        "nanogpt-gpu": runner("nanogpt-gpu", torch_side, compiled=True, **recorded),
        "nanoGPT": runner("nanogpt-gpu", peer_side, device=device, tuned=True, half=True),
    }


def train(sides: dict[str, Runner], text: bytes, flags: Flags, curves: dict[str, Curve]) -> None:
    """Each side to the end of its steps; its curve grows meanwhile, and ends where the side fails."""
    makers = {name: runner.make for name, runner in sides.items()}
    with (
        served(makers, np.frombuffer(text, np.uint8).astype(np.int64), flags.nanogpt, flags.threads) as pipes,
        tqdm(total=flags.looks + 1, unit="look", dynamic_ncols=True) as bar,
    ):
        for look in range(flags.looks + 1):
            for name in list(pipes):
                curve = curves.setdefault(name, Curve())
                steps = max(sides[name].steps * look // flags.looks, FIRST_STEPS) - curve.steps
                if steps > 0:
                    with leaving_out(pipes, name):
                        curve.look(steps, ask(pipes[name], steps), ask(pipes[name], "loss"))
            bar.update()


def seconds_to(loss: float, points: list[tuple[float, float]]) -> float | None:
    """When a curve first falls to a loss, on a straight line between two looks; None where it never does."""
    for (begin, high), (end, low) in pairwise([*points[:1], *points]):
        if low <= loss:
            return end if high <= loss else begin + (end - begin) * (high - loss) / (high - low)
    return None


def draw(curves: dict[str, Curve], loss: float, path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, curve) in enumerate(curves.items()):
        seconds, losses = np.array(curve.points).T
        (line,) = axes.plot(seconds, losses, marker=".", label=name)
        if (reached := seconds_to(loss, curve.points)) is not None:
            axes.plot(reached, loss, "o", color=line.get_color(), markersize=8)
            above = (4, 6 + 12 * i)  # two that come at the same time are both to be read
            axes.annotate(
                f"{reached:.0f} s", (reached, loss), above, textcoords="offset points", color=line.get_color()
            )
    axes.axhline(loss, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="seconds of training", ylabel="held-out loss, nats per byte", ylim=(None, 1.6 * loss))
    axes.legend()
    axes.grid(alpha=0.3)
    write_picture(path, figure)


def tell(curves: dict[str, Curve], loss: float) -> list[dict]:
    """Prints what came out, and returns the rows."""
    times = {name: seconds_to(loss, curve.points) for name, curve in curves.items()}
    for name, curve in curves.items():
        reached = "never" if times[name] is None else f"after {times[name]:.1f} s"
        seconds, last = curve.points[-1]
        print(
            f"{name:27} {loss} {reached}; {last:.4f} after {curve.steps} steps, at {seconds:.1f} s; "
            f"its first {FIRST_STEPS} steps took {curve.first_steps:.1f} s"
        )
    if (peer := times.pop("nanoGPT", None)) is None:
        print(f"nanoGPT failed or did not come to {loss}: nothing to compare with; try a larger --loss")
    return [row(f"{name}, time to {loss}, beside nanoGPT", time, peer, "s") for name, time in times.items()]


@command("benchmarks.time_to_loss", "the curves end there")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.time_to_loss", __doc__)
    load_nanogpt(flags.nanogpt)
    if flags.device not in LOSSES or (flags.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {flags.device} is not here; it is cpu, or cuda where there is one")
    if flags.looks < 1:
        raise InputError(f"--looks {flags.looks}: there must be one at least")
    if flags.threads < 0:
        raise InputError(f"--threads {flags.threads}: it is 0, or how many a side has")
    text = text_of(flags.text)
    check_files(flags.json, flags.out)
    loss = flags.loss or LOSSES[flags.device]
    curves: dict[str, Curve] = {}
    try:
        train(runners(flags.device), text, flags, curves)
    finally:  # what is measured by then is told, whatever came
        curves = {name: curve for name, curve in curves.items() if curve.points}
        rows = tell(curves, loss)
        print(table(rows))
        write_rows(flags.json, rows)
        if flags.out and curves:
            draw(curves, loss, flags.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
