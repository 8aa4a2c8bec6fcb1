"""Options and profiles of the suite. torch is imported by the tests that need it, not here."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings

# The cases are small: threads would only wait for each other. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DEFAULT_BACKEND = "parity_tests.backends.fast"

_shared = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# Everybody's quick and normal runs draw the same cases, so that what is green here is green there; thorough
# ones draw others each time.
settings.register_profile("quick", max_examples=8, derandomize=True, **_shared)
settings.register_profile("normal", max_examples=30, derandomize=True, **_shared)
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
        "--record",
        type=Path,
        metavar="FOLDER",
        help="write every judgement as a line of JSON into this folder, a file for each process",
    )


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest):
    """What the suite is pointed at."""
    import torch

    from parity_tests import parity

    precisions = tuple(request.config.getoption("--dtype") or ("float32", "bfloat16"))
    if "tf32" in precisions and len(precisions) > 1:
        pytest.exit("--dtype tf32 changes how float32 products are computed, so it has to be judged alone", 4)
    torch.set_float32_matmul_precision("high" if precisions == ("tf32",) else "highest")
    backend, device = request.config.getoption("--backend"), request.config.getoption("--device")
    folder = request.config.getoption("--record")
    if folder is None:
        yield parity.target(backend, device, precisions)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.jsonl").open(
        "a", encoding="utf-8"
    ) as file:
        yield parity.target(
            backend,
            device,
            precisions,
            record=lambda judgement: print(json.dumps(judgement._asdict()), file=file),
        )


@pytest.fixture(scope="session")
def agree(target):
    """agree(component, **arguments): values and gradients are the reference's, and as well rounded."""
    from parity_tests import parity

    def check(component: str, seed: int = 0, judge_rounding: bool = True, **arguments) -> None:
        __tracebackhide__ = True
        if not target.backend.offers(component):
            pytest.skip(f"{component} is not offered by {target.backend.module.__name__}")
        parity.require_parity(target, component, arguments, seed, judge_rounding)

    return check
