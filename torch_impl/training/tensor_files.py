"""Safetensors files: tensors by name, and nothing that can execute."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torch_impl.training.files import InputError
from torch_impl.training.flags import check_text


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file, with the permissions of any other. Raises OSError where it cannot."""
    path.touch()
    mode = path.stat().st_mode  # safetensors lets nobody else read what it writes
    try:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, path, metadata={"format": "pt"})  # transformers wants to be told
    except SafetensorError as error:  # an OSError in disguise
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)


@contextmanager
def opened_tensors(path: Path) -> Iterator[safe_open]:
    """The file, to read headers and tensors from. Raises InputError where it is missing or damaged."""
    check_text(str(path), str(path))  # safetensors would call it damaged
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is incomplete: no {path.name}") from error
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
