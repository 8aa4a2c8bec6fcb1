"""Training, the plain way: batch, forward, loss, backward, clip, AdamW, and again.

    python -m ref_numpy.train

trains a model of a quarter of a million parameters on the Python language reference and prints what
it writes.

A model reads all arrays of a batch but the last, which is what it is to write: a decoder's batch is from
data.py, or from packing.py where it learns conversations, an encoder's from masking.py, an encoder-decoder's
from pairs.py.

Shapes: M micro-batches, B sequences in each, T context length.
Not here: files, checkpoints, devices (see train_gpu.py, whose loop is this one's twin).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from ref_numpy.block import Params
from ref_numpy.config import ModelConfig, SamplingConfig, TrainConfig
from ref_numpy.data import sample_batch
from ref_numpy.dropout import DropoutKey
from ref_numpy.generate import generate
from ref_numpy.loss import IGNORE, cross_entropy_backward, cross_entropy_forward
from ref_numpy.optim import Moments, clip_by_global_norm, learning_rate_at, optimizer_step, zero_moments
from ref_numpy.parameters import init_params
from ref_numpy.seq2seq import seq2seq_backward, seq2seq_forward
from ref_numpy.transformer import transformer_backward, transformer_forward

Batch = tuple[Array, ...]  # (M, B, ...) each, the targets last
Sample = Callable[[int, TrainConfig], Batch]  # the batch of a step

MODELS = {
    "decoder": (transformer_forward, transformer_backward),
    "encoder": (transformer_forward, transformer_backward),
    "encoder-decoder": (seq2seq_forward, seq2seq_backward),
}
READS = {  # the arguments of forward that the arrays of a batch are, in order; documents may be left out
    "decoder": ("ids", "documents"),
    "encoder": ("ids", "documents"),
    "encoder-decoder": ("source", "present", "target"),
}


class StepMetrics(NamedTuple):
    loss: float  # nats per token that counts, label smoothing included
    grad_norm: float  # before clipping
    learning_rate: float


def loss_and_gradients(
    params: Params, batch: Batch, step: int, model_config: ModelConfig, config: TrainConfig
) -> tuple[float, Params]:
    """Mean loss over the tokens that count in the whole step, and its gradients, one micro-batch at a time.

    Each micro-batch divides its sum of losses by the count of the whole step, so that their shares add up to
    the mean; the mean of their own means would weigh a token by how few others count beside it.
    """
    forward, backward = MODELS[model_config.architecture]
    names = READS[model_config.architecture]
    *_, targets = batch
    count = int((targets != IGNORE).sum())
    total_loss = 0.0
    total = {name: np.zeros_like(param) for name, param in params.items()}
    for m in range(targets.shape[0]):
        inputs = dict(zip(names, (array[m] for array in batch[:-1]), strict=False))
        key = DropoutKey(config.seed, step, first_row=m * targets.shape[1])
        logits, cache = forward(params, **inputs, config=model_config, key=key)
        loss, loss_cache = cross_entropy_forward(logits, targets[m], config.label_smoothing, count)
        gradients = backward(cross_entropy_backward(1.0, loss_cache), cache)
        total_loss += float(loss)
        total = {name: total[name] + gradient for name, gradient in gradients.items()}
    return total_loss, total


def train_step(
    params: Params,
    moments: Moments,
    batch: Batch,
    step: int,
    model_config: ModelConfig,
    config: TrainConfig,
) -> tuple[Params, Moments, StepMetrics]:
    """One optimizer step on a batch: the new parameters and moments; step counts from 0."""
    loss, gradients = loss_and_gradients(params, batch, step, model_config, config)
    if config.freeze_embeddings:  # no gradient: neither is it clipped along, nor does the optimizer act
        del gradients["token_embedding.weight"]
    gradients, grad_norm = clip_by_global_norm(gradients, config.clip)
    learning_rate = learning_rate_at(step, config)
    params, moments = optimizer_step(params, gradients, moments, step, learning_rate, config)
    return params, moments, StepMetrics(loss, float(grad_norm), learning_rate)


def train(
    params: Params, sample: Sample, model_config: ModelConfig, config: TrainConfig
) -> Iterator[tuple[Params, StepMetrics]]:
    """Yields the parameters and the metrics after each step, config.steps times."""
    moments = zero_moments(params)
    for step in range(config.steps):
        batch = sample(step, config)
        params, moments, metrics = train_step(params, moments, batch, step, model_config, config)
        yield params, metrics


def main() -> None:
    """A toy run on text that every Python carries: its language reference, bytes as tokens."""
    from pydoc_data.topics import topics

    from tqdm import tqdm

    argparse.ArgumentParser("python -m ref_numpy.train", description=main.__doc__).parse_args()
    tokens = np.frombuffer("\n".join(topics.values()).encode("utf-8"), np.uint8)
    model_config = ModelConfig()
    config = TrainConfig(steps=1500, batch_size=16, learning_rate=3e-3, min_learning_rate=3e-4)
    params = init_params(model_config, config.seed)
    sample = partial(sample_batch, tokens, model_config.context_length)
    n_params = sum(param.size for param in params.values())
    print(f"{n_params:,} parameters, {tokens.size:,} bytes of text")

    # Ctrl-C ends the training early; what the model writes by then still follows.
    with suppress(KeyboardInterrupt), tqdm(total=config.steps, unit="step") as bar:
        for trained, metrics in train(params, sample, model_config, config):
            params = trained
            bar.update()
            bar.set_postfix(loss=f"{metrics.loss:.3f}", refresh=False)

    prompt = np.frombuffer(b"The ", np.uint8)
    written = bytes(generate(params, prompt, model_config, 400, SamplingConfig(temperature=0.8)))
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    print("The " + written.decode("utf-8", errors="replace"))


if __name__ == "__main__":
    main()
