"""Runs one case on both sides and judges it by the two questions of tolerances.py."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from parity_tests import tolerances
from parity_tests.backend import Backend, Result, flat, is_floating, map_floats, reference, run_reference
from parity_tests.tolerances import PRECISIONS

PLAIN = "parity_tests.backends.plain_torch"


class Target(NamedTuple):
    """What the suite is pointed at: a backend, a device, and the precisions to judge its rounding in."""

    backend: Backend
    plain: Backend
    device: str
    precisions: tuple[str, ...]


def target(backend: str, device: str, precisions: tuple[str, ...]) -> Target:
    return Target(Backend(backend), Backend(PLAIN), device, precisions)


def rounded(arguments: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The arguments as the precision can hold them, in float64 again."""
    import torch

    dtype = getattr(torch, PRECISIONS[precision].torch_dtype)
    return map_floats(lambda a: torch.from_numpy(a).to(dtype).to(torch.float64).numpy(), arguments)


def _moved(
    component: str, arguments: Mapping[str, Any], cotangent: np.ndarray, u: float, want: Result
) -> dict:
    """How far each result moves when every input moves by +-u of itself; the worst of two random tries."""
    random = np.random.default_rng(0)
    worst = dict.fromkeys(want.named(), 0.0)
    for _ in range(2):
        nudged = map_floats(lambda a: a * (1 + u * random.choice([-1.0, 1.0], a.shape)), arguments)
        nudged_cotangent = cotangent * (1 + u * random.choice([-1.0, 1.0], cotangent.shape))
        for name, value in run_reference(component, nudged, nudged_cotangent).named().items():
            worst[name] = max(worst[name], np.abs(value - want.named()[name]).max(initial=0.0))
    return worst


def _scale(arguments: Mapping[str, Any], cotangent: np.ndarray, want: Result) -> float:
    arrays = [value for value in flat(arguments).values() if is_floating(value)]
    arrays += [cotangent, *want.named().values()]
    return max(float(np.abs(array).max(initial=0.0)) for array in arrays)


def _require(component: str, question: str, got: Result, want: Result, bounds: Mapping[str, Any]) -> None:
    """Raises AssertionError with the worst element where an error exceeds its bound. NaN never passes."""
    for name, exact in want.named().items():
        value = got.named()[name]
        assert value.shape == exact.shape, f"{component}: {name} has shape {value.shape}, not {exact.shape}"
        excess = np.abs(value - exact) - np.broadcast_to(bounds[name], exact.shape)
        if exact.size == 0 or (excess <= 0).all():
            continue
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), exact.shape)
        where = ", ".join(str(int(i)) for i in worst)
        raise AssertionError(
            f"{component}, {question}: {name}[{where}] is {value[worst]!r}, "
            f"the reference has {exact[worst]!r}; they differ by {abs(value[worst] - exact[worst]):.2e}, "
            f"{np.broadcast_to(bounds[name], exact.shape)[worst]:.2e} is excused"
        )


def require_same_mathematics(
    target: Target, component: str, arguments: Mapping[str, Any], cotangent: np.ndarray
) -> None:
    """Question 1: values and gradients in float64, on the CPU."""
    want = run_reference(component, arguments, cotangent)
    got = target.backend.run(component, arguments, cotangent, "float64", "cpu")
    scale = _scale(arguments, cotangent, want)
    bounds = {name: tolerances.mathematics(value, scale) for name, value in want.named().items()}
    _require(component, "same mathematics (float64)", got, want, bounds)


def require_well_rounded(
    target: Target, component: str, arguments: Mapping[str, Any], cotangent: np.ndarray, precision: str
) -> None:
    """Question 2: values and gradients in a lower precision, on the target's device."""
    p = PRECISIONS[precision]
    arguments, cotangent = rounded(arguments, precision), rounded({"dy": cotangent}, precision)["dy"]
    want = run_reference(component, arguments, cotangent)
    got = target.backend.run(component, arguments, cotangent, p.torch_dtype, target.device)
    plain = target.plain.run(component, arguments, cotangent, p.torch_dtype, target.device)
    moved = _moved(component, arguments, cotangent, p.u, want)
    scale = _scale(arguments, cotangent, want)
    bounds = {}
    for name, value in want.named().items():
        plain_error = np.abs(plain.named()[name] - value).max(initial=0.0)
        bounds[name] = tolerances.rounding(value, plain_error, moved[name], scale, p, name != "y")
    _require(component, f"well rounded ({precision} on {target.device})", got, want, bounds)


def require_parity(target: Target, component: str, arguments: Mapping[str, Any], seed: int = 0) -> None:
    """Both questions for one case, with a random cotangent: a cotangent of ones hides whole terms."""
    forward, _ = reference(component)
    y, _ = forward(*arguments.values())
    cotangent = np.asarray(np.random.default_rng(seed).standard_normal(np.shape(y)))
    require_same_mathematics(target, component, arguments, cotangent)
    for precision in target.precisions:
        require_well_rounded(target, component, arguments, cotangent, precision)
