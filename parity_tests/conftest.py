"""Options and profiles of the suite. torch is imported by the tests that need it, not here."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings

from parity_tests import tally

# The cases are small: threads would only wait for each other. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARE = pytest.StashKey[float]()  # a drawn test's share of the time that is given
DEFAULT_BACKEND = "parity_tests.backends.fast"

_shared = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# Everybody's quick and normal runs draw the same cases, so that what is green here is green there; thorough
# ones draw others each time.
settings.register_profile("quick", max_examples=8, derandomize=True, **_shared)
settings.register_profile("normal", max_examples=25, derandomize=True, **_shared)
# The normal cases; a planted bug has to be found, and its smallest case is of no interest.
_found = (Phase.explicit, Phase.generate)
settings.register_profile("zoo", max_examples=30, derandomize=True, phases=_found, **_shared)
settings.register_profile("thorough", max_examples=1000, verbosity=Verbosity.normal, **_shared)
settings.load_profile("normal")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption("--backend", default=DEFAULT_BACKEND, help="module under test (default: %(default)s)")
    group.addoption(
        "--device", default="cpu", help="device it runs on: cpu, cuda, mps (default: %(default)s)"
    )
    group.addoption(
        "--dtype",
        action="append",
        choices=["float32", "tf32", "bfloat16", "float16"],
        help="precision whose rounding is judged; may be repeated (default: float32 and bfloat16)",
    )
    group.addoption(
        "--minutes",
        type=float,
        metavar="M",
        help="with the thorough profile: draw other cases, again and again, until M minutes have passed",
    )
    group.addoption(
        "--keep",
        action="store_true",
        help="write each failing case into parity_tests/kept, from where it is judged in every later run",
    )
    group.addoption(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="write every judgement as a line of JSON into this folder, a file for each process",
    )


@pytest.hookimpl(trylast=True)  # Hypothesis takes its own options first
def pytest_configure(config: pytest.Config) -> None:
    """A backend that does not fit, or a device that is not there, is one line, before any test runs."""
    if config.getoption("--minutes") is not None:
        if settings().derandomize:
            raise pytest.UsageError(
                "--minutes draws other cases each time: add --hypothesis-profile=thorough"
            )
        settings.register_profile("round", settings(), max_examples=100)
        settings.load_profile("round")
    backend, device = config.getoption("--backend"), config.getoption("--device")
    if device != "cpu":
        import torch

        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise pytest.UsageError(
                f"--device {device}: PyTorch has no such device here ({reason})"
            ) from None
    if backend != DEFAULT_BACKEND:
        from parity_tests.backend import Backend, BackendError
        from parity_tests.exchange import NotOffered

        try:
            Backend(backend).require_device(device)
        except (BackendError, NotOffered) as error:
            raise pytest.UsageError(f"--backend {backend}: {error}") from None
        except Exception as error:  # whatever a module does when it is imported
            told = f"{type(error).__name__}: {error}"
            raise pytest.UsageError(f"--backend {backend} cannot be imported: {told}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A backend of somebody's own is judged by the tests that look at it, and not by all others."""
    if config.getoption("--backend") != DEFAULT_BACKEND:
        others = [item for item in items if not _looks_at_the_backend(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    drawn = [item for item in items if _is_drawn(item)]
    for item in drawn:
        item.stash[SHARE] = 1 / len(drawn)


def _is_drawn(item: pytest.Item) -> bool:
    return getattr(getattr(item, "obj", None), "is_hypothesis_test", False)


def _repeat(item: pytest.Function, minutes: float) -> None:
    """Runs a test with other cases again and again, for its share of the time that all processes have."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    end = time.monotonic() + 60 * minutes * processes * item.stash[SHARE]
    arguments = {name: item.funcargs[name] for name in signature(item.obj).parameters}
    while time.monotonic() < end:
        item.obj(**arguments)


def _looks_at_the_backend(item: pytest.Item) -> bool:
    names = set(getattr(item, "fixturenames", ())) - set(
        getattr(getattr(item, "callspec", None), "params", ())
    )
    return bool({"agree", "offered"} & names)


def _precisions(config: pytest.Config) -> tuple[str, ...]:
    import torch

    precisions = tuple(config.getoption("--dtype") or ("float32", "bfloat16"))
    if "tf32" in precisions and len(precisions) > 1:
        pytest.exit("--dtype tf32 changes how float32 products are computed, so it has to be judged alone", 4)
    torch.set_float32_matmul_precision("high" if precisions == ("tf32",) else "highest")
    return precisions


@contextmanager
def _written(folder: Path | None) -> Iterator[Callable[[tuple], None]]:
    """What writes judgements down, if they are asked for."""
    if folder is None:
        yield lambda judgement: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.jsonl"
    with (folder / name).open("a", encoding="utf-8") as file:
        yield lambda judgement: print(_as_json(judgement), file=file)


def _as_json(judgement) -> str:
    """JSON has no infinity: null stands for it."""
    units = {name: unit if math.isfinite(unit) else None for name, unit in judgement.units.items()}
    return json.dumps({**judgement._asdict(), "units": units}, allow_nan=False)


@pytest.fixture(scope="session")
def ours(request: pytest.FixtureRequest):
    """torch_impl, on the device and in the precisions that were asked for, whatever backend is under test."""
    from parity_tests import parity

    config = request.config
    return parity.target(DEFAULT_BACKEND, config.getoption("--device"), _precisions(config))


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest):
    """What the suite is pointed at."""
    from parity_tests import parity

    config = request.config
    backend, device = config.getoption("--backend"), config.getoption("--device")
    with _written(config.getoption("--record")) as write:

        def record(judgement: parity.Judgement) -> None:
            tally.judged(judgement.component, judgement.precision)
            write(judgement)

        listeners = {"record": record, "declined": tally.declined}
        yield parity.target(backend, device, _precisions(config), **listeners)


@pytest.fixture(scope="session")
def offered(target):
    """offered(component): the target, if its backend has the component; otherwise the test is skipped."""

    def require(component: str):
        __tracebackhide__ = True
        if not target.backend.offers(component):
            tally.declined(component, "", "")
            pytest.skip(f"{component} is not offered by {target.backend.name}")
        tally.asked(component)
        return target

    return require


@pytest.fixture(scope="session")
def agree(offered):
    """agree(component, **arguments): values and gradients are the reference's, and as well rounded."""
    from parity_tests import parity

    def check(component: str, seed: int = 0, /, judge_rounding: bool = True, **arguments) -> None:
        __tracebackhide__ = True
        parity.require_parity(offered(component), parity.Case(component, arguments, seed), judge_rounding)

    return check


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """What was judged in a test, and what the backend declined, goes into its report.

    A test in which a precision that was asked for was declined throughout counts as skipped.
    """
    from parity_tests.exchange import NotOffered

    tally.begin()
    failed = True
    try:
        result = yield
        minutes = pyfuncitem.config.getoption("--minutes")
        if minutes is not None and _is_drawn(pyfuncitem):
            _repeat(pyfuncitem, minutes)
        failed = False
    except NotOffered as refusal:
        failed = False
        pytest.skip(f"not offered: {refusal}")
    except pytest.skip.Exception:
        failed = False
        raise
    finally:
        pyfuncitem.user_properties.append(("parity", tally.as_lines(failed)))
    asked = set(pyfuncitem.config.getoption("--dtype") or ())
    if unjudged := tally.never_judged(asked):
        pytest.skip(unjudged)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failing case as a script stands by itself below the failure, to be copied as it is, or is kept."""
    report = yield
    script = getattr(call.excinfo.value, "script", None) if call.excinfo else None
    if script:
        report.sections.append(("The case, as a script for the folder of parity_tests", script))
        if item.config.getoption("--keep") and item.path.stem != "test_kept":  # which are kept already
            name = f"{item.originalname}_{hashlib.sha256(script.encode()).hexdigest()[:8]}.py"
            (Path(__file__).parent / "kept" / name).write_text(script + "\n", encoding="utf-8")
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    """What the backend offers and how it came out."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    lines = [
        line
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, tallied in report.user_properties
        if name == "parity"
        for line in tallied
    ]
    if lines:
        backend, device = (terminalreporter.config.getoption(name) for name in ("--backend", "--device"))
        terminalreporter.section(f"parity of {backend} with the reference")
        for line in tally.summary(lines, device):
            terminalreporter.write_line(line)
