"""A case as Python: what a person pastes into a file to see the same disagreement again.

Arrays are spelled out. Large ones are named by how strategies.py made them, if it did.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from parity_tests.strategies import origin_of


def code(
    component: str, arguments: Mapping[str, Any], seed: int, backend: str, device: str, precision: str
) -> str:
    """A script that makes the case, and judges it when it runs."""
    modules: dict[str, set[str]] = {"parity_tests.parity": {"Case"}}
    lines = [
        f"    {name!r}: {_argument(value, modules)},".replace("\n", "\n    ")
        for name, value in arguments.items()
    ]
    imports = [
        f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(modules.items())
    ]
    own = "\n".join(lines)
    if "inf" in own or "nan" in own:
        imports.insert(0, "from numpy import inf, nan")
    judged = f"case.judge({backend!r}, {device!r}, {precision!r})"
    return "\n".join(
        [
            "import numpy as np",
            *imports,
            "",
            f'case = Case("{component}", seed={seed}, arguments={{',
            own,
            "})",
            'if __name__ == "__main__":',
            f"    {judged}",
        ]
    )


def _argument(value: Any, modules: dict[str, set[str]]) -> str:
    if isinstance(value, dict):
        inner = "".join(f"    {name!r}: {_argument(v, modules)},\n" for name, v in value.items())
        return f"{{\n{inner}}}"
    if isinstance(value, np.ndarray):
        return _array(value, modules)
    if is_dataclass(value):  # a config: what is not as it would be anyway
        changed = {f.name: getattr(value, f.name) for f in fields(value)}
        default = type(value)()
        given = [f"{n}={v!r}" for n, v in changed.items() if v != getattr(default, n)]
        return f"{_imported(type(value), modules)}({', '.join(given)})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        _imported(type(value), modules)
        return repr(value)
    return repr(value.item() if isinstance(value, np.generic) else value)


def _imported(kind: type, modules: dict[str, set[str]]) -> str:
    modules.setdefault(kind.__module__, set()).add(kind.__name__)
    return kind.__name__


def _array(value: np.ndarray, modules: dict[str, set[str]]) -> str:
    origin = origin_of(value)
    if origin is not None:
        modules.setdefault("parity_tests.strategies", set()).add(origin.function)
        inner = ", ".join(_argument(argument, modules) for argument in origin.arguments)
        return f"{origin.function}({inner})" + ("" if origin.item is None else f"[{origin.item!r}]")
    if value.size == 0:
        return f"np.zeros({value.shape}, np.{value.dtype})"
    if value.size > 1 and (value == value.flat[0]).all():
        return f"np.full({value.shape}, {value.flat[0].item()!r})"
    return f"np.array({value.tolist()!r})"
