"""Where two whole models part: the first component, in the order of execution, whose values differ.

Both sides run the case once more and leave marks at each component that has parameters: what goes in and what
comes out, and in the backward pass the gradient that reaches it and the one that it hands on. A component is
called by the parameters it is given (blocks.1.attention), which both sides name alike. Seen are the functions
of the reference; of a backend, PyTorch modules that name their parameters as it does, or else its functions.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np

from parity_tests.backend import run_reference
from parity_tests.exchange import flat, received
from parity_tests.tolerances import PRECISIONS, mathematics

if TYPE_CHECKING:
    from parity_tests.parity import Case, Target

# Those that are called with parameters.
WATCHED = (
    "linear",
    "layernorm",
    "rmsnorm",
    "embedding",
    "learned_positions",
    "multi_head_attention",
    "cross_attention",
    "ffn",
    "swiglu",
    "block",
    "cross_block",
)


# The places of a component, in the order of execution.
INPUT, OUTPUT = "what goes into", "what comes out of"
ARRIVES, LEAVES = "the gradient that reaches", "the gradient handed on by"


class Mark(NamedTuple):
    """A component of the model (blocks.1.attention; empty for the whole), a place there, and the value."""

    part: str
    place: str
    value: np.ndarray


Key = tuple[str, str, int]  # part, place, and how often that was seen before


def _shared(paths: list[list[str]]) -> list[str]:
    """What all paths begin with."""
    levels = zip(*paths, strict=False)
    return [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]


class Recorder:
    """Collects the marks of one side."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.marks: list[Mark] = []
        self._path = {id(value): name.split(".")[:-1] for name, value in params.items()}

    def name(self, component: str, arguments: tuple) -> str:
        """The dotted path that all parameters among the arguments share."""
        values = flat(dict(enumerate(arguments))).values()
        paths = [self._path[id(value)] for value in values if id(value) in self._path]
        part = ".".join(_shared(paths))
        return "head" if component == "linear" and part == "token_embedding" else part  # tied

    def mark(self, part: str, place: str, value: Any) -> None:
        if part and value is not None:
            self.marks.append(Mark(part, place, received(value, part)))

    def entering(self, part: str, arguments: tuple) -> tuple:
        """Marks the first array, and where it is a tensor of autograd also the gradient that it is handed."""
        at = next((i for i, value in enumerate(arguments) if hasattr(value, "dtype")), None)
        if at is None:
            return arguments
        x = arguments[at]
        self.mark(part, INPUT, x)
        if part and getattr(x, "requires_grad", False):
            x = x.view_as(x)  # of its own, so that the gradients of other readers are no part of it
            x.register_hook(lambda dx: self.mark(part, LEAVES, dx))
        return (*arguments[:at], x, *arguments[at + 1 :])

    def leaving(self, part: str, y: Any) -> None:
        """Marks a result, and where it is a tensor of autograd also the gradient that comes back to it."""
        self.mark(part, OUTPUT, y)
        if part and getattr(y, "requires_grad", False):
            y.register_hook(lambda dy: self.mark(part, ARRIVES, dy))

    def numbered(self, y: np.ndarray) -> dict[Key, np.ndarray]:
        """All marks in their order, the result between those of the forward and of the backward pass."""
        forward = [mark for mark in self.marks if mark.place in (INPUT, OUTPUT)]
        backward = [mark for mark in self.marks if mark.place in (ARRIVES, LEAVES)]
        found: dict[Key, np.ndarray] = {}
        for part, place, value in [*forward, Mark("", OUTPUT, y), *backward]:
            found[part, place, sum(key[:2] == (part, place) for key in found)] = value
        return found


def _by_hand(
    seen: Recorder, component: str, forward: Callable, backward: Callable
) -> tuple[Callable, Callable]:
    """A pair of functions that leave marks. A backward pass is known by the cache of its forward pass."""
    caches: dict[int, tuple[str, Any]] = {}  # with the cache itself, lest its id is given away again

    @wraps(forward)
    def marked_forward(*arguments: Any, **more: Any) -> tuple:
        part = seen.name(component, arguments)
        y, cache = forward(*seen.entering(part, arguments), **more)
        seen.leaving(part, y)
        caches[id(cache)] = (part, cache)
        return y, cache

    @wraps(backward)
    def marked_backward(dy: Any, cache: Any, *more: Any) -> Any:
        part, _ = caches[id(cache)]
        seen.mark(part, ARRIVES, dy)
        gradients = backward(dy, cache, *more)
        dx = gradients[0] if isinstance(gradients, tuple) else gradients
        if not isinstance(dx, dict):
            seen.mark(part, LEAVES, dx)
        return gradients

    return marked_forward, marked_backward


def _by_autograd(seen: Recorder, component: str, function: Callable) -> Callable:
    @wraps(function)
    def marked(*arguments: Any, **more: Any) -> Any:
        part = seen.name(component, arguments)
        y = function(*seen.entering(part, arguments), **more)
        seen.leaving(part, y)
        return y

    return marked


@contextmanager
def _functions(seen: Recorder, modules: list[Any]) -> Iterator[None]:
    """Puts marking functions in the place of components, wherever these modules call them by name."""
    pairs: dict[str, tuple[Callable, Callable]] = {}  # one for all modules, which share its caches
    with ExitStack() as stack:
        for module, component in product(modules, WATCHED):
            names = (f"{component}_forward", f"{component}_backward")
            if all(hasattr(module, name) for name in names):
                if component not in pairs:
                    pairs[component] = _by_hand(seen, component, *(getattr(module, name) for name in names))
                for name, marked in zip(names, pairs[component], strict=True):
                    stack.enter_context(patch.object(module, name, marked))
            elif callable(getattr(module, component, None)):
                marked = _by_autograd(seen, component, getattr(module, component))
                stack.enter_context(patch.object(module, component, marked))
        yield


@contextmanager
def _modules(seen: Recorder) -> Iterator[None]:
    """Marks of all PyTorch modules with parameters, called by their names within the outermost."""
    from torch.nn.modules import module as hooks

    names: dict[int, str] = {}

    def enter(module: Any, inputs: tuple) -> tuple | None:
        if id(module) not in names:  # the outermost comes first
            names.update({id(part): name for name, part in module.named_modules()})
        return seen.entering(names[id(module)], inputs) if has_parameters(module) else None

    def leave(module: Any, inputs: tuple, y: Any) -> None:
        if has_parameters(module):
            seen.leaving(names[id(module)], y)

    def has_parameters(module: Any) -> bool:
        return next(module.parameters(), None) is not None

    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _params(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(value for value in arguments.values() if isinstance(value, dict))


def _of_reference(case: "Case", arguments: Mapping[str, Any], dy: np.ndarray) -> dict[Key, np.ndarray]:
    seen = Recorder(_params(arguments))
    modules = [module for name, module in sys.modules.items() if name.startswith("ref_numpy.")]
    with _functions(seen, modules):
        y = run_reference(case.component, arguments, dy).y
    return seen.numbered(y)


def _of_backend(
    target: "Target", case: "Case", arguments: Mapping[str, Any], dy: np.ndarray, precision: str
) -> dict[Key, np.ndarray]:
    """Of its modules, if it has any; otherwise of its functions."""
    recorders: list[Recorder] = []

    @contextmanager
    def watch(placed: Mapping[str, Any]) -> Iterator[None]:
        recorders.extend((Recorder({}), Recorder(_params(placed))))
        with _modules(recorders[0]), _functions(recorders[1], [target.backend.module]):
            yield

    device = target.runs_on(case.component, precision)
    dtype = PRECISIONS[precision].torch_dtype
    y = target.backend.run(case.component, arguments, dy, dtype, device, watch).y
    by_modules, by_functions = recorders
    return (by_modules if by_modules.marks else by_functions).numbered(y)


def first_parting(target: "Target", case: "Case", wrong: list[str]) -> str:
    """One paragraph: the first component, forward and then backward, whose values differ in float64.

    wrong are the names of the results that do.
    """
    arguments, dy = case.arguments, case.cotangent()
    reference = _of_reference(case, arguments, dy)
    backend = _of_backend(target, case, arguments, dy, "float64")
    scale = max(float(np.abs(value).max(initial=0)) for value in reference.values())
    before = None
    shared = [key for key in reference if key in backend]
    for key in shared:
        got, want = backend[key], reference[key]
        if got.shape != want.shape or not (np.abs(got - want) <= mathematics(want, scale)).all():
            return _told(case.component, before, key)
        before = key
    if len(shared) == 1:
        return (
            "None of its parts could be watched: they are no modules or functions with the reference's names."
        )
    own = {name.partition(".")[2].rpartition(".")[0] for name in wrong}
    first = next((part for part, place, _ in reference if place == ARRIVES and part in own), None)
    if first is None:
        return "In float64 all its parts agree."
    return (
        f"FIRST PART TO DIFFER, in the order of execution: {first}, in the gradients of its parameters.\n"
        "All that flows between the parts agrees, forward and backward."
    )


def _told(component: str, before: Key | None, parted: Key) -> str:
    part, place, _ = parted
    culprit = part
    if place in (INPUT, ARRIVES):  # what lies between this part and the one before it
        culprit = ".".join(_shared([before[0].split("."), part.split(".")])) if before else ""
    if before is None:
        agreed = "Nothing before it was watched"
    else:
        agreed = f"{before[1]} {before[0]}".strip() + " still agrees"
    there = f"{place} {part}" if part else "the result"
    return (
        f"FIRST PART TO DIFFER, in the order of execution: {culprit or component}.\n"
        f"{agreed[0].upper()}{agreed[1:]}, {there} does not."
    )
