"""The time until a model is good: python -m benchmarks.time_to_loss --peer FOLDER --text FILE [--out FILE].

The presets char-fast and nanogpt-cpu, and nanoGPT itself (FOLDER is a checkout) with its line for CPUs, train
on the bytes of one text, of which the last tenth is held out. Each has a process to itself; they take turns,
and only their own steps are on their clock, not the evaluations between.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.training import ask, load_peer, nanogpt, ours, row, served, tokens_of
from torch_impl.training.files import InputError, write_file
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS

SIDES = {
    "char-fast": partial(ours, config=PRESETS["char-fast"]),
    "nanogpt-cpu": ours,
    "nanoGPT": nanogpt,
}


@dataclass(frozen=True)
class Flags:
    peer: str = ""
    """Folder of nanoGPT, with its model.py."""
    text: str = ""
    """Text to train on, such as Tiny Shakespeare."""
    loss: float = 1.898
    """Held-out loss to be reached, in nats per byte."""
    looks: int = 16
    """Evaluations of each side, evenly over its steps."""
    threads: int = 0
    """Threads of each side; 0 leaves the choice to PyTorch."""
    out: str = ""
    """Picture of the curves that is written (.png, .svg)."""
    json: str = ""
    """File that the rows are written to."""


Curve = list[tuple[float, float]]  # seconds of training, held-out loss


def curves(flags: Flags, text: bytes) -> dict[str, Curve]:
    """Of each side, to the end of its steps."""
    found: dict[str, Curve] = {name: [(0.0, 0.0)] for name in SIDES}
    steps = {name: PRESETS.get(name, PRESETS["nanogpt-cpu"]).training.steps for name in SIDES}
    with (
        served(list(SIDES.values()), tokens_of(text), flags.peer, flags.threads) as pipes,
        tqdm(total=flags.looks, unit="look", dynamic_ncols=True) as bar,
    ):
        for name, pipe in zip(SIDES, pipes, strict=True):
            found[name] = [(0.0, ask(pipe, 0))]
        for look in range(flags.looks):
            for name, pipe in zip(SIDES, pipes, strict=True):
                first, last = (steps[name] * n // flags.looks for n in (look, look + 1))
                if last > first:
                    seconds = found[name][-1][0] + ask(pipe, last - first)
                    found[name].append((seconds, ask(pipe, 0)))
            bar.update()
    return found


def seconds_to(loss: float, curve: Curve) -> float | None:
    """When a curve first falls to a loss, on a straight line between two looks; None where it never does."""
    for (begin, high), (end, low) in pairwise(curve):
        if low <= loss:
            return begin + (end - begin) * (high - loss) / (high - low)
    return None


def draw(found: dict[str, Curve], loss: float, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in found.items():
        seconds, losses = np.array(curve).T
        axes.plot(seconds, losses, marker=".", label=name)
        if (reached := seconds_to(loss, curve)) is not None:
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
        if not flags.text:
            raise InputError("--text is missing; name a text, such as Tiny Shakespeare")
        text = Path(flags.text).read_bytes()
        if len(text) < 1000:
            raise InputError(f"--text {flags.text} has {len(text)} bytes; it needs 1,000 at least")
        found = curves(flags, text)
        if flags.out:
            draw(found, flags.loss, Path(flags.out))
        times = {name: seconds_to(flags.loss, curve) for name, curve in found.items()}
        for name, curve in found.items():
            reached = "never" if times[name] is None else f"after {times[name]:.1f} s"
            seconds, last = curve[-1]
            print(f"{name:12} {flags.loss} {reached}; {last:.4f} after its last step, at {seconds:.1f} s")
        rows = []
        if times["nanoGPT"] is not None:
            for name in ("char-fast", "nanogpt-cpu"):
                if times[name] is not None:
                    ratio = times["nanoGPT"] / times[name]
                    rows.append(
                        row(f"{name}, time to {flags.loss}", times[name], times["nanoGPT"], ratio, "s")
                    )
        for each in rows:
            print(f"{each['name']:52} {each['ours']:8.1f} {each['peer']:8.1f} s {each['ratio']:6.2f}x")
        if flags.json:
            write_file(Path(flags.json), json.dumps(rows, indent=1).encode("utf-8"))
    except (InputError, OSError) as error:
        print(f"benchmarks.time_to_loss: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
