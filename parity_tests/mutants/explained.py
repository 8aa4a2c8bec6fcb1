"""The survivors that are no bugs, each with its reason: equivalent.toml, read and held against the code."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from parity_tests.mutants.mutate import Mutant

EQUIVALENT = Path(__file__).parent / "equivalent.toml"

Explanations = dict[tuple[str, str, str], str]  # (file, the line, what it becomes): why that is no bug


def read(path: Path = EQUIVALENT) -> Explanations:
    """What is explained: by a line's text and not by its number, so that it moves with the line."""
    found = {}
    for component, entries in tomllib.loads(path.read_text(encoding="utf-8")).items():
        for entry in entries:
            for before, after in entry["mutants"]:
                found[f"ref_numpy/{component}.py", before, after] = entry["why"]
    return found


def without_mutant(explanations: Explanations, file: str, mutants: Sequence[Mutant]) -> list[str]:
    """What is explained of a file, and is no mutant of it (any more)."""
    there = {mutant.change for mutant in mutants}
    return [
        f"{name}: {before} -> {after}"
        for name, before, after in explanations
        if name == file and (name, before, after) not in there
    ]
