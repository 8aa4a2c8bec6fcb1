"""Where a run computes, and in which number format."""

import time
from dataclasses import replace
from typing import NamedTuple

import torch

from torch_impl.flash_attention import HAS_TRITON
from torch_impl.training.config import WITHOUT_PRODUCTS, RunSettings
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError
from torch_impl.training.ranks import ALONE, Ranks

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRODUCTS = {"tf32": (8, 0), "float8": (8, 9)}
"""Formats of the factors of products alone, and the compute capability of GPUs that have them."""


class Place(NamedTuple):
    """The answers to a run's `device`, `precision` and `compile`."""

    device: torch.device
    dtype: torch.dtype  # of the computation
    compile: bool
    products: str | None = None  # the format of their factors: tf32, float8, or None for dtype

    def __str__(self) -> str:
        kind = (
            f"{self.device} ({torch.cuda.get_device_name(self.device)})"
            if self.device.type == "cuda"
            else self.device
        )
        products = f", products in {self.products}" if self.products else ""
        compiled = ", compiled" if self.compile else ""
        return f"{kind}, {str(self.dtype).removeprefix('torch.')}{products}{compiled}"


def best_device() -> str:
    """cuda, else mps, else cpu: the first that is here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of that name, "auto" for the best; each of several processes has a GPU of its own.

    A GPU with a number becomes the current one, which streams, graphs and FSDP2 take, wherever tensors lie.
    Raises InputError where there is none.
    """
    device = _own_device(name, ranks) if ranks.size > 1 else _device_called(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _device_called(name: str) -> torch.device:
    try:
        device = torch.device(best_device() if name == "auto" else name)
    except RuntimeError as error:
        raise InputError(f"--device {name} is no device; use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(
            f"--device {name}: CUDA finds {counted(count, 'GPU')} here"
            + ("; use --device cpu" * (count == 0))
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name}: MPS is not available here; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name} is not supported; use auto, cpu, cuda, cuda:1 or mps")
    return device


def _own_device(name: str, ranks: Ranks) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # Apple's GPU is one
    if name not in ("cuda", "cpu"):
        raise InputError(
            f"--device {name}: the {ranks.size} processes of torchrun compute on GPUs of their own; use "
            "auto, cuda or cpu"
        )
    count = torch.cuda.device_count()
    if name == "cuda" and ranks.local_size > count:
        raise InputError(
            f"--nproc-per-node {ranks.local_size}: CUDA finds {counted(count, 'GPU')} here, and a process "
            f"needs one of its own; use --nproc-per-node {count}" + (", or --device cpu" * (count == 0))
        )
    return torch.device("cuda", ranks.local_rank) if name == "cuda" else torch.device("cpu")


def place_to_read(run: RunSettings, device: str) -> Place:
    """Where a run's model is read, not compiled: its products are in the number format of all the rest."""
    precision = WITHOUT_PRODUCTS.get(run.precision, run.precision)
    return choose_place(replace(run, device=device, precision=precision, compile="off"))


def choose_place(run: RunSettings, ranks: Ranks = ALONE) -> Place:
    """Device, number format and compilation of a run. Raises InputError for a device that is not here."""
    device = choose_device(run.device, ranks)
    products = run.precision if run.precision in _PRODUCTS else None
    if products:
        _refuse_lacking(device, products)
    on_cuda = device.type == "cuda"
    if run.precision != "auto":
        dtype = _DTYPES[WITHOUT_PRODUCTS.get(run.precision, run.precision)]
    elif on_cuda:
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if native else torch.float16
    else:
        dtype = torch.float32
    can_compile = on_cuda and HAS_TRITON  # PyTorch for Windows comes without
    compile = can_compile if run.compile == "auto" else run.compile == "on"
    return Place(device, dtype, compile, products)


def products_beside_float32(dtype: torch.dtype) -> float:
    """How many times as long a product of matrices takes on this CPU as in float32, measured.

    Not every processor has instructions for half precision; without them it takes tens of times as long. The
    two take turns, so that whatever else the machine does in some of them is in the way of both.
    """
    factors = [torch.ones(256, 256, dtype=kind) for kind in (torch.float32, dtype)]
    times = []
    for _ in range(20):
        for matrix in factors:
            begin = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - begin)
    return min(times[1::2]) / min(times[::2])


def _refuse_lacking(device: torch.device, products: str) -> None:
    """Raises InputError for a device that has no products of that format."""
    instead = WITHOUT_PRODUCTS[products]
    if device.type == "cuda" and torch.version.hip is None:
        has, needed = torch.cuda.get_device_capability(device), _PRODUCTS[products]
        if has < needed:
            raise InputError(
                f"--precision {products} needs a GPU of compute capability {needed[0]}.{needed[1]}, and "
                f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}; use --precision {instead}"
            )
    elif (device.type, products) != ("cpu", "float8"):
        raise InputError(f"--precision {products}: {device} has none; use --precision {instead}")
