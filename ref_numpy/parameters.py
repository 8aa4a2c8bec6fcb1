"""The parameters of a model: names, shapes and initial values, the same for both implementations.

They are one flat dict, with the names and shapes of the PyTorch model's state_dict:

    token_embedding.weight (V, C)         position_embedding.weight (N, C), where positions are learned
    blocks.<l>.<name in the block>        of a decoder or an encoder, see block.py
    norm.weight, norm.bias (C)            the last norm, where norms come before the sublayers
    head.weight (V, C)                    where the output does not share the token embedding

An encoder-decoder has encoder.blocks.<l>, encoder.norm, decoder.blocks.<l> (cross_block.py) and decoder.norm.
V vocabulary, C width, N context length, F feed-forward width, D head width, L layers.
"""

from math import prod, sqrt

import numpy as np
from numpy import ndarray as Array
from numpy.typing import DTypeLike

from ref_numpy.config import ModelConfig
from ref_numpy.rng import INIT, Key, normal

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every parameter, in the order in which the model uses them."""
    shapes = {"token_embedding.weight": (config.vocab_size, config.d_model)}
    if config.positions == "learned":
        shapes["position_embedding.weight"] = (config.context_length, config.d_model)
    if config.architecture == "encoder-decoder":
        shapes |= _stack("encoder.", config) | _stack("decoder.", config)
    else:
        shapes |= _stack("", config)
    if not config.tied_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def _stack(prefix: str, config: ModelConfig) -> Shapes:
    shapes: Shapes = {}
    for layer in range(config.n_layer):
        block = _block(config, cross_attention=prefix == "decoder.")
        shapes |= {f"{prefix}blocks.{layer}.{name}": shape for name, shape in block.items()}
    if config.norm_placement == "pre":
        shapes |= _norm(f"{prefix}norm", config)
    return shapes


def _block(config: ModelConfig, cross_attention: bool) -> Shapes:
    C, F, D = config.d_model, config.ffn_width, config.head_width
    shapes = _norm("norm1", config)
    shapes |= _linear("attention.qkv", C + 2 * config.kv_heads * D, C, config)
    if config.qk_norm:
        shapes |= {"attention.q_norm.weight": (D,), "attention.k_norm.weight": (D,)}
    shapes |= _linear("attention.proj", C, C, config)
    shapes |= _norm("norm2", config)
    if cross_attention:
        shapes |= _linear("cross_attention.q", C, C, config)
        shapes |= _linear("cross_attention.kv", 2 * C, C, config)
        shapes |= _linear("cross_attention.proj", C, C, config)
        shapes |= _norm("norm3", config)
    if config.activation == "swiglu":
        shapes |= _linear("ffn.gate", F, C, config)
    return shapes | _linear("ffn.up", F, C, config) | _linear("ffn.down", C, F, config)


def _linear(name: str, outputs: int, inputs: int, config: ModelConfig) -> Shapes:
    weight = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if config.bias else weight


def _norm(name: str, config: ModelConfig) -> Shapes:
    weight, has_bias = {f"{name}.weight": (config.d_model,)}, config.bias and config.norm == "layernorm"
    return weight | {f"{name}.bias": (config.d_model,)} if has_bias else weight


def init_params(config: ModelConfig, seed: int, dtype: DTypeLike = np.float32) -> dict[str, Array]:
    """GPT-2's initial weights (Radford et al. 2019, section 2.3).

    Matrices and embeddings ~ N(0, 0.02^2), but those that end a residual branch (attention.proj, ffn.down)
    ~ N(0, 0.02^2 / n), so that the sum over the n branches of a stack keeps its size: n = 2 L, and 3 L where
    there is cross-attention. Biases 0, norm weights 1.
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
            branches = (3 if name.startswith("decoder.") else 2) * config.n_layer
            ends_branch = name.endswith(("attention.proj.weight", "ffn.down.weight"))
            std = 0.02 / sqrt(branches) if ends_branch else 0.02
            value = std * normal(Key(seed, INIT, stream=i), prod(shape)).reshape(shape)
        params[name] = value.astype(dtype)
    return params


def is_muons(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon serves a parameter: the matrices of blocks, and neither embeddings nor the output head."""
    return len(shape) == 2 and "embedding" not in name and not name.startswith("head.")
