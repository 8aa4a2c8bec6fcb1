"""The zoo's bugs still fit the code, and its verdicts are right."""

from collections import Counter
from pathlib import Path

import pytest

from parity_tests.test_house import DESCRIBED
from parity_tests.zoo import ZOO, run
from parity_tests.zoo.__main__ import chosen, main
from parity_tests.zoo.bug import Bug
from parity_tests.zoo.run import Job, Runner

HOUSE = Path(__file__).parent.parent


def test_every_bug_still_fits_the_code_and_can_be_imported():
    text = {bug.file: (HOUSE / bug.file).read_text(encoding="utf-8") for bug in ZOO}
    for bug in ZOO:
        assert text[bug.file].count(bug.old) == 1, f"{bug.name}: its text has changed in {bug.file}"
        changed = compile(text[bug.file].replace(bug.old, bug.new), bug.file, "exec")
        assert changed != compile(text[bug.file], bug.file, "exec"), f"{bug.name} changes no code"


def test_bugs_have_names_of_their_own_a_sentence_and_a_test():
    assert [name for name, n in Counter(bug.name for bug in ZOO).items() if n > 1] == []
    for bug in ZOO:
        assert bug.sentence.endswith("."), bug.name
        assert (HOUSE / bug.killed_by).is_file(), bug.name


def test_there_are_thirty_and_more_on_each_side():
    sides = Counter(bug.name.partition(".")[0] for bug in ZOO)
    assert sides.keys() == {"ref", "torch"} and min(sides.values()) >= 30


def test_every_component_has_a_bug_on_each_side():
    bugs = {bug.name.rpartition(".")[0] for bug in ZOO}
    for path in (HOUSE / "ref_numpy").glob("[!_]*.py"):
        if path.stem not in DESCRIBED:
            assert {f"ref.{path.stem}", f"torch.{path.stem}"} <= bugs


@pytest.fixture
def small_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one function and one test."""
    files = {
        "ref_numpy/x.py": "def double(x):\n    return 2 * x\n",
        "torch_impl/x.py": "",
        "train_gpu.py": "",
        "conftest.py": "",
        "pyproject.toml": "[tool.pytest.ini_options]\n",
        "parity_tests/conftest.py": "from hypothesis import settings\nsettings.register_profile('zoo')\n",
        "parity_tests/test_x.py": "from ref_numpy.x import double\n\n"
        "def test_two():\n    assert double(2) == 4\n\n"
        "def test_zero():\n    assert double(0) == 0\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(run, "HOUSE", tmp_path)
    return tmp_path


def bug(name: str, new: str) -> Bug:
    return Bug(
        f"ref.x.{name}", "A sentence.", "ref_numpy/x.py", "return 2 * x", new, "parity_tests/test_x.py"
    )


def test_a_verdict_needs_a_test_that_fails(small_house):
    """Caught is what fails a test; not what passes, cannot be imported, or never ends."""
    bugs = [
        bug("wrong", "return 3 * x"),
        bug("right", "return x + x"),
        bug("broken", "retur 2 * x"),
    ]
    jobs = [Job(bug, bug.killed_by) for bug in bugs]
    endless = bug("endless", "while True: pass")
    outcomes = [
        *Runner(3, False, 100.0).outcomes(jobs),
        *Runner(1, False, 3.0).outcomes([Job(endless, endless.killed_by)]),
    ]
    found = {outcome.job.bug.name: outcome for outcome in outcomes}
    wrong = found["ref.x.wrong"]
    assert wrong.killed and wrong.failed == ["test_two"] and "assert 6 == 4" in wrong.message
    assert not found["ref.x.right"].killed and not found["ref.x.right"].trouble
    assert not found["ref.x.broken"].killed and "SyntaxError" in found["ref.x.broken"].trouble
    assert not found["ref.x.endless"].killed and "3 seconds" in found["ref.x.endless"].trouble
    assert (small_house / "ref_numpy" / "x.py").read_text(encoding="utf-8").endswith("return 2 * x\n")


def test_a_bug_that_does_not_fit_is_said(small_house):
    with pytest.raises(
        ValueError, match=r"ref\.x\.gone: its text stands 0 times in ref_numpy/x\.py, not once"
    ):
        bug("gone", "return 2 * x")._replace(old="return 4 * x").plant(small_house)


def test_bugs_are_chosen_by_pattern_and_a_slip_is_named(capsys):
    assert {bug.file for bug in chosen(["ref.attention.*"])} == {"ref_numpy/attention.py"}
    assert chosen([]) == ZOO
    assert main(["--only", "ref.attention.scale_by_with"]) == 2
    said = "--only ref.attention.scale_by_with is no bug; the nearest is ref.attention.scale_by_width"
    assert capsys.readouterr().err == f"zoo: error: {said}\n"
