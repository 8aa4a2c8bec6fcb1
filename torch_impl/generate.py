"""Text from a model, one token at a time. The twin of ref_numpy/generate.py."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ref_numpy.rng import SAMPLE, Key
from torch_impl.rng import uniform
from torch_impl.transformer import Transformer


def sample_token(logits: Float[Tensor, "V"], temperature: float, u: float) -> int:
    """The least token whose cumulative probability exceeds u; at temperature 0 the first largest logit.

    Raises ValueError for a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, but must be 0 (greedy) or more")
    logits = logits.cpu().double()
    if temperature == 0:
        return int((logits == logits.max()).nonzero()[0])
    cumulative = ((logits - logits.max()) / temperature).exp().cumsum(0)
    return int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))


def generate(
    model: Transformer,
    prompt: Integer[Tensor, "T"],
    n_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields n_tokens that continue the prompt; each sees the last context_length tokens before it.

    Token i takes its random number from (seed, i). Raises ValueError for an empty prompt.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty, but the model needs at least one token to go on from")
    ids, limit = prompt.tolist(), model.config.context_length
    device = model.token_embedding.weight.device
    for i in range(n_tokens):
        context = torch.tensor(ids[-limit:], device=device)[None]  # (1, T)
        with torch.inference_mode():
            logits = model(context)[0, -1]
        token = sample_token(logits, temperature, uniform(Key(seed, SAMPLE, step=i), 1).item())
        ids.append(token)
        yield token
