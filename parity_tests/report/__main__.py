"""python -m parity_tests.report: one page that says whether all is well here, and how close to the edge."""

import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parity_tests.report.collect import HOUSE, Unfinished, read_kills, run_suite
from parity_tests.report.draw import overview
from parity_tests.report.environment import environment
from parity_tests.report.page import Report, html, markdown
from torch_impl.training.files import InputError, replace_file
from torch_impl.training.flags import parse_flags

DEFAULT_BACKEND = "parity_tests.backends.fast"


@dataclass(frozen=True)
class Options:
    """The command line of this module; backend, device and dtype are those of the suite."""

    backend: str = DEFAULT_BACKEND
    """Module under test."""
    device: str = "cpu"
    """Where it runs: cpu, cuda, mps."""
    dtype: tuple[Literal["float32", "tf32", "bfloat16", "float16"], ...] = ()
    """Precisions whose rounding is judged; float32 and bfloat16 by default, tf32 alone."""
    profile: Literal["quick", "normal", "thorough"] = "normal"
    """How many cases a test draws: 8, 25, 1000."""
    select: str = ""
    """Only tests whose names fit, as pytest's -k."""
    jobs: str = "auto"
    """Processes at a time, as pytest's -n."""
    zoo: Path = HOUSE / "docs" / "zoo.json"
    """The zoo's last result, for the kill rate."""
    out: Path = Path("parity_report")
    """Folder for report.html, report.md and report.png."""


def suite_arguments(options: Options) -> list[str]:
    """What pytest is given."""
    arguments = ["--backend", options.backend, "--device", options.device]
    for precision in options.dtype:
        arguments += ["--dtype", precision]
    arguments += ["-k", options.select] if options.select else []
    return [*arguments, f"--hypothesis-profile={options.profile}", "-n", options.jobs]


def make(options: Options) -> bool:
    """Writes the report; returns whether all is well. Raises Unfinished."""
    kills = read_kills(options.zoo) if options.backend == DEFAULT_BACKEND else None
    arguments = suite_arguments(options)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        findings = run_suite(arguments, Path(folder))
    command = shlex.join(["pytest", "parity_tests", *arguments])
    report = Report(options.backend, command, findings, kills, environment(options.device))
    picture = overview(findings.rows)
    options.out.mkdir(parents=True, exist_ok=True)
    replace_file(options.out / "report.png", picture)
    replace_file(options.out / "report.md", markdown(report, "report.png").encode("utf-8"))
    replace_file(options.out / "report.html", html(report, picture).encode("utf-8"))
    return findings.is_well


def main(arguments: list[str]) -> int:
    """The exit code: 0 where all is well, 1 where it is not, 2 where there is no report, 130 for Ctrl-C."""
    try:
        options = parse_flags(
            Options(), arguments, "python -m parity_tests.report", "Run the suite, and write one page of it."
        )
        if options.out.exists() and not options.out.is_dir():
            raise InputError(f"--out {options.out} is a file; name a folder")
        is_well = make(options)
    except (InputError, Unfinished, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("report: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{'all is well' if is_well else 'something fails'}: see {options.out / 'report.html'}")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
