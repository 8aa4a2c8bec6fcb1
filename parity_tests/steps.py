"""One step of training on both sides, and, where they part, the first of its stages that differs."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from parity_tests.disagreement import Disagreement
from parity_tests.parity import Case, Target, require_same_mathematics
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.loss import IGNORE
from ref_numpy.train import MODELS, READS, Batch, StepMetrics

Params = Mapping[str, np.ndarray]


class Step(NamedTuple):
    """What a step of training begins with."""

    number: int
    batch: Batch
    params: Params
    model_config: ModelConfig
    config: TrainConfig


def _cases(step: Step) -> Iterator[tuple[int, Case]]:
    """The step's model and loss in each micro-batch, by themselves."""
    *_, targets = step.batch
    count = int((targets != IGNORE).sum())
    is_pair = step.model_config.architecture == "encoder-decoder"
    names = READS[step.model_config.architecture]
    forward, *_ = MODELS[step.model_config.architecture]
    for m in range(targets.shape[0]):
        inputs = dict(zip(names, (array[m] for array in step.batch[:-1]), strict=False))
        key = DropoutKey(step.config.seed, step.number, first_row=m * targets.shape[1])
        settings = {"config": step.model_config, "key": key}
        model = {"params": dict(step.params), **inputs, **settings}
        if not is_pair:  # in the order of the reference's arguments
            documents = model.pop("documents", None)
            model["documents"] = documents
        yield m, Case("seq2seq" if is_pair else "transformer", model)
        logits, _ = forward(step.params, **inputs, **settings)
        loss = {"logits": logits, "targets": targets[m], "label_smoothing": step.config.label_smoothing}
        yield m, Case("cross_entropy", loss | {"count": count})


def _stages(
    want: tuple[Params, StepMetrics], got: tuple[Params, Any]
) -> Iterator[tuple[str, Any, Any, float]]:
    """What a step leaves behind, in the order of execution: on both sides, and how far it may be apart."""
    (params, metrics), (got_params, got_metrics) = want, got
    yield "the losses of its micro-batches, added up", metrics.loss, got_metrics.loss, 1e-9
    yield "the norm of their gradients, added up", metrics.grad_norm, got_metrics.grad_norm, 1e-8
    yield "the learning rate", metrics.learning_rate, got_metrics.learning_rate, 0.0
    for name, value in params.items():
        yield f"the optimizer's step of {name}", value, got_params[name], 1e-8


def require_same_step(
    target: Target, step: Step, want: tuple[Params, StepMetrics], got: tuple[Params, Any]
) -> None:
    """The parameters and metrics after a step: losses to 1e-9, gradients and parameters to 1e-8.

    Errors of earlier steps grow with those after them, so this is more than one step's rounding. Raises
    AssertionError with the first stage that differs; where that is the model's, with the part of it.
    """
    __tracebackhide__ = True
    for stage, exact, value, tolerance in _stages(want, got):
        size, error = np.abs(exact).max(), np.abs(np.asarray(value) - np.asarray(exact)).max()
        if not error <= tolerance * size:
            told = f"step {step.number} differs in {stage}, by {error:.2e} of {size:.6g}"
            raise AssertionError(f"{told}.\n{_within(target, step)}")


def _within(target: Target, step: Step) -> str:
    for m, case in _cases(step):
        try:
            require_same_mathematics(target, case)
        except Disagreement as disagreement:
            return f"In its micro-batch {m} by itself:\n{disagreement}"
    return (
        "Model and loss agree in each of its micro-batches by itself: the fault lies in what is around them."
    )
