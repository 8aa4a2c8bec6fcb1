"""A run folder belongs to one process at a time, and to nobody when that process is gone."""

import subprocess
import sys
from pathlib import Path

import pytest

from run_tests.conftest import content
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


def test_a_lock_of_which_nothing_is_known(tmp_path, holder):
    (tmp_path / "run").mkdir()
    holder()
    for damage in (b"", b"[]", b'{"pid": "x"}'):
        (tmp_path / "run" / "lock.json").write_bytes(damage)
        with pytest.raises(InputError, match="in use: another process trains"), locked(tmp_path / "run"):
            pass


def test_a_run_holds_its_folder_from_the_start(small_run, monkeypatch):
    from torch_impl.training import run as run_module

    refused = []

    def train_while_another_tries(run, stop, profile):
        with pytest.raises(InputError, match="is in use"), locked(run.folder):
            pass
        refused.append(run.folder)
        return False

    monkeypatch.setattr(run_module, "_train", train_while_another_tries)
    assert small_run("--out", "run").code == 0
    assert refused == [Path("run")]
    with locked(Path("run")):
        pass
