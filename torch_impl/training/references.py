"""Which functions of the NumPy reference do what a component of a model does, with the same inputs."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array
from torch import Tensor, nn

from ref_numpy.block import block_backward, block_forward, feed_backward, feed_forward, named, present
from ref_numpy.config import ModelConfig
from ref_numpy.cross_attention import cross_attention_backward, cross_attention_forward
from ref_numpy.cross_block import cross_block_backward, cross_block_forward
from ref_numpy.dropout import DropoutKey
from ref_numpy.layernorm import layernorm_backward, layernorm_forward, rmsnorm_backward, rmsnorm_forward
from ref_numpy.linear import linear_backward, linear_forward
from ref_numpy.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from ref_numpy.masks import causal_mask, padding_mask, places_in_documents
from ref_numpy.multi_head_attention import multi_head_attention_backward, multi_head_attention_forward
from ref_numpy.transformer import attention_mask, embed_backward, embed_forward
from torch_impl.block import Block
from torch_impl.cross_attention import CrossAttention
from torch_impl.cross_block import CrossBlock
from torch_impl.ffn import FFN, SwiGLU
from torch_impl.layernorm import LayerNorm, RMSNorm
from torch_impl.linear import Linear
from torch_impl.multi_head_attention import MultiHeadAttention

Params = dict[str, Array]


class Reference(NamedTuple):
    """A component's two passes; its weights go by their names within it."""

    forward: Callable[[Array, Params], tuple[Array, Any]]  # x, weights -> y, cache
    backward: Callable[[Array, Any], tuple[Array | None, Params]]  # dy, cache -> dx, the weights' gradients


def reference_of(config: ModelConfig, name: str, module: nn.Module, inputs: tuple) -> Reference | None:
    """Of a module that was called with these inputs; None for a kind that is not compared."""
    if isinstance(module, Linear):
        return Reference(
            lambda x, p: linear_forward(x, p["weight"], p.get("bias")),
            lambda dy, cache: _by_name(*linear_backward(dy, cache)),
        )
    if isinstance(module, LayerNorm):
        return Reference(
            lambda x, p: layernorm_forward(x, p["weight"], p.get("bias"), module.epsilon),
            lambda dy, cache: _by_name(*layernorm_backward(dy, cache)),
        )
    if isinstance(module, RMSNorm):
        return Reference(
            lambda x, p: rmsnorm_forward(x, p["weight"], module.epsilon),
            lambda dy, cache: _by_name(*rmsnorm_backward(dy, cache)),
        )
    if isinstance(module, FFN | SwiGLU):
        return Reference(lambda x, p: feed_forward(x, named(p, "ffn"), config), feed_backward)
    if isinstance(module, MultiHeadAttention):
        mask, places = _seen(config, name, inputs[0], inputs[1])
        return Reference(
            lambda x, p: multi_head_attention_forward(x, p, config, mask, places),
            multi_head_attention_backward,
        )
    if isinstance(module, Block):
        (mask, places), key = _seen(config, name, inputs[0], inputs[1]), _plain(inputs[3])
        layer = _layer(name)
        return Reference(lambda x, p: block_forward(x, p, config, mask, places, layer, key), block_backward)
    if isinstance(module, CrossAttention):
        memory, beside = array_of(inputs[1]), array_of(inputs[2])
        return Reference(
            lambda x, p: cross_attention_forward(x, memory.astype(x.dtype), p, config.n_head, beside),
            lambda dy, cache: _but_memory(*cross_attention_backward(dy, cache)),
        )
    if isinstance(module, CrossBlock):
        memory, beside = array_of(inputs[1]), array_of(inputs[2])
        (mask, places), key = _seen(config, name, inputs[0], inputs[3]), _plain(inputs[5])
        return Reference(
            lambda x, p: cross_block_forward(
                x, memory.astype(x.dtype), p, config, mask, beside, places, module.site, key
            ),
            lambda dy, cache: _but_memory(*cross_block_backward(dy, cache)),
        )
    return None


def reference_of_embedding(config: ModelConfig, places: Tensor, key: DropoutKey | None) -> Reference:
    """Of all that comes before the blocks: x is the token ids."""
    t, plain = places.cpu().numpy(), _plain(key)
    return Reference(
        lambda ids, p: embed_forward(p, ids, t, config, plain),
        lambda dy, cache: (None, embed_backward(dy, cache)),
    )


def reference_of_loss(
    targets: Tensor, label_smoothing: float, count: Tensor | int | None, matrix: str
) -> Reference:
    """Of output projection and cross entropy together: x is what the projection reads, by the matrix."""
    t, n = targets.cpu().numpy(), None if count is None else int(count)
    return Reference(
        lambda x, p: linear_cross_entropy_forward(x, p[matrix], t, label_smoothing, n),
        lambda dy, cache: _of_matrix(matrix, *linear_cross_entropy_backward(dy, cache)),
    )


def array_of(tensor: Tensor) -> Array:
    """A tensor as NumPy has it: numbers of any precision in float64, others as they are."""
    tensor = tensor.detach().cpu()  # first of all: MPS has no float64
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _by_name(dx: Array, dweight: Array, dbias: Array | None = None) -> tuple[Array, Params]:
    return dx, present({"weight": dweight, "bias": dbias})


def _of_matrix(name: str, dx: Array, dweight: Array) -> tuple[Array, Params]:
    return dx, {name: dweight}


def _but_memory(dx: Array, dmemory: Array, gradients: Params) -> tuple[Array, Params]:
    """What comes back to the memory is compared where the keys and values are made."""
    return dx, gradients


def _seen(config: ModelConfig, name: str, x: Tensor, attend: partial) -> tuple[Array, Array]:
    """The mask of a self-attention, and the tokens' places."""
    pattern, length = attend.keywords["pattern"], x.shape[1]
    places = np.arange(length)
    if config.architecture == "encoder-decoder":
        of_encoder = name.startswith("encoder.")
        return padding_mask(array_of(pattern.key_mask)) if of_encoder else causal_mask(length), places
    documents = None if pattern.documents is None else array_of(pattern.documents)
    if documents is not None:
        places = places_in_documents(documents)
    return attention_mask(config, _layer(name), length, 0, documents), places


def _layer(name: str) -> int:
    return int(re.findall(r"\d+", name)[0])


def _plain(key: DropoutKey | None) -> DropoutKey | None:
    """A key without tensors."""
    return key and DropoutKey(key.seed, int(key.step), int(key.first_row), key.site)
