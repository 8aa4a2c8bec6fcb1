"""Curves of runs beside each other."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from run_tests.conftest import Gone
from torch_impl.training import plot

NOTE = f"{plot.NOT_COMPARED}, nor bits per byte of different texts"


def run_of(name: str, losses: list[float], **more: object) -> Path:
    """A run folder that holds what it has told of itself, and nothing else."""
    Path(name).mkdir(parents=True)
    rows = [
        {"step": 10 * i, "train_loss": loss - 0.1 if i else None, "val_loss": loss, "bits_per_byte": None}
        | {"perplexity": 2.0, "learning_rate": 1e-3 if i else None, "grad_norm": 1.0, "tokens": 80 * i}
        | {"tokens_per_second": 1234 if i else None, "seconds": 2.0 * i, **more}
        for i, loss in enumerate(losses)
    ]
    Path(name, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(name)


@pytest.fixture
def call(call_main):
    return partial(call_main, plot.main)


def test_runs_are_drawn_and_told_best_first(call):
    run_of("runs/slow", [5.0, 4.0, 3.5])
    run_of("runs/fast", [5.0, 3.0, 3.25])
    code, out, _ = call("runs/slow", "runs/fast", "--out", "both.png")
    assert code == 0 and Path("both.png").read_bytes().startswith(b"\x89PNG\r\n")
    heading, first, second, name = out.splitlines()
    assert heading.split() == ["run", "steps", "best", "at", "step", "last", "tokens/s", "seconds"]
    assert first.split() == ["fast", "20", "3.0000", "10", "3.2500", "1,234", "4"]
    assert second.split()[0] == "slow" and name == "both.png"


def evaluation(step: int, loss: float, bits: float | None = None, speed: int | None = None) -> dict:
    return {"step": step, "train_loss": None, "val_loss": loss, "bits_per_byte": bits} | {
        "perplexity": 10 * loss,
        "tokens_per_second": speed,
    }


def test_runs_with_different_tokens_are_told_by_bits_per_byte():
    """The better model came last: its tokens hold more text, so it loses more with each."""
    small = plot.Curve("small", [evaluation(0, 3.0, 3.0), evaluation(5, 2.0, 2.0)])
    large = plot.Curve("large", [evaluation(0, 6.0, 2.0), evaluation(5, 4.5, 1.5), evaluation(9, 4.8, 1.6)])
    heading, first, second, note = plot.table([small, large]).splitlines()
    assert heading.split()[:4] == ["run", "steps", "best", "bits/byte"]
    assert first.split()[:6] == ["large", "9", "4.5000", "1.5000", "5", "4.8000"]
    assert second.split()[:5] == ["small", "5", "2.0000", "2.0000", "5"]
    assert note == NOTE


def test_one_run_without_bits_per_byte_leaves_the_others_theirs():
    """All were told by losses that cannot be compared, and nothing said so."""
    words = [plot.Curve(f"words-{loss}", [evaluation(0, loss)]) for loss in (1.5, 1.25)]
    bits = [plot.Curve("bytes", [evaluation(0, 3.0, 3.0)]), plot.Curve("bpe", [evaluation(0, 6.0, 2.0)])]
    heading, *rest, note = plot.table([*words, *bits]).splitlines()
    assert heading.split()[:4] == ["run", "steps", "best", "bits/byte"] and note == NOTE
    assert [line.split()[0] for line in rest] == ["bpe", "bytes", "words-1.25", "words-1.5"]
    assert [line.split()[3] for line in rest] == ["2.0000", "3.0000", "–", "–"]
    for alike in (words, [bits[0], plot.Curve("more bytes", [evaluation(0, 2.0, 2.0)])]):
        assert len(plot.table(alike).splitlines()) == 3, "tokens that hold as much text need no note"


def test_the_speed_of_a_run_is_that_of_its_report():
    """It was that of the last few steps, which may have waited for something else."""
    speeds = (None, 1000, 1200, 1100, 10)
    rows = [evaluation(step, 3.0, speed=speed) for step, speed in enumerate(speeds)]
    assert plot.table([plot.Curve("run", rows)]).split()[-2:] == ["1,050", "0"]


@pytest.mark.parametrize(
    ("y", "told"),
    [
        ("val_loss", ["run: best 3.000 at step 5", "words: best 2.000 at step 0"]),
        ("bits_per_byte", ["run: best 1.500 at step 5", "words (has none)"]),
        ("perplexity", ["run: best 30.000 at step 5", "words: best 20.000 at step 0"]),
        ("tokens_per_second", ["run", "words (has none)"]),
    ],
)
def test_the_legend_tells_what_is_drawn(y, told):
    """It told the best loss whatever was drawn, and that of runs that had nothing to draw."""
    run = [evaluation(0, 4.0, 2.0), evaluation(5, 3.0, 1.5, 100), evaluation(9, 3.5, 1.75, 90)]
    curves = [plot.Curve("run", run), plot.Curve("words", [evaluation(0, 2.0)])]
    (axes,) = plot.draw(curves, "step", y, log=False).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == told


@pytest.mark.parametrize("y", ["val_loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second"])
@pytest.mark.parametrize("x", ["step", "tokens", "seconds"])
def test_each_curve_has_the_numbers_of_its_run(x, y):
    rows = plot.read_curve(run_of("run", [5.0, 4.0, 3.0]), "run").rows
    (axes,) = plot.draw([plot.Curve("run", rows)], x, y, log=False).axes
    drawn = axes.lines[0]
    wanted = [row for row in rows if row[y] is not None]
    assert drawn.get_xdata().tolist() == [row[x] for row in wanted]
    assert drawn.get_ydata().tolist() == [row[y] for row in wanted]
    if y == "val_loss":
        assert axes.lines[1].get_ydata().tolist() == pytest.approx([3.9, 2.9])


@pytest.mark.parametrize(("losses", "log"), [([3.5], False), ([3.5, 2.5], False), ([3.5, 2.5], True)])
def test_axes_have_plain_numbers(losses, log):
    """A loss of 3 stood beside its axis as 3 x 10**0, and runs of a few steps had parts of one."""
    rows = plot.read_curve(run_of("run", losses), "run").rows
    for row in rows:
        row["step"] //= 5  # 0 and 2
    figure = plot.draw([plot.Curve("run", rows)], "step", "val_loss", log)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")]
    assert not any("times" in label.get_text() for label in labels)
    if not log:
        steps = [label.get_text() for label in axes.get_xticklabels()]  # of some beyond the axis as well
        assert "0" in steps and all(float(step.replace("\u2212", "-")).is_integer() for step in steps)


def test_step_0_is_not_on_a_logarithmic_axis():
    """A line came level from the left edge to the next evaluation, as if the loss had always been that."""
    rows = plot.read_curve(run_of("run", [5.0, 4.0, 3.0]), "run").rows
    (axes,) = plot.draw([plot.Curve("run", rows)], "step", "val_loss", log=True).axes
    shown = axes.transData.transform([(row["step"], row["val_loss"]) for row in rows])
    assert np.isfinite(shown).all(axis=1).tolist() == [False, True, True]


def test_a_reader_that_goes_away_does_not_matter(monkeypatch):
    """It failed with a broken pipe, as of | head, after it had drawn all."""
    run_of("run", [5.0, 4.0])
    monkeypatch.setattr("sys.stdout", Gone())
    assert plot.main(["run"]) == 0 and Path("curves.png").exists()


@pytest.mark.parametrize("runs", [10, 11, 40, 95])
def test_many_curves_have_a_colour_each_and_are_not_hidden(runs):
    """The legend used to lie over the curves, and to leave them no room at all where there were forty."""
    rows = plot.read_curve(run_of("run", [5.0, 4.0, 3.0]), "run").rows
    figure = plot.draw([plot.Curve(f"run-{i}", rows) for i in range(runs)], "step", "perplexity", log=False)
    figure.savefig("many.png")
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_label().startswith("run-")]
    assert len({to_hex(line.get_color()) for line in lines}) == runs
    curves = axes.get_window_extent()
    assert curves.width > 0.8 * 9 * 120 and curves.height > 0.8 * 5.5 * 120
    for legend in figure.legends:
        assert legend.get_window_extent().x0 >= curves.x1 and legend.get_window_extent().y0 >= 0


def test_names_are_as_long_as_tells_them_apart():
    paths = [Path(path) for path in ("a/seed/run", "b/seed/run", "c")]
    assert plot.names_of(paths[:2]) == ["a/seed/run", "b/seed/run"]
    assert plot.names_of([paths[0], paths[2]]) == ["run", "c"]
    assert plot.names_of(paths[:1] * 2) == ["run", "run"]
    assert plot.names_of([Path()]) == [Path.cwd().name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name at least one run folder"),
        (("nowhere",), "nowhere is no run folder"),
        (("empty",), "empty has no evaluations yet"),
        (("run", "--out", "x.gif"), "--out x.gif must end in .png, .svg or .pdf"),
        (("run", "--y", "bits-per-byte"), "y"),
        (("run", "--y", "bits_per_byte"), "--y bits_per_byte: these runs have none"),
        (("run", "--out", "nowhere/x.png"), "No such file"),
        (("run", "--log"), "--log: there is no evaluation after step 0 yet"),
        (("run", "--colour"), "unknown flag --colour"),
        (("run", "old", "--x", "tokens"), "--x tokens: old has evaluations without it; use --x step"),
    ],
)
def test_a_mistake_is_one_line(call, arguments, message):
    Path("empty").mkdir()
    run_of("old", [3.0], tokens=None)
    run_of("run", [3.0])
    code, out, err = call(*arguments)
    assert code in (1, 2) and message in err and len(err.splitlines()) == 1 and not out
