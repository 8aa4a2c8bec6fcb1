"""Masked tokens: an encoder learns by guessing what a text had at the places that are hidden from it.

Shapes: N tokens of text, M micro-batches, B sequences in each, T context length.
Not here: whole words masked together, a share of places that is exact in every sequence.
"""

import numpy as np
from jaxtyping import Integer
from numpy import ndarray as Array

from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.data import sample_batch
from ref_numpy.loss import IGNORE
from ref_numpy.rng import MASK, Key, uniform

CHOSEN = 0.15  # part of the places that are to be guessed; of these ...
MASKED, REPLACED = 0.8, 0.1  # ... show the mask token, or any token of the text's; the rest stays as it was


def mask_tokens(
    tokens: Integer[Array, "*places"], config: ModelConfig, key: Key
) -> tuple[Integer[Array, "*places"], Integer[Array, "*places"]]:
    """What the model sees, and what it is to guess there (Devlin et al. 2019, section 3.1).

    One number u of the key's stream decides what a place gets: below 0.15 it is chosen, and of this stretch
    the first 80 % become the mask token, the next 10 % a token drawn from another stream, and 10 % stay.
    A target is IGNORE where the place was not chosen.
    """
    u = uniform(key, tokens.size).reshape(tokens.shape)
    v = uniform(key._replace(stream=key.stream + 1), tokens.size).reshape(tokens.shape)
    drawn = (v * config.text_tokens).astype(np.int64)  # never the mask token
    inputs = np.where(u < CHOSEN * (MASKED + REPLACED), drawn, tokens)
    inputs = np.where(u < CHOSEN * MASKED, config.mask_token, inputs)
    return inputs, np.where(u < CHOSEN, tokens, IGNORE)


def sample_masked_batch(
    tokens: Integer[Array, "N"], model_config: ModelConfig, step: int, config: TrainConfig
) -> tuple[Integer[Array, "M B T"], Integer[Array, "M B T"]]:
    """Inputs and targets of a step: the windows that a decoder would read, masked anew at every step."""
    windows, _ = sample_batch(tokens, model_config.context_length, step, config)
    return mask_tokens(windows, model_config, Key(config.seed, MASK, step))
