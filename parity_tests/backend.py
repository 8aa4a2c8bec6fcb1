"""What an implementation under test must offer, and how the suite runs it.

A backend is a module with some of the reference's components under their names and with their arguments:

    layernorm(x, weight, bias, epsilon) -> y                    PyTorch: gradients come from autograd
    layernorm_forward(...) -> (y, cache), layernorm_backward(dy, cache) -> gradients        or by hand

Arrays arrive as torch tensors of the precision and on the device under test. Arguments that are floating
arrays (or dicts of them: parameters by name) are differentiated; the others are settings. What a backend
lacks is reported as not offered, and never counted as passed.
"""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

# Where the reference keeps a component, if not in the file of its own name.
_FILES = {
    "relu": "activations",
    "gelu": "activations",
    "gelu_tanh": "activations",
    "silu": "activations",
    "rmsnorm": "layernorm",
    "learned_positions": "positions",
    "swiglu": "ffn",
    "cross_entropy": "loss",
}


class Result(NamedTuple):
    """Output and gradients by argument name, in float64."""

    y: np.ndarray
    gradients: dict[str, np.ndarray]

    def named(self) -> dict[str, np.ndarray]:
        """All arrays of the result under the names used in reports."""
        return {"y": self.y} | {f"gradient of {name}": value for name, value in self.gradients.items()}


def is_floating(value: Any) -> bool:
    """Whether a value is an array of floating numbers, of NumPy or of PyTorch (bfloat16 included)."""
    return "float" in str(getattr(value, "dtype", ""))


def map_floats(function: Callable[[np.ndarray], Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a function applied to each floating array, also inside dicts."""
    return {
        name: map_floats(function, value)
        if isinstance(value, dict)
        else (function(value) if is_floating(value) else value)
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


def reference(component: str) -> tuple[Callable, Callable]:
    """The reference's forward and backward."""
    module = importlib.import_module(f"ref_numpy.{_FILES.get(component, component)}")
    return getattr(module, f"{component}_forward"), getattr(module, f"{component}_backward")


def run_by_hand(
    forward: Callable, backward: Callable, arguments: Mapping[str, Any], cotangent: Any
) -> tuple[Any, dict[str, Any]]:
    """Output and gradients of a component with a backward of its own."""
    y, cache = forward(*arguments.values())
    gradients = backward(cotangent, cache)
    if not isinstance(gradients, tuple):
        gradients = (gradients,)
    names = [name for name, value in arguments.items() if is_floating(value) or isinstance(value, dict)]
    present = [gradient for gradient in gradients if gradient is not None]
    return y, flat(dict(zip(names, present, strict=True)))


def run_reference(component: str, arguments: Mapping[str, Any], cotangent: np.ndarray) -> Result:
    """The reference on NumPy arrays, in the precision of the arguments."""
    y, gradients = run_by_hand(*reference(component), arguments, cotangent)
    as_float64 = {name: np.asarray(gradient, np.float64) for name, gradient in gradients.items()}
    return Result(np.asarray(y, np.float64), as_float64)


class Backend:
    """A module under test."""

    def __init__(self, module_name: str) -> None:
        self.module: ModuleType = importlib.import_module(module_name)

    def offers(self, component: str) -> bool:
        return hasattr(self.module, component) or hasattr(self.module, f"{component}_forward")

    def run(
        self, component: str, arguments: Mapping[str, Any], cotangent: np.ndarray, dtype: str, device: str
    ) -> Result:
        """The component on the arguments, rounded to a torch dtype and moved to a device."""
        import torch

        def place(array: Any) -> Any:
            if not isinstance(array, np.ndarray | np.floating):
                return array
            tensor = torch.as_tensor(np.array(array))
            if not is_floating(array):
                return tensor.to(device)
            return tensor.to(getattr(torch, dtype)).to(device).requires_grad_()  # MPS has no float64

        def back(tensor: Any) -> np.ndarray:
            return tensor.detach().cpu().double().numpy()

        placed = {
            name: {key: place(inner) for key, inner in value.items()}
            if isinstance(value, dict)
            else place(value)
            for name, value in arguments.items()
        }
        if hasattr(self.module, f"{component}_forward"):
            forward = getattr(self.module, f"{component}_forward")
            backward = getattr(self.module, f"{component}_backward")
            with torch.no_grad():
                y, gradients = run_by_hand(forward, backward, placed, place(cotangent).detach())
        else:
            y = getattr(self.module, component)(*placed.values())
            leaves = {
                name: value
                for name, value in flat(placed).items()
                if isinstance(value, torch.Tensor) and value.requires_grad
            }
            found = torch.autograd.grad(y, list(leaves.values()), place(cotangent).detach().to(y.dtype))
            gradients = dict(zip(leaves, found, strict=True))
        return Result(back(y), {name: back(gradient) for name, gradient in gradients.items()})
