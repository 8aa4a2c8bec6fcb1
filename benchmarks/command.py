"""The outside of a benchmark: its exit code, and one line for what stopped it."""

import sys
from collections.abc import Callable
from functools import wraps

from torch_impl.training.files import InputError, refusal

Main = Callable[[list[str]], None]


def command(name: str, interrupted: str = "") -> Callable[[Main], Callable[[list[str]], int]]:
    """Makes of what carries out a command line what also returns an exit code: 0, 2 for a request that cannot
    be met, 130 after Ctrl-C. `interrupted` says what is missing then."""

    def decorate(main: Main) -> Callable[[list[str]], int]:
        @wraps(main)
        def carry_out(arguments: list[str]) -> int:
            try:
                main(arguments)
            except (InputError, OSError) as error:
                reason = refusal(error) if isinstance(error, OSError) else error
                print(f"{name}: error: {reason}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"{name}: interrupted{interrupted and '; '}{interrupted}", file=sys.stderr)
                return 130
            return 0

        return carry_out

    return decorate
