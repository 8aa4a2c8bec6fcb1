"""Cross entropy between predicted logits and target tokens, with targets that do not count.

Shapes: V vocabulary; the leading axes (batch, time) are places, all treated alike; N their number.
Not here: class weights, soft targets other than label smoothing.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray as Array

IGNORE = -100  # a target with this value does not count (torch's default ignore_index)


class CrossEntropyCache(NamedTuple):
    log_p: Array  # (N, V)
    targets: Array  # (N,)
    label_smoothing: float
    count: int
    shape: tuple[int, ...]


def cross_entropy_forward(
    logits: Float[Array, "*places V"],
    targets: Integer[Array, "*places"],
    label_smoothing: float = 0.0,
    count: int | None = None,
) -> tuple[np.floating, CrossEntropyCache]:
    """loss = 1/count sum over counted places of -sum_v q_v log p_v,  p = softmax(logits).

    q = (1 - s) one_hot(target) + s / V, with s the label smoothing (Szegedy et al. 2016, section 7).
    count is the number of places to average over: by default those whose target is not IGNORE. A caller that
    splits a batch into parts gives the count of the whole, so that the parts' losses add up to the batch's.
    Where nothing counts the loss is 0. Raises ValueError for a target that is neither a token nor IGNORE.

    log p = x - max x - log sum exp(x - max x): no exp overflows, whatever the logits.
    """
    vocab_size = logits.shape[-1]
    x, t = logits.reshape(-1, vocab_size), targets.reshape(-1)
    counted = t != IGNORE
    if ((t[counted] < 0) | (t[counted] >= vocab_size)).any():
        raise ValueError(f"a target lies outside the vocabulary of {vocab_size} and is not {IGNORE}")
    if count is None:
        count = int(counted.sum())
    shifted = x - x.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))  # (N, V)
    at_target = log_p[np.arange(t.size), np.where(counted, t, 0)]  # (N,)
    each = -(1 - label_smoothing) * at_target
    if label_smoothing:
        each = each - label_smoothing * log_p.mean(axis=-1)
    loss = np.where(counted, each, 0).sum() / max(count, 1)
    return loss, CrossEntropyCache(log_p, t, label_smoothing, count, logits.shape)


def cross_entropy_backward(
    dloss: float | Float[Array, ""], cache: CrossEntropyCache
) -> Float[Array, "*places V"]:
    """dlogits = dloss / count (p - q) at the places that count, 0 elsewhere.

    From -sum_v q_v log p_v = -sum_v q_v x_v + log sum_v exp(x_v), since q sums to 1:
        (1) the second term gives exp(x_v) / sum exp = p_v,  (2) the first gives -q_v.
    """
    log_p, targets, s, count, shape = cache
    counted = targets != IGNORE
    places = np.arange(targets.size)
    dlogits = np.exp(log_p) - s / shape[-1]  # (1), and the smoothed part of (2)
    dlogits[places, np.where(counted, targets, 0)] -= 1 - s  # (2)
    dlogits = np.where(counted[:, None], dloss / max(count, 1) * dlogits, 0)
    return dlogits.reshape(shape)
