"""What a user or a machine can get wrong: one line, a non-zero exit, and nothing lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from run_tests.conftest import SMALL, Outcome, content
from torch_impl.training import run as run_module

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read .*bad\.txt: No such file"),
        (b"", r"bad\.txt is empty"),
        (b"text\0text", r"bad\.txt is not text: byte 4 is NUL"),
        (b"caf\xe9 au lait", r"bad\.txt is not UTF-8 text: byte 3 is 0xe9"),
        ("a text".encode("utf-16"), r"bad\.txt is UTF-16 text; save it as UTF-8"),
        (b"\xfe\xff" + "a text".encode("utf-16-be"), r"bad\.txt is UTF-16 text; save it as UTF-8"),
        ("a text".encode("utf-16-le"), r"byte 1 is NUL; if it is UTF-16, save it as UTF-8"),
        (b"short", r"the training text has 4 tokens, but context_length 8 needs at least 9"),
        (
            b"a text of 26 bytes in all.",
            r"the held-out text \(the last tenth of the training text\) has 3 tokens",
        ),
    ],
)
def test_a_text_that_cannot_be_used(small_run, content, message):
    if content is not None:
        Path("bad.txt").write_bytes(content)
    outcome = small_run("--train-file", "bad.txt", "--out", "run")
    assert outcome.code == 2
    assert re.search(message, outcome.error)
    assert not Path("run").exists()


def test_a_held_out_text_that_cannot_be_used(small_run):
    Path("short.txt").write_bytes(b"short")
    error = small_run("--valid-file", "short.txt", "--out", "run").error
    assert (
        "the held-out text has 5 tokens, but context_length 8 needs at least 9; use a longer text or" in error
    )
    Path("short.txt").write_bytes(b"s")
    assert small_run("--valid-file", "short.txt", "--out", "run").error.endswith("; use a longer text")
    Path("folder").mkdir()
    assert "folder is a folder" in small_run("--valid-file", "folder", "--out", "run").error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in its folders")
def test_a_text_that_can_be_read_only_once(small_run):
    """A pipe was read to its end to see whether it is text, and then there was nothing left to train on."""
    os.mkfifo("pipe")
    for flags in (("--train-file", "pipe"), ("--valid-file", "pipe")):
        error = small_run(*flags, "--out", "run").error
        assert "pipe is a pipe or a device, and a text is read more than once; save it in a file" in error


def test_a_run_is_never_overwritten(small_run):
    small_run("--out", "run")
    before = content(Path("run"))
    assert "run exists, and a run is never overwritten" in small_run("--out", "run").error
    assert content(Path("run")) == before


@pytest.mark.parametrize("odd", ["a\0b", "a\ud800b"])
def test_a_config_with_a_path_that_is_none(small_run, cli, odd):
    small_run("--out", "run")
    path = Path("run/last/config.json")
    config = json.loads(path.read_bytes())
    config["run"]["train_file"] = odd
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "config.json: train_file is 'a" in cli("--resume", "run").error


def test_a_run_folder_that_cannot_be_made(small_run, text):
    assert "cannot create the run folder" in small_run("--out", text / "run").error


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "CUDA finds"), ("abacus", "is no device"), ("meta", "is not supported")],
)
def test_a_device_that_is_not_here(small_run, device, message):
    assert message in small_run("--device", device, "--out", "run").error


def test_a_program_error_is_not_called_a_users_mistake(small_run, monkeypatch):
    def broken(state, tokens, config):
        raise RuntimeError("shapes do not match")
        yield

    monkeypatch.setattr(run_module, "train_steps", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        small_run("--out", "run")


def test_a_folder_that_nobody_may_write_to_any_more(small_run, cli, on_file_operation):
    small_run("--out", "whole")

    def refused(event, path):
        if "last.being-written" in path.parts and Path("run/best").exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    on_file_operation(refused)
    outcome = small_run("--out", "run")
    on_file_operation(None)
    assert outcome.code == 1
    assert re.search(r"last: Permission denied; .*what was saved before is whole.*--resume", outcome.error)
    assert cli("--resume", "run").code == 0
    assert content(Path("run")) == content(Path("whole"))


@pytest.mark.skipif(os.name == "nt", reason="a file that is in use cannot be deleted there")
def test_files_that_vanish_while_a_run_reads_them_are_not_missed(small_run, cli, text, at_step):
    """The ids are mapped, and stay until the run lets go of them. To go on, it needs the text again."""
    small_run("--out", "whole")
    at_step(3, lambda: (shutil.rmtree("cache"), text.unlink()))
    assert small_run("--out", "run").code == 0
    assert content(Path("run")) == content(Path("whole"))
    assert "cannot read" in cli("--resume", "run", "--steps", 14).error


def test_a_disk_that_fills_up_at_any_moment(small_run, cli, on_file_operation):
    """Each file operation of a run fails once; the run says so and resumes to the same end."""
    small_run("--out", "whole")
    whole = content(Path("whole"))
    operations = 0

    def count(event, path):
        nonlocal operations
        operations += "run" in path.parts

    on_file_operation(count)
    small_run("--out", "run")
    on_file_operation(None)
    assert operations > 100
    for fatal in [2, 3, 4, 5, *range(7, operations, 13)]:  # 1 is the folder itself
        shutil.rmtree("run", ignore_errors=True)
        seen = 0

        def full(event, path, fatal=fatal):
            nonlocal seen
            seen += "run" in path.parts
            if seen == fatal:
                seen += 1
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        on_file_operation(full)
        outcome = small_run("--out", "run")
        on_file_operation(None)
        if outcome.code == 0:  # what failed was the removal of something that is not needed any more
            assert content(Path("run")) == whole
            continue
        assert outcome.code == 1 and "the disk is full" in outcome.error
        if not Path("run/last").exists():  # the same command can be given again
            assert "has not begun" in outcome.error and not Path("run").exists()
            continue
        assert not [path for path in Path("run").iterdir() if path.suffix == ".being-written"]
        assert cli("--resume", "run").code == 0
        assert content(Path("run")) == whole


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json"]
)
def test_a_checkpoint_with_a_file_missing_or_cut_short(small_run, cli, name):
    small_run("--out", "run")
    path = Path("run/last") / name
    path.write_bytes(path.read_bytes()[:-5])
    assert re.search(rf"{name}.*(is damaged|is no|not JSON)", cli("--resume", "run").error)
    path.unlink()
    assert re.search(rf"run.last.*incomplete.*{name}|{name}.*missing", cli("--resume", "run").error)


def test_a_checkpoint_of_another_model(small_run, cli):
    small_run("--out", "run")
    small_run("--out", "wide", "--d-model", 32)
    small_run("--out", "deep", "--n-layer", 2)
    for other in ("wide", "deep"):
        for name in ("model", "optimizer"):
            shutil.copytree("run", "mixed")
            shutil.copy(f"{other}/last/{name}.safetensors", f"mixed/last/{name}.safetensors")
            assert f"{name}.safetensors does not fit config.json" in cli("--resume", "mixed").error
            shutil.rmtree("mixed")


def test_a_checkpoint_in_another_number_format(small_run, cli):
    small_run("--out", "run")
    path = Path("run/last/model.safetensors")
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert "is F16" in cli("--resume", "run").error


def test_a_config_that_claims_a_billion_layers_allocates_nothing(small_run, cli):
    small_run("--out", "run")
    path = Path("run/last/config.json")
    path.write_bytes(path.read_bytes().replace(b'"n_layer": 1', b'"n_layer": 1000000000'))
    assert "does not fit config.json" in cli("--resume", "run").error


def test_a_file_that_leads_out_of_the_run_folder(small_run, cli, tmp_path):
    small_run("--out", "run")
    victim = tmp_path / "victim"
    shutil.move("run/metrics.jsonl", victim)
    Path("run/metrics.jsonl").symlink_to(victim)
    before = victim.read_bytes()
    assert "symbolic link" in cli("--resume", "run").error
    assert victim.read_bytes() == before


def test_a_loss_scale_from_a_stranger(small_run, cli):
    small_run("--out", "run", "--precision", "float16")
    path = Path("run/last/training.json")
    path.write_bytes(path.read_bytes().replace(b'"growth_factor"', b'"grow"'))
    assert "training.json: a value is of the wrong kind" in cli("--resume", "run").error


@pytest.mark.parametrize("odd", ["", [], {}, False, "1.5", 10**400])
def test_a_best_loss_that_is_no_number(small_run, cli, odd):
    """What is empty passed for none, and the run failed at its next evaluation."""
    small_run("--out", "run")
    path = Path("run/last/training.json")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "best_val_loss": odd}), encoding="utf-8")
    assert "training.json: a value is no number" in cli("--resume", "run", "--steps", 20).error


@pytest.mark.parametrize("damage", [b"{}", b'{"format_version": 1}', b"[1]"])
def test_a_foreign_training_json(small_run, cli, damage):
    small_run("--out", "run")
    Path("run/last/training.json").write_bytes(damage)
    assert "training.json" in cli("--resume", "run").error


def went_on(step, before=None, **among):
    return {"step": step, "before": before or {}, "processes": 1, "on_a_machine": 1, **among}


@pytest.mark.parametrize(
    ("resumed", "told"),
    [
        (None, "a value is of the wrong kind"),
        ({}, "a value is of the wrong kind"),
        ([None], "a value is of the wrong kind"),
        ([{"step": 3}], "a value is of the wrong kind"),
        ([went_on(3.0)], "a value is of the wrong kind"),
        ([went_on(3, [["steps", 4]])], "a value is of the wrong kind"),
        ([went_on(3) | {"now": {}}], "a value is of the wrong kind"),
        ([went_on(0)], "the steps are not in their order"),
        ([went_on(13)], "the steps are not in their order"),
        ([went_on(5), went_on(4)], "the steps are not in their order"),
        ([went_on(3, {"d_model": 4})], "not one that --resume may change"),
        ([went_on(3, {"steps": "4"})], "steps is '4', but must be a int"),
        ([went_on(3, {"steps": 10**400})], "steps is 1000"),
        ([went_on(3, {"log_every": 0})], "log_every is 0, but must be at least 1"),
        ([went_on(3, {"train_file": "\0"})], "which is no text"),
        ([went_on(3, {"precision": {}})], "precision is {}"),
        ([went_on(3, {"eval_tokens": 5})], "not one that --resume may change"),
        ([went_on(3, {}, processes=1.0)], "a value is of the wrong kind"),
        ([went_on(3, {}, on_a_machine=0)], "on_a_machine is not between 1 and processes"),
        ([went_on(3, {}, on_a_machine=2)], "on_a_machine is not between 1 and processes"),
    ],
)
def test_changes_of_a_run_that_cannot_have_been(small_run, cli, resumed, told):
    """The report makes commands of them, when a day's training is at its end."""
    small_run("--out", "run")
    path = Path("run/last/training.json")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "resumed": resumed}), encoding="utf-8")
    error = cli("--resume", "run", "--steps", 20).error
    assert "training.json: " in error and told in error


def test_a_compiler_that_is_missing(text):
    """torch.compile needs a C++ compiler on the CPU."""
    command = [sys.executable, str(ROOT / "train_gpu.py"), *SMALL.split(), "--train-file", str(text)]
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(Path("cache").absolute()),
    }
    outcome = subprocess.run(
        [*command, "--compile", "on"], env=environment, capture_output=True, encoding="utf-8"
    )
    assert outcome.returncode == 1
    assert "C++ compiler" in Outcome(1, "", outcome.stderr).error and "--compile off" in outcome.stderr
