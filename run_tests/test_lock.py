"""A run folder belongs to one process at a time, and to nobody when that process is gone."""

import errno
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


def test_nor_begun_again_by_the_same_command(small_run, holder):
    """It was told to resume that run, which is refused, and before the first checkpoint even to delete it."""
    Path("run").mkdir()
    other = holder()
    names = sorted(Path("run").iterdir())
    outcome = small_run("--out", "run")
    assert outcome.code == 2 and outcome.error.startswith(f"run is in use: process {other.pid} on ")
    assert sorted(Path("run").iterdir()) == names and "--help" not in outcome.error
    assert "run is in use" in small_run("--out", "run").error, "a look must leave the lock as it was"
    other.kill()
    other.wait()
    for _ in range(2):
        assert "run exists, and holds no checkpoint to go on from" in small_run("--out", "run").error
    Path("run/lock").unlink()
    small_run("--out", "run")
    assert not Path("run/lock").exists()


def test_nor_begun_again_once_it_has_a_checkpoint(small_run, holder):
    assert small_run("--out", "run").code == 0
    other, before = holder(), content(Path("run"))
    assert f"run is in use: process {other.pid} on " in small_run("--out", "run").error
    other.kill()
    other.wait()
    assert "run exists, and a run is never overwritten; name another" in small_run("--out", "run").error
    assert content(Path("run")) == before


def test_a_run_without_a_checkpoint_yet_is_not_said_to_be_none(cli, holder):
    """--resume advised to begin a new one."""
    Path("run").mkdir()
    other = holder()
    assert f"run is in use: process {other.pid} on " in cli("--resume", "run").error


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


def all_of(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def replaced(small_run, monkeypatch):
    """To be called within a run: the name of its folder goes to another run, which stays as it is to the last
    byte."""
    assert small_run("--out", "run", "--sample-tokens", 5).code == 0
    (Path("run") / "last.being-written").mkdir()  # it is saving
    (Path("run") / "before-step-1").mkdir()
    (Path("run") / "before-step-1" / "training.json").touch()
    other = all_of("run")
    Path("run").rename("other")

    def moved() -> None:
        if Path("other").is_dir():
            Path("run").rename("moved")
            Path("other").rename("run")

    yield moved
    assert all_of("run") == other and Path("run/last.being-written").is_dir()


renames_open_folders = pytest.mark.skipif(
    sys.platform == "win32", reason="there a folder with open files keeps its name"
)


@renames_open_folders
@pytest.mark.parametrize("step", [6, 12])
@pytest.mark.parametrize("flags", [(), ("--sample-tokens", 5), ("--profile",)])
def test_a_run_writes_nothing_into_a_folder_that_took_the_name_of_its_own(
    small_run, cli, monkeypatch, replaced, step, flags
):
    """The lock went along with the renamed folder, and the checkpoints into the other run."""
    assert small_run("--out", "whole").code == 0
    train_steps = run.train_steps

    def steps(state, sample, config):
        for metrics in train_steps(state, sample, config):
            yield metrics
            if state.step == step:
                replaced()

    monkeypatch.setattr(run, "train_steps", steps)
    outcome = small_run("--out", "run", *flags)
    assert outcome.code == 1 and "run was moved, deleted or taken over meanwhile" in outcome.error
    monkeypatch.setattr(run, "train_steps", train_steps)
    assert cli("--resume", "moved", "--sample-tokens", 0).code == 0
    ours, same = (content(Path(folder), history=False) for folder in ("moved", "whole"))
    for both in (ours, same):
        del both["last/config.json"], both["best/config.json"]  # which name the flags
    assert ours == same


@renames_open_folders
@pytest.mark.parametrize("loss", [None, float("nan")])
def test_nor_what_is_kept_from_before_a_leap_or_told_of_a_failure(small_run, monkeypatch, replaced, loss):
    """The leap even removed what the other run had kept from before its own. A failed step was repeated from
    the other one's checkpoint, and a traceback was the end."""
    train_steps = run.train_steps

    def steps(state, sample, config):
        for metrics in train_steps(state, sample, config):
            yield metrics if loss is None else metrics._replace(loss=metrics.loss * loss)
            replaced()

    monkeypatch.setattr(run, "train_steps", steps)
    monkeypatch.setattr(SpikeWatch, "leaps", lambda self, loss: True)
    error = small_run("--out", "run", "--log-every", 2).error
    assert "run was moved, deleted or taken over" in error


@renames_open_folders
@pytest.mark.parametrize("moment", ["choose_place", "load_for", "put_back"])
def test_nor_does_one_that_is_about_to_go_on(small_run, cli, monkeypatch, replaced, moment):
    """It cleaned up after the other one's save, which was under way, and dropped its newest evaluations."""
    assert small_run("--out", "run", "--steps", 4).code == 0
    act = getattr(prepare, moment)

    def then_moved(*arguments):
        replaced()
        return act(*arguments)

    monkeypatch.setattr(prepare, moment, then_moved)
    assert "run was moved, deleted or taken over" in cli("--resume", "run", "--steps", 6).error


def test_a_lock_that_is_deleted_by_hand_stops_no_run(small_run, monkeypatch):
    """Who takes it for a leftover harms nobody, unless somebody else locks the folder then."""
    monkeypatch.setattr(run, "announce", lambda prepared, request: Path("run/lock").unlink())
    assert small_run("--out", "run").code == 0
    with locked(Path("run")) as require_ours:
        Path("run/lock").unlink()
        with locked(Path("run")), pytest.raises(FileNotFoundError, match="taken over"):
            require_ours()


@renames_open_folders
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


def test_the_one_that_comes_second_hears_of_the_first(small_run, monkeypatch, holder):
    make_tokenizer = prepare.make_tokenizer

    def meanwhile(*arguments):
        Path("run").mkdir()
        holder()
        return make_tokenizer(*arguments)

    monkeypatch.setattr(prepare, "make_tokenizer", meanwhile)
    assert "run is in use: process " in small_run("--out", "run").error


def test_ctrl_c_while_a_new_folder_is_locked(small_run, monkeypatch):
    """The folder stayed, with nothing in it to go on from, and its name was taken."""
    monkeypatch.setattr(lock, "_lock", Mock(side_effect=KeyboardInterrupt))
    assert small_run("--out", "run").code == 130
    assert not Path("run").exists()


def test_a_run_that_cannot_be_locked_to_go_on(small_run, cli, on_file_operation):
    """It was said not to have begun."""
    assert small_run("--out", "run").code == 0

    def full(event, path):
        if path.name == "lock.json.being-written":
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


def test_what_fails_in_a_folder_that_was_moved_is_told_as_that(small_run, monkeypatch):
    def failing(folder, *others):
        folder.parent.rename("moved")
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(run, "save_checkpoint", failing)
    outcome = small_run("--out", "run")
    assert outcome.code == 1 and "run was moved, deleted or taken over" in outcome.error


def test_what_somebody_else_put_into_a_new_folder_stays(small_run, monkeypatch):
    """A run that failed without a checkpoint removed it, be it another run's last checkpoint."""

    def failing(prepared, request):
        Path("run/notes.txt").touch()
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(run, "announce", failing)
    assert small_run("--out", "run").code == 1
    assert Path("run/notes.txt").is_file()


def test_a_new_folder_that_another_process_has_locked_already_stays(small_run, monkeypatch):
    monkeypatch.setattr(lock, "_lock", Mock(side_effect=BlockingIOError(errno.EAGAIN, "taken")))
    outcome = small_run("--out", "run")
    assert outcome.code == 2 and "run is in use" in outcome.error and Path("run").is_dir()


def test_a_run_whose_last_checkpoint_cannot_get_its_name_back_stays(small_run, cli, monkeypatch):
    """All was deleted, its best checkpoint as well, and the run said not to have begun."""
    rename, renamed = Path.rename, []

    def refused(path, target):
        if Path(target).name == "last":
            renamed.append(path)
            if len(renamed) > 2:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    outcome = small_run("--out", "run")
    assert outcome.code == 1 and "what was saved before is whole, and --resume goes on" in outcome.error
    assert Path("run/last.being-replaced").is_dir() and Path("run/best").is_dir()
    monkeypatch.setattr(Path, "rename", rename)
    assert cli("--resume", "run").code == 0


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
