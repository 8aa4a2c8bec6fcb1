"""What is known already: a line of JSON for each verdict, so that a run that was stopped goes on."""

import hashlib
import json
from pathlib import Path

from parity_tests.mutants.mutate import Mutant
from parity_tests.mutants.worker import HOUSE, Verdict


def digest(tests: tuple[str, ...]) -> str:
    """Of test files and of what they share."""
    files = [HOUSE / test for test in tests]
    files += sorted(path for path in (HOUSE / "parity_tests").glob("*.py") if not path.match("test_*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


class State:
    """Verdicts by mutant, in memory or in a file. A mutant is known by the whole text of its file."""

    def __init__(self, path: Path | None) -> None:
        """Raises OSError where the file cannot be read or written."""
        self._path = path
        self._known: dict[str, tuple[str, Verdict]] = {}  # with the digest of the tests
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            for line in file:
                if line.endswith("\n"):  # the last one may have been cut off
                    key, tests, *verdict = json.loads(line)
                    self._known[key] = tests, Verdict(*verdict)

    def verdict(self, mutant: Mutant) -> Verdict | None:
        return self._known[mutant.key][1] if mutant.key in self._known else None

    def settled(self, mutant: Mutant, tests: str) -> bool:
        """Killed, or a survivor of these very tests: one of others has to be tried again."""
        if mutant.key not in self._known:
            return False
        tried, verdict = self._known[mutant.key]
        return verdict.killed_by != "" or tried == tests

    def add(self, mutant: Mutant, tests: str, verdict: Verdict) -> None:
        self._known[mutant.key] = tests, verdict
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                print(json.dumps([mutant.key, tests, *verdict]), file=file)
