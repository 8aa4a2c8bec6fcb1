"""Train the same small model in NumPy and in PyTorch from one seed, and draw how far the two ever are apart.

python -m benchmarks.trajectory --out docs/trajectory.png
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import numpy as np
import torch
import tyro
from tqdm import tqdm

from ref_numpy import data
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.parameters import init_params
from ref_numpy.train import train
from torch_impl import data as fast_data
from torch_impl.train import start, train_steps
from torch_impl.transformer import Transformer

MODEL = ModelConfig(context_length=32, n_layer=2, n_head=3, d_model=48, dropout=0.1)


@dataclass
class Options:
    """Draw the losses of both implementations, and their difference."""

    out: Path = Path("trajectory.png")
    """Picture to write."""
    steps: int = 300
    """Optimizer steps."""


def losses(config: TrainConfig, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """The loss at each step in NumPy and in PyTorch, both in one precision."""
    dtype, T = getattr(torch, precision), MODEL.context_length
    text = np.frombuffer("\n".join(topics.values()).encode("utf-8"), np.uint8)
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


def draw(options: Options) -> None:
    """Two panels: the losses above, their differences below."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    config = TrainConfig(
        steps=options.steps, batch_size=12, micro_batches=3, learning_rate=5e-3, warmup_steps=30
    )
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for precision, color in (("float64", "tab:green"), ("float32", "tab:orange")):
        in_numpy, in_torch = losses(config, precision)
        if precision == "float64":
            above.plot(in_numpy, color="0.75", linewidth=6, label="ref_numpy")
            above.plot(in_torch, color="tab:blue", linewidth=1.2, label="torch_impl")
        apart = np.abs(in_numpy - in_torch)
        below.semilogy(np.maximum(apart, 1e-17), ".", markersize=3, color=color, label=precision)
        print(f"{precision}: losses are at most {apart.max():.1e} apart over {options.steps} steps")
    above.set_ylabel("loss (nats per byte)")
    above.set_title("One seed, two implementations: dropout, AdamW, clipping, three micro-batches")
    below.set_ylabel("difference of the losses (1e-17: none)")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.legend()
        axes.grid(alpha=0.3)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    draw(tyro.cli(Options, prog="python -m benchmarks.trajectory"))
