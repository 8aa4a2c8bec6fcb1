"""Files and folders survive a kill, and a disk that fails, at every single operation."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from ref_numpy import bpe as ref_bpe
from torch_impl.training import files
from torch_impl.training.files import (
    InputError,
    new_folder,
    refusal,
    refuse_links,
    replace_file,
    replaced_folder,
    settle_folder,
    whole_folder,
    write_file,
)
from torch_impl.training.tokenizer import BYTES

ROOT = Path(__file__).parents[1]


def save(folder: Path, word: str) -> None:
    with replaced_folder(folder) as new:
        (new / "one").write_text(word, encoding="utf-8")
        (new / "two").write_text(word, encoding="utf-8")


def state(folder: Path) -> set[str]:
    """The distinct words in the folder: one, if it is whole."""
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    return {path.read_text(encoding="utf-8") for path in folder.iterdir()}


KILLED_SAVE = """
import os, sys
from pathlib import Path
from run_tests.test_files import save
fatal, count = int(sys.argv[2]), 0
def hook(event, arguments):
    global count
    if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.truncate"):
        if sys.argv[1] in str(arguments[0]) or event in ("os.rmdir", "os.remove"):
            count += 1
            if count == fatal:
                os._exit(9)  # as SIGKILL: no handler and no cleaning up
sys.addaudithook(hook)
save(Path(sys.argv[1]), "new")
"""


def test_a_writer_killed_at_any_operation_leaves_a_whole_folder(tmp_path):
    seen = set()
    for fatal in range(1, 100):
        folder = tmp_path / f"kill{fatal}" / "last"
        folder.parent.mkdir()
        save(folder, "old")
        arguments = [sys.executable, "-c", KILLED_SAVE, str(folder), str(fatal)]
        killed = subprocess.run(arguments, cwd=ROOT).returncode
        assert killed in (0, 9)
        readable = state(whole_folder(folder))
        assert readable in ({"old"}, {"new"})
        settle_folder(folder)
        assert state(folder) == readable
        assert [path.name for path in folder.parent.iterdir()] == ["last"]
        seen |= readable
        if not killed:
            break
    assert fatal > 8 and not killed and seen == {"old", "new"}


def test_a_disk_that_fails_at_any_operation_leaves_a_whole_folder(tmp_path, on_file_operation):
    for fatal in range(1, 100):
        folder = tmp_path / f"fail{fatal}" / "last"
        folder.parent.mkdir()
        save(folder, "old")
        count = 0

        def fail_once(event, path, fatal=fatal):
            nonlocal count
            count += 1
            if count == fatal:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        on_file_operation(fail_once)
        try:
            save(folder, "new")
            failed = False
        except OSError:
            failed = True
        on_file_operation(None)
        assert state(folder) in ({"old"}, {"new"})
        save(folder, "later")
        assert state(folder) == {"later"}
        assert [path.name for path in folder.parent.iterdir()] == ["last"]
        if not failed and count < fatal:
            break
    assert fatal > 8


@pytest.mark.parametrize("name", ["last", "last.being-written"])
@pytest.mark.parametrize(("held", "saved"), [(3, True), (4, False)])
def test_on_windows_a_reader_holds_a_folder_for_a_moment(tmp_path, monkeypatch, name, held, saved):
    """Its checkpoint could not be replaced, and that was the end of the run."""
    folder, rename, refused, pauses = tmp_path / "last", Path.rename, [], []
    save(folder, "old")

    def renamed(path, target):
        if path.name == name and len(refused) < held:
            refused.append(PermissionError(13, "in use"))
            refused[-1].winerror = (5, 32)[len(refused) % 2]
            raise refused[-1]
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    if saved:
        save(folder, "new")
    else:
        with pytest.raises(PermissionError):
            save(folder, "new")
    assert len(pauses) == 3 and state(folder) == {"new" if saved else "old"}


def test_what_a_user_calls_like_a_leftover_stays(tmp_path):
    """`cp -r last last.old`, the natural thing to do before an experiment, was removed without a word."""
    folder = tmp_path / "last"
    save(folder, "first")
    for name in ("last.old", "last.new", "last.bak"):
        save(tmp_path / name, name)
    save(folder, "second")
    settle_folder(folder)
    assert state(folder) == {"second"}
    for name in ("last.old", "last.new", "last.bak"):
        assert state(tmp_path / name) == {name}
    assert len(list(tmp_path.iterdir())) == 4


def test_what_an_earlier_version_left_is_found_and_stays(tmp_path):
    """Killed between its two renames, it left all that there was in last.old."""
    folder = tmp_path / "last"
    save(tmp_path / "last.old", "earlier")
    settle_folder(folder)
    assert state(whole_folder(folder)) == {"earlier"}
    save(folder, "new")
    assert state(whole_folder(folder)) == {"new"} and state(tmp_path / "last.old") == {"earlier"}
    save(tmp_path / "last.being-replaced", "newest")
    folder.rename(tmp_path / "elsewhere")
    assert state(whole_folder(folder)) == {"newest"}, "it is the newer one"


def test_a_failed_first_save_leaves_nothing(tmp_path):
    with pytest.raises(OSError), replaced_folder(tmp_path / "last") as new:
        (new / "one").write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_path_leads_elsewhere_meanwhile_is_not_touched(tmp_path):
    """What was renamed and removed then was another run's."""
    save(tmp_path / "last", "other's")

    def elsewhere():
        raise FileNotFoundError("moved")

    with (
        pytest.raises(FileNotFoundError, match="moved"),
        replaced_folder(tmp_path / "last", elsewhere) as new,
    ):
        (new / "one").write_text("ours", encoding="utf-8")
    assert state(tmp_path / "last") == {"other's"} and new.is_dir()


def test_an_error_in_a_copy_keeps_the_name_of_what_is_copied(tmp_path):
    """The folder that was being made was blamed for a file in another one."""
    with pytest.raises(OSError) as error, new_folder(tmp_path / "step-10"):
        (tmp_path / "last" / "model.safetensors").read_bytes()
    assert error.value.filename == str(tmp_path / "last" / "model.safetensors")


@pytest.mark.parametrize(
    ("number", "path", "told"),
    [
        (errno.ENOSPC, "a", "the disk is full, writing a; make room"),
        (errno.ENOSPC, None, "the disk is full, writing standard output; make room"),
        (errno.EACCES, "a", "a: because; give this user the right to it, or use another place"),
        (errno.EIO, "a", "a: because"),
        (errno.EIO, "a\nb\x1b", "a\\nb\\x1b: because"),
    ],
)
def test_what_the_system_refuses_is_one_line(number, path, told):
    assert refusal(OSError(number, "because", path), "standard output") == told


def test_on_windows_a_file_that_is_open_elsewhere_is_no_matter_of_rights():
    error = PermissionError(errno.EACCES, "it is being used by another process", "a")
    error.winerror = 32
    assert refusal(error) == "a: it is being used by another process"


@pytest.mark.parametrize("write", [write_file, replace_file])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, write):
    path = tmp_path / "file"
    write(path, b"old")
    write(path, b"new")
    assert path.read_bytes() == b"new"

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(self), None, str(target))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError) as error:
        write(path, b"newer")
    assert error.value.filename == str(path)  # and not that of a file that nobody has named
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_stands_beside_a_path_that_the_user_names_stays(tmp_path):
    """NAME.being-written was written over and removed, whoever it belonged to."""
    (tmp_path / "file.being-written").write_bytes(b"the user's")
    replace_file(tmp_path / "file", b"content")
    ref_bpe.save(BYTES, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.being-written"]
    assert (tmp_path / "file.being-written").read_bytes() == b"the user's"


def test_a_killed_writer_of_a_folder_of_ours_leaves_what_the_next_one_takes_away(tmp_path):
    """A run is killed many times, and its folder must not fill with halves of files."""
    (tmp_path / "file.being-written").write_bytes(b"half")
    write_file(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    refuse_links(run)
    (run / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="symbolic link"):
        refuse_links(run)
