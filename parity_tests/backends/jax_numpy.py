"""Components in JAX, with gradients by its own vjp: a backend of another framework's arrays.

JAX is no requirement of this project: pip install jax
"""

try:
    import jax
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "this backend needs JAX, an optional extra: pip install jax", name="jax"
    ) from error

import math

import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)  # the first question is put in float64

ARRAYS = jax.numpy.from_dlpack


def _pair(function):
    """forward and backward of a function: vjp by the arguments that are floating arrays."""

    def forward(*arguments):
        at = [
            i
            for i, a in enumerate(arguments)
            if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating)
        ]

        def of_arrays(*arrays):
            given = dict(zip(at, arrays, strict=True))
            return function(*(given.get(i, argument) for i, argument in enumerate(arguments)))

        return jax.vjp(of_arrays, *(arguments[i] for i in at))

    def backward(dy, vjp):
        return vjp(dy)

    return forward, backward


def _linear(x, weight, bias):
    y = x @ weight.T
    return y if bias is None else y + bias


def _gelu(x):
    return 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2)))


def _gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def _layernorm(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    y = weight * centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return y if bias is None else y + bias


def _rmsnorm(x, weight, epsilon):
    return weight * x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + epsilon)


def _embedding(ids, weight):
    return weight[ids]


def _attention(q, k, v, mask, slopes):
    scores = q @ jnp.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    if slopes is not None:
        T, S = q.shape[-2], k.shape[-2]
        distance = jnp.abs(jnp.arange(S - T, S)[:, None] - jnp.arange(S)).astype(q.dtype)
        scores = scores - jnp.asarray(slopes, q.dtype)[:, None, None] * distance
    scores = jnp.where(mask, scores, jnp.finfo(q.dtype).min)
    return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0) @ v


def _swiglu(x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias):
    gate = jax.nn.silu(_linear(x, gate_weight, gate_bias))
    return _linear(gate * _linear(x, up_weight, up_bias), down_weight, down_bias)


def _cross_entropy(logits, targets, label_smoothing, count):
    log_p = jax.nn.log_softmax(logits, axis=-1)
    counted = targets != -100
    picked = jnp.take_along_axis(log_p, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    each = -(1 - label_smoothing) * picked - label_smoothing * log_p.mean(-1)
    count = counted.sum() if count is None else count
    return (each * counted).sum() / jnp.maximum(count, 1)


linear_forward, linear_backward = _pair(_linear)
relu_forward, relu_backward = _pair(jax.nn.relu)
gelu_forward, gelu_backward = _pair(_gelu)
gelu_tanh_forward, gelu_tanh_backward = _pair(_gelu_tanh)
silu_forward, silu_backward = _pair(jax.nn.silu)
layernorm_forward, layernorm_backward = _pair(_layernorm)
rmsnorm_forward, rmsnorm_backward = _pair(_rmsnorm)
embedding_forward, embedding_backward = _pair(_embedding)
attention_forward, attention_backward = _pair(_attention)
swiglu_forward, swiglu_backward = _pair(_swiglu)
cross_entropy_forward, cross_entropy_backward = _pair(_cross_entropy)
