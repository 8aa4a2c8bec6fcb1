"""The README keeps its promises: its links lead somewhere, and its transcript still shows the code."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity_tests.disagreement import Disagreement
from parity_tests.parity import Case
from parity_tests.strategies import seeded

HOUSE = Path(__file__).parent.parent
README = (HOUSE / "README.md").read_text(encoding="utf-8")


def line(path: str, number: str) -> str:
    return (HOUSE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip()


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 50
    assert [link for link in links if not (HOUSE / link).exists()] == []


def test_every_component_stands_in_the_table():
    for path in (HOUSE / "ref_numpy").glob("[!_]*.py"):
        assert f"(ref_numpy/{path.name})" in README


def test_the_debugger_stops_where_the_transcript_says():
    stops = re.findall(r"> (ref_numpy/\w+\.py)\((\d+)\)(\w+)\(\)\n    -> (.*)\n", README)
    assert len(stops) == 5
    for path, number, function, code in stops:
        assert line(path, number) == code, f"{path}:{number}"
        above = (HOUSE / path).read_text(encoding="utf-8").splitlines()[: int(number)]
        assert [text for text in above if text.startswith("def ")][-1].startswith(f"def {function}(")
    assert re.findall(r"break (ref_numpy/\w+\.py:\d+)", README) == [
        f"{path}:{n}" for path, n, *_ in (stops[0], stops[1])
    ]


def test_the_suite_says_of_the_worked_example_what_stands_here(tmp_path):
    """The module with its bug fails in these words, and with the line that mends it passes."""
    module = re.search(r"```python\n(# my_norm\.py\n.*?)```", README, re.DOTALL)[1]
    mended = re.search(r"```python\n( +scale = .*?\n)```", README, re.DOTALL)[1]
    said = re.findall(r"^    E +(.*)$", README, re.MULTILINE)
    path = tmp_path / "my_norm.py"
    path.write_text(module, encoding="utf-8")
    # By its norms alone: the other tests would only be skipped.
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HOUSE / "parity_tests" / "test_layernorm.py"),
        "-n0",
        "-k",
        "test_parity",
    ]
    done = subprocess.run(
        [*command, "--backend", "my_norm", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(said) > 5 and [line for line in said if line not in done.stdout] == []
    case = Case("rmsnorm", {"x": seeded((3, 5), "normal", 1), "weight": np.arange(5.0), "epsilon": 1e-5})
    with pytest.raises(Disagreement, match="not the same mathematics"):
        case.judge(str(path))
    path.write_text(module.replace(re.search(r" +scale = .*\n", module)[0], mended), encoding="utf-8")
    for precision in ("float64", "float32", "bfloat16"):
        case.judge(str(path), precision=precision)
