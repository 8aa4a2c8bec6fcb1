"""One transformer block: attention, then feed-forward, each with a residual connection and a norm.

Pre-norm (GPT-2):               x + dropout(sublayer(norm(x)))
Post-norm (Vaswani et al. 3.1): norm(x + dropout(sublayer(x)))

Shapes: B batch, T time, C width. Parameters come as a dict, by their names within the block:
norm1, attention.qkv, attention.proj, norm2, ffn.up, ffn.down, each with .weight and perhaps .bias, and with
them those of the variants: ffn.gate, attention.q_norm, attention.k_norm.
Not here: cross-attention (see cross_block.py), parallel sublayers, dropout inside a sublayer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Integer
from numpy import ndarray as Array

from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutCache, DropoutKey, dropout_backward, dropout_forward
from ref_numpy.ffn import FFNCache, SwiGLUCache, ffn_backward, ffn_forward, swiglu_backward, swiglu_forward
from ref_numpy.kv_cache import LayerKV
from ref_numpy.layernorm import (
    NormCache,
    layernorm_backward,
    layernorm_forward,
    rmsnorm_backward,
    rmsnorm_forward,
)
from ref_numpy.multi_head_attention import (
    MultiHeadAttentionCache,
    multi_head_attention_backward,
    multi_head_attention_forward,
)

Params = dict[str, Array]


def within(params: Params, part: str) -> Params:
    """The parameters of a part of the model, by their names within it."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def named(gradients: Params, part: str) -> Params:
    """The opposite: the gradients of a part under their names in the whole."""
    return {f"{part}.{name}": gradient for name, gradient in gradients.items()}


def present(gradients: dict[str, Array | None]) -> Params:
    """Without those of biases that a model does not have."""
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def norm_forward(
    x: Float[Array, "B T C"], params: Params, name: str, config: ModelConfig
) -> tuple[Float[Array, "B T C"], NormCache]:
    """The norm that the config names, with the parameters called name.weight and name.bias."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if config.norm == "rmsnorm":
        return rmsnorm_forward(x, weight, config.norm_epsilon)
    return layernorm_forward(x, weight, bias, config.norm_epsilon)


def norm_backward(
    dy: Float[Array, "B T C"], cache: NormCache, name: str, config: ModelConfig
) -> tuple[Float[Array, "B T C"], Params]:
    """Gradient of x, and those of the parameters by name."""
    if config.norm == "rmsnorm":
        dx, dweight = rmsnorm_backward(dy, cache)
        return dx, {f"{name}.weight": dweight}
    dx, dweight, dbias = layernorm_backward(dy, cache)
    return dx, present({f"{name}.weight": dweight, f"{name}.bias": dbias})


def feed_forward(
    x: Float[Array, "B T C"], params: Params, config: ModelConfig
) -> tuple[Float[Array, "B T C"], FFNCache | SwiGLUCache]:
    """The feed-forward layer that the config names, with the parameters called ffn.<name>."""
    gated = config.activation == "swiglu"
    weights = [params.get(name) for name in _ffn_names(gated)]
    return swiglu_forward(x, *weights) if gated else ffn_forward(x, *weights, config.activation)


def feed_backward(
    dy: Float[Array, "B T C"], cache: FFNCache | SwiGLUCache
) -> tuple[Float[Array, "B T C"], Params]:
    """Gradient of x, and those of the parameters by name."""
    gated = isinstance(cache, SwiGLUCache)
    dx, *gradients = swiglu_backward(dy, cache) if gated else ffn_backward(dy, cache)
    return dx, present(dict(zip(_ffn_names(gated), gradients, strict=True)))


def _ffn_names(gated: bool) -> list[str]:
    """The parameters in the order of ffn_forward's arguments, or of swiglu_forward's."""
    layers = ["gate", "up", "down"] if gated else ["up", "down"]
    return [f"ffn.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


class ResidualCache(NamedTuple):
    norm: NormCache
    sublayer: Any  # the sublayer's own cache
    dropout: DropoutCache


def residual_forward(
    x: Float[Array, "B T C"],
    sublayer: Callable[[Array], tuple[Array, Any]],
    params: Params,
    norm: str,
    config: ModelConfig,
    key: DropoutKey | None,
) -> tuple[Float[Array, "B T C"], ResidualCache]:
    """A sublayer, any function of x that returns (y, cache), with its norm, dropout and residual path."""
    if config.norm_placement == "pre":
        normed, norm_cache = norm_forward(x, params, norm, config)
        found, cache = sublayer(normed)
        dropped, dropout = dropout_forward(found, config.dropout, key)
        y = x + dropped
    else:
        found, cache = sublayer(x)
        dropped, dropout = dropout_forward(found, config.dropout, key)
        y, norm_cache = norm_forward(x + dropped, params, norm, config)
    return y, ResidualCache(norm_cache, cache, dropout)


def residual_backward(
    dy: Float[Array, "B T C"],
    cache: ResidualCache,
    sublayer_backward: Callable[[Array, Any], tuple],
    norm: str,
    config: ModelConfig,
) -> tuple[Float[Array, "B T C"], Any, Params]:
    """Gradient of x, what else the sublayer's backward returns beside its dx, and the norm's gradients.

    A sum hands its gradient to both of its terms: the residual path (1) and the sublayer's path (2) meet
    again, and add up, where x was read.
    """
    if config.norm_placement == "pre":
        dnormed, *others = sublayer_backward(dropout_backward(dy, cache.dropout), cache.sublayer)
        through_sublayer, dnorm = norm_backward(dnormed, cache.norm, norm, config)
        return dy + through_sublayer, others, dnorm  # (1) + (2)
    dsum, dnorm = norm_backward(dy, cache.norm, norm, config)
    through_sublayer, *others = sublayer_backward(dropout_backward(dsum, cache.dropout), cache.sublayer)
    return dsum + through_sublayer, others, dnorm  # (1) + (2)


class BlockCache(NamedTuple):
    attention: ResidualCache
    ffn: ResidualCache
    config: ModelConfig


def block_forward(
    x: Float[Array, "B T C"],
    params: Params,
    config: ModelConfig,
    mask: Bool[Array, "*#mask"],
    places: Integer[Array, "*#B T"],
    layer: int = 0,
    key: DropoutKey | None = None,
    past: LayerKV | None = None,
) -> tuple[Float[Array, "B T C"], BlockCache]:
    """One block. layer is its number, which decides the dropout masks; without a key nothing is dropped.

    With a past, the tokens follow on those whose keys and values it holds.
    """
    key1 = key and key._replace(site=2 * layer + 1)
    key2 = key and key._replace(site=2 * layer + 2)

    def attend(x: Array) -> tuple[Array, MultiHeadAttentionCache]:
        return multi_head_attention_forward(x, within(params, "attention"), config, mask, places, past)

    def feed(x: Array) -> tuple[Array, FFNCache | SwiGLUCache]:
        return feed_forward(x, params, config)

    x, attention = residual_forward(x, attend, params, "norm1", config, key1)
    y, ffn = residual_forward(x, feed, params, "norm2", config, key2)
    return y, BlockCache(attention, ffn, config)


def block_backward(dy: Float[Array, "B T C"], cache: BlockCache) -> tuple[Float[Array, "B T C"], Params]:
    """Gradient of x, and those of the parameters by name."""
    config = cache.config
    dx, (dffn,), dnorm2 = residual_backward(dy, cache.ffn, feed_backward, "norm2", config)
    dx, (dattention,), dnorm1 = residual_backward(
        dx, cache.attention, multi_head_attention_backward, "norm1", config
    )
    return dx, {**dnorm1, **named(dattention, "attention"), **dnorm2, **dffn}
