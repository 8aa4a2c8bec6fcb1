"""The mutation tool makes the changes that it says, and its verdicts are those of the tests."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from parity_tests.mutants import explained
from parity_tests.mutants.__main__ import main
from parity_tests.mutants.mutate import Mutant, mutants
from parity_tests.mutants.pool import TIME_LIMIT, Pool
from parity_tests.mutants.publish import Found, counted, page
from parity_tests.mutants.state import State
from parity_tests.mutants.worker import Task, Verdict

HOUSE = Path(__file__).parent.parent

needs_cosmic_ray = pytest.mark.skipif(find_spec("cosmic_ray") is None, reason="cosmic-ray is not installed")


def test_a_mutant_is_killed_an_equivalent_one_survives_and_one_without_end_is_stopped():
    """The first two in one process: what was planted for the first must be gone for the second."""
    file = HOUSE / "ref_numpy" / "alibi.py"
    source = file.read_text(encoding="utf-8")
    tests = ("parity_tests/test_alibi.py::test_published_slopes",)

    def task(old: str, new: str) -> Task:
        assert source.count(old) == 1
        return Task(tests, "ref_numpy.alibi", source.replace(old, new))

    with Pool(1) as pool:
        tasks = [task("(1, power + 1)", "(1, power + 2)"), task("-8 * h / power", "h * -8 / power")]
        verdicts = dict(pool.verdicts(tasks, 60.0))
        assert verdicts[0].killed_by == "test_published_slopes" and "assert" in verdicts[0].message
        assert verdicts[1].killed_by == ""
        [(_, endless)] = pool.verdicts([task("return tuple(", "while True: tuple(")], 0.5)
        assert endless.killed_by == TIME_LIMIT
    assert file.read_text(encoding="utf-8") == source


@needs_cosmic_ray
def test_mutants_change_what_a_program_does_and_nothing_else():
    source = '''"""Double: 2 x + 1."""

from math import floor

HALF: float | None = 0.5


def f(x: "Int[Array, '3']", *, least: int | None = None) -> int | None:
    """Returns 1 + 2."""
    if x < 0:
        raise ValueError(f"{x + 1} is not 3")
    return floor(
        x
        * HALF
    )


if __name__ == "__main__":
    print(f(1 + 1))
'''
    found = {(mutant.line, mutant.before, mutant.after) for mutant in mutants("x.py", source)}
    assert found == {
        (5, "HALF: float | None = 0.5", "HALF: float | None = 1.5"),
        (5, "HALF: float | None = 0.5", "HALF: float | None = -0.5"),
        (10, "if x < 0:", "if not x < 0:"),
        *((10, "if x < 0:", f"if x {sign} 0:") for sign in ("==", "!=", "<=", ">", ">=")),
        *((10, "if x < 0:", f"if x < {number}:") for number in (1, -1)),
        *((14, "* HALF", f"{sign} HALF") for sign in "+-/"),
    }
    for mutant in mutants("x.py", source):
        assert mutant.source.count("\n") == source.count("\n")


def test_every_explanation_still_fits_the_code():
    for (file, line, after), why in explained.read().items():
        lines = [text.strip() for text in (HOUSE / file).read_text(encoding="utf-8").splitlines()]
        assert line in lines, f"equivalent.toml: {file} has no line {line}"
        assert after != line and why.endswith(".")


def mutant(line: int, after: str) -> Mutant:
    return Mutant("ref_numpy/x.py", line, "y = a * b", after, f"source {line} {after}")


def test_what_was_killed_is_not_run_again_and_a_survivor_only_by_other_tests(tmp_path):
    killed, survivor, new = mutant(1, "y = a + b"), mutant(2, "y = a - b"), mutant(3, "y = a / b")
    state = State(tmp_path / "out" / "mutants.jsonl")
    state.add(killed, "tests", Verdict("test_x", "1 is not 2", 0.1))
    state.add(survivor, "tests", Verdict("", "", 0.1))
    with (tmp_path / "out" / "mutants.jsonl").open("a", encoding="utf-8") as file:
        file.write('["cut off')
    again = State(tmp_path / "out" / "mutants.jsonl")
    assert again.verdict(killed) == Verdict("test_x", "1 is not 2", 0.1)
    assert again.settled(killed, "tests") and again.settled(killed, "other tests")
    assert again.settled(survivor, "tests") and not again.settled(survivor, "other tests")
    assert not again.settled(new, "tests")


def test_the_page_counts_and_tells():
    killed = Found(mutant(1, "y = a + b"), Verdict("test_x", "", 1.0), "")
    settled = Found(mutant(2, "y = b * a"), Verdict("", "", 1.0), "A product has no order.")
    survivor = Found(mutant(3, "y = a | b"), Verdict("", "", 1.0), "")
    unknown = Found(mutant(4, "y = a / b"), None, "")
    assert counted([killed, killed, settled]) == "killed 2 of 3, 1 explained"
    found = [killed, settled, survivor, unknown]
    assert counted(found) == "killed 1 of 4, 1 explained, 1 survived, 1 not run"
    text = page({"ref_numpy/x.py": found}, "cosmic-ray 8")
    assert "| [x](../ref_numpy/x.py) | 4 | 1 | 1 | 1 | 1 | test_x 1 |" in text
    assert "| ref_numpy/x.py:3 | `` y = a * b `` | `` y = a \\| b `` |" in text
    assert "| `` y = a * b `` | `` y = b * a `` | A product has no order. |" in text


def test_a_slip_in_the_command_is_named(capsys):
    assert main(["--only", "atention"]) == 2
    said = "--only atention is no component of ref_numpy; the nearest is attention"
    assert capsys.readouterr().err == f"mutants: error: {said}\n"
