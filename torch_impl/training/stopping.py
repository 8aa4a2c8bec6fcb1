"""Why a run ends before its last step: Ctrl-C and its like, and a loss that is no number any more."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_AT_ONCE = 2.0  # seconds


class Diverged(ArithmeticError):
    """The loss or the gradient is no finite number any more. The message is one line."""


class PutOff(Exception):
    """Somebody asks to stop in the midst of something that can be done when the run goes on."""


class StopRequest:
    """Whether somebody asked the run to stop, and with which signal."""

    def __init__(self) -> None:
        self.asked: int | None = None  # of this process, at any moment
        self.signal: int | None = None  # of any process, as all of them know since they last agreed

    def agree(self, largest: Callable[[int], int]) -> None:
        """What one process of a run was asked is asked of all, at the same step; `largest` asks them.

        What comes while they are being asked is not lost: they agree on it the next time.
        """
        self.signal = largest(self.asked or 0) or None

    @property
    def exit_code(self) -> int:
        """What a shell reports for the signal: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + (self.signal or 0)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP is a request; the second ends the process.

    SIGTERM may come from several at once: who sends it to all processes of a job sends it to torchrun too,
    which passes it on. So one that follows within _AT_ONCE does nothing. SIGHUP tells that the terminal is
    gone, and comes twice, from the shell and the system: the second does nothing. Where it is ignored
    already, as nohup arranges, so it stays.
    """
    request, asked_at = StopRequest(), 0.0

    def again(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - asked_at > _AT_ONCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    seconds = {signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: again}  # what a second one does
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        seconds[signal.SIGHUP] = signal.SIG_IGN

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        request.asked, asked_at = number, time.monotonic()
        for watched, second in seconds.items():
            signal.signal(watched, second)
        # Not by print, which the signal may have interrupted; and who reads may be gone by the same Ctrl-C.
        with suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), b"\nstopping after this step; once more to leave at once\n")

    before = {number: signal.signal(number, handle) for number in seconds}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
