"""An encoder-decoder transformer (Vaswani et al. 2017): reads a source whole, writes a target token by token.

Shapes: B batch, S source length, T target length (both at most the context length N), C width, V vocabulary.
Both halves share the token embedding and the table of positions. Parameters are a flat dict: parameters.py.
Not here: writing (see generate.py), separate vocabularies, packed documents.
"""

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
from ref_numpy.cross_block import CrossBlockCache, cross_block_backward, cross_block_forward
from ref_numpy.dropout import DropoutKey
from ref_numpy.layernorm import NormCache
from ref_numpy.linear import LinearCache, linear_backward, linear_forward
from ref_numpy.masks import causal_mask, padding_mask
from ref_numpy.transformer import EmbedCache, embed_backward, embed_forward


class EncodeCache(NamedTuple):
    embed: EmbedCache
    blocks: list[BlockCache]
    norm: NormCache | None
    config: ModelConfig


def encode_forward(
    params: Params,
    source: Integer[Array, "B S"],
    present: Bool[Array, "B S"],
    config: ModelConfig,
    key: DropoutKey | None = None,
) -> tuple[Float[Array, "B S C"], EncodeCache]:
    """The memory: a vector for each token of the source, which has seen all of it but its padding."""
    places, mask = np.arange(source.shape[1]), padding_mask(present)
    x, embed = embed_forward(params, source, places, config, key)
    blocks = []
    for layer in range(config.n_layer):
        own = within(params, f"encoder.blocks.{layer}")
        x, block = block_forward(x, own, config, mask, places, layer, key)
        blocks.append(block)
    norm = None
    if config.norm_placement == "pre":
        x, norm = norm_forward(x, params, "encoder.norm", config)
    return x, EncodeCache(embed, blocks, norm, config)


def encode_backward(dmemory: Float[Array, "B S C"], cache: EncodeCache) -> Params:
    """Gradients of the encoder's parameters and of the embeddings by name."""
    config, gradients, dx = cache.config, {}, dmemory
    if config.norm_placement == "pre":
        dx, gradients = norm_backward(dx, cache.norm, "encoder.norm", config)
    for layer in reversed(range(config.n_layer)):
        dx, dblock = block_backward(dx, cache.blocks[layer])
        gradients |= named(dblock, f"encoder.blocks.{layer}")
    return gradients | embed_backward(dx, cache.embed)


class DecodeCache(NamedTuple):
    embed: EmbedCache
    blocks: list[CrossBlockCache]
    norm: NormCache | None
    head: LinearCache
    config: ModelConfig


def decode_forward(
    params: Params,
    target: Integer[Array, "B T"],
    memory: Float[Array, "B S C"],
    present: Bool[Array, "B S"],
    config: ModelConfig,
    key: DropoutKey | None = None,
) -> tuple[Float[Array, "B T V"], DecodeCache]:
    """Logits of the next token of the target at every place.

    Dropout sites go on where the encoder's end: site 2 L + 1 for the embedding, then three for each block.
    """
    T, first_site = target.shape[1], 2 * config.n_layer + 1
    places, mask, memory_mask = np.arange(T), causal_mask(T), padding_mask(present)
    x, embed = embed_forward(params, target, places, config, key and key._replace(site=first_site))
    blocks = []
    for layer in range(config.n_layer):
        own, site = within(params, f"decoder.blocks.{layer}"), first_site + 3 * layer
        x, block = cross_block_forward(x, memory, own, config, mask, memory_mask, places, site, key)
        blocks.append(block)
    norm = None
    if config.norm_placement == "pre":
        x, norm = norm_forward(x, params, "decoder.norm", config)
    head_weight = params["token_embedding.weight" if config.tied_embeddings else "head.weight"]
    logits, head = linear_forward(x, head_weight, None)  # (B, T, V)
    return logits, DecodeCache(embed, blocks, norm, head, config)


def decode_backward(
    dlogits: Float[Array, "B T V"], cache: DecodeCache
) -> tuple[Float[Array, "B S C"], Params]:
    """Gradients of the memory, which every block has read, and of the decoder's parameters by name."""
    config, gradients = cache.config, {}
    dx, dhead, _ = linear_backward(dlogits, cache.head)
    if config.norm_placement == "pre":
        dx, gradients = norm_backward(dx, cache.norm, "decoder.norm", config)
    dmemory = 0.0
    for layer in reversed(range(config.n_layer)):
        dx, dread, dblock = cross_block_backward(dx, cache.blocks[layer])
        dmemory = dmemory + dread
        gradients |= named(dblock, f"decoder.blocks.{layer}")
    gradients |= embed_backward(dx, cache.embed)
    if config.tied_embeddings:
        gradients["token_embedding.weight"] = gradients["token_embedding.weight"] + dhead
    else:
        gradients["head.weight"] = dhead
    return dmemory, gradients


class Seq2SeqCache(NamedTuple):
    encode: EncodeCache
    decode: DecodeCache


def seq2seq_forward(
    params: Params,
    source: Integer[Array, "B S"],
    present: Bool[Array, "B S"],
    target: Integer[Array, "B T"],
    config: ModelConfig,
    key: DropoutKey | None = None,
) -> tuple[Float[Array, "B T V"], Seq2SeqCache]:
    """Teacher forcing: logits of the next token at every place of a target that is known.

    present marks the tokens of the source; the rest is padding. Padding at a target's end needs no mask: what
    came before does not see it. Raises ValueError where a sequence is longer than the context length.
    """
    for name, length in (("source", source.shape[1]), ("target", target.shape[1])):
        if length > config.context_length:
            limit = config.context_length
            raise ValueError(f"a {name} of {length} is longer than the context length of {limit}")
    memory, encode = encode_forward(params, source, present, config, key)
    logits, decode = decode_forward(params, target, memory, present, config, key)
    return logits, Seq2SeqCache(encode, decode)


def seq2seq_backward(dlogits: Float[Array, "B T V"], cache: Seq2SeqCache) -> Params:
    """Gradients of all parameters; the embeddings served both sides (1), (2), and get the sum."""
    dmemory, gradients = decode_backward(dlogits, cache.decode)  # (1)
    for name, gradient in encode_backward(dmemory, cache.encode).items():  # (2)
        gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return gradients
