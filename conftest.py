"""Shapes in signatures are checked once for each kind of call.

A check takes longer than a small component does, and the suite makes the same calls again and again. What is
checked are the types, dtypes and shapes of arguments and result: where a function has been called with such
arguments before, and all were found right, it is called as it is.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial, wraps

import jaxtyping
from jaxtyping._decorator import jaxtyped as checked_each_time  # whatever stands in its place in jaxtyping


def _kind(value: object) -> object:
    """What a signature sees of an argument; of a list or a dict it is the first item."""
    kind = type(value)
    if hasattr(kind, "dtype") and hasattr(kind, "shape"):
        return kind, value.dtype, value.shape
    if isinstance(value, tuple):
        return kind, *map(_kind, value)
    if isinstance(value, list | dict):
        return kind, _kind(next(iter(value.items() if isinstance(value, dict) else value), None))
    return kind


def _checked_once(function: Callable | None = None, *, typechecker: Callable) -> Callable:
    """jaxtyping.jaxtyped, which --jaxtyping-packages writes before every function and class."""
    if function is None:
        return partial(_checked_once, typechecker=typechecker)
    if not inspect.isfunction(function):
        return checked_each_time(function, typechecker=typechecker)
    if "<locals>" in function.__qualname__:  # made anew at each call of another, and so would be its check
        return function
    checked: Callable | None = None  # to make it takes a millisecond: not for the many that are never called
    seen: set[object] = set()

    @wraps(function)
    def call(*arguments: object, **named: object) -> object:
        __tracebackhide__ = True
        torch = sys.modules.get("torch")
        if torch is not None and torch.compiler.is_compiling():
            return function(*arguments, **named)
        kind = _kind(arguments), _kind(tuple(named.items()))
        if kind in seen:
            return function(*arguments, **named)
        nonlocal checked
        checked = checked or checked_each_time(function, typechecker=typechecker)
        result = checked(*arguments, **named)
        seen.add(kind)
        return result

    return call


jaxtyping.jaxtyped = _checked_once
