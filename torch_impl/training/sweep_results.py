"""What the runs of a sweep came to: a table by their loss, also as Markdown and JSON, and their curves."""

import io
import json
import textwrap
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from torch_impl.training.files import InputError, write_file
from torch_impl.training.plot import Curve, draw, in_columns
from torch_impl.training.sweep_plan import Plan, Trial
from torch_impl.training.telemetry import MetricsLog, Row
from torch_impl.training.visible import visible

FINAL = ("finished", "stopped early", "diverged")  # a run that ended so is not taken up again
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

    def losses(self) -> list[float]:
        """The best held-out loss of each run that came to an end."""
        return [run["best_val_loss"] for run in self.runs if run["ended"] in FINAL[:2]]

    def name(self) -> str:
        return visible(", ".join(f"{name} {value}" for name, value in self.settings.items())) or "all seeds"


def ending(run: Path) -> dict[str, Any] | None:
    """report.json of a run folder; None where there is none, or none that can be read."""
    try:
        found = json.loads((run / "report.json").read_bytes())
        return {name: found[name] for name in _KEPT}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def combinations(plan: Plan, failed: dict[str, str]) -> list[Combination]:
    """The best first. `failed` says what became of runs that left no report in this session."""
    by_settings: dict[tuple, Combination] = {}
    for trial in plan.trials:
        group = by_settings.setdefault(tuple(trial.settings.items()), Combination(trial.settings, []))
        found = _result(plan, trial, failed)
        if found is not None:
            group.runs.append({"folder": trial.name, "seed": trial.seed, **found})
    begun = [group for group in by_settings.values() if group.runs]
    return sorted(begun, key=lambda group: mean(group.losses()) if group.losses() else float("inf"))


def _result(plan: Plan, trial: Trial, failed: dict[str, str]) -> dict[str, Any] | None:
    if trial.name in failed:
        return dict.fromkeys(_KEPT) | {"ended": failed[trial.name]}
    return ending(plan.folder / trial.name)


def table(found: list[Combination]) -> list[tuple[str, ...]]:
    """Lines of cells, the heading first."""
    names = list(found[0].settings) if found else []
    several = any(len(group.runs) > 1 for group in found)
    lines = [(*names, "loss", *(["spread"] * several), "runs", "parameters", "time", "ended")]
    for group in found:
        losses = group.losses()
        seconds = [run["seconds"] for run in group.runs if run["seconds"] is not None]
        sizes = [run["parameters"] for run in group.runs if run["parameters"] is not None]
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else ""
        ends = dict.fromkeys(run["ended"] for run in group.runs)
        lines.append(
            (
                *group.settings.values(),
                f"{mean(losses):.4f}" if losses else "–",
                *([spread] * several),
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


_LEGEND = (
    "loss: the best on the held-out text, in nats per token, the mean over the runs that came to their end; "
    "spread: the sample standard deviation of these; time: the mean of all"
)


def tell(plan: Plan, failed: dict[str, str]) -> str:
    """Write table.md, results.json and curves.png, and return the table for the terminal.

    Raises OSError where the disk is full.
    """
    found = combinations(plan, failed)
    lines = table(found)
    curves = [curve for group in found[:_DRAWN] if (curve := _mean_curve(plan, group)) is not None]
    if curves:
        png = io.BytesIO()
        draw(curves, "step", "loss", log=False).savefig(png, format="png")
        write_file(plan.folder / "curves.png", png.getvalue())
    results = {
        "format_version": 1,
        "command": plan.command,
        "combinations": [
            {
                "settings": group.settings,
                "mean_val_loss": mean(group.losses()) if group.losses() else None,
                "spread": stdev(group.losses()) if len(group.losses()) > 1 else None,
                "runs": group.runs,
            }
            for group in found
        ],
    }
    content = json.dumps(results, indent=2, allow_nan=False)
    write_file(plan.folder / "results.json", content.encode("ascii"))
    write_file(plan.folder / "table.md", visible(_markdown(plan, lines, bool(curves))).encode("utf-8"))
    done = sum(len(group.runs) for group in found)
    return f"\n{done} of {len(plan.trials)} runs\n{in_columns(lines)}\n{textwrap.fill(_LEGEND, 80)}"


def _markdown(plan: Plan, lines: list[tuple[str, ...]], drawn: bool) -> str:
    heading, *rest = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    rule = "|" + "---|" * len(lines[0])
    picture = "\n![The curves](curves.png)\n" if drawn else ""
    body = "\n".join([heading, rule, *rest])
    return f"# Sweep\n\n    {plan.command}\n\n{body}\n\n{_LEGEND}.\n{picture}"


def _mean_curve(plan: Plan, group: Combination) -> Curve | None:
    """The mean of the runs at each step at which all of them were evaluated; None where there is none."""
    logs = []
    for run in group.runs:
        try:
            rows = MetricsLog(plan.folder / run["folder"] / "metrics.jsonl").rows()
        except InputError:
            continue  # damaged: the run itself will say so
        if rows:
            logs.append({row["step"]: row for row in rows})
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    rows = [_mean_row([log[step] for log in logs]) for step in steps]
    return Curve(group.name(), rows) if rows else None


def _mean_row(rows: list[Row]) -> Row:
    names = ("step", "tokens", "seconds", "val_loss", "train_loss")
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: mean(found) if found else None for name, found in values.items()}
