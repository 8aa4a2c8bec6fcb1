"""Training on the CPU beside its peers: python -m benchmarks.train_cpu --nanogpt FOLDER --text FILE.

FOLDER is a checkout of https://github.com/karpathy/nanoGPT. Three shapes, from a toy to a large vocabulary,
are trained on characters or byte pairs of one text: by torch_impl as it is, in float32 and in bfloat16; by
nanoGPT and by transformers' GPT-2, as they are and at their best: memory kept between steps and, where a C++
compiler is found, torch.compile; and the first shape by NumPy alone. Each side has a process to itself, and
they take turns. Beside the speeds stands what the processor allows: the speed of its matrix products.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from timeit import repeat
from typing import Any

import numpy as np
import torch

from benchmarks.command import check_files, command, text_of
from benchmarks.peers import has_compiler, load_nanogpt, peer_side
from benchmarks.rows import OURS, Measured, paired, row, write_rows
from benchmarks.sides import Side, torch_side
from benchmarks.turns import served, take_turns
from ref_numpy.data import sample_batch as numpy_batch
from ref_numpy.parameters import init_params
from ref_numpy.train import train as numpy_train
from torch_impl.bpe import BPETokenizer
from torch_impl.bpe import train as train_bpe
from torch_impl.linear import linear, product_kernel
from torch_impl.train import evaluate
from torch_impl.training.config import RunConfig
from torch_impl.training.costs import forward_flops
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS
from torch_impl.transformer import Transformer

TOKENS = 300_000  # of the text, at most; the last tenth is for the loss


def _shape(batch_size: int, **sizes: int) -> RunConfig:
    """A GPT-2 of these sizes, trained as nanoGPT trains its model for CPUs."""
    like = PRESETS["nanogpt-cpu"]
    return replace(
        like, model=replace(like.model, **sizes), training=replace(like.training, batch_size=batch_size)
    )


SHAPES = {
    "4 x 128, context 64": _shape(12, n_layer=4, d_model=128, n_head=4, context_length=64),
    "6 x 384, context 256": _shape(16, n_layer=6, d_model=384, n_head=6, context_length=256),
    "4 x 256, context 512, 10,000 tokens": _shape(
        8, n_layer=4, d_model=256, n_head=8, context_length=512, vocab_size=10_000
    ),
}


@dataclass(frozen=True)
class Flags:
    nanogpt: str = ""
    """Folder of nanoGPT, with its model.py."""
    text: str = ""
    """Text to train on, whose last tenth is held out."""
    turns: int = 6
    """Turns of each side at each shape."""
    seconds: float = 4.0
    """Of a turn, about, in nanoGPT's steps."""
    tuned: bool = True
    """Also the peers at their best, which takes minutes of compilation."""
    json: str = ""
    """File that the rows are written to."""


def numpy_side(train: np.ndarray, valid: np.ndarray, _: str, config: RunConfig) -> Side:
    """ref_numpy, in float32 as its own command trains."""
    params = init_params(config.model, config.training.seed)
    sample = partial(numpy_batch, train, config.model.context_length)

    def steps() -> Iterator[None]:
        nonlocal params
        for trained, _ in numpy_train(params, sample, config.model, config.training):
            params = trained
            yield

    def held_out_loss() -> float:
        model = Transformer(config.model)
        model.load_state_dict({name: torch.from_numpy(param) for name, param in params.items()})
        return evaluate(model, torch.from_numpy(valid))

    return Side(steps(), held_out_loss)


def sides(config: RunConfig, tuned: bool, with_numpy: bool) -> dict[str, Callable[..., Side]]:
    """Who trains a shape."""
    mine, peer = partial(torch_side, config=config), partial(peer_side, config=config)
    found: dict[str, Callable[..., Side]] = {
        "nanoGPT": peer,
        "torch_impl": mine,
        "torch_impl, bfloat16": partial(mine, dtype=torch.bfloat16),
        "transformers": partial(peer, name="transformers"),
    }
    if with_numpy:
        found["ref_numpy"] = partial(numpy_side, config=config)
    if tuned:
        found["torch_impl, compiled, bfloat16"] = partial(mine, dtype=torch.bfloat16, compiled=has_compiler())
        for name in ("nanoGPT", "transformers"):
            found[f"{name}, tuned"] = partial(peer, name=name, tuned=True)
            found[f"{name}, tuned, bfloat16"] = partial(peer, name=name, tuned=True, half=True)
    return found


def measure(shape: str, config: RunConfig, tokens: np.ndarray, flags: Flags) -> dict[str, Measured]:
    """All sides at one shape, with their losses on the held-out text, after as many steps."""
    makers = sides(config, flags.tuned, with_numpy=shape == next(iter(SHAPES)))
    with served(makers, tokens[:TOKENS], flags.nanogpt) as pipes:
        timings = take_turns(pipes, shape, flags.turns, flags.seconds, config.training.steps, last="loss")
    per_step = config.training.batch_size * config.model.context_length
    flops = 3 * forward_flops(config.model)  # and backward
    return {
        side: Measured(per_step, timing.seconds, flops, {"held-out loss": (timing.last, "nats/token")})
        for side, timing in timings.items()
    }


def ceilings() -> dict[str, float]:
    """FLOP/s of a product of 2,048 by 2,048 matrices, in float32 by who makes it, or in bfloat16."""

    def best(multiply: Callable[[], Any]) -> float:
        return 2 * 2048**3 / min(repeat(multiply, number=1, repeat=6)[1:])

    x, weight = torch.randn(2, 2048, 2048)
    half, half_weight, plain, plain_weight = x.bfloat16(), weight.bfloat16(), x.numpy(), weight.numpy()
    with torch.no_grad():
        return {
            "torch_impl": best(lambda: linear(x, weight, None)),
            "PyTorch": best(lambda: x @ weight),
            "bfloat16": best(lambda: half @ half_weight),
            "ref_numpy": best(lambda: plain @ plain_weight),
        }


def surroundings() -> str:
    """What decides about speed here, and is no figure."""
    words = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "MALLOC_", "LD_PRELOAD", "TORCH")
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(words)}
    settings = ", ".join(f"{name}={value}" for name, value in found.items()) or "none"
    compiler = "found" if has_compiler() else "none, so nothing is compiled"
    return (
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, PyTorch "
        f"{torch.__version__}, NumPy {np.__version__}; torch_impl's products: "
        f"{product_kernel(torch.device('cpu'), torch.float32, True)}; C++ compiler: {compiler}\n"
        f"settings in the environment: {settings}"
    )


def tokens_for(config: RunConfig, text: bytes) -> tuple[RunConfig, np.ndarray]:
    """The text as characters, whose number is then the vocabulary's, or as byte pairs where it is large."""
    if config.model.vocab_size <= 256:
        values, ids = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
        return replace(config, model=replace(config.model, vocab_size=len(values))), ids.astype(np.int64)
    words = text.decode("utf-8", errors="replace")
    vocabulary = train_bpe([words], config.model.vocab_size)
    if len(vocabulary.tokens) < config.model.vocab_size:
        raise InputError(f"--text has fewer than {config.model.vocab_size} byte pairs; take a longer one")
    return config, BPETokenizer(vocabulary).encode(words).astype(np.int64)


def ceiling_rows(results: dict[str, dict[str, Measured]], limits: dict[str, float]) -> list[dict]:
    """Our sides beside the products of their precision, and our products in float32 beside PyTorch's."""
    rows = [
        row("products of 2,048 x 2,048: torch_impl beside PyTorch", limits["torch_impl"] / 1e9,
            limits["PyTorch"] / 1e9, "GFLOP/s")
    ]  # fmt: skip
    for shape, sides in results.items():
        for side, measured in sides.items():
            if side.startswith(OURS):
                limit = limits["bfloat16" if "bfloat16" in side else side]
                name = f"{shape}: {side} beside products of 2,048 x 2,048"
                rows.append(row(name, measured.flop_speed / 1e9, limit / 1e9, "GFLOP/s"))
    return rows


def table(results: dict[str, dict[str, Measured]], limits: dict[str, float]) -> str:
    lines = []
    for shape, sides in results.items():
        lines += [f"\n{shape}", f"{'':30} {'tokens/s':>9} {'nanoGPT = 1':>12} {'GFLOP/s':>8} {'loss':>7}"]
        for side, measured in sides.items():
            ratio = f"{measured.ratio(sides['nanoGPT']):.2f}x" if "nanoGPT" in sides else "-"
            loss, _ = measured.figures["held-out loss"]
            speeds = f"{measured.speed:9,.0f} {ratio:>12} {measured.flop_speed / 1e9:8.0f}"
            lines.append(f"{side:30} {speeds} {loss:7.3f}")
    lines.append("\nproducts of 2,048 x 2,048, GFLOP/s in float32 or as said: ")
    lines[-1] += ", ".join(f"{name} {limit / 1e9:.0f}" for name, limit in limits.items())
    return "\n".join(lines)


@command("benchmarks.train_cpu", "other shapes are not measured")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.train_cpu", __doc__)
    load_nanogpt(flags.nanogpt)
    if flags.turns < 1:
        raise InputError(f"--turns {flags.turns}: there must be one at least")
    text = text_of(flags.text)
    check_files(flags.json)
    print(surroundings())
    limits = ceilings()
    results: dict[str, dict[str, Measured]] = {}
    try:
        for shape, config in SHAPES.items():
            results[shape] = measure(shape, *tokens_for(config, text), flags)
    finally:  # what is measured by then is told, whatever came
        print(table(results, limits))
        write_rows(flags.json, [*paired(results), *ceiling_rows(results, limits)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
