"""Arrays on their way to a backend and back: NumPy's, PyTorch's, or of any library that speaks DLPack."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Binary digits of a number, to tell a result that came back rounder than its arguments.
_DIGITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


class NotOffered(Exception):
    """The backend cannot do this: a precision that its arrays lack, a variant that it declines."""


class Misfit(AssertionError):
    """A result that cannot be compared with the reference's. The message is one line."""


def require(holds: Any, complaint: str) -> None:
    """Raises Misfit where something does not hold."""
    __tracebackhide__ = True
    if not holds:
        raise Misfit(complaint)


def is_floating(value: Any) -> bool:
    """Whether a value is an array of floating numbers, of any library (bfloat16 included)."""
    return "float" in str(getattr(value, "dtype", ""))


def map_floats(function: Callable[[np.ndarray], Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a function applied to each floating array, also inside dicts."""
    return map_arrays(lambda array: function(array) if is_floating(array) else array, arguments)


def map_arrays(function: Callable[[Any], Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a function applied to each value, also inside dicts."""
    return {
        name: map_arrays(function, value) if isinstance(value, dict) else function(value)
        for name, value in arguments.items()
    }


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with dicts taken apart: {"params": {"w": a}} becomes {"params.w": a}."""
    pairs: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            pairs |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            pairs[name] = value
    return pairs


def scale_of(arguments: Mapping[str, Any], results: Mapping[str, np.ndarray]) -> float:
    """The largest number of a case, infinities apart."""
    arrays = [value for value in flat({**arguments, **results}).values() if is_floating(value)]
    return max((float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in arrays), default=0.0)


def sender(kind: Any, dtype: str, device: str) -> Callable[[Any], Any]:
    """What turns a value of the suite into the backend's: arrays rounded to dtype and moved to the device.

    kind is "torch", "numpy", or a function that makes an array from anything with DLPack.
    Raises NotOffered, when called, for a precision that such arrays do not have.
    """
    import torch

    def to_torch(value: Any) -> Any:
        tensor = torch.as_tensor(np.array(value))
        # Rounded before it is moved: some devices have no float64.
        return (tensor.to(getattr(torch, dtype)) if is_floating(value) else tensor).to(device)

    def to_numpy(value: Any) -> Any:
        if dtype == "bfloat16":
            raise NotOffered("NumPy has no bfloat16")
        return np.array(value, dtype=dtype if is_floating(value) else None)

    def by_dlpack(value: Any) -> Any:
        try:
            return kind(to_torch(value).contiguous())
        except (TypeError, ValueError, RuntimeError, BufferError) as error:
            if is_floating(value):
                raise NotOffered(f"its arrays do not take {dtype}: {error}") from error
            raise

    make = {"torch": to_torch, "numpy": to_numpy}.get(kind, by_dlpack)
    return lambda value: make(value) if isinstance(value, np.ndarray | np.floating) else value


def received(value: Any, name: str, least: str | None = None) -> np.ndarray:
    """A backend's result as NumPy has it: floating numbers in float64, others as they are.

    Raises Misfit, with the result's name, for what is no array, and, where least is given, for one
    that holds no floating numbers or fewer digits than that dtype.
    """
    import torch

    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray | np.generic | torch.Tensor):
        value = torch.from_dlpack(value)
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        value = value.detach().cpu()
        array = (value.double() if value.is_floating_point() else value).numpy()
    else:
        array = np.asarray(value)
        dtype = str(array.dtype)
    if array.dtype.kind not in "fiub":
        raise Misfit(f"{name} is no array but {type(value).__name__}: {value!r:.60}")
    if least is not None:
        is_enough = _DIGITS.get(dtype, 0) >= _DIGITS[least]
        require(is_enough, f"{name} comes back as {dtype} from arguments in {least}")
    return array.astype(np.float64) if array.dtype.kind == "f" else array
