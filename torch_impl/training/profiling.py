"""--profile: the operations of a few steps by the time that they take, and their trace.

    trace.json.gz   in the run folder: what ran when, for ui.perfetto.dev or chrome://tracing

torch.profiler slows the steps that it watches, and none of the others.
"""

import gzip
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from torch_impl.train import StepMetrics

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own start and end on stderr

TRACE = "trace.json.gz"
_WARM_UP = 10  # steps: the first ones compile, and fetch memory
_WATCHED = 5  # steps at most
_SHOWN = 10
_COLUMNS = 80


class Operation(NamedTuple):
    """What a kernel, or on the CPU an operation of PyTorch, took in all the steps that were watched."""

    name: str
    seconds: float  # without what it called
    calls: int


def steps_to_watch(done: int, steps: int, every: tuple[int, ...]) -> range:
    """Which steps are watched: a few, once a run that goes on after `done` has warmed up.

    After each so many steps as `every` says it does something else; no such step but the last is among them.
    """
    first = done + min(_WARM_UP, (steps - done) // 2) + 1
    last = min(first + _WATCHED - 1, steps, *(-(-first // n) * n for n in every))
    return range(first, last + 1)


def profiled(
    steps: Iterator[StepMetrics],
    before: int,
    watched: int,
    keep: Callable[[bytes], Path],
    device: torch.device,
) -> Iterator[StepMetrics]:
    """Passes steps on, and after so many of them before watches as many as it is told. `keep` writes their
    trace, and tells where."""
    yield from islice(steps, before)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        yield from islice(steps, watched - 1)
        last = next(steps, None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if last is None:
        return
    found = operations(profiler.key_averages())
    trace = compressed(profiler)
    kept = "no room for it among temporary files" if trace is None else f"{keep(trace)}, for ui.perfetto.dev"
    tqdm.write(f"{table(found, watched)}\nthe trace: {kept}")
    yield last
    yield from steps


def operations(events: list[FunctionEventAvg]) -> list[Operation]:
    """The dearest first. Kernels where there are any: the host runs ahead of them, and its time is hidden."""
    kernels = [
        event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]
    found = [Operation(event.key, event.self_device_time_total / 1e6, event.count) for event in kernels] or [
        Operation(event.key, event.self_cpu_time_total / 1e6, event.count) for event in events
    ]
    return sorted(found, key=lambda operation: -operation.seconds)


def table(found: list[Operation], steps: int) -> str:
    """The ten dearest operations, in a table that fits a terminal."""
    total = sum(operation.seconds for operation in found)
    width = _COLUMNS - 31
    lines = [f"{f'the dearest operations of {steps} steps':<{width}}  ms a step   share   calls"]
    for name, seconds, calls in found[:_SHOWN]:
        share = seconds / total if total else 0.0
        lines.append(
            f"{shortened(name, width):<{width}}{seconds / steps * 1e3:11.3f}{share:8.1%}{calls / steps:8.1f}"
        )
    rest = found[_SHOWN:]
    if rest:
        seconds = sum(operation.seconds for operation in rest)
        lines.append(f"{f'{len(rest)} others':<{width}}{seconds / steps * 1e3:11.3f}{seconds / total:8.1%}")
    lines.append(f"{'all':<{width}}{total / steps * 1e3:11.3f}")
    return "\n".join(lines)


def shortened(name: str, width: int) -> str:
    """A kernel's name without its C++ arguments, and no longer than a column."""
    name = re.sub(r"^(## )?Call | ##$", "", name)  # torch.compile's own
    name = re.sub(r"^void |\(anonymous namespace\)::", "", name)
    while (fewer := re.sub(r"<[^<>]*>", "", name)) != name:
        name = fewer
    name = re.sub(r"(?<=\w)\(.*", "", name)
    if len(name) <= width:
        return name
    return f"{name[: width // 2 - 1]}…{name[-(width - width // 2) :]}"


def compressed(profiler: profile) -> bytes | None:
    """The trace, by way of a file, as PyTorch exports it; None where it wrote none, for want of room."""
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        return gzip.compress(plain.read_bytes()) if plain.is_file() else None
