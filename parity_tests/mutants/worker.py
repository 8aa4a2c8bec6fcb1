"""A process that imports PyTorch and pytest once, and then runs tests on one mutant after the other."""

import ast
import contextlib
import gc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from beartype import beartype

HOUSE = Path(__file__).parent.parent.parent
MEMORY = 6 * 2**30  # bytes of one process: a list that a mutant lets grow for ever is not to take the machine

# The last of them waits for the collector of garbage, three times a run.
_NOT_LOADED = ("randomly", "cacheprovider", "faulthandler", "unraisableexception")
_ROOMS = ("ref_numpy", "torch_impl", "parity_tests")


class Task(NamedTuple):
    """Test files to be run, with another text for one module, or with none."""

    tests: tuple[str, ...]
    module: str = ""
    source: str = ""


class Verdict(NamedTuple):
    """What became of a task."""

    killed_by: str  # the first test that failed, or why none could say; empty where all passed
    message: str
    seconds: float


class _Planted(MetaPathFinder):
    """Imports one module with another text, in the way in which it would be imported otherwise."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(spec for spec in found if spec is not None)
        # Past the cache of bytecode, which knows the file on disk.
        spec.loader.get_code = lambda name: spec.loader.source_to_code(self.source.encode(), spec.origin)
        return spec


class _Listener:
    """A plugin of pytest: plants the mutant before a test is imported, and hears the first failure."""

    def __init__(self, task: Task) -> None:
        self.task, self.planted = task, _Planted(task.module, task.source)
        self.killed_by, self.message = "", ""

    def pytest_configure(self) -> None:
        if self.task.module:  # ahead of jaxtyping's finder, which has just been put there
            sys.meta_path.insert(0, self.planted)

    def pytest_collectreport(self, report: Any) -> None:
        self._hear(report, "import")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._hear(report, report.nodeid.rpartition("::")[2].partition("[")[0])

    def pytest_internalerror(self, excrepr: Any) -> None:
        self.killed_by = self.killed_by or "error of pytest"
        self.message = self.message or str(excrepr).strip().rpartition("\n")[2]

    def _hear(self, report: Any, name: str) -> None:
        if report.failed and not self.killed_by:
            self.killed_by = name
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr).strip().rpartition("\n")[2]
            self.message = " ".join(text.split())[:200]


@cache
def _importers() -> dict[str, set[str]]:
    """By module of the project: those that import it, anywhere in their text."""
    found: dict[str, set[str]] = {}
    for path in (path for room in _ROOMS for path in (HOUSE / room).rglob("*.py")):
        importer = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):  # from ref_numpy import alibi is an import of it
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for name in names:
                found.setdefault(name, set()).add(importer)
    return found


def _dependents(module: str) -> set[str]:
    """The module, and all that import it, directly or not."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {importer for name in new for importer in _importers().get(name, ())} - found
    return found


def _forget(module: str) -> None:
    """Unloads a module and what depends on it, and all tests, so that the next import reads them anew."""
    gone = _dependents(module)
    for name in list(sys.modules):
        is_test = name.startswith("parity_tests.") and not f"{name}.".startswith("parity_tests.mutants.")
        if name in gone or is_test:
            del sys.modules[name]
            package, _, own = name.rpartition(".")
            if package in sys.modules:
                vars(sys.modules[package]).pop(own, None)
    for _ in range(2):  # where a class is defined anew, beartype forgets the classes that it has seen
        beartype(type("Anew", (), {"__module__": __name__}))


def run(task: Task) -> Verdict:
    """Runs pytest in this process, and leaves no module behind that has to do with the mutant."""
    import pytest

    _forget(task.module)
    listener = _Listener(task)
    options = ["-x", "-n0", "--hypothesis-profile=zoo", "--tb=line", f"--rootdir={HOUSE}"]
    options += [f"-c{HOUSE / 'pyproject.toml'}"]
    options += [word for plugin in _NOT_LOADED for word in ("-p", f"no:{plugin}")]
    if "ref_numpy" in sys.modules:  # by an earlier run, whose hook for imports is still there
        options += ["--jaxtyping-packages="]
    begin = time.perf_counter()
    try:
        code = pytest.main([*options, *(str(HOUSE / test) for test in task.tests)], plugins=[listener])
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not listener.planted]
        _forget(task.module)
    killed_by = listener.killed_by or ("" if code == 0 else f"pytest ended with {int(code)}")
    return Verdict(killed_by, listener.message, time.perf_counter() - begin)


def _limit_memory() -> None:
    if importlib.util.find_spec("resource"):  # not on Windows
        import resource

        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def serve(connection: Connection, bytecode: str) -> None:
    """The life of a process: says None when it is ready, and then a verdict for each task.

    bytecode is a folder for it, so that none is written beside the project's files.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.dont_write_bytecode, sys.pycache_prefix = False, sys.pycache_prefix or bytecode
    _limit_memory()
    import hypothesis  # noqa: F401
    import torch  # noqa: F401

    gc.collect()
    gc.freeze()  # what is loaded now stays, and need not be looked through again
    connection.send(None)
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            connection.send(run(connection.recv()))
