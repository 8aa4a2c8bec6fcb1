"""A transformer: a decoder (Radford et al. 2019, GPT-2) or an encoder (Devlin et al. 2019, BERT).

The two differ in one thing: in a decoder a token sees what came before it, in an encoder everything.

Shapes: B batch, T time (at most the context length N), C width, V vocabulary, L layers.
Parameters are one flat dict, see parameters.py.
Not here: an encoder and a decoder together (see seq2seq.py).
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray as Array

from ref_numpy.block import (
    BlockCache,
    Params,
    block_backward,
    block_forward,
    named,
    norm_backward,
    norm_forward,
    within,
)
from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutCache, DropoutKey, dropout_backward, dropout_forward
from ref_numpy.embedding import EmbeddingCache, embedding_backward, embedding_forward
from ref_numpy.kv_cache import KVCache, of_layer
from ref_numpy.layernorm import NormCache
from ref_numpy.linear import LinearCache, linear_backward, linear_forward
from ref_numpy.masks import causal_mask, document_mask, places_in_documents, window_mask
from ref_numpy.positions import (
    LearnedPositionsCache,
    learned_positions_backward,
    learned_positions_forward,
    sinusoidal_positions,
)


class EmbedCache(NamedTuple):
    embedding: EmbeddingCache
    positions: LearnedPositionsCache | None
    dropout: DropoutCache
    config: ModelConfig


def _embedding_scale(config: ModelConfig) -> float:
    """Sinusoids have size 1, so the embeddings beside them are scaled by sqrt C (Vaswani et al. 3.4)."""
    return sqrt(config.d_model) if config.positions == "sinusoidal" else 1.0


def embed_forward(
    params: Params,
    ids: Integer[Array, "B T"],
    places: Integer[Array, "*#B T"],
    config: ModelConfig,
    key: DropoutKey | None = None,
) -> tuple[Float[Array, "B T C"], EmbedCache]:
    """x = dropout(token vectors + positions), where positions are absolute; others act inside attention."""
    table, positions = params["token_embedding.weight"], None
    embedded, embedding = embedding_forward(ids, table)  # (B, T, C)
    x = embedded * _embedding_scale(config)
    if config.positions == "learned":
        learned, positions = learned_positions_forward(places, params["position_embedding.weight"])
        x = x + learned
    elif config.positions == "sinusoidal":
        x = x + sinusoidal_positions(places, config.d_model, table.dtype)
    x, dropout = dropout_forward(x, config.dropout, key)
    return x, EmbedCache(embedding, positions, dropout, config)


def embed_backward(dx: Float[Array, "B T C"], cache: EmbedCache) -> Params:
    """Gradients of the tables by name."""
    gradients = {}
    dx = dropout_backward(dx, cache.dropout)
    if cache.positions:
        shared = cache.positions.places.ndim == 1  # every sequence of the batch read the same vectors
        gradients["position_embedding.weight"] = learned_positions_backward(
            dx.sum(axis=0) if shared else dx, cache.positions
        )
    scaled = dx * _embedding_scale(cache.config)
    return gradients | {"token_embedding.weight": embedding_backward(scaled, cache.embedding)}


def attention_mask(
    config: ModelConfig, layer: int, length: int, before: int, documents: Integer[Array, "B S"] | None
) -> Bool[Array, "*#mask"]:
    """What the last `length` tokens see: everything, or what came before, within a window or a document."""
    if config.architecture == "encoder":
        mask = np.ones((length, length), dtype=bool)
    elif window := config.window_of(layer):
        mask = window_mask(length, window, before)
    else:
        mask = causal_mask(length, before)
    return mask if documents is None else mask & document_mask(documents, before)


class TransformerCache(NamedTuple):
    embed: EmbedCache
    blocks: list[BlockCache]
    norm: NormCache | None
    head: LinearCache
    config: ModelConfig


def transformer_forward(
    params: Params,
    ids: Integer[Array, "B T"],
    config: ModelConfig,
    key: DropoutKey | None = None,
    documents: Integer[Array, "B S"] | None = None,
    past: KVCache | None = None,
) -> tuple[Float[Array, "B T V"], TransformerCache]:
    """Logits at every place: of the next token in a decoder, of the token there in an encoder.

    With a key, dropout acts (training); without, it does not. With documents, the number of the text that
    each token belongs to (or PADDING), texts in one sequence do not see each other, and each has its own
    places. With a past (decoders only), the T tokens follow on those before them, S in all, whose keys and
    values it holds; it then holds theirs too, and there is no backward. Raises ValueError where a sequence is
    longer than the context length or an id is outside the vocabulary.
    """
    before = 0 if past is None else past.length
    T, S = ids.shape[1], before + ids.shape[1]
    if S > config.context_length:
        raise ValueError(f"a sequence of {S} is longer than the context length of {config.context_length}")
    places = np.arange(before, S) if documents is None else places_in_documents(documents)[:, before:]
    x, embed = embed_forward(params, ids, places, config, key)
    blocks = []
    for layer in range(config.n_layer):
        mask = attention_mask(config, layer, T, before, documents)
        own, layer_past = within(params, f"blocks.{layer}"), past and of_layer(past, layer)
        x, block = block_forward(x, own, config, mask, places, layer, key, layer_past)
        blocks.append(block)
    norm = None
    if config.norm_placement == "pre":  # post-norm blocks end with a norm already
        x, norm = norm_forward(x, params, "norm", config)
    head_weight = params["token_embedding.weight" if config.tied_embeddings else "head.weight"]
    logits, head = linear_forward(x, head_weight, None)  # (B, T, V)
    return logits, TransformerCache(embed, blocks, norm, head, config)


def transformer_backward(dlogits: Float[Array, "B T V"], cache: TransformerCache) -> Params:
    """Gradients of all parameters by name: the forward's lines in reverse order.

    A tied embedding is read twice, as input table and as output projection, so its gradient is the sum
    of (1) what comes back through the head and (2) what comes back through the lookup.
    """
    config, gradients = cache.config, {}
    dx, dhead, _ = linear_backward(dlogits, cache.head)  # (1)
    if config.norm_placement == "pre":
        dx, gradients = norm_backward(dx, cache.norm, "norm", config)
    for layer in reversed(range(config.n_layer)):
        dx, dblock = block_backward(dx, cache.blocks[layer])
        gradients |= named(dblock, f"blocks.{layer}")
    gradients |= embed_backward(dx, cache.embed)  # (2)
    if config.tied_embeddings:
        gradients["token_embedding.weight"] = gradients["token_embedding.weight"] + dhead
    else:
        gradients["head.weight"] = dhead
    return gradients
