"""A run folder belongs to one process at a time, and to nobody when that process is gone."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from run_tests.conftest import SMALL, content
from torch_impl.training import run
from torch_impl.training.files import InputError
from torch_impl.training.lock import locked

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys
from pathlib import Path
from torch_impl.training.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `run`."""

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    started: list[subprocess.Popen] = []
    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_that_another_process_trains_is_not_resumed(small_run, cli, holder):
    assert small_run("--out", "run").code == 0
    before = content(Path("run"))
    other = holder()
    outcome = cli("--resume", "run", "--steps", "16")
    assert outcome.code == 2
    assert f"run is in use: process {other.pid} on " in outcome.error and "trains there" in outcome.error
    assert content(Path("run")) == before
    other.kill()  # as a run that is killed: nobody gives the lock back but the system
    other.wait()
    assert cli("--resume", "run", "--steps", "16").code == 0


def test_a_sweep_leaves_a_run_alone_that_another_process_trains(cli, text, tmp_path):
    """A run outlives a sweep that is killed. The same sweep, begun again, called it failed."""
    run = tmp_path / "swept" / "learning_rate=1e-3,seed=0"
    run.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"locked"
        (tmp_path / "swept" / "results.json").write_bytes(b"{}")
        flags = ("--train-file", text, "--vary", "learning_rate=1e-3", "--out", "swept")
        outcome = cli("sweep", *SMALL.split(), *flags)
        assert outcome.code == 2 and f"is in use: process {process.pid} on" in outcome.error and run.is_dir()
        process.kill()


def test_a_lock_of_which_nothing_is_known(tmp_path, holder):
    (tmp_path / "run").mkdir()
    holder()
    for damage in (b"", b"[]", b'{"pid": "x"}'):
        (tmp_path / "run" / "lock.json").write_bytes(damage)
        with pytest.raises(InputError, match="in use: another process trains"), locked(tmp_path / "run"):
            pass


def test_a_folder_that_is_moved_while_its_run_goes_on(small_run, monkeypatch):
    """The run was said not to have begun."""
    monkeypatch.setattr(run, "announce", lambda prepared, request: prepared.folder.rename("moved"))
    outcome = small_run("--out", "run")
    assert outcome.code == 1 and "run: moved or deleted while the run went on" in outcome.error
    assert Path("moved/lock").is_file() and not Path("run").exists()


def test_what_took_the_name_of_a_folder_is_left_alone(small_run, monkeypatch):
    """A run that failed without a checkpoint removed it."""

    def replaced(prepared, request):
        prepared.folder.rename("moved")
        prepared.folder.mkdir()
        (prepared.folder / "mine").touch()
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(run, "announce", replaced)
    assert small_run("--out", "run").code == 1
    assert Path("run/mine").is_file()


def test_a_run_holds_its_folder_from_the_start(small_run, monkeypatch):
    """A sweep that was begun again removed the folder of a run which had nothing to save yet."""
    refused = []

    def while_another_tries(prepared, request):
        with pytest.raises(InputError, match="is in use"), locked(prepared.folder):
            pass
        refused.append(prepared.folder)

    monkeypatch.setattr(run, "announce", while_another_tries)
    assert small_run("--out", "run").code == 0
    assert refused == [Path("run")]
    with locked(Path("run")):
        pass
