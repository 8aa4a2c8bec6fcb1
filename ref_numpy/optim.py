"""Adam, AdamW, a step of the optimizer that is chosen (or Muon, see muon.py), clipping of the gradient by its
global norm, and the learning rate's schedule.

All functions return new arrays and leave what they are given alone.
Not here: AMSGrad, per-layer learning rates, an L2 penalty inside Adam (that is what AdamW corrects).
"""

from math import cos, pi
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from ref_numpy.config import TrainConfig
from ref_numpy.muon import muon
from ref_numpy.parameters import is_muons

Params = dict[str, Array]


class Moments(NamedTuple):
    """Running means of the gradient (m) and of its square (v), for every parameter by name."""

    m: Params
    v: Params


def zero_moments(params: Params) -> Moments:
    """The moments before the first step."""
    return Moments(
        {name: np.zeros_like(value) for name, value in params.items()},
        {name: np.zeros_like(value) for name, value in params.items()},
    )


def adam(
    param: Float[Array, "*shape"],
    gradient: Float[Array, "*shape"],
    m: Float[Array, "*shape"],
    v: Float[Array, "*shape"],
    t: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Step number t = 1, 2, ... of Adam (Kingma & Ba 2015, algorithm 1): the new param, m and v.

    m = b1 m + (1 - b1) g        m_hat = m / (1 - b1^t)     means that start at 0 are too small by this factor
    v = b2 v + (1 - b2) g^2      v_hat = v / (1 - b2^t)
    param = param - lr m_hat / (sqrt(v_hat) + epsilon)
    """
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return param - learning_rate * m_hat / (np.sqrt(v_hat) + epsilon), m, v


def adamw(
    param: Float[Array, "*shape"],
    gradient: Float[Array, "*shape"],
    m: Float[Array, "*shape"],
    v: Float[Array, "*shape"],
    t: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2): param shrinks by lr weight_decay param, then Adam steps.

    The decay never enters the gradient, and so not the moments either. As in PyTorch it is multiplied by the
    whole learning rate; in the paper by the schedule's factor eta_t alone.
    """
    decayed = param - learning_rate * weight_decay * param
    return adam(decayed, gradient, m, v, t, learning_rate, beta1, beta2, epsilon)


def decays(param: Array) -> bool:
    """Whether weight decay acts on a parameter: on matrices and embeddings, not on biases and norms."""
    return param.ndim >= 2


def optimizer_step(
    params: Params, gradients: Params, moments: Moments, step: int, learning_rate: float, config: TrainConfig
) -> tuple[Params, Moments]:
    """One step with the config's optimizer; step counts from 0. What has no gradient stays as it is.

    With Muon, what it does not act on is AdamW's; it has no v, and its rate follows the same schedule.
    """
    new_params, new_m, new_v = dict(params), dict(moments.m), dict(moments.v)
    settings = (step + 1, learning_rate, config.beta1, config.beta2, config.epsilon)
    for name, gradient in gradients.items():
        param = params[name]
        state = (param, gradient, moments.m[name], moments.v[name])
        if config.optimizer == "adam":
            new = adam(*state, *settings)
        elif config.optimizer == "muon" and is_muons(name, param.shape):
            rate = learning_rate * config.muon_learning_rate / config.learning_rate
            new = (*muon(*state[:3], rate, config.muon_momentum, config.weight_decay), state[3])
        else:
            weight_decay = config.weight_decay if decays(param) else 0.0
            new = adamw(*state, *settings, weight_decay)
        new_params[name], new_m[name], new_v[name] = new
    return new_params, Moments(new_m, new_v)


def clip_by_global_norm(gradients: Params, limit: float) -> tuple[Params, np.floating]:
    """g min(1, limit / norm), norm = sqrt(sum of squares over all gradients together), and that norm.

    (Pascanu, Mikolov, Bengio 2013, algorithm 1.) A limit of 0 leaves the gradients as they are.
    """
    norm = np.sqrt(sum((gradient * gradient).sum() for gradient in gradients.values()))
    if limit == 0 or norm <= limit:
        return gradients, norm
    return {name: gradient * (limit / norm) for name, gradient in gradients.items()}, norm


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0.

    Warm-up, step < w:  peak (step + 1) / (w + 1)
    Then, with r = (step - w) / (steps - w), the share of the decay that lies behind:
        constant:  peak
        linear:    peak - (peak - min) r
        cosine:    min + (peak - min) (1 + cos(pi r)) / 2       (Loshchilov & Hutter 2017, equation 5)
    """
    peak, least, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    r = (step - warmup) / max(config.steps - warmup, 1)  # a warm-up of all steps leaves none to divide by
    if config.schedule == "linear":
        return peak - (peak - least) * r
    return least + (peak - least) * 0.5 * (1.0 + cos(pi * r))
