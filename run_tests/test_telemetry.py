"""What a run tells of itself."""

import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_impl.training import plot
from torch_impl.training.files import InputError
from torch_impl.training.telemetry import MetricsLog, faces_of_loss


@pytest.fixture
def run(small_run):
    outcome = small_run("--out", "run")
    assert outcome.code == 0
    return outcome


def test_every_evaluation_is_a_line(run):
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert [row["tokens"] for row in rows] == [0, 128, 256, 384]
    names = {"step", "train_loss", "val_loss", "bits_per_byte", "perplexity", "learning_rate", "grad_norm"}
    for row in rows:
        assert set(row) == names | {"tokens", "tokens_per_second", "seconds"}
        assert row["bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2))
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]))
    assert rows[0]["train_loss"] is None
    for row in rows[1:]:
        assert all(math.isfinite(value) for value in row.values())
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_the_first_lines_say_where_and_how(run):
    lines = [line for line in run.out.splitlines() if "they would take" not in line]  # by the processor
    first, attention, products, _, third, given_way, fourth, *_ = lines
    assert first.startswith("preset cpu on cpu, float32: ")
    assert "run folder run" in first
    assert attention == "attention: scaled_dot_product_attention, causal"
    assert products in ("matrix products: oneDNN", "matrix products: PyTorch's choice")  # by the processor
    assert third == "256 different tokens, 1.00 bytes of held-out text in each"
    assert given_way == "warmup_steps 1, a tenth of the steps, which are fewer than the preset's 100"
    assert fourth.startswith("step 0: ") and fourth.endswith("ln V = 5.545")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--positions", "alibi"], "scaled_dot_product_attention, masked, by blocks of queries"),
        (
            ["--n-layer", "2", "--attention-pattern", "local, full", "--window", "3"],
            "scaled_dot_product_attention, causal in full layers; "
            "scaled_dot_product_attention, masked, by blocks of queries in local layers, of 3 keys",
        ),
    ],
)
def test_the_path_of_attention_is_named(small_run, flags, line):
    outcome = small_run("--out", "run", "--steps", "1", "--warmup-steps", "0", *flags)
    assert outcome.code == 0
    assert f"attention: {line}" in outcome.out.splitlines()


def test_the_run_folder_is_complete(run):
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "best",
        "last",
        "lock",
        "lock.json",
        "losses.png",
        "metrics.jsonl",
        "report.html",
        "report.json",
        "sample.txt",
        "tensorboard",
    ]
    for name in ("best", "last"):
        assert sorted(path.name for path in (Path("run") / name).iterdir()) == [
            "config.json",
            "model.safetensors",
            "optimizer.safetensors",
            "tokenizer.json",
            "training.json",
        ]
    assert Path("run/losses.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert Path("run/sample.txt").read_text(encoding="utf-8") in run.out


def test_best_is_the_best(run):
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = json.loads(Path("run/best/training.json").read_bytes())
    assert training["best_val_loss"] == min(row["val_loss"] for row in rows)
    assert training["step"] == training["best_step"]


def test_tensorboard_sees_the_same_curve_though_the_run_was_resumed(run, cli):
    assert cli("--resume", "run", "--steps", 14).code == 0
    curve = EventAccumulator("run/tensorboard").Reload().Scalars("val_loss")
    rows = MetricsLog(Path("run/metrics.jsonl")).rows()
    assert [event.step for event in curve] == [row["step"] for row in rows] == [0, 4, 8, 12, 14]
    assert [event.value for event in curve] == pytest.approx([row["val_loss"] for row in rows], rel=1e-6)


def test_runs_of_the_same_second_have_folders_of_their_own(small_run):
    for _ in range(3):
        assert small_run("--steps", 1).code == 0
    assert len(list(Path("runs").iterdir())) == 3


def test_a_terminal_that_lacks_a_character_does_not_end_the_run(small_run, monkeypatch):
    """The sample of an untrained model is full of replacement characters, which ASCII has not."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert small_run("--out", "run", "--steps", 1, "--sample-tokens", 50).code == 0
    assert "\ufffd" in Path("run/sample.txt").read_text(encoding="utf-8")


def test_a_sample_does_nothing_to_a_terminal(small_run, monkeypatch):
    """A model of bytes writes controls, which cleared the screen that the run was watched on."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    assert small_run("--out", "run", "--steps", 1, "--sample-tokens", 200).code == 0
    terminal.flush()
    controls = {chr(code) for code in range(32)} - {"\n", "\t"}
    assert controls & set(Path("run/sample.txt").read_text(encoding="utf-8"))
    assert not controls & set(terminal.buffer.getvalue().decode("utf-8"))


@given(st.floats(0, 20), st.floats(0.1, 1))
def test_faces_of_a_loss(loss, tokens_per_byte):
    faces = faces_of_loss(loss, tokens_per_byte)
    assert 2 ** (faces["bits_per_byte"] / tokens_per_byte) == pytest.approx(faces["perplexity"])


def test_a_loss_beyond_all_bounds_still_has_a_perplexity():
    assert math.isfinite(faces_of_loss(1e4, 1.0)["perplexity"])


def test_a_disk_that_fills_up_within_a_line_leaves_no_half_of_it(tmp_path):
    """The file was cut, and then closed, which wrote what a buffer still held: a damaged line."""
    resource = pytest.importorskip("resource")  # a limit to the size of files, which Windows has not
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = {"step": 1, "train_loss": 1.0, "val_loss": 2.0}
    log.append(row)
    whole = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) * 5 // 3, hard))
    try:
        with pytest.raises(OSError):
            log.append({**row, "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == whole


def test_a_number_that_is_not_finite_is_null(tmp_path):
    """JSON knows no Infinity, which older runs have written."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = {"step": 1, "tokens": 32, "train_loss": 1.0, "val_loss": 2.0}
    log.append({**row, "grad_norm": math.inf})
    assert b'"grad_norm": null' in log.path.read_bytes()
    log.path.write_bytes(log.path.read_bytes().replace(b"null", b"Infinity"))
    assert log.rows() == [{**row, "grad_norm": None}]
    log.append({**row, "step": 2, "grad_norm": 3.0})
    log.forget_from(3)
    assert b"Infinity" not in log.path.read_bytes() and len(log.rows()) == 2
    for y in ("grad_norm", "loss"):
        assert plot.main([str(tmp_path), "--y", y, "--out", str(tmp_path / "curves.png")]) == 0
    log.append({**row, "val_loss": math.nan})
    with pytest.raises(InputError, match="line 3 is damaged"):
        log.rows()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"tokens_per_second": "fast"}, "'tokens_per_second' is no number"),
        ({"seconds": [1.0]}, "'seconds' is no number"),
        ({"seconds": True}, "'seconds' is no number"),
        ({"step": 10**400}, "'step' is no number"),
        ({"val_loss": -1e308}, "'val_loss' is no number of at most 1e+100"),  # an axis has no room for it
        ({"step": None}, "'step' is no number"),
        ({"val_loss": None}, "'val_loss' is no number"),
        ({"val_loss": "3"}, "'val_loss' is no number"),
        ({"a\nb": "3"}, r"'a\nb' is no number"),
    ],
)
def test_a_line_of_other_than_numbers_is_named(tmp_path, values, complaint):
    """Of the values only losses and steps were looked at, so that plot ended with a traceback."""
    log, row = MetricsLog(tmp_path / "metrics.jsonl"), {"step": 1, "val_loss": 3.0, "train_loss": None}
    log.path.write_text(json.dumps(row) + "\n" + json.dumps(row | values) + "\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        log.rows()
    assert f"line 2 is damaged: {complaint}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["[]", "3", "null", '{"step": 1, "val_loss": 2.0}', "{", "[" * 99999])
def test_a_line_that_is_no_evaluation_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1 is damaged"):
        MetricsLog(tmp_path / "metrics.jsonl").rows()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = {"step": 1, "train_loss": 1.0, "val_loss": 2.0}
    log.append(row)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        log.append({**row, "step": 2})
    assert log.rows() == [row]
