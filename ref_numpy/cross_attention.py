"""Cross-attention (Vaswani et al. 2017, section 3.2.3): queries of one sequence look at another, the memory.

Shapes: B batch, T time, S length of the memory, C width, H heads, D = C / H head width.
Parameters come as a dict: q.weight (C, C), kv.weight (2 C, C), proj.weight (C, C), each perhaps with .bias.
The rows of kv.weight are k of all heads, then v.
Not here: positions (the two sequences have no distance), grouped queries, norms of queries and keys.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from ref_numpy.attention import AttentionCache, attention_backward, attention_forward
from ref_numpy.linear import LinearCache, linear_backward, linear_forward
from ref_numpy.multi_head_attention import join_heads, split_heads


class CrossAttentionCache(NamedTuple):
    q: LinearCache
    kv: LinearCache
    attention: AttentionCache
    proj: LinearCache


def cross_attention_forward(
    x: Float[Array, "B T C"],
    memory: Float[Array, "B S C"],
    params: dict[str, Array],
    n_head: int,
    mask: Bool[Array, "*#mask"],
) -> tuple[Float[Array, "B T C"], CrossAttentionCache]:
    """Queries from x, keys and values from the memory. The mask broadcasts to (B, H, T, S)."""
    q, q_cache = linear_forward(x, params["q.weight"], params.get("q.bias"))
    kv, kv_cache = linear_forward(memory, params["kv.weight"], params.get("kv.bias"))  # (B, S, 2C)
    q, k, v = (split_heads(part, n_head) for part in (q, *np.split(kv, 2, axis=-1)))
    heads, attention = attention_forward(q, k, v, mask)  # (B, H, T, D)
    y, proj = linear_forward(join_heads(heads), params["proj.weight"], params.get("proj.bias"))
    return y, CrossAttentionCache(q_cache, kv_cache, attention, proj)


def cross_attention_backward(
    dy: Float[Array, "B T C"], cache: CrossAttentionCache
) -> tuple[Float[Array, "B T C"], Float[Array, "B S C"], dict[str, Array]]:
    """Gradients of x, of the memory, and of the parameters by name: the forward's lines in reverse order."""
    gradients = {}
    djoined, gradients["proj.weight"], gradients["proj.bias"] = linear_backward(dy, cache.proj)
    n_head = cache.attention.q.shape[1]
    dq, dk, dv = map(join_heads, attention_backward(split_heads(djoined, n_head), cache.attention))
    dkv = np.concatenate([dk, dv], axis=-1)  # (B, S, 2C)
    dmemory, gradients["kv.weight"], gradients["kv.bias"] = linear_backward(dkv, cache.kv)
    dx, gradients["q.weight"], gradients["q.bias"] = linear_backward(dq, cache.q)
    return dx, dmemory, {name: gradient for name, gradient in gradients.items() if gradient is not None}
