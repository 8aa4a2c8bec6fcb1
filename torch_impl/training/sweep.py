"""A sweep: one run for each combination of some settings and for each seed, one after another.

    python train_gpu.py sweep PRESET --vary learning_rate=1e-4,3e-4,1e-3 --vary n_layer=2,4 --seeds 3

Each run is a process of its own, with a run folder of its own below the sweep's, so that one that fails is a
row of the table and not the end. Beside them stand table.md, results.json and curves.png, as they are after
each run. Nothing here imports torch.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from torch_impl.training.config import RunConfig, read_config
from torch_impl.training.files import WRITTEN, InputError, refusal, whole_folder
from torch_impl.training.lock import locked
from torch_impl.training.sweep_plan import Plan, Trial, make_plan
from torch_impl.training.sweep_results import FINAL, WHOLE, how_it_ended, tell
from torch_impl.training.terminal import interrupt_only_noted

_STOPPED = {129, 130, 143, -signal.SIGINT, -signal.SIGTERM}  # exit codes of a run that somebody stopped
_COMPARED = ("train_file", "valid_file", "content", "precision", "eval_every", "eval_tokens", "patience")
"""Settings of a run that decide its losses, or which of them there are."""
_OWN_FILES = {"lock", "lock.json", "results.json", "table.md", "curves.png"}


def sweep(arguments: list[str]) -> int:
    """Carry out a sweep; the exit code: 0, 1 where no run came to its end, or that of a run that was stopped.

    Raises InputError for a mistake in any of the runs, before the first one, and for a run that another
    process trains; and OSError, which says how to go on, where the system refuses something after that.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a sweep starts its runs by itself, each in one process; start it without torchrun")
    with ExitStack() as held:
        try:
            plan = make_plan(arguments)
            _check_folder(plan)
            plan.folder.mkdir(parents=True, exist_ok=True)
            require_folder = held.enter_context(locked(plan.folder))
        except OSError as error:  # nothing has begun
            raise InputError(refusal(error)) from error
        try:
            return _run_all(plan, require_folder)
        except OSError as error:
            if error.errno is None:  # the folder was moved
                raise
            goes_on = f"what was saved before is whole; to go on: {plan.command}"
            raise OSError(f"{refusal(error)}; {goes_on}") from error


def _check_folder(plan: Plan) -> None:
    """Raises InputError for a folder of something else, or of a sweep with other settings."""
    if not plan.folder.exists():
        return
    names = {path.name for path in plan.folder.iterdir()} if plan.folder.is_dir() else {"a file"}
    names = {name.removesuffix(WRITTEN) for name in names}  # of a sweep that was killed
    if names and "results.json" not in names and not names <= _OWN_FILES:
        raise InputError(f"{plan.folder} exists, and is no sweep; name another --out")
    for trial in plan.trials:
        if _has_checkpoint(plan.folder / trial.name):
            _check_same(trial, read_config(plan.folder / trial.name / "last"), plan.folder / trial.name)


def _check_same(trial: Trial, found: RunConfig, folder: Path) -> None:
    """Raises InputError where a run that is there already has other settings than it would get now."""
    wanted = trial.request.config
    model = replace(wanted.model, vocab_size=found.model.vocab_size)  # which the tokenizer decides
    training = wanted.training
    if trial.request.fit:  # and these, the memory
        training = replace(training, micro_batches=found.training.micro_batches)
    wanted = replace(wanted, model=model, training=training)
    for part in ("model", "training", "tokenizer", "start", "run"):
        old, new = getattr(found, part), getattr(wanted, part)
        for name in _COMPARED if part == "run" else asdict(old):
            has, asked = getattr(old, name), getattr(new, name)
            if has != asked:
                raise InputError(f"{folder} has {name} {has}, and this sweep {asked}; name another --out")


def _has_checkpoint(run: Path) -> bool:
    return (whole_folder(run / "last") / "training.json").is_file()


def _run_all(plan: Plan, require_folder: Callable[[], None]) -> int:
    failed: dict[str, str] = {}
    table = tell(plan, failed)
    for number, trial in enumerate(plan.trials, 1):
        folder = plan.folder / trial.name
        if how_it_ended(folder) in FINAL:
            continue
        require_folder()
        if folder.is_dir() and not folder.is_symlink():
            with locked(folder):  # a run outlives a sweep that was killed
                pass
        print(f"\nrun {number} of {len(plan.trials)}: {trial.name}", flush=True)
        with interrupt_only_noted() as interrupt:  # the run hears it as well, saves and leaves
            code = launch(_arguments(trial, folder))
        require_folder()
        if interrupt.pressed or code in _STOPPED:
            print(f"{tell(plan, failed)}\nstopped; to go on: {plan.command}")
            return 128 - code if code < 0 else code or 130
        if code and how_it_ended(folder) not in FINAL:
            failed[trial.name] = _why(code, folder)
        table = tell(plan, failed)
        if number < len(plan.trials):
            print(table, flush=True)
    print(f"{table}\n{plan.folder / 'table.md'}")
    return 0 if any(how_it_ended(plan.folder / trial.name) in WHOLE for trial in plan.trials) else 1


def _arguments(trial: Trial, folder: Path) -> list[str]:
    """What begins a run, or goes on with it."""
    if _has_checkpoint(folder):
        return ["--resume", str(folder), "--cache", str(trial.request.cache)]
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)  # of a run that was killed before it had anything to save
    return [*trial.arguments, "--out", str(folder)]


def _why(code: int, folder: Path) -> str:
    """What became of a run that failed."""
    if how_it_ended(folder) == "out of memory":
        return "out of memory"
    return f"killed by signal {-code}" if code < 0 else f"failed, exit code {code}"


def launch(arguments: list[str]) -> int:
    """Run train_gpu.py and wait for it; its exit code, or a signal's number below 0.

    SIGTERM is passed on, and so is SIGHUP, unless nohup or its like has it ignored.
    """
    program = Path(__file__).parents[2] / "train_gpu.py"
    process = subprocess.Popen([sys.executable, str(program), *arguments])
    passed_on = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        passed_on.append(signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, _: process.send_signal(number)) for n in passed_on}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
