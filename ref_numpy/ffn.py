"""Position-wise feed-forward layer (Vaswani et al. 2017, section 3.3): widen, bend, narrow.

Shapes: B batch, T time, C width, F feed-forward width. Not here: experts.
"""

from typing import NamedTuple

from jaxtyping import Float
from numpy import ndarray as Array

from ref_numpy.activations import (
    GeluCache,
    gelu_backward,
    gelu_forward,
    gelu_tanh_backward,
    gelu_tanh_forward,
    relu_backward,
    relu_forward,
    silu_backward,
    silu_forward,
)
from ref_numpy.linear import LinearCache, linear_backward, linear_forward

ACTIVATIONS = {
    "relu": (relu_forward, relu_backward),
    "gelu": (gelu_forward, gelu_backward),
    "gelu_tanh": (gelu_tanh_forward, gelu_tanh_backward),
    "silu": (silu_forward, silu_backward),
}


class FFNCache(NamedTuple):
    up: LinearCache
    hidden: Array | GeluCache  # of the activation
    down: LinearCache
    activation: str


def ffn_forward(
    x: Float[Array, "B T C"],
    up_weight: Float[Array, "F C"],
    up_bias: Float[Array, "F"] | None,
    down_weight: Float[Array, "C F"],
    down_bias: Float[Array, "C"] | None,
    activation: str,
) -> tuple[Float[Array, "B T C"], FFNCache]:
    """y = W2 f(W1 x + b1) + b2, at each position alone; f is named by activation."""
    activation_forward, _ = ACTIVATIONS[activation]
    wide, up_cache = linear_forward(x, up_weight, up_bias)  # (B, T, F)
    bent, hidden = activation_forward(wide)
    y, down_cache = linear_forward(bent, down_weight, down_bias)
    return y, FFNCache(up_cache, hidden, down_cache, activation)


def ffn_backward(
    dy: Float[Array, "B T C"], cache: FFNCache
) -> tuple[
    Float[Array, "B T C"],
    Float[Array, "F C"],
    Float[Array, "F"] | None,
    Float[Array, "C F"],
    Float[Array, "C"] | None,
]:
    """Gradients of x, up_weight, up_bias, down_weight, down_bias: the forward's lines in reverse order."""
    _, activation_backward = ACTIVATIONS[cache.activation]
    dbent, ddown_weight, ddown_bias = linear_backward(dy, cache.down)
    dwide = activation_backward(dbent, cache.hidden)
    dx, dup_weight, dup_bias = linear_backward(dwide, cache.up)
    return dx, dup_weight, dup_bias, ddown_weight, ddown_bias


class SwiGLUCache(NamedTuple):
    gate: LinearCache
    gated: Array  # input of the SiLU
    up: LinearCache
    opened: Array  # SiLU of the gate
    wide: Array
    down: LinearCache


def swiglu_forward(
    x: Float[Array, "B T C"],
    gate_weight: Float[Array, "F C"],
    gate_bias: Float[Array, "F"] | None,
    up_weight: Float[Array, "F C"],
    up_bias: Float[Array, "F"] | None,
    down_weight: Float[Array, "C F"],
    down_bias: Float[Array, "C"] | None,
) -> tuple[Float[Array, "B T C"], SwiGLUCache]:
    """y = W2 (silu(Wg x + bg) * (W1 x + b1)) + b2: one half is let through by the other (Shazeer 2020)."""
    gated, gate = linear_forward(x, gate_weight, gate_bias)  # (B, T, F)
    opened, gated = silu_forward(gated)
    wide, up = linear_forward(x, up_weight, up_bias)  # (B, T, F)
    y, down = linear_forward(opened * wide, down_weight, down_bias)
    return y, SwiGLUCache(gate, gated, up, opened, wide, down)


def swiglu_backward(
    dy: Float[Array, "B T C"], cache: SwiGLUCache
) -> tuple[
    Float[Array, "B T C"],
    Float[Array, "F C"],
    Float[Array, "F"] | None,
    Float[Array, "F C"],
    Float[Array, "F"] | None,
    Float[Array, "C F"],
    Float[Array, "C"] | None,
]:
    """Gradients of the forward's arguments. x is read twice: by the gate (1) and by the product (2)."""
    dproduct, ddown_weight, ddown_bias = linear_backward(dy, cache.down)
    dwide, dopened = dproduct * cache.opened, dproduct * cache.wide
    through_up, dup_weight, dup_bias = linear_backward(dwide, cache.up)  # (2)
    dgated = silu_backward(dopened, cache.gated)
    through_gate, dgate_weight, dgate_bias = linear_backward(dgated, cache.gate)  # (1)
    dx = through_gate + through_up  # (1) + (2)
    return dx, dgate_weight, dgate_bias, dup_weight, dup_bias, ddown_weight, ddown_bias
