"""torch_impl under the reference's names: the suite's default target.

Its functions are offered as they are, flash attention with the mask for a pattern; its modules (attention
heads, ffn, block, transformer) are called with the weights handed in.
"""

import torch
from torch.func import functional_call

from ref_numpy.attention import causal_mask
from torch_impl.activations import gelu, gelu_tanh, relu, silu  # noqa: F401
from torch_impl.attention import MultiHeadAttention, attention  # noqa: F401
from torch_impl.block import Block
from torch_impl.dropout import dropout  # noqa: F401
from torch_impl.embedding import embedding  # noqa: F401
from torch_impl.ffn import FFN
from torch_impl.flash_attention import AttentionPattern
from torch_impl.flash_attention import flash_attention as fused
from torch_impl.layernorm import layernorm, rmsnorm  # noqa: F401
from torch_impl.linear import linear  # noqa: F401
from torch_impl.loss import cross_entropy  # noqa: F401
from torch_impl.positions import learned_positions  # noqa: F401
from torch_impl.transformer import Transformer


def _present(params):
    return {name: value for name, value in params.items() if value is not None}


def flash_attention(q, k, v, mask, bias, tile):
    """Biases are the pattern's own; the rows of a tile are the queries of a block."""
    assert bias is None
    return fused(q, k, v, AttentionPattern(mask=mask), queries_at_once=tile[0])


def multi_head_attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias, n_head, mask):
    module = MultiHeadAttention(x.shape[-1], n_head, qkv_bias is not None)
    weights = {
        "qkv.weight": qkv_weight,
        "qkv.bias": qkv_bias,
        "proj.weight": proj_weight,
        "proj.bias": proj_bias,
    }
    return functional_call(module, _present(weights), (x, mask))


def ffn(x, up_weight, up_bias, down_weight, down_bias, activation):
    module = FFN(x.shape[-1], up_weight.shape[0], activation, up_bias is not None)
    weights = {"up.weight": up_weight, "up.bias": up_bias, "down.weight": down_weight, "down.bias": down_bias}
    return functional_call(module, _present(weights), (x,))


def block(x, params, config, mask, layer, key):
    """The block knows the causal mask only."""
    assert (mask.cpu().numpy() == causal_mask(x.shape[1])).all()
    return functional_call(Block(config, layer), params, (x, key))


def transformer(params, ids, config, key):
    """As in training: parameters in float32 or better, activations in the precision under test."""
    dtype = params["token_embedding.weight"].dtype
    held = torch.promote_types(dtype, torch.float32)
    model = Transformer(config, compute_dtype=dtype).to(ids.device, held)
    return functional_call(model, {name: value.to(held) for name, value in params.items()}, (ids, key))
