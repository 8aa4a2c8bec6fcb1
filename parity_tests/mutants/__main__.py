"""python -m parity_tests.mutants: every mutant of the reference has to be killed, or explained.

--half torch_impl changes the fast half instead, of which nothing is explained: much that survives there is a
matter of speed, or of devices that are not here. The rest are holes.
"""

import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from parity_tests.mutants import explained
from parity_tests.mutants.mutate import Mutant, mutants
from parity_tests.mutants.pool import Pool
from parity_tests.mutants.publish import Found, counted, page
from parity_tests.mutants.state import State, digest
from parity_tests.mutants.worker import HOUSE, Task

PROGRAM = "parity_tests.mutants"
# Files that have more than the test of their own name.
TESTS = {
    "bpe_format": ("parity_tests/test_bpe_format.py", "parity_tests/test_bpe.py"),
    "optim": ("parity_tests/test_optim.py", "parity_tests/test_muon.py"),
}
HEALTHY_LIMIT = 300.0  # seconds for the tests without a mutant
PATIENCE = 3.0  # a mutant may take so many times as long as the healthy code ...
GRACE = 5.0  # ... and so many seconds more


@dataclass(frozen=True)
class Options:
    """The command line of this module."""

    only: tuple[str, ...] = ()
    """Files, such as attention, or patterns such as "b*"; all by default."""
    half: Literal["ref_numpy", "torch_impl"] = "ref_numpy"
    """What is changed: the reference, or the components of the fast half."""
    jobs: int = os.cpu_count() or 1
    """Processes at a time."""
    out: Path | None = None
    """Folder for mutants.md, and mutants.jsonl from which a run that was stopped goes on; none by default."""
    minutes: float = 0.0
    """Stop after so many; 0 means no limit."""
    sample: int = 0
    """Run so many mutants of a file, drawn at random and always the same; 0 means no limit."""


def components(only: Sequence[str], half: str) -> list[str]:
    """The files that are meant. Raises InputError for a name that fits none."""
    from torch_impl.training.files import InputError

    files = (path.stem for path in (HOUSE / half).glob("[!_]*.py"))
    there = sorted(name for name in files if (HOUSE / "parity_tests" / f"test_{name}.py").exists())
    for pattern in only:
        if not any(fnmatch(name, pattern) for name in there):
            near = get_close_matches(pattern, there, 1, cutoff=0)
            raise InputError(f"--only {pattern} is no component of {half}; the nearest is {near[0]}")
    return [name for name in there if not only or any(fnmatch(name, pattern) for pattern in only)]


def tests_of(file: str) -> tuple[str, ...]:
    stem = Path(file).stem
    return TESTS.get(stem, (f"parity_tests/test_{stem}.py",))


def judged(pool: Pool, file: str, some: Sequence[Mutant], state: State) -> Iterator[None]:
    """Puts the verdicts on mutants of one file into the state, as they come.

    The tests are run on the healthy code first, for what fails anyway kills nothing.
    Raises InputError where a test fails without a mutant.
    """
    from torch_impl.training.files import InputError

    tests = tests_of(file)
    tested = digest(tests)
    healthy = Mutant(file, 0, "", "", (HOUSE / file).read_text(encoding="utf-8"))
    if not state.settled(healthy, tested):
        [(_, verdict)] = pool.verdicts([Task(tests)], HEALTHY_LIMIT)
        if verdict.killed_by:
            failure = f"{verdict.killed_by}: {verdict.message}"
            raise InputError(f"{', '.join(tests)} does not pass without any mutant: {failure}")
        state.add(healthy, tested, verdict)
    limit = GRACE + PATIENCE * state.verdict(healthy).seconds
    module = ".".join(Path(file).with_suffix("").parts)
    tasks = [Task(tests, module, mutant.source) for mutant in some]
    for index, verdict in pool.verdicts(tasks, limit):
        state.add(some[index], tested, verdict)
        yield


def run(options: Options, by_file: dict[str, list[Mutant]], state: State) -> bool:
    """Runs what the state does not know. False where the time ran out before."""
    pending = {}
    for file, some in by_file.items():
        tested = digest(tests_of(file))
        # In a random order that never changes: what is run of a file is a fair sample of it at any time.
        drawn = random.Random(0).sample(some, min(options.sample or len(some), len(some)))
        pending[file] = [mutant for mutant in drawn if not state.settled(mutant, tested)]
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    total = sum(len(some) for some in pending.values())
    with Pool(options.jobs) as pool, tqdm(total=total, unit="mutant") as bar:
        for file, some in pending.items():
            if not some:
                continue
            bar.set_description(Path(file).stem)
            with closing(judged(pool, file, some, state)) as verdicts:
                for _ in verdicts:
                    bar.update()
                    if time.monotonic() > end:
                        return False
    return True


def main(arguments: list[str]) -> int:
    """The exit code: 0 where all were killed or explained, 1 where not, 2 for a mistake, 130 for Ctrl-C."""
    from torch_impl.training.files import InputError
    from torch_impl.training.flags import parse_flags

    try:
        options = parse_flags(
            Options(),
            arguments,
            "python -m parity_tests.mutants",
            "Change each operator, number and condition in turn, and see whether the tests notice.",
        )
        if options.jobs < 1:
            raise InputError(f"--jobs is {options.jobs}, but must be at least 1")
        for name, value in {"minutes": options.minutes, "sample": options.sample}.items():
            if value < 0:
                raise InputError(f"--{name} is {value}, but must be 0 (no limit) or more")
        files = [f"{options.half}/{name}.py" for name in components(options.only, options.half)]
        try:
            library = f"cosmic-ray {version('cosmic-ray')}"
            by_file = {
                file: list(mutants(file, (HOUSE / file).read_text(encoding="utf-8")))
                for file in tqdm(files, "changing", unit="file", leave=False)
            }
        except ImportError:
            raise InputError(
                "this needs cosmic-ray, which is not installed: pip install cosmic-ray"
            ) from None
        explanations = explained.read()
        stale = [
            line for file in files for line in explained.without_mutant(explanations, file, by_file[file])
        ]
        if stale:
            raise InputError(f"equivalent.toml explains what is no mutant: {'; '.join(stale)}")
        state = State(options.out / "mutants.jsonl" if options.out else None)
        complete = run(options, by_file, state)
    except (InputError, OSError) as error:  # OSError: the folder cannot be written
        print(f"mutants: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        further = "" if options.out is None else "; the same command goes on from here"
        print(f"mutants: interrupted{further}", file=sys.stderr)
        return 130
    found = {
        file: [Found(m, state.verdict(m), explanations.get(m.change, "")) for m in some]
        for file, some in by_file.items()
    }
    if options.out is not None:
        (options.out / "mutants.md").write_text(page(found, library), encoding="utf-8")
    everything = [each for some in found.values() for each in some]
    good = complete
    survivors = {each.mutant.change for each in everything if each.survived}  # the same text may stand twice
    for each in everything:
        if each.survived and not each.explained:
            print(f"survived: {each.mutant}")
            good = False
        elif each.killed and each.why and each.mutant.change not in survivors:
            print(f"explained as no bug, but killed by {each.verdict.killed_by}: {each.mutant}")
            good = False
    print(counted(everything))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
