"""Runs one case on both sides and judges it by the two questions of tolerances.py."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from parity_tests import tolerances
from parity_tests.backend import Backend, Result, leaves, run_reference
from parity_tests.components import DIFFERENTIABLE, reference, reference_function
from parity_tests.disagreement import Arrays, Disagreement
from parity_tests.exchange import Misfit, NotOffered, flat, is_floating, map_floats, scale_of
from parity_tests.snippet import code
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
    told of every judgement, and of what the backend declined and why (component, precision, reason)."""

    backend: Backend
    plain: Backend
    device: str
    precisions: tuple[str, ...]
    record: Callable[[Judgement], None] = lambda judgement: None
    declined: Callable[[str, str, str], None] = lambda component, precision, reason: None

    @property
    def mathematics_on(self) -> str:
        """The device of the first question: the CPU, but for backends that do not run there."""
        return "cpu" if "cpu" in getattr(self.backend.module, "DEVICES", ("cpu",)) else self.device

    def runs_on(self, component: str, precision: str) -> str:
        """The device of a question: for that of rounding the one under test. A function without gradients is
        put the first question alone, so there as well, unless it has no float64."""
        has_rounding, has_float64 = component in DIFFERENTIABLE, not self.device.startswith("mps")
        moves = precision != "float64" or (has_float64 and not has_rounding)
        return self.device if moves else self.mathematics_on


def target(backend: str, device: str, precisions: tuple[str, ...], **listeners: Callable) -> Target:
    """The target by its names. Raises BackendError for a module that is not there or does not fit."""
    return Target(Backend(backend), Backend(PLAIN), device, precisions, **listeners)


def rounded(arguments: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The arguments as the precision can hold them, in float64 again."""
    import torch

    dtype = getattr(torch, PRECISIONS[precision].torch_dtype)
    return map_floats(lambda a: torch.as_tensor(a).to(dtype).to(torch.float64).numpy(), arguments)


class Case(NamedTuple):
    """A component, the arguments it is given, and the seed of the cotangent that is sent back through it."""

    component: str
    arguments: Mapping[str, Any]
    seed: int = 0

    def cotangent(self) -> np.ndarray:
        """A random one: a cotangent of ones hides whole terms."""
        forward, _ = reference(self.component)
        y, _ = forward(*self.arguments.values())
        return np.asarray(np.random.default_rng(self.seed).standard_normal(np.shape(y)))

    def inputs(self, precision: str) -> tuple[dict[str, Any], np.ndarray]:
        """Arguments and cotangent as a precision holds them."""
        held = rounded({"dy": self.cotangent(), **self.arguments}, precision)
        dy = held.pop("dy")
        return held, dy

    def judge(self, backend: str, device: str = "cpu", precision: str = "float64") -> None:
        """Raises Disagreement where the backend is off in this case, and says so where it is not."""
        aim = target(backend, device, (precision,))
        if self.component not in DIFFERENTIABLE:
            require_same_results(aim, self)
        elif precision == "float64":
            require_same_mathematics(aim, self)
        else:
            require_well_rounded(aim, self, precision)
        print(f"{backend} agrees on this case of {self.component} ({precision}).")


@contextmanager
def _explained(target: Target, case: Case, precision: str) -> Iterator[None]:
    """What goes wrong inside a backend, and results that cannot be compared, are told with their case."""
    __tracebackhide__ = True
    try:
        yield
    except NotOffered:
        raise
    except Exception as error:
        if isinstance(error, Misfit):
            error = Misfit(f"{case.component} of {target.backend.name}: {error}")
        device = target.runs_on(case.component, precision)
        error.script = code(*case, target.backend.name, device, precision)
        raise error from None


def _run(target: Target, case: Case, precision: str, arguments: Mapping[str, Any], dy: np.ndarray) -> Result:
    __tracebackhide__ = True
    device = target.runs_on(case.component, precision)
    with _explained(target, case, precision):
        return target.backend.run(case.component, arguments, dy, PRECISIONS[precision].torch_dtype, device)


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


def _units(value: np.ndarray, exact: np.ndarray, bound: Any) -> float:
    """The largest error in units of its bound; no error at all is 0 of any bound."""
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.where(value == exact, 0.0, np.abs(value - exact.astype(float)) / bound)
    return float(np.where(np.isnan(units), np.inf, units).max(initial=0.0))


_KINDS = {
    "f": "floating numbers",
    "i": "integers",
    "u": "integers",
    "b": "truth values",
    "c": "complex numbers",
}


def _require(target: Target, case: Case, precision: str, got: Arrays, want: Arrays, bounds: Arrays) -> None:
    """Records the judgement, and raises Disagreement where an error exceeds its bound. NaN never passes.

    Raises Misfit where the results of the two sides are not even of the same kind.
    """
    __tracebackhide__ = True
    with _explained(target, case, precision):
        if one_sided := sorted(set(got) ^ set(want)):
            raise Misfit(f"only one side has {', '.join(one_sided)}")
        for name, exact in want.items():
            if got[name].shape != exact.shape:
                raise Misfit(f"{name} has shape {got[name].shape}, not {exact.shape}")
            if (kind := _KINDS[got[name].dtype.kind]) != (wanted := _KINDS[exact.dtype.kind]):
                raise Misfit(f"{name} holds {kind}, not {wanted}")
    units = {name: _units(got[name], exact, bounds[name]) for name, exact in want.items()}
    device = target.runs_on(case.component, precision)
    target.record(Judgement(case.component, precision, device, units))
    if any(unit > 1 for unit in units.values()):
        raise Disagreement(target, case, precision, got, want, bounds)


def require_same_mathematics(target: Target, case: Case) -> None:
    """Question 1: values and gradients in float64."""
    __tracebackhide__ = True
    dy = case.cotangent()
    want = run_reference(case.component, case.arguments, dy).named()
    got = _run(target, case, "float64", case.arguments, dy).named()
    scale = scale_of({"dy": dy, **case.arguments}, want)
    bounds = {name: tolerances.mathematics(value, scale) for name, value in want.items()}
    _require(target, case, "float64", got, want, bounds)


def _require_sound_device(target: Target, case: Case, precision: str, want: Arrays, scale: float) -> None:
    """That the plain implementation, by which the backend is measured, errs here about as on the CPU.

    Else nothing excuses as much as a broken device: where all results are 0, a backend's are as good as any.
    """
    __tracebackhide__ = True
    p = PRECISIONS[precision]
    arguments, dy = case.inputs(precision)
    here, on_cpu = (
        target.plain.run(case.component, arguments, dy, p.torch_dtype, device).named()
        for device in (target.device, "cpu")
    )
    bounds = {
        name: tolerances.soundness(np.abs(on_cpu[name] - value).max(initial=0.0), scale, p)
        for name, value in want.items()
    }
    plainly = target._replace(backend=target.plain, record=lambda judgement: None)
    _require(plainly, case, precision, here, want, bounds)


def require_well_rounded(target: Target, case: Case, precision: str) -> None:
    """Question 2: values and gradients in a lower precision, on the target's device.

    Not judged where an input or the plain implementation overflows: float16 ends at 65504.
    """
    __tracebackhide__ = True
    p = PRECISIONS[precision]
    arguments, dy = case.inputs(precision)
    if not all(np.isfinite(value).all() for value in flat(arguments).values() if is_floating(value)):
        return
    want = run_reference(case.component, arguments, dy).named()
    got = _run(target, case, precision, arguments, dy).named()
    uncertainty = _uncertainty(target, case.component, arguments, dy, precision)
    if not np.isfinite(list(uncertainty.values())).all():
        return
    scale = scale_of({"dy": dy, **arguments}, want)
    if target.device != "cpu":
        _require_sound_device(target, case, precision, want, scale)
    bounds = {
        name: tolerances.rounding(value, uncertainty[name], scale, p, is_gradient=name != "y")
        for name, value in want.items()
    }
    _require(target, case, precision, got, want, bounds)


def require_same_results(target: Target, case: Case) -> None:
    """For functions without gradients: numbers in float64 as in question 1, all else equal."""
    __tracebackhide__ = True
    want = leaves(reference_function(case.component)(*case.arguments.values()))
    with _explained(target, case, "float64"):
        device = target.runs_on(case.component, "float64")
        got = target.backend.call(case.component, case.arguments, device)
    scale = scale_of(case.arguments, {name: value for name, value in want.items() if value.dtype.kind == "f"})
    bounds = {
        name: tolerances.mathematics(value[np.isfinite(value)], scale) if value.dtype.kind == "f" else 0.0
        for name, value in want.items()
    }
    _require(target, case, "float64", got, want, bounds)


def require_parity(target: Target, case: Case, judge_rounding: bool = True) -> None:
    """All questions for one case; which of them the backend declines is told to the target's listener.

    The second question is not put where rounding is luck, which no bound tells from a bug: with a kink behind
    rounded values (a ReLU after a matrix product) a gradient jumps when a value is rounded to its other side.
    """
    __tracebackhide__ = True
    questions: dict[str, Callable[[], None]] = {}
    if case.component in DIFFERENTIABLE:
        questions["float64"] = partial(require_same_mathematics, target, case)
        for precision in target.precisions if judge_rounding else ():
            questions[precision] = partial(require_well_rounded, target, case, precision)
    else:
        questions["float64"] = partial(require_same_results, target, case)
    for precision, ask in questions.items():
        try:
            ask()
        except NotOffered as refusal:
            target.declined(case.component, precision, str(refusal))
