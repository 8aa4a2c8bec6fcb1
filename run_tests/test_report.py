"""The report at the end of a run, and the command that repeats it."""

import base64
import errno
import json
import os
import re
import shlex
import shutil
import signal
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import matplotlib.image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run_tests.conftest import SMALL, content, metrics
from torch_impl.training import generate_command
from torch_impl.training import run as run_module
from torch_impl.training.command_line import parse
from torch_impl.training.config import read_config
from torch_impl.training.presets import PRESETS
from torch_impl.training.progress import load_progress
from torch_impl.training.repeating import arguments_of, as_typed, program
from torch_impl.training.telemetry import draw_losses


class Page(HTMLParser):
    """The tags of a page, its pictures, and what can be read on it."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.tags, self.pictures, self.text = [], [], ""
        self.feed(Path(run, "report.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(
                base64.b64decode(dict(attributes)["src"].removeprefix("data:image/png;base64,"))
            )

    def handle_data(self, data):
        self.text += data


def report_of(run: str) -> dict:
    return json.loads(Path(run, "report.json").read_bytes())


@pytest.mark.usefixtures("pictures")
def test_a_finished_run_ends_with_its_figures_and_pictures(small_run, cli):
    outcome = small_run("--out", "run", "--looks", 1)
    assert outcome.code == 0
    found, rows, page = report_of("run"), metrics(Path("run")), Page("run")
    best = min(rows, key=lambda row: row["val_loss"])
    assert (found["ended"], found["step"], found["steps"]) == ("finished", 12, 12)
    assert (found["best_val_loss"], found["best_step"]) == (best["val_loss"], best["step"])
    assert found["last_train_loss"] == rows[-1]["train_loss"]
    assert found["tokens"] == rows[-1]["tokens"] == 12 * 4 * 8
    assert len(page.pictures) == 2 and all(png.startswith(b"\x89PNG") for png in page.pictures)
    assert page.pictures[0] == Path("run/losses.png").read_bytes()
    assert matplotlib.image.imread("run/losses.png").shape == (600, 960, 4)
    best_told = f"{best['val_loss']:.4f} nats per token, {best['bits_per_byte']:.4f} bits per byte"
    for shown in (f"{found['parameters']:,}", best_told, found["command"], found["text"], "PyTorch"):
        assert shown in page.text
    assert cli("--resume", "run").code == 0 and len(Page("run").pictures) == 2
    assert best_told in outcome.out and f"report: {Path('run/report.html')}" in outcome.out


def test_what_a_model_writes_is_no_part_of_the_page(cli):
    Path("tags.txt").write_text("<script>alert('&amp;')</script>" * 40, encoding="utf-8")
    flags = ("--train-file", "tags.txt", "--out", "<b>", "--steps", 40, "--sample-tokens", 60, "--looks", 1)
    assert cli(*SMALL.split(), *flags, "--learning-rate", 0.03, "--dropout", 0).code == 0
    page = Page("<b>")
    assert "<scr" in Path("<b>/sample.txt").read_text(encoding="utf-8") and "<scr" in page.text
    assert not {"script", "b"} & set(page.tags)


@pytest.fixture
def disturbed(monkeypatch):
    """Something happens after a step."""
    train_steps = run_module.train_steps

    def arrange(at: int, happens) -> None:
        def steps(state, sample, config):
            for step_metrics in train_steps(state, sample, config):
                yield happens(step_metrics) if state.step == at else step_metrics

        monkeypatch.setattr(run_module, "train_steps", steps)

    return arrange


def test_a_run_that_was_stopped_reports_how_to_go_on(small_run, disturbed):
    def stop(step_metrics):
        signal.raise_signal(signal.SIGINT)
        return step_metrics

    disturbed(7, stop)
    outcome = small_run("--out", "my run", "--looks", 3)
    assert outcome.code == 130
    how = "python train_gpu.py --resume " + as_typed(["my run"])
    assert report_of("my run")["ended"] == "stopped" and report_of("my run")["step"] == 7
    assert how in Page("my run").text and outcome.out.rstrip().endswith(how)
    assert "A sample, of step 4" in Page("my run").text


def test_a_run_that_diverged_or_gave_up_says_so_in_its_report(small_run, disturbed):
    rough = ("--learning-rate", 3, "--warmup-steps", 0, "--steps", 40)
    assert small_run("--out", "weary", "--patience", 2, *rough).code == 0
    assert report_of("weary")["ended"] == "stopped early" and report_of("weary")["step"] < 40
    disturbed(7, lambda metrics: metrics._replace(loss=metrics.loss * float("nan")))
    outcome = small_run("--out", "run")
    assert report_of("run")["ended"] == "diverged" and outcome.error == report_of("run")["told"]
    assert "step 7: the loss is nan" in Page("run").text


def test_a_disk_that_is_full_at_the_end_is_told_and_the_report_comes_later(small_run, cli, on_file_operation):
    def full(event, path):
        if path.name == "report.html.being-written":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    on_file_operation(full)
    assert "the disk is full, writing run" in small_run("--out", "run").error
    on_file_operation(None)
    assert not list(Path("run").glob("*.being-*"))
    assert cli("--resume", "run").code == 0
    assert report_of("run")["ended"] == "finished" and "img" in Page("run").tags


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
@pytest.mark.usefixtures("pictures")
def test_a_text_whose_name_is_no_utf8_is_named_in_the_report(small_run, cli):
    """Such a run used to fail in its report, after the last step; and then its checkpoints were refused."""
    shutil.copy("text.txt", "text\udcfd.txt")
    outcome = small_run("--out", "run", "--train-file", "text\udcfd.txt")
    assert outcome.code == 0 and r"text\udcfd.txt" in Page("run").text
    assert cli("--resume", "run", "--steps", 14).code == 0 and report_of("run")["step"] == 14
    assert generate_command.main(["--model", "run", "--prompt", "The", "--max-new-tokens", "2"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    draw_losses(Path("losses.png"), rows, 256, "run\udcfd")
    assert Path("losses.png").stat().st_size


FLAGS = {
    "--steps": st.integers(1000, 5000),
    "--learning-rate": st.floats(1e-3, 1e-1),
    "--weight-decay": st.floats(0, 1),
    "--eval-every": st.integers(1, 500),
    "--positions": st.sampled_from(["learned", "rope", "alibi"]),
    "--seed": st.integers(0, 10),
    "--dropout": st.floats(0, 0.5),
    "--tokenizer": st.sampled_from(["bpe", "bytes"]),
    "--train-file": st.text(
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1
    ).filter(lambda name: name not in (".", "..") and not name.startswith("-")),
}
SWITCHES = ["--qk-norm", "--no-tied-embeddings", "--checkpoint-activations"]


@settings(max_examples=25)
@given(
    st.sampled_from([preset for preset in PRESETS if preset != "gpt2-124m"]),
    st.fixed_dictionaries({}, optional=FLAGS),
    st.sets(st.sampled_from(SWITCHES)),
)
def test_the_command_of_a_config_gives_that_config(preset, flags, switches):
    if PRESETS[preset].run.content == "conversations" or PRESETS[preset].model.architecture != "decoder":
        flags.pop("--tokenizer", None)
    given_ = [preset, *switches, *(part for flag, value in flags.items() for part in (flag, str(value)))]
    config = parse(given_).config
    arguments = arguments_of(config)
    assert parse(arguments).config == config
    if os.name != "nt":
        assert shlex.split(as_typed(arguments)) == arguments


def test_the_command_of_a_run_that_began_with_weights_repeats_it(small_run, cli, text):
    small_run("--out", "run", "--special-tokens", "--tokenizer", "bpe", "--vocab-size", 260)
    flags = ("--init-from", "run", "--train-file", text, "--steps", 4, "--looks", 0, "--sample-tokens", 0)
    assert cli("cpu", "--device", "cpu", "--out", "tuned", *flags).code == 0
    command = report_of("tuned")["command"]
    assert command.startswith("python train_gpu.py cpu ")
    arguments = shlex.split(command)[2:]
    assert cli(*arguments, "--out", "again").code == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (Path(run, "last", name).read_bytes() for run in ("tuned", "again"))
        assert first == second
    config = read_config(Path("again/last"))
    assert config == read_config(Path("tuned/last"))
    assert re.search(r"--init-from \S*run ", command)


def test_the_commands_of_a_run_that_went_on_with_other_flags_repeat_it(small_run, cli):
    """It used to be one command, made of the flags of the last: its schedule was another from step 1 on, and
    nobody could find again what the run had found."""
    assert small_run("--out", "run", "--micro-batches", 2).code == 0
    assert len(report_of("run")["resumed"]) == 0 and "The command that repeats it" in Page("run").text
    for changed in (["--steps", 20, "--eval-every", 5], [], ["--batch-size", "auto", "--steps", 24]):
        assert cli("--resume", "run", *changed).code == 0
    found, page = report_of("run"), Page("run").text
    assert [(each["step"], each["steps"]) for each in found["resumed"]] == [(12, 12), (20, 20)]
    commands = [found["command"], *(each["command"] for each in found["resumed"])]
    assert commands[1:] == [
        "python train_gpu.py --resume run-again --eval-every 5 --steps 20",
        "python train_gpu.py --resume run-again --steps 24 --micro-batches 1",
    ]
    places = [
        page.index(f"{end}:{line}")
        for end, line in zip(("12 of 12", "20 of 20", "then"), commands, strict=True)
    ]
    assert places == sorted(places) and "The commands that repeat it" in page
    for command in commands:
        assert cli(*shlex.split(command)[2:]).code == 0
    assert content(Path("run-again")) == content(Path("run"))
    assert report_of("run-again")["command"] == found["command"].replace("-again", "-again-again")


def test_a_run_that_was_stopped_and_went_on_with_other_flags_tells_when(small_run, cli, disturbed):
    """What is asked for in two sessions, of which the first had nothing to do, is one command."""
    happens = {"at": lambda step_metrics: signal.raise_signal(signal.SIGINT) or step_metrics}
    disturbed(7, lambda step_metrics: happens["at"](step_metrics))
    assert small_run("--out", "run").code == 130
    happens["at"] = lambda step_metrics: step_metrics
    assert cli("--resume", "run", "--steps", 7).code == 0  # evaluates there
    assert cli("--resume", "run", "--shard").code == 0
    assert cli("--resume", "run", "--steps", 12, "--precision", "bfloat16").code == 0
    assert [
        (each["step"], each["steps"], each["command"].split("--resume run-again ")[1])
        for each in report_of("run")["resumed"]
    ] == [(7, 12, "--steps 7"), (7, 7, "--precision bfloat16 --steps 12 --shard")]
    assert "until step 7 of 12:" in Page("run").text and "until step 7 of 7:" in Page("run").text
    assert "--steps 12" in report_of("run")["command"] and "bfloat16" not in report_of("run")["command"]


def test_flags_that_nothing_was_done_with_are_no_part_of_the_history(small_run, cli, monkeypatch):
    """Three times somebody thought better of it."""
    assert small_run("--out", "run").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train_steps", mock.Mock(side_effect=KeyboardInterrupt))
        for steps, micro_batches in ((500, 1), (300, 2), (12, 2)):
            flags = ("--steps", steps, "--micro-batches", micro_batches)
            assert cli("--resume", "run", *flags).code == 130
            assert len(load_progress(Path("run/last")).resumed) == 1
    assert cli("--resume", "run", "--micro-batches", 1).code == 0 and report_of("run")["resumed"] == []
    assert cli("--resume", "run", "--steps", 20).code == 0
    assert [each["command"] for each in report_of("run")["resumed"]] == [
        "python train_gpu.py --resume run-again --steps 20"
    ]


def test_a_run_that_changes_before_its_first_step_begins_with_the_change(small_run, cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_evaluate", mock.Mock(side_effect=KeyboardInterrupt))
        assert small_run("--out", "run").code == 130
    assert cli("--resume", "run", "--steps", 8).code == 0
    found = report_of("run")
    assert found["resumed"] == [] and "--steps 8" in found["command"]
    assert cli(*shlex.split(found["command"])[2:], "--out", "again").code == 0
    assert content(Path("again")) == content(Path("run"))


@pytest.mark.parametrize(
    ("processes", "on_a_machine", "told"),
    [
        (1, 1, "python"),
        (4, 4, "torchrun --nproc-per-node 4"),
        (8, 4, "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500"),
        (3, 2, "torchrun --nproc-per-node 3"),  # it was 1 machine with 2
    ],
)
def test_the_command_is_for_as_many_processes(processes, on_a_machine, told):
    assert " ".join(program(processes, on_a_machine)) == f"{told} train_gpu.py"


def test_a_checkpoint_that_does_not_know_how_its_run_began_has_the_command_of_its_config(small_run, cli):
    """So were all of them, once."""
    assert small_run("--out", "run").code == 0 and cli("--resume", "run", "--steps", 20).code == 0
    path = Path("run/last/training.json")
    training = json.loads(path.read_bytes())
    assert training.pop("resumed") == [
        {"step": 12, "before": {"steps": 12}, "processes": 1, "on_a_machine": 1}
    ]
    path.write_text(json.dumps(training), encoding="utf-8")
    assert cli("--resume", "run").code == 0
    assert report_of("run")["resumed"] == [] and "--steps 20" in report_of("run")["command"]
