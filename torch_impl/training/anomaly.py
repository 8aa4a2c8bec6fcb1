"""What went wrong in a step, by doing it again: a step is a pure function of its checkpoint and its number.

The run goes back to last/, repeats the steps up to the one that failed, and looks into that one: which
component was the first to make a number that is not finite, and whose gradients are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ref_numpy.loss import IGNORE
from torch_impl.train import Sample, TrainState, micro_batches, train_steps
from torch_impl.training.checkpoint import load_state
from torch_impl.training.config import RunConfig
from torch_impl.training.prepare import Run
from torch_impl.training.stopping import StopRequest

_SHOWN = 4  # names of each kind


def not_finite(tensors: dict[str, Tensor | None]) -> list[str]:
    """The names of those that hold a number that is none, or is infinite."""
    return [name for name, tensor in tensors.items() if tensor is not None and not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # this process's part
    return bool(local.detach().isfinite().all())


def offenders(run: Run, step: int, stop: StopRequest) -> str:
    """What is not finite in a step, counted from 1, as a sentence; the state is that of the step afterwards.

    All processes of a run look, each at its own rows, and no further where they are asked to stop.
    """
    state, config, sample = run.state, run.config, run.objective.sample
    load_state(run.folder / "last", state)
    training, device = config.training, state.rates.device
    for _ in islice(train_steps(state, sample, training), step - 1 - state.step):
        stop.agree(state.ranks.largest)
        if stop.signal is not None:
            return "the search for the cause was stopped"
    weights = not_finite(dict(state.model.named_parameters()))
    weights = max(state.ranks.gathered(weights), key=bool)  # of any process's part, so that all leave
    if weights:
        return f"the weights of {_listed(weights)} are not finite before the step"
    clock = torch.tensor(state.step, device=device)
    components, returning = first_not_finite(state, sample(clock, training), clock, config)
    gradients = not_finite({name: p.grad for name, p in state.model.named_parameters()})
    found = state.ranks.gathered((components, returning, gradients))
    components, returning, gradients = max(found, key=lambda each: (bool(each[0]), bool(each[2])))
    if not components and not gradients:
        if run.place.compile:
            return "done again without torch.compile, the step is finite: the cause may be the compiled code"
        return "done again, the step is finite"
    if components:
        told = f"the first to make one is {components[0]}"
    else:
        told = "the forward pass is finite"
        told += f", the gradient that comes back to {returning[0]} is not" if returning else ""
    told += f"; gradients that are not finite: {_listed(gradients) or 'none'}"
    if config.run.detect_anomaly:
        told += f"; {_by_reference(state, sample, clock, config)}"
    return told


def _by_reference(state: TrainState, sample: Sample, clock: Tensor, config: RunConfig) -> str:
    """Which component computes something else than the NumPy reference on the batch of a step."""
    from torch_impl.training.against_reference import Comparison

    tqdm.write("computing that step by the NumPy reference, component by component (Ctrl-C twice leaves)")
    comparison = Comparison(state.model)
    with comparison.watching():
        first_not_finite(state, sample(clock, config.training), clock, config)
    found = state.ranks.gathered((comparison.broken, comparison.departures))
    broken, departures = (max(each, key=bool) for each in zip(*found, strict=True))
    if broken:
        return f"beside the NumPy reference, the first component that loses its numbers is {broken[0]}"
    if departures:
        return (
            "no component loses its numbers; the first that departs from the NumPy reference is "
            f"{departures[0]}"
        )
    parts = config.run.shard and state.ranks.size > 1
    return (
        "all components do with their inputs, and with the gradients that came back to them, what the NumPy "
        "reference does, within rounding"
        + (" (not compared: the gradients of weights, which are held in parts)" if parts else "")
    )


def first_not_finite(
    state: TrainState, batch: tuple[Tensor, ...], clock: Tensor, config: RunConfig
) -> tuple[list[str], list[str]]:
    """Components whose outputs are not finite in forward passes on a batch, in the order in which they end;
    and those whose outputs' gradients are not, in the order in which these come back.

    The gradients are in the parameters afterwards.
    """
    state.model.zero_grad(set_to_none=True)
    training = config.training
    count = (batch[-1] != IGNORE).sum()
    found: list[tuple[str, bool]] = []  # and whether what came in was finite
    returning: list[str] = []
    with _watched(state.model, found, returning):
        for micro_batch, key in micro_batches(state, batch, clock, training):
            loss = state.model.loss(micro_batch, key, training.label_smoothing, count)
            if not _is_finite(loss):
                found.append(("the loss", True))
            state.scaler.scale(loss).backward()
    return _makers(found), returning


def _makers(found: list[tuple[str, bool]]) -> list[str]:
    """The names; of a part into which came what is not finite, that of the component that it is a part of."""
    names = []
    for name, came_finite in found:
        around = (n for n, came in found if came and name.startswith(f"{n}."))
        names.append(name if came_finite else next(around, f"what comes into {name}"))
    return names


@contextmanager
def _watched(model: nn.Module, found: list[tuple[str, bool]], returning: list[str]) -> Iterator[None]:
    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look_back(gradient: Tensor) -> None:
            if not _is_finite(gradient):
                returning.append(name)

        def look(module: nn.Module, inputs: tuple, output: object) -> None:
            if not isinstance(output, Tensor):
                return
            if not _is_finite(output):
                came = all(_is_finite(x) for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
                found.append((name, came))
            if output.requires_grad:
                output.register_hook(look_back)

        return module.register_forward_hook(look)

    handles = [
        watch(name or "the model", module)
        for name, module in model.named_modules()
        if not isinstance(module, nn.Identity)  # which stands for a component that the model has not
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
