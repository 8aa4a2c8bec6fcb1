"""Progress on a terminal of any width, and in a file."""

import io

import pytest

from torch_impl.training import progress_bar
from torch_impl.training.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stderr(monkeypatch):
    def become(stream: io.StringIO) -> io.StringIO:
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return become


@pytest.mark.parametrize("columns", [20, 30, 40, 60, 80, 120])
def test_the_bar_fits_its_terminal_and_shows_the_loss(stderr, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = stderr(Terminal())
    with ProgressBar(1300, 100) as bar:
        for step in range(200, 1301, 100):
            bar.show(step, 1.8234, 23_456.0)
    drawn = terminal.getvalue().replace("\n", "\r").split("\r")
    assert all(len(line) < columns for line in drawn)
    shown = "loss 1.823" if columns > 20 else "loss 1.8"
    assert any("1300/1300" in line and shown in line for line in drawn)
    assert any("23,456 tokens/s" in line for line in drawn) == (columns == 120)


@pytest.mark.parametrize("known", ["", "0", "wide"])
def test_a_terminal_that_tells_no_width_has_eighty_columns(stderr, monkeypatch, known):
    monkeypatch.setenv("COLUMNS", known)
    terminal = stderr(Terminal())
    with ProgressBar(10, 0) as bar:
        bar.show(10, 1.0, 1.0)
    assert max(map(len, terminal.getvalue().replace("\n", "\r").split("\r"))) == 79


def test_a_file_gets_lines_now_and_then(stderr, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: clock[0])
    file = stderr(io.StringIO())
    with ProgressBar(1000, 400) as bar:
        for step in range(401, 1001):
            clock[0] += 0.25
            bar.show(step, 2.5, 1000.0)
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue() and len(lines) == 5
    assert lines[0] == "521/1000 steps, loss 2.500, 1,000 tokens/s, 01:59 left"
    assert lines[-1] == "1000/1000 steps, loss 2.500, 1,000 tokens/s, 00:00 left"
