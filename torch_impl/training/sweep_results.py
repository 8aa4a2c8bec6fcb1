"""What the runs of a sweep came to: a table, the best first, also as Markdown and JSON, and their curves.

They are compared by their loss per token; where their tokens differ, by the bits per byte of the same text,
and those that have none, since their tokens lose text, come after all others.
"""

import io
import json
import math
import textwrap
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from torch_impl.training.config import LEARNED, RunConfig
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError, write_file
from torch_impl.training.plot import NOT_COMPARED, Curve, draw, in_columns, same_tokens
from torch_impl.training.sweep_plan import Plan, Trial
from torch_impl.training.telemetry import MetricsLog, Row
from torch_impl.training.visible import visible

WHOLE = ("finished", "stopped early")  # a run that ended so came to its end
FINAL = (*WHOLE, "diverged")  # ... and one that ended so is not taken up again
_DRAWN = 10  # combinations in the picture
_KEPT = (
    "ended",
    "told",
    "step",
    "best_val_loss",
    "best_step",
    "best_bits_per_byte",
    "last_val_loss",
    "parameters",
    "tokens",
    "seconds",
    "tokens_per_second",
    "peak_memory",
)


class Combination(NamedTuple):
    """Some values of the varied settings, and the runs with them, one for each seed."""

    settings: dict[str, str]
    runs: list[dict[str, Any]]  # that have ended, one way or another

    def ended(self) -> list[dict[str, Any]]:
        """The runs that came to their end; of them the table and the picture tell."""
        return [run for run in self.runs if run["ended"] in WHOLE]

    def best(self, name: str) -> list[float]:
        """What each run that came to its end has under that name; nothing where one of them has none."""
        found = [run[name] for run in self.ended()]
        return [] if None in found else found

    def name(self) -> str:
        return visible(", ".join(f"{name} {value}" for name, value in self.settings.items())) or "all seeds"


class Measure(NamedTuple):
    """What combinations are compared by."""

    column: str  # in metrics.jsonl
    heading: str  # in the table
    unit: str
    note: str = ""

    @property
    def name(self) -> str:
        """In report.json."""
        return f"best_{self.column}"


_TEXTS = "the held-out texts differ: neither losses nor bits per byte of different texts can be compared"
_LOSS = Measure("val_loss", "loss", "nats per token")
_BITS = Measure("bits_per_byte", "bits/byte", "bits per byte")


def ending(run: Path) -> dict[str, Any] | None:
    """report.json of a run folder; None where there is none, or none that can be read."""
    try:
        found = json.loads((run / "report.json").read_bytes())
        return {name: found[name] for name in _KEPT}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def how_it_ended(run: Path) -> str | None:
    """By the report of a run folder; None where there is none."""
    found = ending(run)
    return found and found["ended"]


def combinations(plan: Plan, failed: dict[str, str]) -> tuple[list[Combination], Measure]:
    """The best first, and by what. `failed` says what became of runs that left no report in this session."""
    by_settings: dict[tuple, Combination] = {}
    for trial in plan.trials:
        group = by_settings.setdefault(tuple(trial.settings.items()), Combination(trial.settings, []))
        found = _result(plan, trial, failed)
        if found is not None:
            group.runs.append({"folder": trial.name, "seed": trial.seed, **found})
    begun = [group for group in by_settings.values() if group.runs]
    measure = _measure(plan, [run for group in begun for run in group.runs])

    def place(group: Combination) -> tuple[float, float]:
        return tuple(mean(group.best(name) or [math.inf]) for name in (measure.name, _LOSS.name))

    return sorted(begun, key=place), measure


def _measure(plan: Plan, runs: list[dict[str, Any]]) -> Measure:
    """The loss; where tokens differ, bits per byte, if any run that came to its end has them.

    Within one tokenizer the two are a multiple of each other, the same for all runs, and order them alike.
    """
    configs = [trial.request.config for trial in plan.trials]
    alike = same_tokens([(run["best_val_loss"], run["best_bits_per_byte"]) for run in runs])
    if alike is None:  # nothing but the settings can tell
        alike = len(set(map(_tokenizer, configs))) == 1
    texts = {(run.valid_file or (run.train_file,), run.eval_tokens) for run in (each.run for each in configs)}
    note = _TEXTS if len(texts) > 1 else "" if alike else NOT_COMPARED
    bits = any(run["best_bits_per_byte"] is not None for run in runs if run["ended"] in WHOLE)
    return (_BITS if bits and not alike else _LOSS)._replace(note=note)


def _tokenizer(config: RunConfig) -> tuple[object, ...]:
    """What decides a run's tokens."""
    learned = config.tokenizer.tokenizer in LEARNED  # from the training text
    return config.tokenizer, config.start.init_from, config.run.train_file if learned else ""


def _result(plan: Plan, trial: Trial, failed: dict[str, str]) -> dict[str, Any] | None:
    if trial.name in failed:
        return dict.fromkeys(_KEPT) | {"ended": failed[trial.name]}
    return ending(plan.folder / trial.name)


def table(found: list[Combination], measure: Measure) -> list[tuple[str, ...]]:
    """Lines of cells, the heading first."""
    names = list(found[0].settings) if found else []
    several = any(len(group.runs) > 1 for group in found)
    beside = ["loss"] * (measure.name != _LOSS.name)
    lines = [(*names, measure.heading, *["spread"] * several, *beside, "runs", "parameters", "time", "ended")]
    for group in found:
        best, losses = group.best(measure.name), group.best(_LOSS.name)
        seconds = [run["seconds"] for run in group.runs if run["seconds"] is not None]
        sizes = [run["parameters"] for run in group.runs if run["parameters"] is not None]
        spread = f"{stdev(best):.4f}" if len(best) > 1 else ""
        ends = dict.fromkeys(run["ended"] for run in group.runs)
        lines.append(
            (
                *group.settings.values(),
                f"{mean(best):.4f}" if best else "–",
                *[spread] * several,
                *[f"{mean(losses):.4f}" if losses else "–" for _ in beside],
                str(len(group.runs)),
                f"{sizes[0]:,}" if sizes else "–",
                f"{mean(seconds):,.0f} s" if seconds else "–",
                ", ".join(_counted(end, group.runs) for end in ends),
            )
        )
    return lines


def _counted(end: str, runs: list[dict[str, Any]]) -> str:
    count = sum(run["ended"] == end for run in runs)
    return end if count == len(runs) else f"{count} {end}"


def _legend(measure: Measure) -> str:
    return (
        f"{measure.heading}: the best on the held-out text, in {measure.unit}, the mean over the runs that "
        "came to their end; spread: the sample standard deviation of these; time: the mean of all"
        f"{measure.note and '; '}{measure.note}"
    )


def tell(plan: Plan, failed: dict[str, str]) -> str:
    """Write table.md, results.json and curves.png, and return the table for the terminal.

    Raises OSError where the disk is full.
    """
    found, measure = combinations(plan, failed)
    lines, legend = table(found, measure), _legend(measure)
    curves = [curve for group in found[:_DRAWN] if (curve := _mean_curve(plan, group, measure)) is not None]
    if curves:
        png, figure = io.BytesIO(), draw(curves, "step", measure.column, log=False)
        figure.axes[0].set_title("the best that each run had come to, the mean over runs", fontsize="medium")
        figure.savefig(png, format="png")
        write_file(plan.folder / "curves.png", png.getvalue())
    results = {
        "format_version": 2,
        "command": plan.command,
        "compared_by": measure.name,
        "combinations": [_in_numbers(group) for group in found],
    }
    content = json.dumps(results, indent=2, allow_nan=False)
    write_file(plan.folder / "results.json", content.encode("ascii"))
    page = visible(_markdown(plan, lines, legend, bool(curves)))
    write_file(plan.folder / "table.md", page.encode("utf-8"))
    done = sum(len(group.runs) for group in found)
    return f"\n{done} of {counted(len(plan.trials), 'run')}\n{in_columns(lines)}\n{textwrap.fill(legend, 80)}"


def _in_numbers(group: Combination) -> dict[str, Any]:
    losses, bits = group.best("best_val_loss"), group.best("best_bits_per_byte")
    return {
        "settings": group.settings,
        "mean_val_loss": mean(losses) if losses else None,
        "mean_bits_per_byte": mean(bits) if bits else None,
        "spread_val_loss": stdev(losses) if len(losses) > 1 else None,
        "spread_bits_per_byte": stdev(bits) if len(bits) > 1 else None,
        "runs": group.runs,
    }


def _markdown(plan: Plan, lines: list[tuple[str, ...]], legend: str, drawn: bool) -> str:
    heading, *rest = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    rule = "|" + "---|" * len(lines[0])
    picture = "\n![The curves](curves.png)\n" if drawn else ""
    body = "\n".join([heading, rule, *rest])
    return f"# Sweep\n\n    {plan.command}\n\n{body}\n\n{legend}.\n{picture}"


def _mean_curve(plan: Plan, group: Combination, measure: Measure) -> Curve | None:
    """At each step, the mean over runs of the best that each had come to by then; None where there is none.

    A run that stopped early keeps its best, so that the curve ends at the figure in the table. Those that did
    not come to their end are left out, as they are there, unless there are no others.
    """
    column = measure.column
    logs = [log for run in group.ended() or group.runs if (log := _evaluations(plan, run, column))]
    steps = sorted(set().union(*logs))
    so_far = [accumulate([log.get(step, math.inf) for step in steps], min) for log in logs]
    means = [(step, mean(bests)) for step, *bests in zip(steps, *so_far, strict=True)]
    rows: list[Row] = [{"step": step, column: best if math.isfinite(best) else None} for step, best in means]
    if not group.ended():
        told = f" ({', '.join(dict.fromkeys(run['ended'] for run in group.runs))})"
    else:
        told = f" ({len(logs)} of {len(group.runs)} runs)" * (len(logs) < len(group.runs))
    return Curve(group.name() + told, rows) if rows else None


def _evaluations(plan: Plan, run: dict[str, Any], column: str) -> dict[int, float]:
    """By step, what the evaluations of a run found, infinity where they did not find that."""
    try:
        rows = MetricsLog(plan.folder / run["folder"] / "metrics.jsonl").rows()
    except InputError:
        return {}  # damaged: the run itself will say so
    return {row["step"]: math.inf if row.get(column) is None else row[column] for row in rows}
