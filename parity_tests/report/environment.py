"""What a measurement depends on: versions, processor, the library of matrix products, the device."""

import ctypes
import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np


def environment(device: str) -> dict[str, str]:
    """By name, in the order in which it is read."""
    import torch

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    core = openblas_core()
    described = {
        "Date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "System": platform.platform(),
        "Python": platform.python_version(),
    }
    for package in ("numpy", "torch", "hypothesis", "pytest", "jax", "transformers", "triton"):
        with suppress(PackageNotFoundError):
            described[package] = version(package)
    described |= {
        "Processor": f"{processor()}, {os.cpu_count()} cores",
        "PyTorch's kernels": torch.backends.cpu.get_cpu_capability(),
        "BLAS of NumPy": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "Its kernels": core or "unknown",
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", "not set"),
        "Device": device_name(device),
    }
    return described


def processor() -> str:
    """The processor's name, as each system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def openblas_core() -> str | None:
    """The family of processors whose kernels NumPy's OpenBLAS has chosen; None for another library."""
    beside = Path(np.__file__).parent
    for folder in (beside.parent / "numpy.libs", beside / ".dylibs", beside / ".libs"):
        for path in folder.glob("*openblas*"):
            with suppress(OSError, AttributeError):
                name = ctypes.CDLL(str(path)).scipy_openblas_get_corename64_
                name.restype = ctypes.c_char_p
                return name().decode("ascii", errors="replace")
    return None


def device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return f"{device}, {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return device
