"""Masked tokens: what an encoder learns from. The twin of ref_numpy/masking.py."""

from typing import NamedTuple

import torch
from jaxtyping import Integer
from torch import Tensor

from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.loss import IGNORE
from ref_numpy.rng import MASK, Key
from torch_impl.data import sample_batch
from torch_impl.loss import cross_entropy
from torch_impl.rng import uniform
from torch_impl.train import held_out_windows, sequences_at_once
from torch_impl.training.ranks import ALONE, Ranks
from torch_impl.transformer import Transformer

CHOSEN, MASKED, REPLACED = 0.15, 0.8, 0.1
_EVALUATION = 2  # stream of the masks on held-out text; those of training are 0 and 1


class MaskedLoss(NamedTuple):
    """How well hidden tokens are guessed."""

    loss: float  # nats per hidden token
    accuracy: float  # part of them whose likeliest guess is right


def mask_tokens(
    tokens: Integer[Tensor, "*places"], config: ModelConfig, key: Key
) -> tuple[Integer[Tensor, "*places"], Integer[Tensor, "*places"]]:
    """What the model sees, and what it is to guess there; IGNORE where nothing is to be guessed.

    A key whose step is a tensor draws where that is.
    """
    where, shape = key.step.device if isinstance(key.step, Tensor) else "cpu", tokens.shape
    u = uniform(key, tokens.numel(), where).view(shape)
    v = uniform(key._replace(stream=key.stream + 1), tokens.numel(), where).view(shape)
    drawn = (v * config.text_tokens).long().to(tokens.device)
    shown = (u >= CHOSEN * (MASKED + REPLACED)).to(tokens.device)
    masked, chosen = (u < CHOSEN * MASKED).to(tokens.device), (u < CHOSEN).to(tokens.device)
    inputs = torch.where(shown, tokens, drawn).masked_fill(masked, config.mask_token)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


def sample_masked_batch(
    tokens: Integer[Tensor, "N"],
    model_config: ModelConfig,
    step: int | Integer[Tensor, ""],
    config: TrainConfig,
) -> tuple[Integer[Tensor, "M B T"], Integer[Tensor, "M B T"]]:
    """Inputs and targets of a step: the windows that a decoder would read, masked anew at every step."""
    windows, _ = sample_batch(tokens, model_config.context_length, step, config)
    return mask_tokens(windows, model_config, Key(config.seed, MASK, step))


@torch.no_grad()
def evaluate_masked(
    model: Transformer,
    tokens: Integer[Tensor, "N"],
    batch_size: int | None = None,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> MaskedLoss:
    """Loss and accuracy on a text, under masks that are the same whenever so many windows at a time are.

    The windows, and the processes that divide them, are those of train.evaluate. Raises ValueError for a
    text of fewer than two tokens.
    """
    total, right, count = 0.0, 0, 0
    T, V = model.config.context_length, model.config.vocab_size
    windows = held_out_windows(tokens, T, batch_size or sequences_at_once(T, V), max_tokens)
    for (number, window), counts in ranks.dealt(enumerate(windows)):
        window = window.to(next(model.parameters()).device)
        inputs, targets = mask_tokens(window[:, :-1], model.config, Key(0, MASK, number, _EVALUATION))
        logits = model(inputs)
        if counts:
            total += cross_entropy(logits, targets, count=1).item()
            right += int((logits.argmax(-1) == targets).sum())
            count += int((targets != IGNORE).sum())
    total, right, count = ranks.sums(total, right, count)
    return MaskedLoss(total / max(count, 1), right / max(count, 1))
