"""What a run tells of itself: metrics.jsonl, and a picture of the losses."""

import io
import json
import math
import os
import sys
from pathlib import Path
from statistics import median

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from torch_impl.training.files import InputError, named_after, write_file
from torch_impl.training.visible import visible

Row = dict[str, float | int | None]  # an evaluation; None: not known, or no finite number

SHARES = ("accuracy", "exact_match")  # that some objectives measure beside the loss


def faces_of_loss(loss: float, tokens_per_byte: float | None) -> Row:
    """A loss in nats per token, as bits per byte of text (None where tokens do not hold all of it), and as
    perplexity."""
    return {
        "val_loss": loss,
        "bits_per_byte": tokens_per_byte and loss / math.log(2) * tokens_per_byte,
        "perplexity": math.exp(min(loss, 700.0)),  # beyond, a float has no room
    }


def in_words(row: Row) -> str:
    """What an evaluation found, for the terminal: nats per token, and the other faces that it has."""
    told = [f"{row['val_loss']:.4f} nats per token"]
    if row["bits_per_byte"]:
        told.append(f"{row['bits_per_byte']:.4f} bits per byte")
    told += [f"{name.replace('_', ' ')} {row[name]:.2%}" for name in SHARES if name in row]
    return ", ".join([*told, f"perplexity {row['perplexity']:.2f}"])


def usual_speed(rows: list[Row]) -> int | None:
    """Tokens per second, the median over the evaluations that tell them."""
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    return round(median(speeds)) if speeds else None


_DRAWN = 1e100
"""The largest numbers of a curve: at the end of what a float can be, an axis has no room for its ticks."""


class MetricsLog:
    """metrics.jsonl: a line for each evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All evaluations so far. A last line without its end is one that a killed run was writing: left out.

        Raises InputError for any other line that cannot be read.
        """
        rows = []
        *lines, _unfinished = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line, parse_constant=lambda name: None)  # Infinity of older runs
                _check(row)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.path}, line {number} is damaged: {error}") from error
            rows.append(row)
        return rows

    def append(self, row: Row) -> None:
        """Add a line, whole or not at all. Raises OSError where the disk is full.

        Not through a buffer, which would write the rest of the line after the file was cut.
        """
        line = _line(row)
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(size)
                named_after(error, self.path)
                raise

    def forget_from(self, step: int) -> None:
        """Drop the evaluations of a step and all later ones: the run makes them again."""
        kept = [_line(row) for row in self.rows() if row["step"] < step]
        write_file(self.path, b"".join(kept))


def _check(row: object) -> None:
    """Raises ValueError for what is no evaluation."""
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    for name in ("step", "val_loss", "train_loss"):
        if name not in row:
            raise ValueError(f"it has no {name}")
    for name, value in row.items():
        known = value is not None or name in ("step", "val_loss")
        most = sys.float_info.max if name == "perplexity" else _DRAWN
        if known and not (type(value) in (int, float) and abs(value) <= most):
            raise ValueError(f"{name!r} is no number of at most {most:.0e}")


def _line(row: Row) -> bytes:
    """JSON has no infinity: null stands for a number that is not finite, such as the norm of an overflow."""
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False).encode("ascii") + b"\n"


def draw_losses(path: Path, rows: list[Row], vocab_size: int, title: str) -> None:
    """A PNG of the training and held-out losses over the steps, from ln V, the loss of knowing nothing."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    trained = [row for row in rows if row["train_loss"] is not None]
    trained_steps, losses = [row["step"] for row in trained], [row["train_loss"] for row in trained]
    axes.plot(trained_steps, losses, marker=".", label="training text")
    axes.plot(steps, [row["val_loss"] for row in rows], marker=".", label="held-out text")
    best = min(rows, key=lambda row: row["val_loss"])
    axes.plot(
        best["step"], best["val_loss"], "o", mfc="none", color="C1", label=f"best: {best['val_loss']:.3f}"
    )
    nothing = math.log(vocab_size)
    axes.axhline(nothing, linestyle=":", color="grey", label=f"ln V = {nothing:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_title(visible(title), parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(path, picture.getvalue())
