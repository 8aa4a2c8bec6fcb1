"""The report of a run, written when it ends, for whatever reason.

    report.html   a page by itself: figures, curves, a sample, attention maps, environment, the commands
    report.json   the figures

All that comes from the text or from the model is escaped.
"""

import base64
import json
import platform
from html import escape
from string import Template
from typing import Any

import numpy as np
import torch

from torch_impl.training.attention_maps import draw_attention
from torch_impl.training.config import FORMAT_VERSION
from torch_impl.training.counting import counted, in_bytes
from torch_impl.training.files import write_file
from torch_impl.training.history import history
from torch_impl.training.memory import peak_memory
from torch_impl.training.prepare import Run
from torch_impl.training.repeating import command_of, resume_command
from torch_impl.training.telemetry import SHARES, draw_losses, usual_speed
from torch_impl.training.visible import visible


def write_report(run: Run, ended: str, told: str, sample: str | None = None) -> dict[str, Any]:
    """Draw the curves, write both files, and return the figures. Raises OSError where the disk is full.

    ended is finished, stopped early, stopped, diverged or out of memory; told says it in a sentence.
    """
    rows = run.metrics.rows()
    if rows:
        draw_losses(run.folder / "losses.png", rows, run.config.model.vocab_size, str(run.folder))
    found = figures(run, ended, told)
    write_file(run.folder / "report.json", json.dumps(found, indent=2, allow_nan=False).encode("ascii"))
    write_file(run.folder / "report.html", page(run, found, sample).encode("utf-8"))
    return found


def figures(run: Run, ended: str, told: str) -> dict[str, Any]:
    """What there is to say in numbers; None for what is not known."""
    rows, training = run.metrics.rows(), run.config.training
    best = min(rows, key=lambda row: row["val_loss"], default={})
    last = rows[-1] if rows else {}
    tokens = run.progress.step * training.batch_size * run.objective.tokens_per_sequence
    return {
        "format_version": FORMAT_VERSION,
        "ended": ended,
        "told": told,
        "parameters": sum(parameter.numel() for parameter in run.state.model.parameters()),
        "step": run.progress.step,
        "steps": training.steps,
        "tokens": tokens,
        "passes": tokens / run.objective.train_tokens.numel(),
        "seconds": round(run.seconds(), 1),
        "tokens_per_second": usual_speed(rows),
        "peak_memory": peak_memory(run.place.device),
        "best_step": best.get("step"),
        "best_val_loss": best.get("val_loss"),
        "best_bits_per_byte": best.get("bits_per_byte"),
        "last_val_loss": last.get("val_loss"),
        "last_train_loss": last.get("train_loss"),
        **{name: last[name] for name in SHARES if name in last},
        **commands(run),
        "text": run.progress.corpus,
        "environment": environment(run),
    }


def commands(run: Run) -> dict[str, Any]:
    """The command that the run began with, and those that went on with other settings or among more or fewer
    processes, each with the step until which the one before it ran, of how many. Where there are several,
    they repeat it in a folder of its own: they would go on with this run."""
    resumed, configs = run.progress.resumed, history(run.config, run.progress.resumed)
    among = [*resumed, run.progress]
    again = f"{run.folder.resolve().name}-again" if resumed else ""
    return {
        "command": command_of(configs[0], among[0], again),
        "resumed": [
            {
                "step": change.step,
                "steps": before.training.steps,
                "command": resume_command(again, config, change, processes),
            }
            for change, before, config, processes in zip(
                resumed, configs[:-1], configs[1:], among[1:], strict=True
            )
        ],
    }


def environment(run: Run) -> dict[str, str]:
    """What the figures were found with."""
    found = {
        "computed on": str(run.place),
        "Python": platform.python_version(),
        "PyTorch": str(torch.__version__),
        "NumPy": np.__version__,
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{counted(torch.get_num_threads(), 'thread')}",
    }
    if run.place.device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
    if run.state.ranks.size > 1:
        found["processes"] = str(run.state.ranks.size)
    return found


def in_short(found: dict[str, Any]) -> str:
    """The figures in a line or two, for the terminal."""
    best = ""
    if found["best_val_loss"] is not None:
        best = f"best: {_loss(found)} at step {found['best_step']:,}\n"
    memory = f", {in_bytes(found['peak_memory'])} of memory" if found["peak_memory"] else ""
    speed = f", {found['tokens_per_second']:,} tokens/s" if found["tokens_per_second"] else ""
    return f"{best}{_time(found['seconds'])}{speed}{memory}"


def _loss(found: dict[str, Any]) -> str:
    bits = found["best_bits_per_byte"]
    return f"{found['best_val_loss']:.4f} nats per token" + (f", {bits:.4f} bits per byte" if bits else "")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def page(run: Run, found: dict[str, Any], sample: str | None) -> str:
    """The content of report.html."""
    training = run.config.training

    def shown(value: Any, form: str, unit: str = "") -> str:
        return "–" if value is None else f"{value:{form}}{unit}"

    numbers = {
        "parameters": shown(found["parameters"], ","),
        "steps": f"{found['step']:,} of {found['steps']:,}",
        "batch": f"{counted(training.batch_size, 'sequence')} of {run.objective.tokens_per_sequence:,} "
        "tokens",
        "tokens": f"{found['tokens']:,}, {found['passes']:.2f} times the training text",
        "time": _time(found["seconds"]),
        "speed": shown(found["tokens_per_second"], ",", " tokens/s"),
        "memory, at most": in_bytes(found["peak_memory"]) if found["peak_memory"] else "–",
        "best loss on the held-out text": "–"
        if found["best_val_loss"] is None
        else f"{_loss(found)}, at step {found['best_step']:,}",
        "last loss on the held-out text": shown(found["last_val_loss"], ".4f"),
        "last loss on the training text": shown(found["last_train_loss"], ".4f"),
        **{f"last {name.replace('_', ' ')}": f"{found[name]:.2%}" for name in SHARES if name in found},
    }
    parts = [_table(numbers)]
    curves = run.folder / "losses.png"
    if found["best_val_loss"] is not None and curves.exists():
        parts.append(_picture(curves.read_bytes(), "losses over the steps"))
    seen = run.seen
    if sample is None and seen is not None:
        sample = seen.sample
    if sample:
        at = found["step"] if seen is None or sample != seen.sample else seen.step
        parts.append(f"<h2>A sample, of step {at:,}</h2><pre>{escape(visible(sample))}</pre>")
    if seen is not None and seen.maps:
        parts.append(f"<h2>Attention on a held-out passage, at step {seen.step:,}</h2>")
        parts.append(_picture(draw_attention(seen.maps), "attention maps"))
    parts.append(_commands(found["command"], found["resumed"]))
    parts.append(
        "<h2>Environment</h2>" + _table(found["environment"] | {"SHA-256 of the text": found["text"]})
    )
    return _PAGE.substitute(
        title=escape(visible(str(run.folder))), told=escape(visible(found["told"])), content="\n".join(parts)
    )


def _commands(first: str, resumed: list[dict[str, Any]]) -> str:
    if not resumed:
        return f"<h2>The command that repeats it</h2><pre>{escape(visible(first))}</pre>"
    ends = [f"until step {each['step']:,} of {each['steps']:,}:" for each in resumed]
    typed = [first, *(each["command"] for each in resumed)]
    lines = (
        f"<p>{end}<pre>{escape(visible(line))}</pre>"
        for end, line in zip([*ends, "then:"], typed, strict=True)
    )
    return f"<h2>The commands that repeat it</h2>{''.join(lines)}"


def _table(rows: dict[str, str]) -> str:
    lines = (f"<tr><th>{escape(name)}<td>{escape(visible(value))}" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


def _picture(png: bytes, what: str) -> str:
    return f'<img alt="{what}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
th { text-align: left; font-weight: normal; color: #666; padding-right: 2rem; vertical-align: top }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
pre { background: #f4f4f4; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100% }
</style>
<h1>$title</h1>
<p>$told</p>
$content
</html>
""")
