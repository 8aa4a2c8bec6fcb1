"""Multi-head self-attention (Vaswani et al. 2017, section 3.2.2): many attentions side by side.

Shapes: B batch, T time, C width, H heads, K key/value heads, D = C / H head width, G = (H + 2 K) D.
Parameters come as a dict: qkv.weight (G, C), qkv.bias (G), proj.weight (C, C), proj.bias (C), and with
qk_norm q_norm.weight, k_norm.weight (D).
The rows of qkv.weight are q of all heads, then k, then v; head h owns the rows h D to (h + 1) D of each.
Grouped queries (Ainslie et al. 2023): head h reads key/value head h // (H / K), so neighbours share.
Query-key normalisation (Dehghani et al. 2023, section 2, there by LayerNorm, here by RMSNorm): each head's q
and k are normalised over D, before they turn with their place.
Not here: keys from another sequence (see cross_attention.py).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray as Array

from ref_numpy.alibi import alibi_slopes
from ref_numpy.attention import AttentionCache, attention_backward, attention_forward
from ref_numpy.config import ModelConfig
from ref_numpy.kv_cache import LayerKV, extend
from ref_numpy.layernorm import NormCache, rmsnorm_backward, rmsnorm_forward
from ref_numpy.linear import LinearCache, linear_backward, linear_forward
from ref_numpy.rope import RopeCache, rope_backward, rope_forward


def split_heads(x: Float[Array, "B T HD"], n_head: int) -> Float[Array, "B H T D"]:
    """Features h D to (h + 1) D become head h."""
    return x.reshape(*x.shape[:2], n_head, -1).transpose(0, 2, 1, 3)


def join_heads(x: Float[Array, "B H T D"]) -> Float[Array, "B T HD"]:
    """The heads side by side again."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def repeat_heads(x: Float[Array, "B K S D"], n_head: int) -> Float[Array, "B H S D"]:
    """Each key/value head H / K times, one after the other: as many as there are heads to read them."""
    return x.repeat(n_head // x.shape[1], axis=1)


def sum_readers(dx: Float[Array, "B H S D"], kv_heads: int) -> Float[Array, "B K S D"]:
    """Backward of repeat_heads: what several heads have read gets the sum of their gradients."""
    B, H, S, D = dx.shape
    return dx.reshape(B, kv_heads, H // kv_heads, S, D).sum(axis=2)


class MultiHeadAttentionCache(NamedTuple):
    qkv: LinearCache
    q_norm: NormCache | None
    k_norm: NormCache | None
    rope: RopeCache | None
    attention: AttentionCache
    proj: LinearCache
    config: ModelConfig


def multi_head_attention_forward(
    x: Float[Array, "B T C"],
    params: dict[str, Array],
    config: ModelConfig,
    mask: Bool[Array, "*#mask"],
    places: Integer[Array, "*#B T"],
    past: LayerKV | None = None,
) -> tuple[Float[Array, "B T C"], MultiHeadAttentionCache]:
    """One projection makes q, k and v of all heads; a second mixes what they found.

    The mask broadcasts to (B, H, T, S); places, for rotary positions, says where in its text a token is.
    With a past, queries also look at keys of the tokens before these, S in all; there is no backward then.
    """
    H, K, D = config.n_head, config.kv_heads, config.head_width
    qkv, qkv_cache = linear_forward(x, params["qkv.weight"], params.get("qkv.bias"))  # (B, T, (H + 2 K) D)
    q, k, v = np.split(qkv, [H * D, (H + K) * D], axis=-1)
    q, k, v = split_heads(q, H), split_heads(k, K), split_heads(v, K)  # (B, H, T, D), k and v (B, K, T, D)
    q_norm = k_norm = rope = slopes = None
    if config.qk_norm:
        q, q_norm = rmsnorm_forward(q, params["q_norm.weight"], config.norm_epsilon)
        k, k_norm = rmsnorm_forward(k, params["k_norm.weight"], config.norm_epsilon)
    if config.positions == "rope":
        q, rope = rope_forward(q, places, config)
        k, rope = rope_forward(k, places, config)  # by the same angles: one cache serves both
    if config.positions == "alibi":
        slopes = alibi_slopes(H)
    if past is not None:
        k, v = extend(past, k, v)  # (B, K, S, D)
    heads, attention = attention_forward(q, repeat_heads(k, H), repeat_heads(v, H), mask, slopes)
    y, proj = linear_forward(join_heads(heads), params["proj.weight"], params.get("proj.bias"))
    return y, MultiHeadAttentionCache(qkv_cache, q_norm, k_norm, rope, attention, proj, config)


def multi_head_attention_backward(
    dy: Float[Array, "B T C"], cache: MultiHeadAttentionCache
) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
    """Gradient of x, and those of the parameters by name: the forward's lines in reverse order."""
    config, gradients = cache.config, {}
    djoined, gradients["proj.weight"], gradients["proj.bias"] = linear_backward(dy, cache.proj)
    dq, dk, dv = attention_backward(split_heads(djoined, config.n_head), cache.attention)  # (B, H, T, D)
    dk, dv = sum_readers(dk, config.kv_heads), sum_readers(dv, config.kv_heads)  # (B, K, T, D)
    if config.positions == "rope":
        dq, dk = rope_backward(dq, cache.rope), rope_backward(dk, cache.rope)
    if config.qk_norm:
        dq, gradients["q_norm.weight"] = rmsnorm_backward(dq, cache.q_norm)
        dk, gradients["k_norm.weight"] = rmsnorm_backward(dk, cache.k_norm)
    dqkv = np.concatenate([join_heads(dq), join_heads(dk), join_heads(dv)], axis=-1)  # (B, T, (H + 2 K) D)
    dx, gradients["qkv.weight"], gradients["qkv.bias"] = linear_backward(dqkv, cache.qkv)
    return dx, {name: gradient for name, gradient in gradients.items() if gradient is not None}
