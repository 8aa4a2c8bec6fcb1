"""The losses of a run as they are read: one that leaps is told, and one that is no number ends the run."""

import math

import torch
from tqdm import tqdm

from torch_impl.training.anomaly import offenders
from torch_impl.training.keeping import keep_newest
from torch_impl.training.memory import ran_out
from torch_impl.training.prepare import Run
from torch_impl.training.stopping import Diverged, StopRequest

_KEPT_FROM_BEFORE = 2  # leaps of the loss
_TOLD = 4  # gradients at each


def read_pending(run: Run, stop: StopRequest) -> float:
    """Read the metrics of the steps since the last reading, and return the last loss.

    Raises Diverged at the first step whose loss is no finite number, or whose gradient is none where no loss
    scaler watches over it.
    """
    progress, pending, scaler = run.progress, run.pending, run.state.scaler
    losses = torch.stack([metrics.loss for metrics in pending]).tolist()
    norms = torch.stack([metrics.grad_norm for metrics in pending]).tolist()
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), progress.step + 1):
        if not math.isfinite(loss):
            raise diverged(run, step, f"the loss is {loss}: {_cause(run, step, stop)}")
        if not math.isfinite(norm) and not scaler.is_enabled():
            raise diverged(run, step, f"the norm of the gradient is {norm}: {_cause(run, step, stop)}")
    if scaler.is_enabled() and scaler.get_scale() == 0:
        raise diverged(run, run.state.step, "the gradient overflows float16 at any loss scale")
    for step, loss in enumerate(losses, progress.step + 1):
        if run.spikes.leaps(loss):
            _tell_spike(run, step, loss)
    run.spikes.remember_gradients(run.state)
    progress.loss_sum += sum(losses)
    progress.loss_count += len(losses)
    progress.step = run.state.step
    pending.clear()
    return losses[-1]


def _tell_spike(run: Run, step: int, loss: float) -> None:
    """Say that the loss leaps and which gradients do, and keep the checkpoint from before."""
    grown = ", ".join(f"{name} {times:.1f} times" for name, times in run.spikes.grown(run.state)[:_TOLD])
    kept = f"is kept as {run.folder / f'before-step-{step}'}"
    if run.state.ranks.first:
        run.require_folder()
        try:
            keep_newest(run.folder, step, _KEPT_FROM_BEFORE, "before-step")
        except OSError as error:  # a full disk does not end a run that has nothing to save now
            kept = f"could not be kept: {error.strerror}"
    tqdm.write(
        f"step {step}: the loss leaps to {loss:.3f} from about {run.spikes.mean:.3f}; going on. The "
        f"gradients that grew most: {grown or 'not known yet'}. The checkpoint from before {kept}"
    )


def _cause(run: Run, step: int, stop: StopRequest) -> str:
    """Which component and which tensors are to blame, found by repeating the step."""
    tqdm.write(f"step {step} failed; repeating it from the last checkpoint to see where (Ctrl-C leaves)")
    run.require_folder()
    try:
        return offenders(run, step, stop)
    except (MemoryError, RuntimeError) as error:  # it needs more than the step did, where that was compiled
        if not ran_out(error):
            raise
        return "the search for the cause ran out of memory"


def diverged(run: Run, step: int, what: str) -> Diverged:
    """The error that ends the run at a step, with what may help."""
    config = run.config.training
    clip = "" if 0 < config.clip <= 1 else ", --clip 1"
    last = run.folder / "last"
    good = f"The last good checkpoint is {last}. " if last.is_dir() else ""
    return Diverged(
        f"step {step}: {what}; stopped. {good}Try a run with --learning-rate below {config.learning_rate:g}, "
        f"--warmup-steps above {config.warmup_steps}{clip}"
    )
