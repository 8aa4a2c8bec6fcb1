"""Counts, in each test, what was judged and what the backend declined; and sums it up at the end of a run.

A tally travels with the test's report, from the process that ran it to the one that prints.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

# Of the running test: what it asked for, (component, precision) of its judgements, what was declined and why.
_asked: set[str] = set()
_judged: Counter[tuple[str, str]] = Counter()
_declined: Counter[tuple[str, str, str]] = Counter()

Line = tuple[str, str, str, int]  # component, precision, "passed", "failed" or why not, cases


def begin() -> None:
    """A new test."""
    _asked.clear()
    _judged.clear()
    _declined.clear()


def asked(component: str) -> None:
    """Of a component that is offered."""
    _asked.add(component)


def judged(component: str, precision: str) -> None:
    _judged[component, precision] += 1


def declined(component: str, precision: str, reason: str) -> None:
    """With an empty precision: the component is not offered at all."""
    _declined[component, precision, reason] += 1


def as_lines(failed: bool) -> list[Line]:
    """The running test's tally. Of a test that failed, all that it judged is in doubt, and what it asked for
    and did not come to judge has failed, in no precision."""
    lines = [(*key, "failed" if failed else "passed", cases) for key, cases in _judged.items()]
    if failed:
        silent = _asked - {component for component, _ in _judged} - {found[0] for found in _declined}
        lines += [(component, "", "failed", 1) for component in sorted(silent)]
    return lines + [(component, p, f"- {why}", cases) for (component, p, why), cases in _declined.items()]


def never_judged(asked: set[str]) -> str:
    """Why a test counts as skipped: all, or a precision that was asked for, was declined throughout."""
    for component, precision, reason in _declined:
        if (component, precision) not in _judged and (precision in asked or not _judged):
            return f"{component} is not offered in {precision}: {reason}"
    return ""


def summary(lines: Iterable[Line], device: str) -> list[str]:
    """What passed, what failed and what is not offered, a component in one of them for each precision."""
    cases: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for component, precision, outcome, count in lines:
        cases[component, precision][outcome] += count
    wholly = {
        component for (component, precision), found in cases.items() if not precision and found["failed"]
    }
    passed, failed, partly, lacking = (defaultdict(list) for _ in range(4))
    for (component, precision), outcomes in sorted(cases.items()):
        refused = [outcome.removeprefix("- ") for outcome in outcomes if outcome.startswith("- ")]
        if outcomes["failed"] or (component in wholly and outcomes["passed"]):
            failed[component] += [precision] * bool(precision)
        elif not outcomes["passed"]:
            lacking[precision, refused[0]].append(component)
        else:
            passed[component].append(precision)
            if refused:
                count = f"{outcomes.total() - outcomes['passed']} of {outcomes.total()} cases"
                partly[component, f"{count}: {'; '.join(refused)}"].append(precision)
    rows = [("passed", line) for line in _together(passed)] + [("failed", line) for line in _together(failed)]
    for (component, why), found in partly.items():
        rows.append(("not offered", f"{component} in {', '.join(found)}, {why}"))
    for (precision, reason), names in lacking.items():
        line = (
            ", ".join(names) + (f" in {precision}" if precision else "") + (f": {reason}" if reason else "")
        )
        rows.append(("not offered", line))
    rows.append(("", f"float64 is the question of mathematics, the others that of rounding, on {device}"))
    return [f"{title:13}{line}" for title, line in rows]


def _together(precisions: dict[str, list[str]]) -> list[str]:
    """Components with the same precisions share a line."""
    together = defaultdict(list)
    for component, found in precisions.items():
        together[", ".join(found)].append(component)
    return [", ".join(names) + (f" (in {found})" if found else "") for found, names in together.items()]
