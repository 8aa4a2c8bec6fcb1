"""A decoder's block with a memory (Vaswani et al. 2017, section 3.1).

Three sublayers: self-attention, cross-attention, feed-forward, and in the same order norm1, norm2, norm3.
Shapes: B batch, T time, S length of the memory, C width. Parameters come as a dict, by their names within the
block: those of block.py, with cross_attention.q, cross_attention.kv, cross_attention.proj and norm3 added.
Not here: a block without a memory (see block.py).
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Integer
from numpy import ndarray as Array

from ref_numpy.block import (
    Params,
    ResidualCache,
    feed_backward,
    feed_forward,
    named,
    residual_backward,
    residual_forward,
    within,
)
from ref_numpy.config import ModelConfig
from ref_numpy.cross_attention import CrossAttentionCache, cross_attention_backward, cross_attention_forward
from ref_numpy.dropout import DropoutKey
from ref_numpy.ffn import FFNCache, SwiGLUCache
from ref_numpy.multi_head_attention import (
    MultiHeadAttentionCache,
    multi_head_attention_backward,
    multi_head_attention_forward,
)


class CrossBlockCache(NamedTuple):
    attention: ResidualCache
    cross_attention: ResidualCache
    ffn: ResidualCache
    config: ModelConfig


def cross_block_forward(
    x: Float[Array, "B T C"],
    memory: Float[Array, "B S C"],
    params: Params,
    config: ModelConfig,
    mask: Bool[Array, "*#mask"],
    memory_mask: Bool[Array, "*#memory_mask"],
    places: Integer[Array, "*#B T"],
    site: int = 0,
    key: DropoutKey | None = None,
) -> tuple[Float[Array, "B T C"], CrossBlockCache]:
    """One block; its three dropout masks are those of sites site + 1 to site + 3."""
    key1, key2, key3 = (key and key._replace(site=site + n) for n in (1, 2, 3))

    def attend(x: Array) -> tuple[Array, MultiHeadAttentionCache]:
        return multi_head_attention_forward(x, within(params, "attention"), config, mask, places)

    def attend_memory(x: Array) -> tuple[Array, CrossAttentionCache]:
        own = within(params, "cross_attention")
        return cross_attention_forward(x, memory, own, config.n_head, memory_mask)

    def feed(x: Array) -> tuple[Array, FFNCache | SwiGLUCache]:
        return feed_forward(x, params, config)

    x, attention = residual_forward(x, attend, params, "norm1", config, key1)
    x, cross_attention = residual_forward(x, attend_memory, params, "norm2", config, key2)
    y, ffn = residual_forward(x, feed, params, "norm3", config, key3)
    return y, CrossBlockCache(attention, cross_attention, ffn, config)


def cross_block_backward(
    dy: Float[Array, "B T C"], cache: CrossBlockCache
) -> tuple[Float[Array, "B T C"], Float[Array, "B S C"], Params]:
    """Gradients of x, of the memory, and of the parameters by name."""
    config = cache.config
    dx, (dffn,), dnorm3 = residual_backward(dy, cache.ffn, feed_backward, "norm3", config)
    dx, (dmemory, dcross), dnorm2 = residual_backward(
        dx, cache.cross_attention, cross_attention_backward, "norm2", config
    )
    dx, (dattention,), dnorm1 = residual_backward(
        dx, cache.attention, multi_head_attention_backward, "norm1", config
    )
    gradients = {**dnorm1, **named(dattention, "attention"), **dnorm2, **named(dcross, "cross_attention")}
    return dx, dmemory, {**gradients, **dnorm3, **dffn}
