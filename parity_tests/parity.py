"""Runs one case on both sides and judges it by the two questions of tolerances.py."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from parity_tests import tolerances
from parity_tests.backend import Backend, Result, flat, is_floating, map_floats, reference, run_reference
from parity_tests.tolerances import PRECISIONS

PLAIN = "parity_tests.backends.plain_torch"


class Judgement(NamedTuple):
    """How one case came out in one question: the largest error of each result, in units of its bound.

    precision is "float64" for the question of mathematics, otherwise that whose rounding was judged. Above 1
    the case has failed; infinite is what is NaN, or off where nothing is excused.
    """

    component: str
    precision: str
    device: str
    units: dict[str, float]


class Target(NamedTuple):
    """What the suite is pointed at: a backend, a device, the precisions to judge its rounding in, and who is
    told of every judgement."""

    backend: Backend
    plain: Backend
    device: str
    precisions: tuple[str, ...]
    record: Callable[[Judgement], None] = lambda judgement: None


def target(
    backend: str,
    device: str,
    precisions: tuple[str, ...],
    record: Callable[[Judgement], None] = lambda judgement: None,
) -> Target:
    return Target(Backend(backend), Backend(PLAIN), device, precisions, record)


def rounded(arguments: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The arguments as the precision can hold them, in float64 again."""
    import torch

    dtype = getattr(torch, PRECISIONS[precision].torch_dtype)
    return map_floats(lambda a: torch.as_tensor(a).to(dtype).to(torch.float64).numpy(), arguments)


def _uncertainty(
    target: Target, component: str, arguments: Mapping[str, Any], cotangent: np.ndarray, precision: str
) -> dict[str, float]:
    """What each result of a case may honestly be off by: the largest error of the plain implementation, and
    the largest change of the exact result, over the case and two neighbours.

    A neighbour has every input moved by one or two units in the last place, up or down. In a case of a few
    numbers the plain implementation may be exact by luck, but hardly in those around it too. And who rounds
    once more on the way, anywhere, gets the exact result of a neighbour at best.
    """
    p = PRECISIONS[precision]
    random = np.random.default_rng(0)
    exact = run_reference(component, arguments, cotangent).named()
    error, change = dict.fromkeys(exact, 0.0), dict.fromkeys(exact, 0.0)
    for size in (0.0, 2 * p.u, 2 * p.u):
        moved = map_floats(
            lambda a, size=size: a * (1 + size * random.choice([-1.0, 1.0], a.shape)),
            {"dy": cotangent, **arguments},
        )
        moved = rounded(moved, precision)
        dy = moved.pop("dy")
        want = run_reference(component, moved, dy)
        got = target.plain.run(component, moved, dy, p.torch_dtype, target.device)
        for name, value in want.named().items():
            error[name] = max(error[name], np.abs(got.named()[name] - value).max(initial=0.0))
            change[name] = max(change[name], np.abs(value - exact[name]).max(initial=0.0))
    return {name: error[name] + change[name] for name in exact}


def _scale(arguments: Mapping[str, Any], cotangent: np.ndarray, want: Result) -> float:
    arrays = [value for value in flat(arguments).values() if is_floating(value)]
    arrays += [cotangent, *want.named().values()]
    return max(float(np.abs(array).max(initial=0.0)) for array in arrays)


def _units(value: np.ndarray, exact: np.ndarray, bound: Any) -> float:
    """The largest error in units of its bound; no error at all is 0 of any bound."""
    error = np.abs(value - exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.where(error == 0, 0.0, error / bound)
    return float(np.where(np.isnan(units), np.inf, units).max(initial=0.0))


def _require(
    target: Target,
    component: str,
    precision: str,
    device: str,
    got: Result,
    want: Result,
    bounds: Mapping[str, Any],
) -> None:
    """Records the case, and raises AssertionError with the worst element where an error exceeds its bound.

    NaN never passes.
    """
    __tracebackhide__ = True
    mathematics = precision == "float64"
    question = "same mathematics (float64)" if mathematics else f"well rounded ({precision} on {device})"
    found, wanted = set(got.named()), set(want.named())  # a gradient that one side forgot is no agreement
    assert found == wanted, f"{component}: only one side has {', '.join(sorted(found ^ wanted))}"
    for name, exact in want.named().items():
        shape = got.named()[name].shape
        assert shape == exact.shape, f"{component}: {name} has shape {shape}, not {exact.shape}"
    units = {name: _units(got.named()[name], exact, bounds[name]) for name, exact in want.named().items()}
    target.record(Judgement(component, precision, device, units))
    for name, exact in want.named().items():
        value = got.named()[name]
        excess = np.abs(value - exact) - np.broadcast_to(bounds[name], exact.shape)
        if exact.size == 0 or (excess <= 0).all():
            continue
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), exact.shape)
        where = ", ".join(str(int(i)) for i in worst)
        raise AssertionError(
            f"{component}, {question}: {name}[{where}] is {value[worst]:.12g}, "
            f"the reference has {exact[worst]:.12g}; they differ by {abs(value[worst] - exact[worst]):.2e}, "
            f"{np.broadcast_to(bounds[name], exact.shape)[worst]:.2e} is excused"
        )


def require_same_mathematics(
    target: Target, component: str, arguments: Mapping[str, Any], cotangent: np.ndarray
) -> None:
    """Question 1: values and gradients in float64, on the CPU."""
    __tracebackhide__ = True
    want = run_reference(component, arguments, cotangent)
    got = target.backend.run(component, arguments, cotangent, "float64", "cpu")
    scale = _scale(arguments, cotangent, want)
    bounds = {name: tolerances.mathematics(value, scale) for name, value in want.named().items()}
    _require(target, component, "float64", "cpu", got, want, bounds)


def require_well_rounded(
    target: Target, component: str, arguments: Mapping[str, Any], cotangent: np.ndarray, precision: str
) -> None:
    """Question 2: values and gradients in a lower precision, on the target's device.

    Not judged where an input or the plain implementation overflows: float16 ends at 65504.
    """
    __tracebackhide__ = True
    p = PRECISIONS[precision]
    arguments, cotangent = rounded(arguments, precision), rounded({"dy": cotangent}, precision)["dy"]
    if not all(np.isfinite(value).all() for value in flat(arguments).values() if is_floating(value)):
        return
    want = run_reference(component, arguments, cotangent)
    got = target.backend.run(component, arguments, cotangent, p.torch_dtype, target.device)
    uncertainty = _uncertainty(target, component, arguments, cotangent, precision)
    if not np.isfinite(list(uncertainty.values())).all():
        return
    scale = _scale(arguments, cotangent, want)
    bounds = {
        name: tolerances.rounding(value, uncertainty[name], scale, p, is_gradient=name != "y")
        for name, value in want.named().items()
    }
    _require(target, component, precision, target.device, got, want, bounds)


def require_parity(
    target: Target, component: str, arguments: Mapping[str, Any], seed: int, judge_rounding: bool = True
) -> None:
    """Both questions for one case, with a random cotangent: a cotangent of ones hides whole terms.

    The second question is not put where rounding is luck, which no bound tells from a bug: with a kink behind
    rounded values (a ReLU after a matrix product) a gradient jumps when a value is rounded to its other side.
    """
    __tracebackhide__ = True
    forward, _ = reference(component)
    y, _ = forward(*arguments.values())
    cotangent = np.asarray(np.random.default_rng(seed).standard_normal(np.shape(y)))
    require_same_mathematics(target, component, arguments, cotangent)
    for precision in target.precisions if judge_rounding else ():
        require_well_rounded(target, component, arguments, cotangent, precision)
