"""How far a run is, on stderr: a bar as wide as its terminal, or a line now and then where there is none."""

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

_BETWEEN_LINES = 30.0  # seconds, in a file

# By the columns that the terminal has at least. What is least wanted stands last, where a line is cut.
_FORMATS = {
    90: "{l_bar}{bar}{r_bar}",
    50: "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left",
    0: "{n_fmt}/{total_fmt}{postfix}, {remaining} left",
}


class ProgressBar:
    """How many of a run's steps are done, with the last loss and the speed."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.first, self.started = steps, done, time.monotonic()
        self.told = self.started
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            initial=done,
            unit="step",
            bar_format="{n_fmt}/{total_fmt}",
            disable=not self.on_terminal,
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Say where the run is."""
        if self.on_terminal:
            self._draw(step, loss, tokens_per_second)
        elif time.monotonic() - self.told > _BETWEEN_LINES or step == self.steps:
            self.told = time.monotonic()
            left = (self.told - self.started) / (step - self.first) * (self.steps - step)
            print(
                f"{step}/{self.steps} steps, loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, "
                f"{tqdm.format_interval(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def _draw(self, step: int, loss: float, tokens_per_second: float) -> None:
        columns = _columns()
        least = next(least for least in _FORMATS if columns >= least)
        self.bar.ncols = columns - 1  # some terminals begin a new line after the last column
        self.bar.bar_format = _FORMATS[least]
        speed = f", {tokens_per_second:,.0f} tokens/s" if least == max(_FORMATS) else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}{speed}", refresh=False)
        self.bar.update(step - self.bar.n)


def _columns() -> int:
    """The width of the terminal, which the environment may overrule; 80 where nobody knows."""
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named):
        return int(named)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
