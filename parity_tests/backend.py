"""What an implementation under test may offer, and how the suite runs it.

A backend is a module, or a file, with some of the components of components.py under their names and with
their arguments, which come by position:

    layernorm(x, weight, bias, epsilon) -> y                    PyTorch: gradients come from autograd
    layernorm_forward(...) -> (y, cache), layernorm_backward(dy, cache) -> gradients        or by hand

The backward pass returns a gradient for each argument that is a floating array or a dict of them (parameters
by name), in their order; a bias that is None has none. The other arguments are settings. All are left as they
were given: who calls a component may need them again. Names may stand at the head of the module:

    ARRAYS = "torch"                       what arrays it takes: "torch" (if it says nothing), "numpy", or a
                                           function that makes one from DLPack, such as jax.numpy.from_dlpack
    DTYPES = ("float32", "bfloat16")       what it computes in, if not in everything
    DEVICES = ("cuda",)                    where it runs, if not everywhere

It may return arrays of any library that speaks DLPack. What is given no array, such as causal_mask, makes its
own on PyTorch's default device, which is then the one under test. A case that it does not do is declined by
raising NotImplementedError. What a backend lacks or declines is reported as not offered, and never counted as
passed.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from parity_tests import components
from parity_tests.exchange import NotOffered, flat, is_floating, map_arrays, received, require, sender

Watch = Callable[[Mapping[str, Any]], AbstractContextManager]  # of the arguments as the backend gets them


class BackendError(Exception):
    """The module cannot be held against the reference; the message is one line."""


class Result(NamedTuple):
    """Output and gradients by argument name, in float64."""

    y: np.ndarray
    gradients: dict[str, np.ndarray]

    def named(self) -> dict[str, np.ndarray]:
        """All arrays of the result under the names used in reports."""
        return {"y": self.y} | {f"gradient of {name}": value for name, value in self.gradients.items()}


def run_by_hand(
    forward: Callable, backward: Callable, arguments: Mapping[str, Any], cotangent: Any
) -> tuple[Any, dict[str, Any]]:
    """Output and gradients of a component with a backward of its own.

    Raises Misfit for a gradient too many or too few.
    """
    pair = forward(*arguments.values())
    is_pair = isinstance(pair, tuple) and len(pair) == 2
    require(is_pair, f"{forward.__name__} returns {type(pair).__name__}, not (y, cache)")
    gradients = backward(cotangent, pair[1])
    gradients = gradients if isinstance(gradients, tuple | list) else (gradients,)
    names = [name for name, value in arguments.items() if is_floating(value) or isinstance(value, dict)]
    present = [gradient for gradient in gradients if gradient is not None]
    require(
        len(present) == len(names),
        f"{backward.__name__} returns {len(present)} gradients, not {len(names)}: of {', '.join(names)}",
    )
    return pair[0], flat(dict(zip(names, present, strict=True)))


def run_reference(component: str, arguments: Mapping[str, Any], cotangent: np.ndarray) -> Result:
    """The reference on NumPy arrays, in the precision of the arguments."""
    y, gradients = run_by_hand(*components.reference(component), arguments, cotangent)
    as_float64 = {name: np.asarray(gradient, np.float64) for name, gradient in gradients.items()}
    return Result(np.asarray(y, np.float64), as_float64)


def _run_by_autograd(
    function: Callable, arguments: Mapping[str, Any], cotangent: Any
) -> tuple[Any, dict[str, Any]]:
    import torch

    name = getattr(function, "__name__", "it")
    leaves = {key: value.requires_grad_() for key, value in flat(arguments).items() if is_floating(value)}
    y = function(*arguments.values())
    is_tensor = isinstance(y, torch.Tensor)
    require(is_tensor, f"{name} returns {type(y).__name__}, not one tensor")
    require(y.shape == cotangent.shape, f"y has shape {tuple(y.shape)}, not {tuple(cotangent.shape)}")
    require(y.requires_grad, f"autograd finds no way back from y: {name} left its graph (numpy? detach?)")
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype), allow_unused=True)
    found = dict(zip(leaves, gradients, strict=True))
    lost = [key for key, gradient in found.items() if gradient is None]
    require(not lost, f"autograd finds no way back from y to {', '.join(lost)}")
    return y, found


def _import(name: str) -> ModuleType:
    """A module by its name, also from the current folder, or by its file."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise BackendError(f"there is no file {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # found, but what it imports is not
        raise BackendError(f"there is no module {error.name} to import, here or installed") from None


class Backend:
    """A module under test. Raises BackendError for one that is not there or does not fit."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: ModuleType = _import(name)
        self.arrays = getattr(self.module, "ARRAYS", "torch")
        if self.arrays not in ("torch", "numpy") and not callable(self.arrays):
            raise BackendError(f'{name}: ARRAYS is {self.arrays!r}, not "torch", "numpy" or a function')
        self.offered = tuple(component for component in components.NAMES if self.offers(component))
        if not self.offered:
            raise BackendError(f"{name} offers no component{self._meant()}; there are {self._known()}")
        for component in self.offered:
            self._check_signature(component)

    def _known(self) -> str:
        return ", ".join(components.NAMES)

    def _meant(self) -> str:
        """Whose name is nearly that of a function in the module."""
        for function in vars(self.module):
            near = difflib.get_close_matches(function.lower(), components.NAMES, n=1, cutoff=0.75)
            if near and callable(getattr(self.module, function)):
                return f" (its {function} should perhaps be called {near[0]})"
        return ""

    def _check_signature(self, component: str) -> None:
        wanted = components.parameters(component)
        by_hand = hasattr(self.module, f"{component}_forward")
        name = f"{component}_forward" if by_hand else component
        if by_hand and not hasattr(self.module, f"{component}_backward"):
            raise BackendError(f"{self.name} has {name}, but no {component}_backward")
        if not by_hand and component in components.DIFFERENTIABLE and self.arrays != "torch":
            raise BackendError(
                f"{self.name}: without PyTorch there is no autograd, so {component} needs "
                f"{component}_forward and {component}_backward"
            )
        try:
            own = signature(getattr(self.module, name))
        except (TypeError, ValueError):  # not written in Python
            return
        try:
            own.bind(*wanted)
            shared = [parameter for parameter in own.parameters if parameter in wanted]
            fits = shared == [parameter for parameter in wanted if parameter in shared]
        except TypeError:
            fits = False
        if not fits:
            given = ", ".join(own.parameters)
            raise BackendError(f"{self.name}: {name}({given}) is to be called as {name}({', '.join(wanted)})")

    def offers(self, component: str) -> bool:
        return hasattr(self.module, component) or hasattr(self.module, f"{component}_forward")

    def require(self, dtype: str, device: str) -> None:
        """Raises NotOffered where the module says that it does not compute in a dtype or on a device."""
        self.require_device(device)
        offered = getattr(self.module, "DTYPES", (dtype,))
        if dtype not in offered:
            raise NotOffered(f"it computes in {', '.join(offered)}")

    def require_device(self, device: str) -> None:
        kind = device.partition(":")[0]
        offered = getattr(self.module, "DEVICES", (kind,))
        if kind not in offered:
            raise NotOffered(f"it runs on {', '.join(offered)}, so --device has to be one of those")

    def run(
        self,
        component: str,
        arguments: Mapping[str, Any],
        cotangent: np.ndarray,
        dtype: str,
        device: str,
        watch: Watch = lambda placed: nullcontext(),
    ) -> Result:
        """A differentiable component on the arguments, rounded to a torch dtype and moved to a device.

        Raises NotOffered for what the backend declines, Misfit for results that cannot be compared.
        """
        import torch

        self.require(dtype, device)
        place = sender(self.arrays, dtype, device)
        placed, dy = map_arrays(place, arguments), place(cotangent)
        try:
            with watch(placed):
                if hasattr(self.module, f"{component}_forward"):
                    forward = getattr(self.module, f"{component}_forward")
                    with torch.no_grad():
                        y, gradients = run_by_hand(
                            forward, getattr(self.module, f"{component}_backward"), placed, dy
                        )
                else:
                    y, gradients = _run_by_autograd(getattr(self.module, component), placed, dy)
        except NotImplementedError as error:
            raise NotOffered(str(error) or "it declines") from error
        if dtype == "float64":  # once is enough
            _require_unchanged({**placed, "dy": dy}, map_arrays(place, {**arguments, "dy": cotangent}))
        return Result(
            received(y, "y", dtype),
            {name: received(value, f"the gradient of {name}", dtype) for name, value in gradients.items()},
        )

    def call(self, component: str, arguments: Mapping[str, Any], device: str) -> dict[str, np.ndarray]:
        """A function without gradients, in float64: its results by name. Raises as run."""
        import torch

        self.require("float64", device)
        place = sender(self.arrays, "float64", device)
        placed = map_arrays(place, arguments)
        try:
            with torch.device(device):
                found = leaves(getattr(self.module, component)(*placed.values()))
        except NotImplementedError as error:
            raise NotOffered(str(error) or "it declines") from error
        _require_unchanged(placed, map_arrays(place, arguments))
        return found


def _require_unchanged(placed: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    """Raises Misfit where an argument is no longer what was given."""
    given = flat(again)
    for name, value in flat(placed).items():
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            now, before = received(value, name), received(given[name], name)
            require(np.array_equal(now, before, equal_nan=now.dtype.kind == "f"), f"{name} was changed")


def leaves(value: Any, name: str = "result") -> dict[str, np.ndarray]:
    """Tuples, dicts and generators taken apart: result[0][weight]; tuples of numbers are arrays."""
    if hasattr(value, "__next__"):
        value = list(value)
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, tuple | list) and not all(isinstance(v, int | float | np.generic) for v in value):
        pairs = list(enumerate(value))
    else:
        return {name: received(value, name)}
    found: dict[str, np.ndarray] = {}
    for key, inner in pairs:
        found |= leaves(inner, f"{name}[{key}]")
    return found
