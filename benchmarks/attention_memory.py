"""Memory and time of attention by context: python -m benchmarks.attention_memory [--contexts 1024 8192].

One layer's attention, forward and backward, in float32, for each kind of pattern: as torch_impl chooses its
path, beside the plain formulas, which hold all scores. A row is the memory that a pass needs beyond what was
there before it, q, k and v included. Each pass has a process of its own, since the system keeps the highest
figure only (on Windows it keeps none that Python reads); on CUDA PyTorch counts.
"""

import argparse
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from parity_tests.backends import plain_torch
from torch_impl.flash_attention import QUERIES_AT_ONCE, AttentionPattern, choose_path, flash_attention

HEADS, HEAD_WIDTH = 4, 32
WINDOW = 256


def pattern_of(kind: str, T: int, device: str) -> AttentionPattern:
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=device)
    documents = torch.arange(T, device=device)[None] // 1000
    return {
        "causal": AttentionPattern(causal=True),
        "window": AttentionPattern(causal=True, window=WINDOW),
        "alibi": AttentionPattern(causal=True, alibi_slopes=slopes),
        "documents": AttentionPattern(causal=True, documents=documents),
    }[kind]


def plain(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """The formulas, one after the other, with mask and bias over all scores."""
    t = torch.arange(q.shape[2], device=q.device)
    ages = t[:, None] - t
    mask, bias = ages >= 0, None
    if pattern.window:
        mask &= ages < pattern.window
    if pattern.documents is not None:
        mask = mask & (pattern.documents[0, :, None] == pattern.documents[0])
    if pattern.alibi_slopes is not None:
        bias = -pattern.alibi_slopes[:, None, None] * ages
    return plain_torch.flash_attention(q, k, v, mask, bias, None)


def measure(kind: str, T: int, is_ours: bool, device: str, answer: Connection) -> None:
    """Sends (MiB at the peak, seconds) of one forward and backward pass."""
    attend = flash_attention if is_ours else plain

    def forward_and_backward(T: int) -> float:
        pattern = pattern_of(kind, T, device)
        qkv = [torch.randn(1, HEADS, T, HEAD_WIDTH, device=device, requires_grad=True) for _ in range(3)]
        start = time.perf_counter()
        attend(*qkv, pattern).sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    forward_and_backward(QUERIES_AT_ONCE + 1 if device == "cpu" else T)  # imports, and on CUDA compiles
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory(device)
    seconds = forward_and_backward(T)
    answer.send((peak_memory(device) - before, seconds))


def peak_memory(device: str) -> float:
    """The most that was in use so far, in MiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def in_a_process(*arguments: object) -> tuple[float, float]:
    """measure in a fresh process. NaN where it could not be done, as when memory is short."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(*arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return float("nan"), float("nan")
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.attention_memory",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--kinds", nargs="+", default=["causal", "window", "alibi", "documents"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="where the rows are written")
    options = parser.parse_args()
    rows = []
    print(f"{'':44} {'ours':>10} {'plain':>10}")
    for kind in options.kinds:
        path = choose_path(
            pattern_of(kind, 1, "cpu"), torch.device(options.device), torch.float32, HEAD_WIDTH
        )
        print(f"{kind}: {path}")
        for T in options.contexts:
            ours, theirs = (in_a_process(kind, T, is_ours, options.device) for is_ours in (True, False))
            for what, unit, i in (("memory", "MiB", 0), ("time", "s", 1)):
                name = f"attention, {kind}, context {T}, {what}"
                rows.append({"name": name, "ours": ours[i], "peer": theirs[i], "unit": unit})
                rows[-1]["ratio"] = theirs[i] / ours[i]
                print(f"{name:44} {ours[i]:10.2f} {theirs[i]:10.2f} {unit:4} {rows[-1]['ratio']:8.2f}x")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
