"""Memory and time of attention by context: python -m benchmarks.attention_memory [--contexts 1024 8192].

One layer's attention, forward and backward, in float32, for each kind of pattern: as torch_impl chooses its
path, beside the plain formulas, which hold all scores. A row is the memory that a pass needs beyond what was
there before it, q, k and v included. Each pass has a process of its own, since the system keeps the highest
figure only (on Windows it keeps none that Python reads); on CUDA PyTorch counts. A dash is what could not be
measured, as where memory is short, and a ratio of or to nothing: a short context fits into what was there.
"""

import multiprocessing
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, get_args

import torch
from torch import Tensor

from benchmarks.command import check_files, command
from benchmarks.rows import line, row, write_rows
from parity_tests.backends import plain_torch
from torch_impl.flash_attention import QUERIES_AT_ONCE, AttentionPattern, choose_path, flash_attention
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags
from torch_impl.training.memory import peak_memory, ran_out

HEADS, HEAD_WIDTH = 4, 32
WINDOW = 256
Kind = Literal["causal", "window", "alibi", "documents"]


@dataclass(frozen=True)
class Flags:
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Context lengths, in tokens."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """Patterns."""
    device: str = "cpu"
    """cpu or cuda."""
    json: str = ""
    """File that the rows are written to."""


def pattern_of(kind: Kind, T: int, device: str) -> AttentionPattern:
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


def measure(kind: Kind, T: int, is_ours: bool, device: str, answer: Connection) -> None:
    """Sends (MiB at the peak, seconds) of one forward and backward pass; nothing where memory runs out."""
    attend = flash_attention if is_ours else plain

    def forward_and_backward(T: int) -> float:
        pattern = pattern_of(kind, T, device)
        qkv = [torch.randn(1, HEADS, T, HEAD_WIDTH, device=device, requires_grad=True) for _ in range(3)]
        start = time.perf_counter()
        attend(*qkv, pattern).sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    try:
        forward_and_backward(QUERIES_AT_ONCE + 1 if device == "cpu" else T)  # imports, and on CUDA compiles
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        before = peak_memory(torch.device(device))
        seconds = forward_and_backward(T)
    except KeyboardInterrupt:
        pass  # which the other process tells
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
    else:
        after = peak_memory(torch.device(device))
        answer.send((None if before is None else (after - before) / 2**20, seconds))


def in_a_process(kind: Kind, T: int, is_ours: bool, device: str) -> tuple[float | None, float | None]:
    """measure in a fresh process. None where it could not be done, as when memory is short."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(kind, T, is_ours, device, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        side = "ours" if is_ours else "plain"
        print(f"{kind}, context {T}, {side}: it has failed, as where memory is short", file=sys.stderr)
        return None, None
    finally:
        process.join()


@command("benchmarks.attention_memory", "other contexts are not measured")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.attention_memory", __doc__)
    if short := [T for T in flags.contexts if T < 1]:
        raise InputError(f"--contexts {short[0]}: it must be 1 at least")
    if flags.device not in ("cpu", "cuda") or (flags.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {flags.device} is not here; it is cpu, or cuda where there is one")
    check_files(flags.json)
    device, rows = torch.device(flags.device), []
    print(f"{'':44} {'ours':>10} {'plain':>10}")
    try:
        for kind in flags.kinds:
            print(f"{kind}: {choose_path(pattern_of(kind, 1, 'cpu'), device, torch.float32, HEAD_WIDTH)}")
            for T in flags.contexts:
                ours, plain = (in_a_process(kind, T, is_ours, flags.device) for is_ours in (True, False))
                for what, unit, mine, theirs in zip(
                    ("memory", "time"), ("MiB", "s"), ours, plain, strict=True
                ):
                    rows.append(row(f"attention, {kind}, context {T}, {what}", mine, theirs, unit))
                    print(line(rows[-1], 44))
    finally:  # what is measured by then is written, whatever came
        write_rows(flags.json, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
