"""Training on the CPU beside its peers: python -m benchmarks.train_cpu --peer FOLDER --text FILE.

FOLDER is a checkout of https://github.com/karpathy/nanoGPT. Three shapes, from a toy to a large vocabulary,
are trained on characters or byte pairs of one text: by torch_impl as it is, in float32 and in bfloat16; by
nanoGPT and by transformers' GPT-2, as they are and at their best: memory kept between steps and, where a C++
compiler is found, torch.compile; and the first shape by NumPy alone. Each side has a process to itself, and
they take turns. Beside the speeds stands what the processor allows: the speed of its matrix products.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.training import (
    Side,
    ask,
    load_peer,
    nanogpts_loop,
    nanogpts_model,
    ours,
    served,
    speed_rows,
    take_turns,
)
from ref_numpy.config import ModelConfig
from ref_numpy.data import sample_batch as numpy_batch
from ref_numpy.parameters import init_params
from ref_numpy.train import train as numpy_train
from torch_impl.bpe import BPETokenizer
from torch_impl.bpe import train as train_bpe
from torch_impl.linear import linear, product_kernel
from torch_impl.train import evaluate, keep_freed_memory
from torch_impl.training.config import RunConfig
from torch_impl.training.costs import forward_flops
from torch_impl.training.files import InputError, write_file
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
    peer: str = ""
    """Folder of nanoGPT, with its model.py."""
    text: str = ""
    """Text to train on, whose last tenth is held out."""
    turns: int = 6
    """Turns of each side at each shape, after three steps that are not timed."""
    seconds: float = 4.0
    """Of a turn, about, in nanoGPT's steps."""
    tuned: bool = True
    """Also the peers at their best, which takes minutes of compilation."""
    json: str = ""
    """File that the rows are written to."""


class Gpt2(nn.Module):
    """transformers' GPT-2, as nanoGPT's loop calls a model."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.d_model}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)
        self.model = GPT2LMHeadModel(
            GPT2Config(vocab_size=model.vocab_size, n_positions=model.context_length, **sizes, **dropouts)
        )

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(ids, use_cache=False).logits
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def configure_optimizers(self, decay: float, rate: float, betas: tuple, device: str) -> torch.optim.AdamW:
        fused = device == "cuda"  # as nanoGPT's
        return torch.optim.AdamW(self.parameters(), lr=rate, betas=betas, weight_decay=decay, fused=fused)


def peer_side(
    train: np.ndarray,
    valid: np.ndarray,
    folder: str,
    config: RunConfig,
    name: str,
    tuned: bool = False,
    half: bool = False,
) -> Side:
    """A peer's model in nanoGPT's loop, as it is or at its best."""
    model = nanogpts_model(folder, config) if name == "nanoGPT" else Gpt2(config.model)
    if tuned:
        keep_freed_memory()
    return nanogpts_loop(model, train, valid, config, compiled=tuned and has_compiler(), half=half)


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


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs for the CPU."""
    return any(which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def sides(config: RunConfig, tuned: bool, with_numpy: bool) -> dict[str, Callable[..., Side]]:
    """Who trains a shape. The first two are nanoGPT as it is and torch_impl."""
    found: dict[str, Callable[..., Side]] = {
        "nanoGPT": partial(peer_side, config=config, name="nanoGPT"),
        "torch_impl": partial(ours, config=config),
        "torch_impl, bfloat16": partial(ours, config=config, dtype=torch.bfloat16),
        "transformers": partial(peer_side, config=config, name="transformers"),
    }
    if with_numpy:
        found["ref_numpy"] = partial(numpy_side, config=config)
    if tuned:
        found["torch_impl, compiled, bfloat16"] = partial(
            ours, config=config, dtype=torch.bfloat16, compiled=has_compiler()
        )
        for name in ("nanoGPT", "transformers"):
            found[f"{name}, tuned"] = partial(peer_side, config=config, name=name, tuned=True)
            found[f"{name}, tuned, bfloat16"] = partial(
                peer_side, config=config, name=name, tuned=True, half=True
            )
    return found


class Speed(NamedTuple):
    """What came out for one side at one shape."""

    shape: str
    side: str
    tokens: float  # per second, as the median of the turns
    peer: float  # nanoGPT's
    ratio: float  # the median of the turns' ratios
    flops: float  # per second, forward and backward
    loss: float  # on the held-out text, after as many steps as the others


def measure(name: str, config: RunConfig, tokens: np.ndarray, flags: Flags) -> list[Speed]:
    """All sides at one shape."""
    makers = sides(config, flags.tuned, with_numpy=name == next(iter(SHAPES)))
    tokens_per_step = config.training.batch_size * config.model.context_length
    with served(list(makers.values()), tokens[:TOKENS], flags.peer, 0) as pipes:
        for pipe in tqdm(pipes, desc=f"{name}: first steps", unit="side", dynamic_ncols=True):
            ask(pipe, 2)
        again = ask(pipes[0], 1)
        steps = max(round(flags.seconds / again), 1)
        for pipe in pipes[1:]:
            ask(pipe, 1)
        turns = take_turns(pipes, steps, flags.turns, name)
        losses = [ask(pipe, 0) for pipe in pipes]
    found = []
    for number, side in enumerate(makers):
        speed, peer = (tokens_per_step / statistics.median(turn[n] for turn in turns) for n in (number, 0))
        ratio = statistics.median(turn[0] / turn[number] for turn in turns)
        flops = 3 * forward_flops(config.model) * speed
        found.append(Speed(name, side, speed, peer, ratio, flops, losses[number]))
    return found


def ceilings() -> dict[str, float]:
    """FLOP/s of a product of 2,048 by 2,048 matrices: the best of five."""

    def best(multiply: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            multiply()
            times.append(time.perf_counter() - begin)
        return 2 * 2048**3 / min(times[1:])

    x, weight = torch.randn(2, 2048, 2048)
    half, half_weight, plain, plain_weight = x.bfloat16(), weight.bfloat16(), x.numpy(), weight.numpy()
    with torch.no_grad():
        return {
            "float32, torch_impl": best(lambda: linear(x, weight, None)),
            "float32, PyTorch": best(lambda: x @ weight),
            "bfloat16": best(lambda: half @ half_weight),
            "float32, NumPy": best(lambda: plain @ plain_weight),
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


def table(speeds: list[Speed], limits: dict[str, float]) -> str:
    lines = []
    for shape in SHAPES:
        lines += [f"\n{shape}", f"{'':28} {'tokens/s':>9} {'nanoGPT = 1':>12} {'GFLOP/s':>8} {'loss':>7}"]
        lines += [
            f"{each.side:28} {each.tokens:9,.0f} {each.ratio:11.2f}x {each.flops / 1e9:8.0f} {each.loss:7.3f}"
            for each in speeds
            if each.shape == shape
        ]
    lines.append("\nproducts of 2,048 x 2,048, GFLOP/s: ")
    lines[-1] += ", ".join(f"{name} {flops / 1e9:.0f}" for name, flops in limits.items())
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    try:
        flags = parse_flags(Flags(), arguments, "python -m benchmarks.train_cpu", __doc__)
        load_peer(flags.peer)
        if not flags.text:
            raise InputError("--text is missing; name a text, such as Tiny Shakespeare")
        if flags.turns < 1:
            raise InputError(f"--turns {flags.turns}: there must be one at least")
        text = Path(flags.text).read_bytes()
        print(surroundings())
        limits = ceilings()
        speeds = []
        for name, config in SHAPES.items():
            speeds += measure(name, *tokens_for(config, text), flags)
        if flags.json:
            write_file(Path(flags.json), json.dumps(speed_rows(speeds), indent=1).encode("utf-8"))
    except (InputError, OSError) as error:
        print(f"benchmarks.train_cpu: error: {error}", file=sys.stderr)
        return 2
    print(table(speeds, limits))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
