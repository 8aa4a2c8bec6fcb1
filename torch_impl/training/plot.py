"""Curves of runs, beside each other: `python -m torch_impl.training.plot RUN [RUN ...]`. See --help.

A picture, and a table of how each run ended. A run that still trains is drawn as far as it is.
"""

import io
import os
import sys
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from matplotlib import colormaps, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from torch_impl.training.files import InputError, refusal, replace_file
from torch_impl.training.flags import parse_flags
from torch_impl.training.telemetry import MetricsLog, Row, usual_speed
from torch_impl.training.terminal import lasting_output, show_what_can_be_shown
from torch_impl.training.visible import visible

_SIZE = (9.0, 5.5)  # inches
_DPI = 120
_FEW = 10  # curves, of which each has one of matplotlib's own colours
_IN_A_COLUMN = 40  # names of runs, where the legend stands beside the curves
_AXES = {
    "step": "step",
    "tokens": "tokens trained on",
    "seconds": "seconds of training",
    "val_loss": "loss, nats per token",
    "bits_per_byte": "bits per byte of held-out text",
    "perplexity": "perplexity of held-out text",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient, before clipping",
    "tokens_per_second": "tokens per second",
}
_OF_HELD_OUT = ("val_loss", "bits_per_byte", "perplexity")  # the less, the better
NOT_COMPARED = "losses per token of different tokenizers cannot be compared"
rcParams["axes.formatter.min_exponent"] = 4  # with --log a loss is 3, not 3 x 10**0


@dataclass(frozen=True)
class PlotFlags:
    """The command line of this module."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders."""
    out: str = "curves.png"
    """Picture to write: PNG, or SVG or PDF by its ending."""
    x: Literal["step", "tokens", "seconds"] = "step"
    """What the curves run along."""
    y: Literal["loss", "bits_per_byte", "perplexity", "learning_rate", "grad_norm", "tokens_per_second"] = (
        "loss"
    )
    """What they show: loss is that on the held-out text, and thin, that on the training text."""
    log: bool = False
    """Draw both axes by powers of ten."""


class Curve(NamedTuple):
    """What a run has told of itself."""

    name: str
    rows: list[Row]


def read_curve(folder: Path, name: str) -> Curve:
    """Raises InputError for a folder that is no run, and for one without an evaluation."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no run folder")
    rows = MetricsLog(folder / "metrics.jsonl").rows()
    if not rows:
        raise InputError(f"{folder} has no evaluations yet (metrics.jsonl is empty or missing)")
    return Curve(name, rows)


def names_of(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart; of "." that of the folder which it is."""
    folders = [folder if folder.name else folder.absolute() for folder in folders]
    parts = 1
    while parts < max(len(folder.parts) for folder in folders):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names
        parts += 1
    return [folder.as_posix() for folder in folders]


def draw(curves: list[Curve], x: str, y: str, log: bool) -> Figure:
    """The columns x and y of the runs in one picture, each in a colour of its own, its best evaluation of
    held-out text marked."""
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    few = len(curves) <= _FEW
    colours = [f"C{i}" if few else colormaps["turbo"](i / (len(curves) - 1)) for i in range(len(curves))]
    for colour, (name, rows) in zip(colours, curves, strict=True):
        shown = [row for row in rows if row.get(y) is not None]
        best = min(shown, key=lambda row: row[y]) if shown and y in _OF_HELD_OUT else None
        label = name if shown else f"{name} (has none)"
        if best is not None:
            label += f": best {best[y]:.3f} at step {best['step']:,}"
        axes.plot([row[x] for row in shown], [row[y] for row in shown], ".-", color=colour, label=label)
        if y == "val_loss":
            trained = [row for row in rows if row.get("train_loss") is not None]
            axes.plot(
                [row[x] for row in trained], [row["train_loss"] for row in trained], color=colour, lw=0.7
            )
        if best is not None:
            axes.plot(best[x], best[y], "o", mfc="none", ms=9, color=colour)
    axes.set(xlabel=_AXES[x], ylabel=_AXES[y])
    if y == "val_loss":
        axes.set_title("held-out text, and thin, training text", fontsize="medium")
    if log:
        axes.set_xscale("log", nonpositive="mask")  # clipped, step 0 would be a line from the left
        axes.set_yscale("log")
    elif x != "seconds":  # there is no half of a step
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3, which="both")
    legend = axes.legend(fontsize="small") if few else _legend_beside(figure)
    for label in legend.get_texts():
        label.set_parse_math(False)  # a name may have dollars
    return figure


def _legend_beside(figure: Figure) -> Legend:
    """A legend that would hide the curves stands beside them, in a figure as much larger."""
    columns = -(-len(figure.axes[0].get_legend_handles_labels()[1]) // _IN_A_COLUMN)
    legend = figure.legend(loc="outside right upper", fontsize="small", ncols=columns)
    needed = legend.get_window_extent()
    width, height = _SIZE
    figure.set_size_inches(width + needed.width / _DPI, max(height, needed.height / _DPI + 0.2))
    return legend


def same_tokens(bests: list[tuple[float, float | None]]) -> bool | None:
    """Whether losses per token, each with its bits per byte, are of tokens that hold as much text; None where
    there are no bits per byte to tell it by."""
    ratios = [bits and bits / loss for loss, bits in bests if loss]
    known = [ratio for ratio in ratios if ratio]
    return len(known) == len(ratios) and isclose(min(known), max(known)) if known else None


def table(curves: list[Curve]) -> str:
    """How each run ended, best first: by bits per byte, which all tokenizers share, and after those that have
    them the others, by loss.

    The speed is that of a run's report.
    """
    bests = [min(curve.rows, key=lambda row: row["val_loss"]) for curve in curves]
    faces = [(best["val_loss"], best.get("bits_per_byte")) for best in bests]
    bits_known = any(bits is not None for _, bits in faces)
    lines = [("run", "steps", "best", *["bits/byte"] * bits_known, "at step", "last", "tokens/s", "seconds")]
    for (name, rows), best in sorted(zip(curves, bests, strict=True), key=lambda pair: _place(pair[1])):
        last, bits = rows[-1], best.get("bits_per_byte")
        speed = usual_speed(rows)
        lines.append(
            (
                name,
                f"{last['step']:,}",
                f"{best['val_loss']:.4f}",
                *["–" if bits is None else f"{bits:.4f}"] * bits_known,
                f"{best['step']:,}",
                f"{last['val_loss']:.4f}",
                f"{speed:,}" if speed else "",
                f"{last.get('seconds') or 0:,.0f}",
            )
        )
    different = same_tokens(faces) is False
    note = f"\n{NOT_COMPARED}, nor bits per byte of different texts" if different else ""
    return in_columns(lines) + note


def _place(best: Row) -> tuple[bool, float]:
    """What runs are ordered by: those without bits per byte come last."""
    bits = best.get("bits_per_byte")
    return bits is None, best["val_loss"] if bits is None else bits


def in_columns(lines: list[tuple[str, ...]]) -> str:
    """Cells below each other: the first column begins, the others end together."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        for cells in (zip(line, widths, strict=True) for line in lines)
    )


def main(arguments: list[str]) -> int:
    """The exit code: 0; 2 for a request that cannot be met, 1 for a failure, each with one line on stderr."""
    show_what_can_be_shown()
    try:
        flags = parse_flags(
            PlotFlags(), arguments, "python -m torch_impl.training.plot", "Draw and compare curves of runs."
        )
        if not flags.runs:
            raise InputError("name at least one run folder; see --help")
        out = Path(flags.out)
        kind = out.suffix[1:].lower()
        if kind not in ("png", "svg", "pdf"):
            raise InputError(f"--out {out} must end in .png, .svg or .pdf")
        folders = [Path(os.path.normpath(run)) for run in flags.runs]
        curves = [
            read_curve(f, name) for f, name in zip(folders, map(visible, names_of(folders)), strict=True)
        ]
        y = "val_loss" if flags.y == "loss" else flags.y
        if all(row.get(y) is None for curve in curves for row in curve.rows):
            raise InputError(f"--y {flags.y}: these runs have none; use --y loss")
        for name, rows in curves:
            if any(row.get(flags.x) is None for row in rows):
                raise InputError(f"--x {flags.x}: {name} has evaluations without it; use --x step")
        if flags.log and not any(row[flags.x] > 0 for curve in curves for row in curve.rows):
            raise InputError("--log: there is no evaluation after step 0 yet; leave it out")
        picture = io.BytesIO()
        draw(curves, flags.x, y, flags.log).savefig(picture, format=kind)
        replace_file(out, picture.getvalue())
        with lasting_output():  # who looks at the picture need not read the table
            print(f"{table(curves)}\n{out}")
    except InputError as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except OSError as error:
        message, code = refusal(error), 1
    else:
        return 0
    print(f"plot: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
