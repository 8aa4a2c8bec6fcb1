"""The kill matrix on paper: zoo.json for programs, zoo.md for people, zoo.png at a glance."""

import json
import platform
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from parity_tests.zoo.run import Outcome

SIDES = {"ref": "ref_numpy", "torch": "torch_impl"}


def publish(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Writes the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"date": date.today().isoformat(), "python": platform.python_version(), "bugs": rows(outcomes)}
    (folder / "zoo.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "zoo.md").write_text(page(content), encoding="utf-8")
    draw(content, folder / "zoo.png")


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One for each bug, in the order of their names; tests beside its own under `also`."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in sorted(outcomes, key=lambda o: (o.job.bug.name, o.job.test != o.job.bug.killed_by)):
        bug, test = outcome.job
        if test != bug.killed_by:
            found[bug.name]["also"][test] = outcome.failed
            continue
        found[bug.name] = {
            "name": bug.name,
            "sentence": bug.sentence,
            "file": bug.file,
            "test": test,
            "killed": outcome.killed,
            "by": outcome.failed,
            "message": outcome.message[:200],
            "seconds": outcome.seconds,
            "also": {},
        }
    return list(found.values())


def page(content: dict[str, Any]) -> str:
    """The matrix as Markdown, a table for each test file."""
    bugs = content["bugs"]
    killed = sum(bug["killed"] for bug in bugs)
    slowest = max(bugs, key=lambda bug: bug["seconds"])
    lines = [
        "# The bug zoo",
        "",
        f"Killed {killed} of {len(bugs)} planted bugs, each by its component's own test; {content['date']}, "
        f"Python {content['python']}. `python -m parity_tests.zoo --out docs` makes this page; "
        "with `--matrix` it names not only the first test that fails, but all.",
        "",
        "![Time to the first failure, by component](zoo.png)",
        "",
        f"*Seconds* are those of pytest, its imports included; the longest took {slowest['seconds']:.0f} "
        f"(`{slowest['name']}`).",
    ]
    by_test = defaultdict(list)
    for bug in bugs:
        by_test[bug["test"]].append(bug)
    for test, some in sorted(by_test.items()):
        lines += [
            "",
            f"## [{Path(test).stem}](../{test})",
            "",
            "| Bug | What is wrong | Caught by | Seconds |",
        ]
        lines += ["|---|---|---|---|"]
        for bug in some:
            tests = ", ".join(f"`{name}`" for name in bug["by"]) or "**nothing**"
            tests += "".join(f"; {Path(file).stem}" for file, failed in bug["also"].items() if failed)
            name = bug["name"].replace("_", " ").replace(".", " · ")
            lines.append(f"| {name} | {bug['sentence']} | {tests} | {bug['seconds']:.1f} |".replace("|", "|"))
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], path: Path) -> None:
    """A dot for each bug: its component, its side, and how long it lived."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bugs = content["bugs"]
    components = sorted({Path(bug["test"]).stem.removeprefix("test_") for bug in bugs}, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 0.24 * len(components) + 1.6), layout="constrained")
    looks = {"ref": ("tab:blue", 0.16), "torch": ("tab:orange", -0.16)}
    for side, (color, lift) in looks.items():
        some = [bug for bug in bugs if bug["name"].startswith(f"{side}.")]
        places = [components.index(Path(bug["test"]).stem.removeprefix("test_")) + lift for bug in some]
        alive = [not bug["killed"] for bug in some]
        axes.scatter(
            [bug["seconds"] for bug in some], places, 18, color, alpha=0.8, label=f"planted in {SIDES[side]}"
        )
        survivors = [(bug["seconds"], place) for bug, place, a in zip(some, places, alive, strict=True) if a]
        if survivors:
            axes.scatter(*zip(*survivors, strict=True), 90, "none", edgecolors="red", label="survived")
    axes.set_yticks(range(len(components)), components)
    axes.set_ylim(-0.7, len(components) - 0.3)
    axes.set_xscale("log")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200) if t <= 2 * max(bug["seconds"] for bug in bugs)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("seconds of pytest, imports included")
    killed = sum(bug["killed"] for bug in bugs)
    axes.set_title(f"Killed {killed} of {len(bugs)} planted bugs, each by its component's own test")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
