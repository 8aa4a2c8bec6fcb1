"""Cases that once failed, one in each file of kept: judged in every run, whatever the backend.

pytest parity_tests --hypothesis-profile=thorough --keep writes those that it finds there.
"""

import runpy
from pathlib import Path

import pytest

KEPT = sorted((Path(__file__).parent / "kept").glob("*.py"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_case(agree, path):
    case = runpy.run_path(str(path))["case"]
    agree(case.component, case.seed, **case.arguments)
