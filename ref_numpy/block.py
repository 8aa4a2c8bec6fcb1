"""One transformer block: attention, then feed-forward, each with a residual connection and a norm.

Pre-norm (GPT-2):               x + dropout(sublayer(norm(x)))
Post-norm (Vaswani et al. 3.1): norm(x + dropout(sublayer(x)))

Shapes: B batch, T time, C width. Parameters come as a dict, by their names within the block:
norm1, attention.qkv, attention.proj, norm2, ffn.up, ffn.down, each with .weight and perhaps .bias.
Not here: cross-attention, parallel sublayers, dropout inside a sublayer.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float
from numpy import ndarray as Array

from ref_numpy.attention import (
    MultiHeadAttentionCache,
    multi_head_attention_backward,
    multi_head_attention_forward,
)
from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutCache, DropoutKey, dropout_backward, dropout_forward
from ref_numpy.ffn import FFNCache, ffn_backward, ffn_forward
from ref_numpy.layernorm import (
    NormCache,
    layernorm_backward,
    layernorm_forward,
    rmsnorm_backward,
    rmsnorm_forward,
)

Params = dict[str, Array]


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
    return dx, _present({f"{name}.weight": dweight, f"{name}.bias": dbias})


def _present(gradients: dict[str, Array | None]) -> Params:
    """Without the biases that a model does not have."""
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _attend_forward(
    x: Array, params: Params, config: ModelConfig, mask: Array
) -> tuple[Array, MultiHeadAttentionCache]:
    return multi_head_attention_forward(
        x,
        params["attention.qkv.weight"],
        params.get("attention.qkv.bias"),
        params["attention.proj.weight"],
        params.get("attention.proj.bias"),
        config.n_head,
        mask,
    )


def _attend_backward(dy: Array, cache: MultiHeadAttentionCache) -> tuple[Array, Params]:
    names = ("attention.qkv.weight", "attention.qkv.bias", "attention.proj.weight", "attention.proj.bias")
    dx, *gradients = multi_head_attention_backward(dy, cache)
    return dx, _present(dict(zip(names, gradients, strict=True)))


def _feed_forward(x: Array, params: Params, config: ModelConfig) -> tuple[Array, FFNCache]:
    return ffn_forward(
        x,
        params["ffn.up.weight"],
        params.get("ffn.up.bias"),
        params["ffn.down.weight"],
        params.get("ffn.down.bias"),
        config.activation,
    )


def _feed_backward(dy: Array, cache: FFNCache) -> tuple[Array, Params]:
    names = ("ffn.up.weight", "ffn.up.bias", "ffn.down.weight", "ffn.down.bias")
    dx, *gradients = ffn_backward(dy, cache)
    return dx, _present(dict(zip(names, gradients, strict=True)))


class BlockCache(NamedTuple):
    norm1: NormCache
    attention: MultiHeadAttentionCache
    dropout1: DropoutCache
    norm2: NormCache
    ffn: FFNCache
    dropout2: DropoutCache
    config: ModelConfig


def block_forward(
    x: Float[Array, "B T C"],
    params: Params,
    config: ModelConfig,
    mask: Bool[Array, "*#mask"],
    layer: int = 0,
    key: DropoutKey | None = None,
) -> tuple[Float[Array, "B T C"], BlockCache]:
    """One block. layer is its number, which decides the dropout masks; without a key nothing is dropped."""
    key1 = key and key._replace(site=2 * layer + 1)
    key2 = key and key._replace(site=2 * layer + 2)
    if config.norm_placement == "pre":
        normed, norm1 = norm_forward(x, params, "norm1", config)
        attended, attention = _attend_forward(normed, params, config, mask)
        dropped, dropout1 = dropout_forward(attended, config.dropout, key1)
        x = x + dropped
        normed, norm2 = norm_forward(x, params, "norm2", config)
        fed, ffn = _feed_forward(normed, params, config)
        dropped, dropout2 = dropout_forward(fed, config.dropout, key2)
        y = x + dropped
    else:
        attended, attention = _attend_forward(x, params, config, mask)
        dropped, dropout1 = dropout_forward(attended, config.dropout, key1)
        x, norm1 = norm_forward(x + dropped, params, "norm1", config)
        fed, ffn = _feed_forward(x, params, config)
        dropped, dropout2 = dropout_forward(fed, config.dropout, key2)
        y, norm2 = norm_forward(x + dropped, params, "norm2", config)
    return y, BlockCache(norm1, attention, dropout1, norm2, ffn, dropout2, config)


def block_backward(dy: Float[Array, "B T C"], cache: BlockCache) -> tuple[Float[Array, "B T C"], Params]:
    """Gradient of x, and those of the parameters by name.

    A sum hands its gradient to both of its terms: the residual path (1) and the sublayer's path (2) meet
    again, and add up, where x was read.
    """
    norm1, attention, dropout1, norm2, ffn, dropout2, config = cache
    if config.norm_placement == "pre":
        dnormed, dffn = _feed_backward(dropout_backward(dy, dropout2), ffn)
        through_ffn, dnorm2 = norm_backward(dnormed, norm2, "norm2", config)
        dx = dy + through_ffn  # (1) + (2)
        dnormed, dattention = _attend_backward(dropout_backward(dx, dropout1), attention)
        through_attention, dnorm1 = norm_backward(dnormed, norm1, "norm1", config)
        dx = dx + through_attention  # (1) + (2)
    else:
        dsum, dnorm2 = norm_backward(dy, norm2, "norm2", config)
        through_ffn, dffn = _feed_backward(dropout_backward(dsum, dropout2), ffn)
        dx = dsum + through_ffn  # (1) + (2)
        dsum, dnorm1 = norm_backward(dx, norm1, "norm1", config)
        through_attention, dattention = _attend_backward(dropout_backward(dsum, dropout1), attention)
        dx = dsum + through_attention  # (1) + (2)
    return dx, {**dnorm1, **dattention, **dnorm2, **dffn}
