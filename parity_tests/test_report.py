"""The parity report: what it reads out of a run, and that it tells good from bad at the first glance."""

import json
from pathlib import Path

import numpy as np
import pytest

from parity_tests.components import FILES
from parity_tests.report.__main__ import main
from parity_tests.report.collect import (
    Findings,
    Kills,
    Row,
    TestFile,
    Unfinished,
    read_kills,
    read_records,
    read_tests,
)
from parity_tests.report.draw import histogram, overview
from parity_tests.report.environment import environment
from parity_tests.report.page import Report, html, markdown, verdict

TestFile.__test__ = False  # not a test of ours


def report_of(units: list[float], failed: tuple[tuple[str, str], ...] = ()) -> Report:
    rows = [Row("rmsnorm", "bfloat16", "cpu", np.sort(units), "gradient of x")]
    files = [TestFile("test_layernorm", 4, 1, list(failed)), TestFile("test_bpe", 7, 0, [])]
    kills = Kills("2026-11-21", {"test_layernorm": (3, 4)})
    return Report("mine", "pytest parity_tests", Findings(rows, files, [], 9.0), kills, {"Python": "3.11"})


def test_the_verdict_says_how_close_to_the_edge():
    assert verdict(report_of([0.01, 0.5, 0.2])) == [
        "All is well: 11 tests pass, and in 3 cases no error exceeds its bound.",
        "Closest to the edge: rmsnorm in bfloat16 on cpu, whose gradient of x is off by 0.50 of what "
        "is allowed.",
        "Of 4 planted bugs the suite caught 3 (2026-11-21).",
    ]


def test_a_failure_is_said_first_and_shown():
    report = report_of([0.1, 3.0], (("test_layernorm::test_parity", "off by 2"),))
    assert verdict(report)[0] == "1 of 12 tests fail."
    for page in (html(report, b""), markdown(report, "report.png")):
        assert "off by 2" in page and "All is well" not in page
    assert 'class="verdict ill"' in html(report, b"") and 'class="verdict well"' in html(
        report_of([0.1]), b""
    )


def test_text_from_outside_stays_text():
    """A backend's name and messages may hold anything."""
    hostile = "<script>alert(1)</script>|`x`"
    report = report_of([2.0], ((hostile, hostile),))._replace(backend=hostile, environment={hostile: hostile})
    assert "<script>" not in html(report, b"") and "<script>" not in markdown(report, "report.png")
    assert "\\|\\`x\\`" in markdown(report, "report.png")


def test_records_of_all_processes_are_put_together(tmp_path: Path):
    """The worst result of a case is that case's; null, which is NaN somewhere, is the largest."""
    lines = [
        {
            "component": "rope",
            "precision": "float32",
            "device": "cpu",
            "units": {"y": 0.5, "gradient of x": 0.1},
        },
        {
            "component": "rope",
            "precision": "float32",
            "device": "cpu",
            "units": {"y": 0.2, "gradient of x": 0.7},
        },
        {"component": "alibi", "precision": "float64", "units": {"y": None, "gradient of x": 2.0}},
    ]
    lines = [{"device": "cpu", **line} for line in lines]
    (tmp_path / "gw0.jsonl").write_text("\n".join(map(json.dumps, lines[:1])) + "\n", encoding="utf-8")
    (tmp_path / "gw1.jsonl").write_text("\n".join(map(json.dumps, lines[1:])) + "\n", encoding="utf-8")
    alibi, rope = read_records(tmp_path)
    assert rope.units.tolist() == [0.5, 0.7] and rope.worst == "gradient of x"
    assert (
        alibi.units.tolist() == [np.inf] and alibi.worst == "y" and overview([alibi, rope])[:4] == b"\x89PNG"
    )


def test_results_of_tests_are_counted_by_file(tmp_path: Path):
    cases = [
        '<testcase classname="p.test_rope" name="test_a"/>',
        '<testcase classname="p.test_rope" name="test_b"><failure message="off&#10; by 2"/></testcase>',
        '<testcase classname="p.test_bpe" name="test_c"><skipped message="not offered"/></testcase>',
    ]
    path = tmp_path / "tests.xml"
    path.write_text(f'<testsuites><testsuite time="2.5">{"".join(cases)}</testsuite></testsuites>', "utf-8")
    files, reasons, seconds = read_tests(path)
    assert files == [
        TestFile("test_bpe", 0, 1, []),
        TestFile("test_rope", 1, 0, [("test_rope::test_b", "off by 2")]),
    ]
    assert reasons == ["not offered"] and seconds == 2.5


def test_components_know_their_test_file():
    assert (FILES["rmsnorm"], FILES["cross_entropy"]) == ("layernorm", "loss")
    assert all((Path(__file__).parent / f"test_{file}.py").is_file() for file in FILES.values())


def test_a_histogram_marks_what_is_beyond_the_bound():
    good, bad = (histogram(Row("x", "float32", "cpu", np.array([units]), "y")) for units in (0.9, 1.2))
    assert good.count("#c62828") == 1 and bad.count("#c62828") == 2  # the bound's line, and a bar


def test_the_environment_names_the_library_of_products():
    found = environment("cpu")
    assert found["Processor"] and found["BLAS of NumPy"] and found["OPENBLAS_CORETYPE"]


def test_the_zoos_result_may_be_missing_but_not_damaged(tmp_path: Path, capsys):
    assert read_kills(tmp_path / "none.json") is None
    (tmp_path / "zoo.json").write_text('{"bugs": [{}]}', encoding="utf-8")
    with pytest.raises(Unfinished, match="is no result of the zoo: KeyError"):
        read_kills(tmp_path / "zoo.json")
    assert main(["--zoo", str(tmp_path / "zoo.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
