"""The time until a model is good: python -m benchmarks.time_to_loss --peer FOLDER --text FILE [--out FILE].

A preset made for it, a preset with nanoGPT's settings, and nanoGPT itself (FOLDER is a checkout) train on the
bytes of one text, of which the last tenth is held out: the sizes of nanoGPT's line for CPUs, or with --device
cuda of its character model. Each side has a process to itself; they take turns, and only their own steps are
on their clock, not the evaluations between. The first five steps, in which kernels are compiled and a CUDA
graph is recorded, count there as the next ones do; the time that they took is told beside it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.train_gpu import peer_side
from benchmarks.training import Side, ask, load_peer, nanogpt, ours, row, served, tokens_of
from torch_impl.training.files import InputError, write_file
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS

LOSSES = {"cpu": 1.898, "cuda": 1.4697}
"""What nanoGPT reaches: its line for CPUs, as it came out here, and its character model, by its README."""

FIRST_STEPS = 5


@dataclass(frozen=True)
class Flags:
    peer: str = ""
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
    """Picture of the curves that is written (.png, .svg)."""
    json: str = ""
    """File that the rows are written to."""


class Runner(NamedTuple):
    """A side, and how long it trains."""

    steps: int
    make: Callable[..., Side]


class Curve(NamedTuple):
    """What became of a side."""

    first_steps: float  # seconds
    points: list[tuple[float, float]]  # seconds of training without compilation, held-out loss


def runners(device: str) -> dict[str, Runner]:
    """The sides on a device, by name."""

    def runner(preset: str, make: Callable[..., Side], **settings: object) -> Runner:
        config = PRESETS[preset]
        return Runner(config.training.steps, partial(make, config=config, **settings))

    if device == "cpu":
        return {
            "char-fast": runner("char-fast", ours),
            "nanogpt-cpu": runner("nanogpt-cpu", ours),
            "nanoGPT": runner("nanogpt-cpu", nanogpt),
        }
    recorded = {"dtype": torch.bfloat16, "device": device, "cuda_graph": True}
    return {
        "char-fast-gpu": runner("char-fast-gpu", ours, compiled=True, **recorded),
        "char-fast-gpu, not compiled": runner("char-fast-gpu", ours, **recorded),
        "nanogpt-gpu": runner("nanogpt-gpu", ours, compiled=True, **recorded),
        "nanoGPT": runner("nanogpt-gpu", peer_side, name="nanoGPT", device=device),
    }


def curves(sides: dict[str, Runner], text: bytes, flags: Flags) -> dict[str, Curve]:
    """Of each side, to the end of its steps. One that fails is named, and ends there."""
    makers = [runner.make for runner in sides.values()]
    found: dict[str, Curve] = {}
    with (
        served(makers, tokens_of(text), flags.peer, flags.threads) as pipes,
        tqdm(total=flags.looks + 1, unit="look", dynamic_ncols=True) as bar,
    ):
        going = dict(zip(sides, pipes, strict=True))
        done = dict.fromkeys(sides, 0)
        for look in range(flags.looks + 1):
            for name, pipe in list(going.items()):
                until = max(sides[name].steps * look // flags.looks, FIRST_STEPS)
                try:
                    if until > done[name]:
                        seconds, loss = ask(pipe, until - done[name]), ask(pipe, 0)
                        _note(found, name, seconds, loss, done[name], until)
                        done[name] = until
                except (EOFError, ConnectionError):
                    bar.write(f"{name}: it has failed after step {done[name]}", file=sys.stderr)
                    del going[name]
            bar.update()
    return found


def _note(found: dict[str, Curve], name: str, seconds: float, loss: float, done: int, until: int) -> None:
    """Write down a look. The first one stands at 0 until the second tells how long its steps take."""
    if name not in found:
        found[name] = Curve(seconds, [(0.0, loss)])
        return
    points = found[name].points
    if len(points) == 1:
        points[0] = (seconds / (until - done) * done, points[0][1])
    points.append((points[-1][0] + seconds, loss))


def seconds_to(loss: float, points: list[tuple[float, float]]) -> float | None:
    """When a curve first falls to a loss, on a straight line between two looks; None where it never does."""
    for (begin, high), (end, low) in pairwise(points):
        if low <= loss:
            return begin + (end - begin) * (high - loss) / (high - low)
    return None


def draw(found: dict[str, Curve], loss: float, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in found.items():
        seconds, losses = np.array(curve.points).T
        axes.plot(seconds, losses, marker=".", label=name)
        if (reached := seconds_to(loss, curve.points)) is not None:
            axes.plot(reached, loss, "o", color=axes.lines[-1].get_color(), markersize=8)
            axes.annotate(f"{reached:.0f} s", (reached, loss), (4, 6), textcoords="offset points")
    axes.axhline(loss, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="seconds of training", ylabel="held-out loss, nats per byte", ylim=(None, 3.0))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    try:
        flags = parse_flags(Flags(), arguments, "python -m benchmarks.time_to_loss", __doc__)
        load_peer(flags.peer)
        if flags.device not in LOSSES or (flags.device == "cuda" and not torch.cuda.is_available()):
            raise InputError(f"--device {flags.device} is not here; it is cpu, or cuda where there is one")
        if not flags.text:
            raise InputError("--text is missing; name a text, such as Tiny Shakespeare")
        text = Path(flags.text).read_bytes()
        if len(text) < 10_000:
            raise InputError(f"--text {flags.text} has {len(text)} bytes; it needs 10,000 at least")
        loss = flags.loss or LOSSES[flags.device]
        found = curves(runners(flags.device), text, flags)
        if flags.out:
            draw(found, loss, Path(flags.out))
        times = {name: seconds_to(loss, curve.points) for name, curve in found.items()}
        for name, curve in found.items():
            reached = "never" if times[name] is None else f"after {times[name]:.1f} s"
            seconds, last = curve.points[-1]
            print(
                f"{name:27} {loss} {reached}; {last:.4f} after its last step, at {seconds:.1f} s; "
                f"its first {FIRST_STEPS} steps took {curve.first_steps:.1f} s"
            )
        peer, rows = times.get("nanoGPT"), []
        if peer is None:
            print(f"nanoGPT did not come to {loss}, so there is nothing to compare with; try a larger --loss")
        for name, time in times.items():
            if peer is not None and time is not None and name != "nanoGPT":
                rows.append(row(f"{name}, time to {loss}", time, peer, peer / time, "s"))
        for each in rows:
            print(f"{each['name']:62} {each['ours']:8.1f} {each['peer']:8.1f} s {each['ratio']:6.2f}x")
        if flags.json:
            write_file(Path(flags.json), json.dumps(rows, indent=1).encode("utf-8"))
    except (InputError, OSError) as error:
        print(f"benchmarks.time_to_loss: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
