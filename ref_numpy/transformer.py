"""A decoder-only transformer language model (Radford et al. 2019: GPT-2).

Shapes: B batch, T time (at most the context length N), C width, V vocabulary, L layers.
Parameters are one flat dict, with the names and shapes of the PyTorch model's state_dict:

    token_embedding.weight (V, C)         position_embedding.weight (N, C), where positions are learned
    blocks.<l>.<name in the block>        see block.py
    norm.weight, norm.bias (C)            the last norm, where norms come before the sublayers
    head.weight (V, C)                    where the output does not share the token embedding

Not here: caching for generation, any mask but the causal one.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray as Array
from numpy.typing import DTypeLike

from ref_numpy.attention import causal_mask
from ref_numpy.block import BlockCache, Params, block_backward, block_forward, norm_backward, norm_forward
from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutCache, DropoutKey, dropout_backward, dropout_forward
from ref_numpy.embedding import EmbeddingCache, embedding_backward, embedding_forward
from ref_numpy.layernorm import NormCache
from ref_numpy.linear import LinearCache, linear_backward, linear_forward
from ref_numpy.positions import (
    LearnedPositionsCache,
    learned_positions_backward,
    learned_positions_forward,
    sinusoidal_positions,
)
from ref_numpy.rng import INIT, Key, normal


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order in which the model uses them."""
    C, F = config.d_model, config.ffn_width
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if config.bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (C,)
        if config.bias and config.norm == "layernorm":
            shapes[f"{name}.bias"] = (C,)

    shapes["token_embedding.weight"] = (config.vocab_size, C)
    if config.positions == "learned":
        shapes["position_embedding.weight"] = (config.context_length, C)
    for layer in range(config.n_layer):
        block = f"blocks.{layer}"
        norm(f"{block}.norm1")
        linear(f"{block}.attention.qkv", 3 * C, C)
        linear(f"{block}.attention.proj", C, C)
        norm(f"{block}.norm2")
        linear(f"{block}.ffn.up", F, C)
        linear(f"{block}.ffn.down", C, F)
    if config.norm_placement == "pre":
        norm("norm")
    if not config.tied_embeddings:
        shapes["head.weight"] = (config.vocab_size, C)
    return shapes


def init_params(config: ModelConfig, seed: int, dtype: DTypeLike = np.float32) -> Params:
    """GPT-2's initial weights (Radford et al. 2019, section 2.3), the same for both implementations.

    Matrices and embeddings ~ N(0, 0.02^2), but those that end a residual branch (attention.proj, ffn.down)
    ~ N(0, 0.02^2 / (2 L)), so that the sum over 2 L branches keeps its size. Biases 0, norm weights 1.
    (OpenAI's code draws learned positions with 0.01; 0.02 is what later implementations took for them too.)
    Parameter number i of parameter_shapes draws from stream i of the seed.
    """
    params = {}
    for i, (name, shape) in enumerate(parameter_shapes(config).items()):
        if name.endswith(".bias"):
            value = np.zeros(shape)
        elif "norm" in name:
            value = np.ones(shape)
        else:
            ends_branch = name.endswith(("attention.proj.weight", "ffn.down.weight"))
            std = 0.02 / sqrt(2 * config.n_layer) if ends_branch else 0.02
            value = std * normal(Key(seed, INIT, stream=i), int(np.prod(shape))).reshape(shape)
        params[name] = value.astype(dtype)
    return params


class TransformerCache(NamedTuple):
    embedding: EmbeddingCache
    positions: LearnedPositionsCache | None
    dropout: DropoutCache
    blocks: list[BlockCache]
    norm: NormCache | None
    head: LinearCache
    config: ModelConfig


def _embedding_scale(config: ModelConfig) -> float:
    """Sinusoids have size 1, so the embeddings beside them are scaled by sqrt C (Vaswani et al. 3.4)."""
    return sqrt(config.d_model) if config.positions == "sinusoidal" else 1.0


def _block_params(params: Params, layer: int) -> Params:
    prefix = f"blocks.{layer}."
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def transformer_forward(
    params: Params, ids: Integer[Array, "B T"], config: ModelConfig, key: DropoutKey | None = None
) -> tuple[Float[Array, "B T V"], TransformerCache]:
    """Logits of the next token at every place. With a key, dropout acts (training); without, it does not.

    Raises ValueError where a sequence is longer than the context length or an id is outside the vocabulary.
    """
    T = ids.shape[1]
    if T > config.context_length:
        raise ValueError(f"a sequence of {T} is longer than the context length of {config.context_length}")
    table = params["token_embedding.weight"]
    embedded, embedding = embedding_forward(ids, table)  # (B, T, C)
    if config.positions == "learned":
        places, positions = learned_positions_forward(params["position_embedding.weight"], T)  # (T, C)
    else:
        places, positions = sinusoidal_positions(T, config.d_model, table.dtype), None
    x, dropout = dropout_forward(embedded * _embedding_scale(config) + places, config.dropout, key)

    mask = causal_mask(T)
    blocks = []
    for layer in range(config.n_layer):
        x, block = block_forward(x, _block_params(params, layer), config, mask, layer, key)
        blocks.append(block)

    norm = None
    if config.norm_placement == "pre":  # post-norm blocks end with a norm already
        x, norm = norm_forward(x, params, "norm", config)
    head_weight = table if config.tied_embeddings else params["head.weight"]
    logits, head = linear_forward(x, head_weight, None)  # (B, T, V)
    return logits, TransformerCache(embedding, positions, dropout, blocks, norm, head, config)


def transformer_backward(dlogits: Float[Array, "B T V"], cache: TransformerCache) -> Params:
    """Gradients of all parameters by name: the forward's lines in reverse order.

    A tied embedding is read twice, as input table and as output projection, so its gradient is the sum
    of (1) what comes back through the head and (2) what comes back through the lookup.
    """
    config = cache.config
    dx, dhead, _ = linear_backward(dlogits, cache.head)  # (1)
    gradients = {}
    if config.norm_placement == "pre":
        dx, gradients = norm_backward(dx, cache.norm, "norm", config)
    for layer in reversed(range(config.n_layer)):
        dx, dblock = block_backward(dx, cache.blocks[layer])
        gradients |= {f"blocks.{layer}.{name}": gradient for name, gradient in dblock.items()}

    dx = dropout_backward(dx, cache.dropout)
    if config.positions == "learned":
        dplaces = dx.sum(axis=0)  # (T, C): every sequence of the batch read the same vectors
        gradients["position_embedding.weight"] = learned_positions_backward(dplaces, cache.positions)
    dtable = embedding_backward(dx * _embedding_scale(config), cache.embedding)  # (2)
    if config.tied_embeddings:
        gradients["token_embedding.weight"] = dtable + dhead
    else:
        gradients["token_embedding.weight"] = dtable
        gradients["head.weight"] = dhead
    return gradients
