"""Some worker processes: tasks go in, verdicts come out as they are ready, and who hangs is ended."""

import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from parity_tests.mutants.worker import Task, Verdict, serve

TIME_LIMIT = "the time limit"
CRASH = "a crash"
STARTING = 120.0  # seconds for the imports of a process
RUNS = 150  # after which a process is replaced, for modules that were unloaded never go entirely

_LOOK = 0.2  # seconds between looks at the keyboard: a wait without end cannot be interrupted on Windows


class _Worker:
    """A process, and the task that it is at: -1 while it starts, None when it waits for one."""

    def __init__(self, cache: str) -> None:
        context = get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(theirs, cache), daemon=True)
        self.process.start()
        theirs.close()
        self.task: int | None = -1
        self.deadline = time.monotonic() + STARTING
        self.runs = 0

    def begin(self, index: int, task: Task, limit: float) -> None:
        self.connection.send(task)
        self.task, self.deadline = index, time.monotonic() + limit
        self.runs += 1

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """A context: whatever ends it ends the processes as well."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True)

    def __enter__(self) -> "Pool":
        # What the processes inherit. torch reads the first when it is imported.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = self._folder.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()
        self._folder.cleanup()

    def verdicts(self, tasks: Sequence[Task], limit: float) -> Iterator[tuple[int, Verdict]]:
        """(place among the tasks, verdict) as they come; each task may take `limit` seconds."""
        waiting = deque(range(len(tasks)))
        try:
            while waiting or any(worker.task not in (None, -1) for worker in self._workers):
                self._replace(min(self.jobs, len(waiting)))
                for worker in self._workers:
                    if worker.task is None and waiting:
                        index = waiting.popleft()
                        worker.begin(index, tasks[index], limit)
                ready = wait([worker.connection for worker in self._workers], _LOOK)
                for worker in list(self._workers):
                    found = self._hear(worker, worker.connection in ready, limit)
                    if found is not None:
                        yield found
        finally:
            for worker in [worker for worker in self._workers if worker.task is not None]:
                self._dismiss(worker)  # left in the middle

    def _replace(self, wanted: int) -> None:
        for worker in [worker for worker in self._workers if worker.task is None and worker.runs >= RUNS]:
            self._dismiss(worker)
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self._folder.name))

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()

    def _hear(self, worker: _Worker, spoke: bool, limit: float) -> tuple[int, Verdict] | None:
        """What a worker says, if it is a verdict; a worker that is dead or late is dismissed."""
        task = worker.task
        if spoke:
            try:
                verdict = worker.connection.recv()
                worker.task = None
                return None if verdict is None else (task, verdict)
            except (EOFError, OSError):
                worker.process.join()
                verdict = Verdict(CRASH, f"exit code {worker.process.exitcode}", 0.0)
        elif task is not None and time.monotonic() > worker.deadline:
            verdict = Verdict(TIME_LIMIT, f"no end in {limit:.0f} seconds", limit)
        else:
            return None
        self._dismiss(worker)
        if task == -1:
            raise RuntimeError("a process for tests could not be started: python -c 'import torch, pytest'")
        return None if task is None else (task, verdict)
