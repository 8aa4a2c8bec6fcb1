"""A run folder belongs to one process at a time, and to nobody when that process is gone."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from run_tests.conftest import SMALL, content
from torch_impl.training import lock, prepare, run, sweep
from torch_impl.training.files import InputError
from torch_impl.training.lock import locked
from torch_impl.training.spikes import SpikeWatch

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
        assert "--help" not in outcome.error  # which has nothing to say on that
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
    assert outcome.code == 1 and "run was moved, deleted or taken over meanwhile" in outcome.error
    assert Path("moved/lock").is_file() and not Path("run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there a folder with open files keeps its name")
def test_a_run_writes_nothing_into_a_folder_that_took_the_name_of_its_own(small_run, cli, monkeypatch):
    """The lock went along with the renamed folder, and the checkpoints into the other run."""
    assert small_run("--out", "whole").code == 0
    assert small_run("--out", "other").code == 0
    train_steps = run.train_steps

    def renamed(folder, step):
        def steps(state, sample, config):
            for metrics in train_steps(state, sample, config):
                yield metrics
                if state.step == step:
                    Path(folder).rename(f"{folder}-moved")
                    shutil.copytree("other", folder)

        monkeypatch.setattr(run, "train_steps", steps)
        begin = small_run("--out", folder) if step == 6 else cli("--resume", folder)
        assert begin.code == 1 and f"{folder} was moved, deleted or taken over meanwhile" in begin.error
        assert content(Path(folder)) == content(Path("other"))

    renamed("run", 6)
    renamed("run-moved", 9)
    monkeypatch.setattr(run, "train_steps", train_steps)
    assert cli("--resume", "run-moved-moved").code == 0
    assert content(Path("run-moved-moved")) == content(Path("whole"))


@pytest.mark.skipif(sys.platform == "win32", reason="there a folder with open files keeps its name")
@pytest.mark.parametrize(("flags", "step"), [((), 1), (("--profile",), 7)])
def test_nor_a_trace_or_what_is_kept_from_before_a_leap(small_run, monkeypatch, flags, step):
    """The leap even removed what the other run had kept from before its own."""
    assert small_run("--out", "other").code == 0
    Path("other/before-step-1").mkdir()
    before, train_steps = sorted(Path("other").rglob("*")), run.train_steps

    def renamed(state, sample, config):
        for metrics in train_steps(state, sample, config):
            yield metrics
            if state.step == step:
                Path("run").rename("moved")
                Path("other").rename("run")

    monkeypatch.setattr(run, "train_steps", renamed)
    monkeypatch.setattr(SpikeWatch, "leaps", lambda self, loss: not flags)
    assert "run was moved, deleted or taken over meanwhile" in small_run("--out", "run", *flags).error
    Path("run").rename("other")
    assert sorted(Path("other").rglob("*")) == before


def test_a_lock_that_is_deleted_by_hand_stops_no_run(small_run, monkeypatch):
    """Who takes it for a leftover harms nobody, unless somebody else locks the folder then."""
    monkeypatch.setattr(run, "announce", lambda prepared, request: Path("run/lock").unlink())
    assert small_run("--out", "run").code == 0
    with locked(Path("run")) as require_ours:
        Path("run/lock").unlink()
        with locked(Path("run")), pytest.raises(FileNotFoundError, match="taken over"):
            require_ours()


@pytest.mark.skipif(sys.platform == "win32", reason="there a folder with open files keeps its name")
def test_a_sweep_writes_nothing_into_a_folder_that_took_the_name_of_its_own(cli, text, monkeypatch):
    def renamed(arguments):
        Path("swept").rename("moved")
        Path("swept").mkdir()
        return 0

    monkeypatch.setattr(sweep, "launch", renamed)
    outcome = cli("sweep", *SMALL.split(), "--train-file", text, "--vary", "d_ff=8,16", "--out", "swept")
    assert outcome.code == 1 and "swept was moved, deleted or taken over meanwhile" in outcome.error
    assert not list(Path("swept").iterdir())


def test_two_runs_that_begin_at_once_in_one_folder(small_run, monkeypatch):
    """The one that came second was told that a file exists, and not what to do."""
    make_tokenizer = prepare.make_tokenizer

    def meanwhile(*arguments):
        Path("run").mkdir()
        return make_tokenizer(*arguments)

    monkeypatch.setattr(prepare, "make_tokenizer", meanwhile)
    outcome = small_run("--out", "run")
    assert outcome.code == 2 and "run exists, and a run is never overwritten; name another" in outcome.error


def test_ctrl_c_while_a_new_folder_is_locked(small_run, monkeypatch):
    """The folder stayed, with nothing in it to go on from, and its name was taken."""
    monkeypatch.setattr(lock, "_lock", Mock(side_effect=KeyboardInterrupt))
    assert small_run("--out", "run").code == 130
    assert not Path("run").exists()


def test_a_run_that_cannot_be_locked_to_go_on(small_run, cli, on_file_operation):
    """It was said not to have begun."""
    assert small_run("--out", "run").code == 0

    def full(event, path):
        if path.name == "lock.json.new":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    on_file_operation(full)
    outcome = cli("--resume", "run", "--steps", "16")
    on_file_operation(None)
    assert outcome.code == 1 and "what was saved before is whole, and --resume goes on" in outcome.error
    assert cli("--resume", "run", "--steps", "16").code == 0


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
