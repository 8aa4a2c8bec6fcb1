"""Planting bugs: each in a copy of the project of its own, with a process that runs the component's test."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple
from xml.etree import ElementTree

from parity_tests.zoo.bug import Bug

HOUSE = Path(__file__).parent.parent.parent
NEEDED = ("ref_numpy", "torch_impl", "parity_tests", "train_gpu.py", "conftest.py", "pyproject.toml")

_TESTS_FAILED = 1  # pytest's exit code; others mean that it could not run
_LOOK = 0.2  # seconds between looks at the keyboard: a wait without end cannot be interrupted on Windows


class Job(NamedTuple):
    """A test file to be run on a project with one bug, or with none."""

    bug: Bug | None
    test: str


class Outcome(NamedTuple):
    """What became of a job."""

    job: Job
    failed: list[str]  # tests, the first to fail first
    message: str  # the first failure, in a line
    seconds: float  # that pytest took: until the first failure, if it was to stop there
    trouble: str  # why there is no verdict; empty where there is one

    @property
    def killed(self) -> bool:
        return bool(self.failed) and not self.trouble


class Runner:
    """Runs jobs on some processes at a time, and leaves nothing behind."""

    def __init__(self, jobs: int, every_test: bool, limit: float) -> None:
        self.jobs, self.every_test, self.limit = jobs, every_test, limit
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = Lock(), Event()

    def outcomes(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """The outcomes as they come. Whatever ends the iteration ends the processes as well."""
        with (
            tempfile.TemporaryDirectory(prefix="zoo-", ignore_cleanup_errors=True) as folder,
            ThreadPoolExecutor(self.jobs) as threads,
        ):
            try:
                waiting = {threads.submit(self._run, job, Path(folder)) for job in jobs}
                while waiting:
                    done, waiting = wait(waiting, _LOOK, FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            finally:
                self._stop()
                threads.shutdown(cancel_futures=True)

    def _stop(self) -> None:
        with self._lock:
            self._stopped.set()
            for process in self._running:
                process.kill()

    def _run(self, job: Job, folder: Path) -> Outcome:
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as copy:
            root = Path(copy)
            copy_project(root)
            try:
                if job.bug is not None:
                    job.bug.plant(root)
            except ValueError as error:
                return Outcome(job, [], "", 0.0, str(error))
            output, code = self._pytest(job.test, root, folder)
            return read_outcome(job, root / "report.xml", output, code)

    def _pytest(self, test: str, root: Path, folder: Path) -> tuple[str, int | None]:
        """What a run printed, and its exit code; None where it had to be ended."""
        command = [sys.executable, "-m", "pytest", test, "-n0", "--hypothesis-profile=zoo", "--tb=line"]
        command += ["--junitxml=report.xml", "-p", "no:randomly", "-p", "no:cacheprovider"]
        command += [] if self.every_test else ["-x"]
        settings = {
            "PYTHONDONTWRITEBYTECODE": "1",  # a stale one would hide the bug
            "PYTHONPATH": str(root),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
            "OMP_NUM_THREADS": "1",
        }
        with self._lock:
            if self._stopped.is_set():
                return "stopped", None
            process = subprocess.Popen(
                command,
                cwd=root,
                env=os.environ | settings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self._running.add(process)
        try:
            output, _ = process.communicate(timeout=self.limit)
            return output.decode("utf-8", errors="replace"), process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return f"it has not come to an end in {self.limit:.0f} seconds", None
        finally:
            with self._lock:
                self._running.discard(process)


def copy_project(to: Path) -> None:
    """What the tests need of this project; the user's own files stay where they are."""
    for name in NEEDED:
        if (HOUSE / name).is_dir():
            shutil.copytree(HOUSE / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(HOUSE / name, to / name)


def read_outcome(job: Job, report: Path, output: str, code: int | None) -> Outcome:
    """The verdict of a run by its report (JUnit's XML) and its exit code."""
    if code not in (0, _TESTS_FAILED):
        lines = [line for line in output.splitlines() if line.strip()]
        errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
        return Outcome(job, [], "", 0.0, [f"pytest has ended with {code}", *lines[-1:], *errors][-1])
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failed, message = [], ""
    for case in suite.iter("testcase"):
        failures = [child for child in case if child.tag in ("failure", "error")]
        if failures:
            message = message or " ".join(failures[0].get("message", "").split())
            failed.append(case.get("name"))
    return Outcome(job, list(dict.fromkeys(failed)), message, float(suite.get("time")), "")
