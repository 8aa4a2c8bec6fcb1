"""A run, from its first step to its last checkpoint: train, evaluate, save, tell.

The order of the writes at a step is what makes a killed run resumable: first the line in metrics.jsonl, then
best/, then last/. A resumed run goes on from last/ and drops the lines beyond it, so it makes them again.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from torch_impl.train import StepMetrics, train_steps
from torch_impl.training.announcement import announce
from torch_impl.training.anomaly import not_finite
from torch_impl.training.beginning import system_errors_told
from torch_impl.training.checkpoint import save_checkpoint
from torch_impl.training.command_line import Request
from torch_impl.training.divergence import diverged, read_pending
from torch_impl.training.events import TensorBoardEvents
from torch_impl.training.files import write_file
from torch_impl.training.keeping import keep_newest
from torch_impl.training.looks import look, look_is_due
from torch_impl.training.memory import OutOfMemory, accounted
from torch_impl.training.prepare import Run, prepare
from torch_impl.training.progress import OWED
from torch_impl.training.progress_bar import ProgressBar
from torch_impl.training.ranks import joined
from torch_impl.training.repeating import as_typed, program
from torch_impl.training.report import in_short, write_report
from torch_impl.training.stopping import Diverged, PutOff, StopRequest, stop_requests
from torch_impl.training.telemetry import in_words
from torch_impl.training.visible import visible

_SILENT = 2  # seconds, for which an evaluation has no bar


def train(request: Request) -> int:
    """Carry out what the command line asks for; the exit code. Raises AnotherFailed where another process of
    the run has said already why it ends."""
    with ExitStack() as held:
        ranks = held.enter_context(joined(torch.cuda.is_available()))
        with nullcontext() if request.resume else system_errors_told():
            run = prepare(request, ranks, held)
            announce(run, request)
        with stop_requests() as stop:
            try:
                with accounted(run.config, run.place, ranks):
                    early = _train(run, stop, request.profile)
            except (Diverged, OutOfMemory) as error:
                _report_failure(run, error)
                raise
            step, steps = run.progress.step, run.config.training.steps
            if stop.signal is not None and (step < steps or run.progress.owed is not None):
                told = f"stopped after step {step}; to go on: {_how_to_resume(run)}"
                _report(run, "stopped", told)
                print(told)
                ranks.wait()  # torchrun ends all processes as soon as one has left so
                return stop.exit_code
        sample = _write_sample(run)
        if run.seen is None and run.config.run.looks:  # there was nothing left to train
            _look(run, None)
        told = f"stopped early, after step {step} of {steps}" if early else f"finished after step {step}"
        _report(run, "stopped early" if early else "finished", told + _how_to_talk(run), sample)
        print("finished" + _how_to_talk(run))
        return 0


def _how_to_resume(run: Run) -> str:
    """The command that goes on with a run, among as many processes."""
    return as_typed([*program(run.state.ranks.size, run.state.ranks.local_size), "--resume", str(run.folder)])


def _how_to_talk(run: Run) -> str:
    module = "generate" if run.config.run.content == "text" else "chat"
    command = as_typed(["python", "-m", f"torch_impl.{module}", "--model", str(run.folder)])
    if run.config.model.architecture == "encoder":
        return f'; have it fill gaps: {command} --prompt "a <mask> in a text"'
    return f"; talk to it: {command}" + " --prompt TEXT" * (module == "generate")


def _report(run: Run, ended: str, told: str, sample: str | None = None) -> None:
    """Write the report, and say the most important of it."""
    if run.state.ranks.first:
        run.require_folder()
        found = write_report(run, ended, told, sample)
        print(f"{in_short(found)}\nreport: {run.folder / 'report.html'}")


def _report_failure(run: Run, error: Diverged | OutOfMemory) -> None:
    """Write the report of a run that failed. All processes find that it diverged, and wait for the first one
    to say so, for torchrun ends them as soon as one has left."""
    diverged, ranks = isinstance(error, Diverged), run.state.ranks
    if ranks.first:
        with suppress(OSError):  # what is told already is worse
            run.require_folder()
            write_report(run, "diverged" if diverged else "out of memory", str(error))
    if diverged:
        with suppress(RuntimeError):  # another one is gone already
            ranks.wait()


def _train(run: Run, stop: StopRequest, profile: bool) -> bool:
    """All steps that are left, with their evaluations and checkpoints; whether patience ended them.

    The device is read every log_every steps and where something is written; between, the host runs ahead.
    """
    config, settings, progress = run.config.training, run.config.run, run.progress
    if run.unsaved:
        _save(run, "last")  # from here on, a killed run can be resumed as it was asked for
    if progress.best_val_loss is None:
        _evaluate(run, stop, progress.owed or dict.fromkeys(OWED), None)
    elif progress.owed is not None or (progress.loss_count and progress.step == config.steps):
        # Put off, or the last step is now one after which nobody had asked for it.
        _evaluate(run, stop, progress.owed or dict.fromkeys(OWED), None)
        _save(run, "last")
    elif run.state.ranks.first:
        run.require_folder()
        keep_newest(run.folder, progress.step, settings.keep_checkpoints)
    if _weary(run):
        return True
    if stop.signal is not None:
        return False
    tokens_per_step = config.batch_size * run.objective.tokens_per_sequence
    training_seconds, steps_before = 0.0, progress.step  # since the last evaluation
    steps = train_steps(run.state, run.objective.sample, config)
    if profile and run.state.ranks.first and progress.step < config.steps:
        steps = _profiled(run, steps)
    mark = time.perf_counter()
    with ProgressBar(config.steps, progress.step) as bar:
        for metrics in steps:
            run.pending.append(metrics)
            step, done = run.state.step, run.state.step == config.steps
            stop.agree(run.state.ranks.largest)
            evaluating = done or step % settings.eval_every == 0
            saving = done or step % settings.checkpoint_every == 0
            if not (evaluating or saving or step % settings.log_every == 0 or stop.signal is not None):
                continue

            loss = read_pending(run, stop)
            training_seconds += time.perf_counter() - mark
            speed = (step - steps_before) * tokens_per_step / training_seconds
            bar.show(step, loss, speed)
            if evaluating:
                _evaluate(run, stop, _numbers(metrics), speed)
                training_seconds, steps_before = 0.0, step
            weary, stopping = _weary(run), stop.signal is not None
            if saving or weary or stopping:
                _save(run, "last")
            if weary or stopping:
                return weary
            mark = time.perf_counter()
    return False


def _profiled(run: Run, steps: Iterator[StepMetrics]) -> Iterator[StepMetrics]:
    """The steps that are left, of which a few are watched."""
    from torch_impl.training.profiling import TRACE, profiled, steps_to_watch

    done, settings = run.progress.step, run.config.run
    watched = steps_to_watch(
        done, run.config.training.steps, (settings.eval_every, settings.checkpoint_every)
    )

    def keep(trace: bytes) -> Path:
        run.require_folder()
        write_file(run.folder / TRACE, trace)
        return run.folder / TRACE

    return profiled(steps, watched.start - 1 - done, len(watched), keep, run.place.device)


def _weary(run: Run) -> bool:
    """Whether patience is at its end, which is said."""
    config, progress = run.config, run.progress
    if weary := progress.is_weary(config.run.patience, config.training.steps):
        tqdm.write(
            f"no evaluation was better than that of step {progress.best_step}: stopped early; to train on, "
            f"--resume with --patience above {config.run.patience}, or 0"
        )
    return weary


def _numbers(metrics: StepMetrics) -> dict[str, float | None]:
    """What an evaluation tells of the last step; None for a norm that is no finite number."""
    numbers = {name: getattr(metrics, name).item() for name in OWED}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _evaluate(
    run: Run, stop: StopRequest, numbers: dict[str, float | None], tokens_per_second: float | None
) -> None:
    """Measure the held-out text, write it down with the numbers of the last step, and keep the model in best/
    if none was better.

    Where somebody asks to stop meanwhile, the run owes the evaluation, and begins with it when it goes on.
    """
    progress, config, ranks = run.progress, run.config, run.state.ranks

    def between() -> None:
        stop.agree(ranks.largest)
        if stop.signal is not None:
            raise PutOff
        bar.update()

    try:
        with tqdm(desc="evaluating", unit="batch", delay=_SILENT, leave=False, disable=None) as bar:
            faces = run.objective.evaluate(
                run.state.model, config.run.eval_tokens or None, replace(ranks, between=between)
            )
    except PutOff:
        progress.owed = numbers
        return
    progress.owed = None
    loss = faces["val_loss"]
    if not math.isfinite(loss):
        raise diverged(run, progress.step, f"the loss on the held-out text is {loss}")
    row = {
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.loss_count if progress.loss_count else None,
        **faces,
        **numbers,
        "tokens": progress.step * config.training.batch_size * run.objective.tokens_per_sequence,
        "tokens_per_second": tokens_per_second and round(tokens_per_second),
        "seconds": round(run.seconds(), 3),
    }
    progress.loss_sum, progress.loss_count = 0.0, 0
    if run.events is not None:
        run.require_folder()
        run.metrics.append(row)
        run.events.scalars(progress.step, row)
    known = f"; ln V = {math.log(config.model.vocab_size):.3f}" if progress.step == 0 else ""
    tqdm.write(f"step {progress.step}: held-out text {in_words(faces)}{known}")
    if progress.best_val_loss is None or loss < progress.best_val_loss:
        progress.best_step, progress.best_val_loss, progress.no_better = progress.step, loss, 0
        _save(run, "best")
    else:
        progress.no_better += 1
    if look_is_due(progress.step, config.training.steps, config.run):
        _look(run, run.events)


def _look(run: Run, events: TensorBoardEvents | None) -> None:
    run.seen = look(run.state, run.tokenizer, run.objective, run.config.run, events)


def _save(run: Run, name: str) -> None:
    """Write the checkpoint of that name, unless a weight is no finite number."""
    bad = not_finite(dict(run.state.model.named_parameters()))
    if run.state.ranks.largest(len(bad)):
        raise diverged(run, run.progress.step, f"weights are not finite: {', '.join(bad[:8])}")
    run.progress.seconds = run.seconds()
    run.progress.loss_scale = run.state.scaler.state_dict() or None
    run.require_folder()
    save_checkpoint(run.folder / name, run.config, run.tokenizer, run.state, run.progress, run.require_folder)
    if name == "last" and run.progress.owed is None and run.state.ranks.first:
        keep_newest(run.folder, run.progress.step, run.config.run.keep_checkpoints)


def _write_sample(run: Run) -> str | None:
    """Print an example of what the model has learned, and keep it in sample.txt."""
    length = run.config.run.sample_tokens
    if not length:
        return None
    example = run.objective.example(run.state.model, length)
    if run.state.ranks.first:
        run.require_folder()
        write_file(run.folder / "sample.txt", example.encode("utf-8"))
    print(f"\n{visible(example) if sys.stdout.isatty() else example}\n")
    return example
