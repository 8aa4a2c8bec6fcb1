"""Why a run ends before its last step: Ctrl-C and its like, and a loss that is no number any more."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Diverged(ArithmeticError):
    """The loss or the gradient is no finite number any more. The message is one line."""


class StopRequest:
    """Whether somebody asked the run to stop, and with which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def agree(self, largest: Callable[[int], int]) -> None:
        """What one process of a run was asked is asked of all, at the same step; `largest` asks them."""
        self.signal = largest(self.signal or 0) or None

    @property
    def exit_code(self) -> int:
        """What a shell reports for the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal or 0)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM is a request, and the second ends the process at once."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for watched_number in watched:
            signal.signal(watched_number, signal.SIG_DFL)
        print("\nstopping after this step; once more to leave at once", file=sys.stderr)

    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in watched}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
