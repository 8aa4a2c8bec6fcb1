"""Training: batch, forward, loss, backward, clip, AdamW, and again. The twin of ref_numpy/train.py.

A step is a function of tensors and reads nothing back from the device, so that the host runs ahead of it.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ref_numpy.config import TrainConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.loss import IGNORE
from torch_impl.optim import clip_by_global_norm, learning_rates, make_optimizer, set_learning_rate
from torch_impl.training.captured import Recorder, captured
from torch_impl.training.ranks import ALONE, Engine, Ranks, make_engine
from torch_impl.transformer import Embedded

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h

Batch = tuple[Tensor, ...]  # (M, B, ...) each: what the model reads, and last the targets
Sample = Callable[[Integer[Tensor, ""], TrainConfig], Batch]  # the batch of a step


@dataclass(frozen=True)
class FromHost:
    """The batches of a text that lies on the host, for a model on a device.

    They are made by the step's number as the host has it, since the device's clock would have to be waited
    for, and sent while the device still computes the step before.
    """

    sample: Sample
    device: torch.device

    def __call__(self, step: Integer[Tensor, ""], config: TrainConfig) -> Batch:
        batch = self.sample(step.cpu(), config)
        if self.device.type == "cuda":  # which copies from other memory only while everybody waits
            batch = tuple(tensor.contiguous().pin_memory() for tensor in batch)
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)


class StepMetrics(NamedTuple):
    """Tensors on the device; reading one waits for the step."""

    loss: Float[Tensor, ""]  # nats per token that counts, label smoothing included
    grad_norm: Float[Tensor, ""]  # before clipping
    learning_rate: Float[Tensor, ""]


@dataclass
class TrainState:
    """What changes from step to step. The learning rates stand in a table beside the step counter."""

    model: Embedded
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # acts for float16 only, whose small gradients would vanish
    rates: Float[Tensor, "steps"]
    engine: Engine  # the model's loss, perhaps compiled, perhaps on several processes
    ranks: Ranks = ALONE
    compiled: bool = False  # the model, and what CUDA makes batches with
    recorder: Recorder | None = None  # steps are recorded and replayed (see training/captured.py)
    step: int = 0  # finished steps


def start(
    model: Embedded,
    config: TrainConfig,
    compiled: bool = False,
    ranks: Ranks = ALONE,
    sharded_on: torch.device | None = None,
) -> TrainState:
    """The state before the first step. Several processes divide each micro-batch among them, and with a
    device to be sharded on, the parameters too (see ranks.make_engine)."""
    model.token_embedding.weight.requires_grad_(not config.freeze_embeddings)
    engine = make_engine(model, compiled, ranks, sharded_on)
    device = model.token_embedding.weight.device
    if device.type == "cpu":
        keep_freed_memory()
    scaler = torch.amp.GradScaler(device.type, enabled=model.compute_dtype == torch.float16)
    # Only CUDA gains from a step counter of its own; elsewhere (MPS) float64 may be missing.
    rates = learning_rates(config).to(device if device.type == "cuda" else "cpu")
    return TrainState(model, make_optimizer(model, config), scaler, rates, engine, ranks, compiled)


def keep_freed_memory() -> None:
    """Lets the C library keep what a step frees for the next one, up to a fifth of a step's time on Linux.

    glibc hands large blocks, and free memory at the end of its heap, back to the system, only to fetch them
    again page by page (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD). Other systems have no mallopt.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for size in (2**25, 2**30):  # of which glibc may refuse the larger one
            library.mallopt(_MMAP_THRESHOLD, size)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def micro_batches(
    state: TrainState, batch: Batch, clock: Integer[Tensor, ""], config: TrainConfig
) -> Iterator[tuple[Batch, DropoutKey | None]]:
    """The rows of each micro-batch that are this process's, and the key of their dropout."""
    *_, targets = batch
    parts, rows, _ = targets.shape
    own = state.ranks.rows(rows)
    for m in range(parts):
        key = None
        if state.model.config.dropout > 0:
            key = DropoutKey(config.seed, clock, first_row=torch.full_like(clock, m * rows + own.start))
        yield tuple(tensor[m, own] for tensor in batch), key


def train_step(
    state: TrainState, batch: Batch, clock: Integer[Tensor, ""], config: TrainConfig
) -> StepMetrics:
    """One optimizer step on a batch, in place. clock is the number of the step, from 0, as a tensor.

    The loss is the mean over the tokens that count in the whole step, however micro-batches and processes
    divide them: each process computes its rows of each micro-batch.
    """
    optimizer, scaler = state.optimizer, state.scaler
    *_, targets = batch
    count = (targets != IGNORE).sum()
    loss = torch.zeros((), device=targets.device)
    for m, (micro_batch, key) in enumerate(micro_batches(state, batch, clock, config), 1):
        with state.engine.joining(m == len(targets)):
            share = state.engine.loss(micro_batch, key, config.label_smoothing, count)
            scaler.scale(share * state.ranks.size).backward()  # of whose gradients an engine takes the mean
        loss = loss + share.detach()

    scaler.unscale_(optimizer)
    grad_norm = clip_by_global_norm(state.model, config.clip)
    rate = torch.take(state.rates, clock)  # indexing would read the clock on the host
    set_learning_rate(optimizer, rate)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return StepMetrics(state.ranks.total(loss), grad_norm, rate)


def train_steps(state: TrainState, sample: Sample, config: TrainConfig) -> Iterator[StepMetrics]:
    """Goes on from state.step to config.steps, and yields the metrics after each step."""
    clock = torch.tensor(state.step, device=state.rates.device)
    from_host = isinstance(sample, FromHost)

    def batch() -> Batch:
        return sample(torch.tensor(state.step) if from_host else clock, config)

    if state.compiled and clock.is_cuda and not from_host:
        batch = torch.compile(batch)  # a hundred small operations, which a GPU makes one after the other

    def step() -> StepMetrics:
        metrics = train_step(state, batch(), clock, config)
        clock.add_(1)
        return metrics

    if state.recorder is not None:
        step = captured(step, state.recorder)
    while state.step < config.steps:
        metrics = step()
        state.step += 1
        yield metrics


def held_out_windows(
    tokens: Integer[Tensor, "N"], context_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Integer[Tensor, "_ _"]]:
    """A text in windows of the context length and one token more, which is the first of the next window.

    With max_tokens, windows of about that many, spread evenly over the text. The last one may be shorter.
    Raises ValueError for a text of fewer than two tokens.
    """
    T, predicted = context_length, tokens.numel() - 1
    if predicted < 1:
        raise ValueError(f"a text of {tokens.numel()} tokens has nothing to predict; it needs 2")
    starts = torch.arange(0, max(predicted - T + 1, 0), T, device=tokens.device)  # of whole windows
    if max_tokens is not None and starts.numel() * T > max_tokens:
        wanted = max(max_tokens // T, 1)
        starts = starts[torch.arange(wanted, device=starts.device) * starts.numel() // wanted]
        rest = 0
    else:
        rest = predicted % T
    offsets = torch.arange(T + 1, device=tokens.device)
    for group in starts.split(batch_size):
        if len(group):
            yield tokens[group[:, None] + offsets].long()
    if rest:
        yield tokens[-rest - 1 :][None].long()


def sequences_at_once(length: int, logits: int = 1, most: int = 64) -> int:
    """How many sequences an evaluation takes at a time: of at most 65,536 tokens in all, and where logits, so
    many for each token, stand in memory whole, 2^28 of them."""
    return max(1, min(most, 2**16 // length, 2**28 // (length * logits)))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Integer[Tensor, "N"],
    batch_size: int | None = None,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean loss over a text in nats per token, without dropout: of a Transformer, or of what has a config and
    a loss like one.

    Every token but the first is predicted once, from at most a window's worth of text before it; with
    max_tokens, about that many. Several processes divide the batches among them, and all get the mean.
    Raises ValueError for a text of fewer than two tokens.
    """
    total, count, T = 0.0, 0, model.config.context_length
    device = next(model.parameters()).device
    windows = held_out_windows(tokens, T, batch_size or sequences_at_once(T), max_tokens)
    for window, counts in ranks.dealt(windows):
        window = window.to(device)
        inputs, targets = window[:, :-1], window[:, 1:]
        loss = model.loss((inputs, targets), count=1)
        if counts:
            total += loss.item()
            count += targets.numel()
    total, count = ranks.sums(total, count)
    return total / count
