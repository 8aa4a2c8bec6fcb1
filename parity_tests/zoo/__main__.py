"""python -m parity_tests.zoo: every planted bug has to be caught by its component's own test."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from parity_tests.zoo import ZOO
from parity_tests.zoo.bug import Bug
from parity_tests.zoo.publish import publish
from parity_tests.zoo.run import Job, Outcome, Runner
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags


@dataclass(frozen=True)
class Options:
    """The command line of this module."""

    only: tuple[str, ...] = ()
    """Names of bugs, or patterns such as "ref.attention.*"; all by default."""
    jobs: int = os.cpu_count() or 1
    """Processes at a time."""
    matrix: bool = False
    """Run a component's test to its end, and list all that fail, not only the first."""
    also: tuple[str, ...] = ()
    """Further test files to run on each bug, such as parity_tests/test_block.py; they decide nothing."""
    out: Path | None = None
    """Folder for zoo.md, zoo.png and zoo.json; none by default."""
    limit: float = 300.0
    """Seconds after which a test is ended; that is no catch."""


def chosen(only: Sequence[str]) -> list[Bug]:
    """The bugs that are meant. Raises InputError for a name that fits none."""
    for pattern in only:
        if not any(fnmatch(bug.name, pattern) for bug in ZOO):
            near = get_close_matches(pattern, [bug.name for bug in ZOO], 1, cutoff=0)
            raise InputError(f"--only {pattern} is no bug; the nearest is {near[0]}")
    return [bug for bug in ZOO if not only or any(fnmatch(bug.name, pattern) for pattern in only)]


def run(options: Options, bugs: Sequence[Bug]) -> list[Outcome]:
    """Runs the tests without a bug first, for what fails anyway catches nothing; then each bug.

    Raises InputError where a test fails without a bug.
    """
    runner = Runner(options.jobs, options.matrix, options.limit)
    healthy = [Job(None, test) for test in sorted({bug.killed_by for bug in bugs} | set(options.also))]
    planted = [Job(bug, test) for bug in bugs for test in dict.fromkeys([bug.killed_by, *options.also])]
    outcomes = []
    with tqdm(total=len(healthy) + len(planted), unit="run") as bar:
        for outcome in runner.outcomes([*healthy, *planted]):
            bar.update()
            bug, test = outcome.job
            if bug is None:
                if outcome.failed or outcome.trouble:
                    found = outcome.trouble or f"{outcome.failed[0]}: {outcome.message}"
                    raise InputError(f"{test} does not pass without any bug: {found}")
                continue
            outcomes.append(outcome)
            if test == bug.killed_by and not outcome.killed:
                bar.write(f"{bug.name} survives: {outcome.trouble or bug.sentence}")
    return outcomes


def main(arguments: list[str]) -> int:
    """The exit code: 0 where all were caught, 1 where one was not, 2 for a mistake, 130 for Ctrl-C."""
    try:
        options = parse_flags(
            Options(),
            arguments,
            "python -m parity_tests.zoo",
            "Plant bugs in a copy of the project, each of which a test has to catch.",
        )
        if options.jobs < 1:
            raise InputError(f"--jobs is {options.jobs}, but must be at least 1")
        for test in options.also:
            if not Path(test).is_file():
                raise InputError(f"--also {test} is no file")
        bugs = chosen(options.only)
        outcomes = run(options, bugs)
    except InputError as error:
        print(f"zoo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130
    own = [outcome for outcome in outcomes if outcome.job.test == outcome.job.bug.killed_by]
    if options.out is not None:
        publish(outcomes, options.out)
    for outcome in own:
        if not outcome.killed:
            bug = outcome.job.bug
            print(f"survived: {bug.name} ({bug.file}; {bug.killed_by}): {outcome.trouble or bug.sentence}")
    killed = sum(outcome.killed for outcome in own)
    print(f"killed {killed} of {len(own)}")
    return 0 if killed == len(own) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
