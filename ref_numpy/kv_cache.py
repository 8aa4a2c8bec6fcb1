"""The key/value cache: keys and values of the tokens so far, so that a new token computes its own alone.

A token's keys and values depend on what came before it alone, so in a causal model they never change again.
Memory for a whole context is taken once; extend is the one function of the reference that writes in place.

Shapes: L layers, B batch, K key/value heads, N context length, T new tokens, S all so far, D head width.
Not here: gradients, a context that is full (see generate.py), memory that a window would spare.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import DTypeLike

from ref_numpy.config import ModelConfig


class LayerKV(NamedTuple):
    k: Array  # (B, K, N, D), of which the first `length` tokens are known
    v: Array
    length: int


class KVCache(NamedTuple):
    k: Array  # (L, B, K, N, D)
    v: Array
    length: int  # tokens so far


def empty_cache(config: ModelConfig, batch: int, dtype: DTypeLike) -> KVCache:
    """Room for context_length tokens in each of `batch` sequences."""
    shape = (config.n_layer, batch, config.kv_heads, config.context_length, config.head_width)
    return KVCache(np.empty(shape, dtype), np.empty(shape, dtype), 0)


def of_layer(cache: KVCache, layer: int) -> LayerKV:
    """A layer's own part of the memory: what is written there is written to the cache."""
    return LayerKV(cache.k[layer], cache.v[layer], cache.length)


def extend(
    past: LayerKV, k: Float[Array, "B K T D"], v: Float[Array, "B K T D"]
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """Writes the keys and values of T new tokens behind those before them, and returns all S of them."""
    S = past.length + k.shape[2]
    past.k[:, :, past.length : S], past.v[:, :, past.length : S] = k, v
    return past.k[:, :, :S], past.v[:, :, :S]


def advance(cache: KVCache, tokens: int) -> KVCache:
    """The cache after a forward pass, when all layers have written their part."""
    return cache._replace(length=cache.length + tokens)
