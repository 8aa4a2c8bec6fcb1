"""Training on a GPU beside its peers: python -m benchmarks.train_gpu --nanogpt FOLDER --text FILE.

FOLDER is a checkout of https://github.com/karpathy/nanoGPT. The preset gpu, a character model of ten million
parameters and GPT-2's smallest shape are trained by torch_impl, nanoGPT and transformers, all compiled, in
bfloat16 (nanoGPT with the exact GELU); by torch_impl with --cuda-graph as well, and the widest in float8.
Each side has a process to itself; they take turns, and between them keep no memory but their weights and
moments, and what a CUDA graph owns. Beside the speeds stands what the GPU allows, in products of matrices
and in copies. MFU is (6 N + 12 L H D T) tokens/s (PaLM, appendix B) as a part of the measured products, or of
--peak-tflops, such as the data sheet's.
"""

import sys
import time
from collections.abc import Callable
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
from torch_impl.training.config import RunConfig
from torch_impl.training.costs import palm_flops, parameter_count
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags
from torch_impl.training.footprint import Kernels, activation_bytes
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

_WORTH_FLOAT8 = 768
"""Width from which products are dear enough for 8-bit factors. To compile them takes longer than all else."""


@dataclass(frozen=True)
class Flags:
    nanogpt: str = ""
    """Folder of nanoGPT, with its model.py."""
    text: str = ""
    """Text to train on, bytes as tokens, whose last tenth is held out."""
    shapes: tuple[str, ...] = ("gpu", "char-10m", "gpt2-124m")
    """Shapes to train; there is also toy, for a look on the CPU."""
    batch_size: int = 0
    """Sequences of a step, such as fewer for a smaller GPU; 0 for each shape's own."""
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


def sides(config: RunConfig, device: str) -> dict[str, Callable[..., Side]]:
    """Who trains a shape."""
    mine = partial(torch_side, config=config, dtype=torch.bfloat16, device=device, compiled=has_compiler())
    peer = partial(peer_side, config=config, device=device, tuned=True, half=True)
    found: dict[str, Callable[..., Side]] = {
        "nanoGPT": peer,
        "torch_impl": mine,
        "transformers": partial(peer, name="transformers"),
    }
    if device == "cuda":
        found["torch_impl, CUDA graph"] = partial(mine, cuda_graph=True)
    wide = config.model.d_model >= _WORTH_FLOAT8
    if device == "cpu" or (wide and torch.cuda.get_device_capability() >= (8, 9)):
        found["torch_impl, float8"] = partial(mine, float8=True)
    return found


def measure(
    shape: str, config: RunConfig, tokens: np.ndarray, flags: Flags, peak: float
) -> dict[str, Measured]:
    """All sides at one shape, with their part of a peak in FLOP/s, their memory, and their first step."""
    with served(sides(config, flags.device), tokens, flags.nanogpt) as pipes:
        timings = take_turns(pipes, shape, flags.turns, flags.seconds, config.training.steps, last="rest")
    results = {}
    for side, timing in timings.items():
        measured = Measured(tokens_of_a_step(config), timing.seconds, palm_flops(config.model))
        measured.figures["MFU"] = 100 * measured.flop_speed / peak, "%"
        measured.figures["first step"] = timing.first_step, "s"
        if flags.device == "cuda":
            measured.figures["memory"] = timing.last / 2**30, "GiB"
        results[side] = measured
    return results


def tokens_of_a_step(config: RunConfig) -> int:
    return config.training.batch_size * config.model.context_length


def moved_bytes(config: RunConfig) -> int:
    """What a step has to read and write at least: AdamW reads weights, gradients and two moments, and writes
    all but gradients, 28 bytes a parameter; activations in bfloat16 are written once and read once."""
    kept = activation_bytes(config.model, config.training.batch_size, Kernels(size=2, of_cpu=False))
    return 28 * parameter_count(config.model) + 2 * kept


def ceilings(device: str) -> tuple[float, float]:
    """FLOP/s of a product in bfloat16, and bytes per second that a copy reads and writes: the best of ten
    turns, of ten each, so that a launch and waiting for it do not count."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    to = torch.empty_like(a)

    def best(act: Callable[[], Any]) -> float:
        def turn() -> None:
            for _ in range(10):
                act()
            if device == "cuda":
                torch.cuda.synchronize()

        return min(repeat(turn, number=1, repeat=11)[1:]) / 10

    return 2 * size**3 / best(lambda: a @ b), 2 * a.numel() * a.element_size() / best(lambda: to.copy_(a))


def ceiling_rows(
    results: dict[str, dict[str, Measured]], shapes: dict[str, RunConfig], products: float, copies: float
) -> list[dict]:
    """The fastest of ours at each shape beside the ceilings: by palm_flops and by moved_bytes."""
    rows = []
    for shape, found in results.items():
        if mine := {side: measured for side, measured in found.items() if side.startswith(OURS)}:
            side = max(mine, key=lambda side: mine[side].speed)
            fastest, config = mine[side], shapes[shape]
            moved = moved_bytes(config) * fastest.speed / tokens_of_a_step(config)
            name = f"{shape}: {side} beside the measured"
            rows.append(row(f"{name} products", fastest.flop_speed / 1e12, products / 1e12, "TFLOP/s"))
            rows.append(row(f"{name} copies", moved / 1e9, copies / 1e9, "GB/s"))
    return rows


def table(results: dict[str, dict[str, Measured]], shapes: dict[str, RunConfig]) -> str:
    lines = [
        f"{'':30} {'tokens/s':>11} {'nanoGPT = 1':>12} {'MFU':>7} {'memory':>10} {'first step':>11}",
    ]
    for shape, found in results.items():
        model, batch_size = shapes[shape].model, shapes[shape].training.batch_size
        lines.append(
            f"{shape}: {parameter_count(model) / 1e6:,.1f}M parameters, "
            f"steps of {batch_size} x {model.context_length} tokens"
        )
        for side, measured in found.items():
            ratio = f"{measured.ratio(found['nanoGPT']):.2f}x" if "nanoGPT" in found else "-"
            figures = {what: f"{number:,.1f} {unit}" for what, (number, unit) in measured.figures.items()}
            lines.append(
                f"  {side:28} {measured.speed:11,.0f} {ratio:>12} {figures['MFU']:>7} "
                f"{figures.get('memory', '-'):>10} {figures['first step']:>11}"
            )
    lines.append("MFU in float8 is a part of the speed in bfloat16, as all others are")
    return "\n".join(lines)


def shapes_of(flags: Flags) -> dict[str, RunConfig]:
    """The shapes that flags ask for. Raises InputError for one that is none."""
    if unknown := set(flags.shapes) - set(SHAPES):
        raise InputError(f"--shapes {sorted(unknown)[0]} is none; there are {', '.join(SHAPES)}")
    shapes = {shape: SHAPES[shape] for shape in flags.shapes}
    if flags.batch_size:
        sizes = {"batch_size": flags.batch_size, "micro_batches": 1}
        shapes = {s: replace(each, training=replace(each.training, **sizes)) for s, each in shapes.items()}
    return shapes


@command("benchmarks.train_gpu", "other shapes are not measured")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.train_gpu", __doc__)
    load_nanogpt(flags.nanogpt)
    if flags.device not in ("cuda", "cpu") or (flags.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {flags.device} is not here; --device cpu --shapes toy is for a look")
    if flags.turns < 1:
        raise InputError(f"--turns {flags.turns}: there must be one at least")
    if flags.batch_size < 0:
        raise InputError(f"--batch-size {flags.batch_size}: it is 0, or what a step takes")
    if flags.peak_tflops < 0:
        raise InputError(f"--peak-tflops {flags.peak_tflops}: it is 0, or those of the data sheet")
    text, shapes = text_of(flags.text), shapes_of(flags)
    check_files(flags.json)
    products, copies = ceilings(flags.device)
    peak = flags.peak_tflops * 1e12 or products
    name = torch.cuda.get_device_name() if flags.device == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"products {products / 1e12:.1f} TFLOP/s in bfloat16, copies {copies / 1e9:.0f} GB/s")
    if not has_compiler():
        print("no C++ compiler is found, so no side is compiled")
    results: dict[str, dict[str, Measured]] = {}
    try:
        tokens = np.frombuffer(text, np.uint8).astype(np.int64)
        for shape, config in shapes.items():
            results[shape] = measure(shape, config, tokens, flags, peak)
    finally:  # what is measured by then is told, whatever came
        print(table(results, shapes))
        rows = [*paired(results), *ceiling_rows(results, shapes, products, copies)]
        write_rows(flags.json, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
