"""What the tests of runs share: a small text, small runs, and a hand on every file operation."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import train_gpu
from torch_impl.training import report, telemetry
from torch_impl.training import run as run_module
from torch_impl.training.files import write_file

# A run of twelve steps that evaluates, saves and reads at steps of their own.
SMALL = """cpu --device cpu --tokenizer bytes
    --context-length 8 --n-layer 1 --n-head 2 --d-model 16 --batch-size 4 --steps 12
    --eval-every 4 --checkpoint-every 5 --log-every 3 --sample-tokens 5 --dropout 0.1 --looks 0"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failure prints; progress bars aside, there must be no other."""
        lines = [line for line in self.err.splitlines() if "train_gpu.py: error: " in line]
        assert self.code != 0 and len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0].split("train_gpu.py: error: ")[1]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def signals_are_heard() -> None:
    """Under nohup, or in a shell's background, a process begins with signals ignored, and so do its children:
    what asks a run to stop would go unheard."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):  # Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where other tests have the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Gone(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw losses takes a third of a small run; only tests that look at them have them drawn."""
    monkeypatch.setattr(report, "draw_losses", lambda path, *drawn: write_file(path, PNG))


@pytest.fixture
def pictures(no_picture: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are drawn."""
    monkeypatch.setattr(report, "draw_losses", telemetry.draw_losses)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox – so they say – jumps over the lazy dog.\n" * 20, encoding="utf-8")
    return path


@pytest.fixture
def call_main(capsys: pytest.CaptureFixture) -> Callable[..., Outcome]:
    """Runs a program in this process, by its main function."""

    def call(main: Callable[[list[str]], int], *arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def cli(call_main: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Runs train_gpu.py in this process."""
    return partial(call_main, train_gpu.main)


@pytest.fixture
def small_run(cli: Callable[..., Outcome], text: Path) -> Callable[..., Outcome]:
    """Runs the small run; flags given later override."""
    return lambda *flags: cli(*SMALL.split(), "--train-file", text, *flags)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has something done while a run computes a given step; nothing, where none is given."""
    train_steps = run_module.train_steps

    def arrange(step: int | None, act: Callable[[], object] = lambda: None) -> None:
        def steps(state, sample, config):
            for step_metrics in train_steps(state, sample, config):
                if state.step == step:
                    act()
                yield step_metrics

        monkeypatch.setattr(run_module, "train_steps", steps)

    return arrange


@pytest.fixture
def stop_at(at_step: Callable[..., None]) -> Callable[..., None]:
    """Sends this process a signal while a given step is computed."""

    def arrange(step: int | None, number: int = signal.SIGINT) -> None:
        def ask() -> None:
            signal.raise_signal(number)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a Ctrl-C now leaves at once"

        at_step(step, ask)

    return arrange


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def content(run: Path, history: bool = True) -> dict[str, object]:
    """Both checkpoints of a run and its metrics, without what a clock measured; where that is said also
    without what --resume changed on the way."""
    files: dict[str, object] = {"metrics": metrics(run)}
    for path in sorted([*run.glob("last/*"), *run.glob("best/*")]):
        name = str(path.relative_to(run))
        files[name] = path.read_bytes()
        if path.name == "training.json":
            files[name] = {**json.loads(path.read_bytes()), "seconds": None}
            if not history:
                del files[name]["resumed"], files[name]["processes"], files[name]["on_a_machine"]
        if path.name == "config.json":
            files[name] = json.loads(path.read_bytes())
    return files


_FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.truncate")
_on_operation: Callable[[str, Path], None] | None = None


def _hook(event: str, arguments: tuple) -> None:
    if (
        _on_operation is not None
        and event in _FILE_OPERATIONS
        and isinstance(arguments[0], str | os.PathLike)
    ):
        _on_operation(event, Path(arguments[0]))


sys.addaudithook(_hook)  # can never be removed, so it asks each time whether anybody listens


@pytest.fixture
def on_file_operation() -> Iterator[Callable[[Callable[[str, Path], None] | None], None]]:
    """Lets a test see, count and forbid file operations before they happen."""

    def listen(listener: Callable[[str, Path], None] | None) -> None:
        global _on_operation
        _on_operation = listener

    yield listen
    listen(None)
