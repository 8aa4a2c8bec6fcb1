"""Train a language model on text: `python train_gpu.py [PRESET] [--flags]`. See --help.

`python train_gpu.py sweep [PRESET] --vary NAME=VALUE,VALUE [--flags]` trains several and compares them.
"""

import os
import re
import sys

from ref_numpy.config import ConfigError
from torch_impl.training.command_line import Request, parse
from torch_impl.training.files import InputError, refusal
from torch_impl.training.lock import InUse
from torch_impl.training.stopping import Diverged
from torch_impl.training.terminal import lasting_output, show_what_can_be_shown


def main(arguments: list[str]) -> int:
    """Carry out a command line. The exit code is 0, 1 for a run that failed, 2 for a request that cannot be
    met, and 128 + the signal for a run that was stopped; a failure is one line on stderr."""
    show_what_can_be_shown()
    with lasting_output():
        try:
            return _sweep(arguments[1:]) if arguments[:1] == ["sweep"] else _train(arguments)
        except KeyboardInterrupt:
            return _fail("interrupted", 130) if os.environ.get("RANK", "0") == "0" else 130


def _train(arguments: list[str]) -> int:
    try:
        request = parse(arguments)
    except InUse as error:  # on which --help has nothing to say
        return _refuse(error)
    except (InputError, ConfigError) as error:
        return _refuse(InputError(f"{error}; see --help"))
    except OSError as error:  # of a path that cannot be looked at
        return _refuse(InputError(refusal(error)))
    from torch_impl.training.beginning import NotBegun
    from torch_impl.training.ranks import AnotherFailed  # imports torch, which --help can do without
    from torch_impl.training.run import train

    try:
        return train(request)
    except AnotherFailed:
        return 1
    except (InputError, ConfigError) as error:
        return _fail(str(error), 2)
    except (NotBegun, Diverged) as error:
        return _fail(str(error), 1)
    except (OSError, MemoryError, RuntimeError) as error:
        message = _explain(error, request)
        if message is None:
            raise
        return _fail(message, 1)


def _refuse(error: InputError | ConfigError) -> int:
    """Say what is wrong with a request: of several processes one, be it that all of them found it, or that
    of another machine, on which a file is missing."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        import torch

        from torch_impl.training.ranks import AnotherFailed, joined

        try:
            with joined(torch.cuda.is_available()):
                raise error
        except AnotherFailed:
            return 2
        except (InputError, ConfigError) as found:
            error = found
        except RuntimeError:  # another is gone already
            pass
    return _fail(str(error), 2)


def _sweep(arguments: list[str]) -> int:
    from torch_impl.training.sweep import sweep

    try:
        return sweep(arguments)
    except (InputError, ConfigError) as error:
        return _refuse(error)
    except OSError as error:
        return _fail(refusal(error), 1)


def _explain(error: Exception, request: Request) -> str | None:
    """One line for what can go wrong on a sound machine; None for what cannot."""
    from torch_impl.training.memory import OutOfMemory, ran_out  # imports torch

    if isinstance(error, OSError):
        goes_on = "; what was saved before is whole, and --resume goes on from it"
        return refusal(error) + goes_on * (error.errno is not None)
    if isinstance(error, OutOfMemory):
        return str(error)
    if ran_out(error):
        model, training = request.config.model, request.config.training
        return (
            f"out of memory with batch_size {training.batch_size} in {training.micro_batches} micro_batches "
            f"and context_length {model.context_length}: raise --micro-batches (same result), or reduce "
            "--batch-size, --context-length, --d-model or --n-layer"
        )
    if type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
        reason = str(error).partition("\n")[0]
        return f"the model does not compile here ({reason}); use --compile off"
    gone = re.search(r"[Cc]onnection (closed|reset)|[Tt]imed? ?out|Broken pipe", str(error))
    if gone and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return (
            "another process of the run is gone, or does not answer; whatever was saved before is whole, and "
            "--resume goes on from it"
        )
    return None


def _fail(message: str, code: int) -> int:
    print(f"train_gpu.py: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
