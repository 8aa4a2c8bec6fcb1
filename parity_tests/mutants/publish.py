"""The page about the mutants: what killed them, and why the others are no bugs."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from parity_tests.mutants.mutate import Mutant
from parity_tests.mutants.worker import Verdict

_NAMED = 4  # tests of a file that are named
_HEAD = """\
# Mutants of {half}

{counted}; {date}, Python {python}, {library}, {minutes:.0f} minutes of tests.
`python -m parity_tests.mutants --half {half} --out FOLDER` makes this page.

[cosmic-ray](https://cosmic-ray.readthedocs.io) changes one operator, number, comparison, condition or loop of
a file at a time, and each change has to be killed by the component's own test. An operator is replaced by its
like alone: a float has no `<<` or `|`. Signatures, the texts of errors, and programs (`main`) stay as they
are.

What has not been run of a file is a random part of it, drawn with a fixed seed."""


class Found(NamedTuple):
    """A mutant and what became of it."""

    mutant: Mutant
    verdict: Verdict | None  # None: not run yet
    why: str  # it is no bug; empty where nothing explains it

    @property
    def killed(self) -> bool:
        return self.verdict is not None and self.verdict.killed_by != ""

    @property
    def survived(self) -> bool:
        return self.verdict is not None and not self.killed

    @property
    def explained(self) -> bool:
        return self.survived and self.why != ""


def _code(text: str) -> str:
    """As code in a table's cell."""
    return f"`` {text} ``".replace("|", "\\|") if text else "(nothing)"


def _killers(found: Sequence[Found]) -> str:
    names = Counter(each.verdict.killed_by for each in found if each.killed)
    said = [f"{name} {count}" for name, count in names.most_common(_NAMED)]
    others = sum(names.values()) - sum(count for _, count in names.most_common(_NAMED))
    return ", ".join(said + [f"others {others}"] * (others > 0))


def counted(found: Sequence[Found]) -> str:
    """The line on which the command ends."""
    killed, explained = sum(each.killed for each in found), sum(each.explained for each in found)
    survived = sum(each.survived for each in found) - explained
    unknown = sum(each.verdict is None for each in found)
    more = [f"{survived} survived"] * (survived > 0) + [f"{unknown} not run"] * (unknown > 0)
    return ", ".join([f"killed {killed} of {len(found)}", f"{explained} explained", *more])


def page(by_file: Mapping[str, Sequence[Found]], library: str) -> str:
    """The page as Markdown."""
    everything = [each for found in by_file.values() for each in found]
    minutes = sum(each.verdict.seconds for each in everything if each.verdict is not None) / 60
    lines = [
        *_HEAD.format(
            half=Path(next(iter(by_file))).parts[0],
            counted=counted(everything).capitalize(),
            date=date.today().isoformat(),
            python=platform.python_version(),
            library=library,
            minutes=minutes,
        ).splitlines(),
        "",
        "| File | Mutants | Killed | Explained | Survived | Not run | Killed by |",
        "|---|---|---|---|---|---|---|",
    ]
    for file, found in by_file.items():
        explained = sum(each.explained for each in found)
        numbers = (
            len(found),
            sum(each.killed for each in found),
            explained,
            sum(each.survived for each in found) - explained,
            sum(each.verdict is None for each in found),
        )
        cells = [f"[{Path(file).stem}](../{file})", *(str(n or "") for n in numbers), _killers(found)]
        lines.append(f"| {' | '.join(cells)} |")
    left = [each.mutant for each in everything if each.survived and not each.explained]
    if left:
        lines += ["", "## Survived", "", "| Where | Line | Becomes |", "|---|---|---|"]
        lines += [f"| {m.file}:{m.line} | {_code(m.before)} | {_code(m.after)} |" for m in left]
    lines += ["", "## Survived, and why that is no bug"]
    for file, found in by_file.items():
        reasons = {each.mutant.change: each.why for each in found if each.explained}
        if reasons:
            lines += ["", f"### {Path(file).stem}", "", "| Line | Becomes | Why |", "|---|---|---|"]
        for (_, before, after), why in reasons.items():
            lines.append(f"| {_code(before)} | {_code(after)} | {why} |")
    return "\n".join(lines) + "\n"
