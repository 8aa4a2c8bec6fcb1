"""Train the same small model in NumPy and in PyTorch from one seed, and draw how far the two ever are apart.

python -m benchmarks.trajectory --out docs/trajectory.png
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.command import check_files, command, write_picture
from benchmarks.rows import row, write_rows
from ref_numpy import data
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.parameters import init_params
from ref_numpy.train import train
from torch_impl import data as fast_data
from torch_impl.train import start, train_steps
from torch_impl.training.corpus import python_reference
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags
from torch_impl.transformer import Transformer

MODEL = ModelConfig(context_length=32, n_layer=2, n_head=3, d_model=48, dropout=0.1)


@dataclass(frozen=True)
class Flags:
    out: str = "trajectory.png"
    """Picture of the losses and their differences (.png, .svg, .pdf)."""
    steps: int = 300
    """Optimizer steps."""
    json: str = ""
    """File that the rows are written to."""


def losses(config: TrainConfig, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """The loss at each step in NumPy and in PyTorch, both in one precision."""
    dtype, T = getattr(torch, precision), MODEL.context_length
    text = np.frombuffer(python_reference().encode("utf-8"), np.uint8)
    tensor = torch.from_numpy(text.copy())
    params = init_params(MODEL, config.seed, precision)
    model = Transformer(MODEL, dtype).to(dtype)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    both = zip(
        train(params, partial(data.sample_batch, text, T), MODEL, config),
        train_steps(start(model, config), partial(fast_data.sample_batch, tensor, T), config),
        strict=True,
    )
    rows = [
        (plain.loss, fast.loss.item())
        for (_, plain), fast in tqdm(both, total=config.steps, desc=precision, unit="step")
    ]
    in_numpy, in_torch = np.array(rows).T
    return in_numpy, in_torch


def draw(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Two panels: the losses above, in the first precision, and all their differences below."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    in_numpy, in_torch = next(iter(found.values()))
    above.plot(in_numpy, color="0.75", linewidth=6, label="ref_numpy")
    above.plot(in_torch, color="tab:blue", linewidth=1.2, label="torch_impl")
    for color, (precision, (in_numpy, in_torch)) in zip(
        ("tab:green", "tab:orange"), found.items(), strict=True
    ):
        apart = np.maximum(np.abs(in_numpy - in_torch), 1e-17)
        below.semilogy(apart, ".", markersize=3, color=color, label=precision)
    above.set_ylabel("loss (nats per byte)")
    above.set_title("One seed, two implementations: dropout, AdamW, clipping, three micro-batches")
    below.set_ylabel("difference of the losses (1e-17: none)")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def furthest(precision: str, in_numpy: np.ndarray, in_torch: np.ndarray) -> dict:
    """A row with the two losses of the step at which they are furthest apart."""
    step = int(np.abs(in_numpy - in_torch).argmax())
    name = f"{precision}: loss where furthest apart in {len(in_numpy)} steps, torch_impl beside ref_numpy"
    return row(name, float(in_torch[step]), float(in_numpy[step]), "nats/token")


@command("benchmarks.trajectory")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.trajectory", __doc__)
    if flags.steps < 1:
        raise InputError(f"--steps {flags.steps}: there must be one at least")
    if not flags.out:
        raise InputError("--out is empty; name a picture")
    Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    check_files(flags.json, flags.out)
    config = TrainConfig(
        steps=flags.steps,
        batch_size=12,
        micro_batches=3,
        learning_rate=5e-3,
        warmup_steps=min(30, flags.steps),
    )
    found = {}
    for precision in ("float64", "float32"):
        in_numpy, in_torch = found[precision] = losses(config, precision)
        apart = np.abs(in_numpy - in_torch).max()
        print(f"{precision}: losses are at most {apart:.1e} apart over {flags.steps} steps")
    write_rows(flags.json, [furthest(precision, *both) for precision, both in found.items()])
    write_picture(flags.out, draw(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
