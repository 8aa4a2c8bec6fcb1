"""Running the suite for a report, and what is read out of its records."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

HOUSE = Path(__file__).parent.parent.parent


class Row(NamedTuple):
    """All cases of one component in one question, on one device."""

    component: str
    precision: str  # "float64": the question of mathematics; else that whose rounding was judged
    device: str
    units: np.ndarray  # the largest error of each case, in units of its bound, in rising order
    worst: str  # the result that had the largest error of all, such as "gradient of x"


class TestFile(NamedTuple):
    """How the tests of one file came out."""

    name: str  # test_attention
    passed: int
    skipped: int
    failed: list[tuple[str, str]]  # name and message


class Findings(NamedTuple):
    """All that a run of the suite has found."""

    rows: list[Row]
    files: list[TestFile]
    not_judged: list[str]  # why tests were skipped, each reason once
    seconds: float

    @property
    def failures(self) -> list[tuple[str, str]]:
        return [failure for file in self.files for failure in file.failed]

    @property
    def is_well(self) -> bool:
        return not self.failures and all(row.units[-1] <= 1 for row in self.rows)


class Unfinished(Exception):
    """The suite did not run; the message is one line."""


def run_suite(arguments: Sequence[str], folder: Path) -> Findings:
    """pytest with its own output on the terminal, its records in a folder. Raises Unfinished."""
    records, junit = folder / "records", folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", str(HOUSE / "parity_tests"), *arguments]
    command += ["--record", str(records), f"--junitxml={junit}", "-p", "no:cacheprovider", "--tb=line"]
    code = subprocess.run(command).returncode
    if code not in (0, 1) or not junit.is_file():  # 1: tests have failed
        raise Unfinished(f"the suite could not run: pytest has ended with {code}, for the reason above")
    files, not_judged, seconds = read_tests(junit)
    return Findings(read_records(records), files, not_judged, seconds)


def read_records(folder: Path) -> list[Row]:
    """The judgements of all processes, by component, precision and device."""
    units, worst = defaultdict(list), {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            judgement = json.loads(line)
            place = judgement["component"], judgement["precision"], judgement["device"]
            errors = {name: np.inf if unit is None else unit for name, unit in judgement["units"].items()}
            result = max(errors, key=errors.get)
            largest = errors[result]
            units[place].append(largest)
            worst[place] = max(worst.get(place, (-1.0, "")), (largest, result))
    return [Row(*place, np.sort(found), worst[place][1]) for place, found in sorted(units.items())]


def read_tests(junit: Path) -> tuple[list[TestFile], list[str], float]:
    """The tests by file, the reasons of those that were skipped, and how long all took."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    passed, skipped, failed = defaultdict(int), defaultdict(int), defaultdict(list)
    reasons = {}
    for case in suite.iter("testcase"):
        names = [part for part in case.get("classname", "").split(".") if part.startswith("test_")]
        file = names[0] if names else case.get("name").rpartition(".")[2]  # of a file that has no tests yet
        found = {child.tag: " ".join(child.get("message", "").split()) for child in case}
        if message := found.get("failure") or found.get("error"):
            failed[file].append((f"{file}::{case.get('name')}", message))
        elif "skipped" in found:
            skipped[file] += 1
            reasons[found["skipped"]] = None
        else:
            passed[file] += 1
    names = sorted({*passed, *skipped, *failed})
    files = [TestFile(name, passed[name], skipped[name], failed[name]) for name in names]
    return files, list(reasons), float(suite.get("time"))


class Kills(NamedTuple):
    """What became of the planted bugs when the zoo was last run."""

    date: str
    by_file: dict[str, tuple[int, int]]  # test file: caught, planted

    @property
    def total(self) -> tuple[int, int]:
        return sum(caught for caught, _ in self.by_file.values()), sum(n for _, n in self.by_file.values())


def read_kills(path: Path) -> Kills | None:
    """The zoo's last result, if there is one. Raises Unfinished for a file that is none."""
    if not path.is_file():
        return None
    by_file: dict[str, list[Any]] = defaultdict(list)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for bug in content["bugs"]:
            by_file[Path(bug["test"]).stem].append(bool(bug["killed"]))
        return Kills(str(content["date"]), {name: (sum(all_), len(all_)) for name, all_ in by_file.items()})
    except (ValueError, KeyError, TypeError) as error:
        raise Unfinished(f"{path} is no result of the zoo: {type(error).__name__} {error}") from None
