"""Training on a GPU beside its peers: python -m benchmarks.train_gpu --peer FOLDER --text FILE.

FOLDER is a checkout of https://github.com/karpathy/nanoGPT. The preset gpu, a character model of ten million
parameters and GPT-2's smallest shape are trained by torch_impl, nanoGPT and transformers, all compiled, in
bfloat16; by torch_impl with --cuda-graph and in float8 as well. Each side has a process to itself, and they
take turns. Beside the speeds stands what the GPU allows, in products of matrices and in copies. MFU is
(6 N + 12 L H D T) tokens/s (PaLM, appendix B) as a part of the measured products, or of --peak-tflops, such
as the data sheet's.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.train_cpu import Gpt2
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
    tokens_of,
)
from torch_impl.training.config import RunConfig
from torch_impl.training.costs import in_bytes, palm_flops
from torch_impl.training.files import InputError, write_file
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS


def _shape(preset: str, batch_size: int, **model: Any) -> RunConfig:
    """A preset's training on other sizes, without dropout, as speeds are compared, in one micro-batch."""
    like = PRESETS[preset]
    training = replace(like.training, batch_size=batch_size, micro_batches=1)
    return replace(like, model=replace(like.model, dropout=0.0, **model), training=training)


SHAPES = {
    "toy": _shape("nanogpt-cpu", 12),
    "gpu": PRESETS["gpu"],
    "char-10m": _shape("gpu", 64, vocab_size=256),
    "gpt2-124m": _shape("gpt2-124m", 32, vocab_size=50_304),
}


@dataclass(frozen=True)
class Flags:
    peer: str = ""
    """Folder of nanoGPT, with its model.py."""
    text: str = ""
    """Text to train on, bytes as tokens, whose last tenth is held out."""
    shapes: tuple[str, ...] = ("gpu", "char-10m", "gpt2-124m")
    """Shapes to train; there is also toy, for a look on the CPU."""
    turns: int = 5
    """Turns of each side at each shape."""
    seconds: float = 2.0
    """Of a turn, about, in nanoGPT's steps."""
    device: str = "cuda"
    """cuda, or cpu for a look."""
    peak_tflops: float = 0.0
    """TFLOP/s that MFU is a part of; 0 for those that are measured."""
    json: str = ""
    """File that the rows are written to."""


@dataclass(frozen=True)
class Speed:
    """What came out for one side at one shape."""

    shape: str
    side: str
    tokens: float  # per second
    peer: float  # nanoGPT's
    ratio: float  # the median of the turns' ratios
    first_step: float  # seconds, compilation included
    memory: float  # bytes on the GPU, at most


def peer_side(
    train: np.ndarray, valid: np.ndarray, folder: str, config: RunConfig, name: str, device: str
) -> Side:
    """A peer at its best: compiled, bfloat16 by autocast, TF32 where float32 is left."""
    torch.set_float32_matmul_precision("high")
    model = nanogpts_model(folder, config) if name == "nanoGPT" else Gpt2(config.model)
    return nanogpts_loop(model, train, valid, config, compiled=True, half=True, device=device)


def measure(shape: str, tokens: np.ndarray, flags: Flags) -> list[Speed]:
    """All sides at one shape. nanoGPT is the first."""
    config, on_cuda = SHAPES[shape], flags.device == "cuda"
    mine = partial(ours, config=config, dtype=torch.bfloat16, device=flags.device, compiled=on_cuda)
    makers: dict[str, Callable[..., Side]] = {
        "nanoGPT": partial(peer_side, config=config, name="nanoGPT", device=flags.device),
        "torch_impl": mine,
        "transformers": partial(peer_side, config=config, name="transformers", device=flags.device),
    }
    if on_cuda:
        makers["torch_impl, CUDA graph"] = partial(mine, cuda_graph=True)
    if not on_cuda or torch.cuda.get_device_capability() >= (8, 9):
        makers["torch_impl, float8"] = partial(mine, float8=True)
    with served(list(makers.values()), tokens, flags.peer, 0) as pipes:
        alive, first = {}, []
        bar = tqdm(makers, desc=f"{shape}: first steps", unit="side", dynamic_ncols=True)
        for side, pipe in zip(bar, pipes, strict=True):
            try:
                seconds, _ = ask(pipe, 1), ask(pipe, 5)  # by then a graph is recorded
            except (EOFError, ConnectionError):
                bar.write(f"{shape}, {side}: it has failed, and is left out", file=sys.stderr)
                continue
            alive[side] = pipe
            first.append(seconds)
        if "nanoGPT" not in alive:
            raise InputError(f"{shape}: nanoGPT has failed, so there is nothing to compare with")
        pipes = list(alive.values())
        steps = max(round(flags.seconds / (ask(pipes[0], 5) / 5)), 1)
        turns = take_turns(pipes, steps, flags.turns, shape)
        memory = [ask(pipe, -1) for pipe in pipes]
    tokens_per_step = config.training.batch_size * config.model.context_length
    peer = tokens_per_step / median(turn[0] for turn in turns)
    return [
        Speed(
            shape,
            side,
            tokens_per_step / median(turn[number] for turn in turns),
            peer,
            median(turn[0] / turn[number] for turn in turns),
            first[number],
            memory[number],
        )
        for number, side in enumerate(alive)
    ]


def ceilings(device: str) -> tuple[float, float]:
    """FLOP/s of a product in bfloat16, and bytes per second that a copy reads and writes: the best of ten."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    to = torch.empty_like(a)

    def best(act: Callable[[], Any]) -> float:
        times = []
        for _ in range(11):
            begin = time.perf_counter()
            act()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    return 2 * size**3 / best(lambda: a @ b), 2 * a.numel() * a.element_size() / best(lambda: to.copy_(a))


def table(speeds: list[Speed], products: float, copies: float, peak: float) -> str:
    lines = [
        f"{'':34} {'tokens/s':>11} {'nanoGPT = 1':>12} {'MFU':>6} {'memory':>10} {'first step':>11}",
    ]
    for each in speeds:
        mfu = palm_flops(SHAPES[each.shape].model) * each.tokens / peak
        lines.append(
            f"{each.shape + ', ' + each.side:34} {each.tokens:11,.0f} {each.ratio:11.2f}x {mfu:6.1%} "
            f"{in_bytes(round(each.memory)):>10} {each.first_step:9.1f} s"
        )
    lines.append("MFU in float8 is a part of the speed in bfloat16, as all others are")
    lines.append(
        f"measured: products {products / 1e12:.1f} TFLOP/s in bfloat16, copies {copies / 1e9:.0f} GB/s"
    )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    try:
        flags = parse_flags(Flags(), arguments, "python -m benchmarks.train_gpu", __doc__)
        load_peer(flags.peer)
        if unknown := set(flags.shapes) - set(SHAPES):
            raise InputError(f"--shapes {sorted(unknown)[0]} is none; there are {', '.join(SHAPES)}")
        if flags.device not in ("cuda", "cpu") or (flags.device == "cuda" and not torch.cuda.is_available()):
            raise InputError(f"--device {flags.device} is not here; --device cpu --shapes toy is for a look")
        if flags.turns < 1:
            raise InputError(f"--turns {flags.turns}: there must be one at least")
        if not flags.text:
            raise InputError("--text is missing; name a text, such as Tiny Shakespeare")
        tokens = tokens_of(Path(flags.text).read_bytes())
        products, copies = ceilings(flags.device)
        speeds = [speed for shape in flags.shapes for speed in measure(shape, tokens, flags)]
        if flags.json:
            write_file(Path(flags.json), json.dumps(speed_rows(speeds), indent=1).encode("utf-8"))
    except (InputError, OSError) as error:
        print(f"benchmarks.train_gpu: error: {error}", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if flags.device == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(table(speeds, products, copies, flags.peak_tflops * 1e12 or products))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
