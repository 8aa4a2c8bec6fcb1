"""What a model costs: parameters and arithmetic, counted from its config alone, without torch.

T tokens, C model width, H heads, D head width, F feed-forward width, V vocabulary, L layers. An
encoder-decoder reads sources as long as its targets, T; what is said of a token is said of one of the target
together with one of the source.
Not here: in FLOPs, what is no matrix product; memory (see footprint.py).
"""

from dataclasses import replace
from math import prod
from typing import NamedTuple

from ref_numpy.config import ModelConfig
from ref_numpy.parameters import parameter_shapes

PARTS = ("embedding", "positions", "attention", "cross-attention", "ffn", "norms", "head")


def _part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    whole = {"token_embedding": "embedding", "position_embedding": "positions", "head": "head"}
    if (first := name.split(".")[0]) in whole:
        return whole[first]
    if "norm" in name:
        return "norms"
    if "cross_attention" in name:
        return "cross-attention"
    return "attention" if "attention" in name else "ffn"


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Number of parameters of each of PARTS. Looks at one layer and at two, however many there are."""

    def count(layers: int) -> dict[str, int]:
        numbers = dict.fromkeys(PARTS, 0)
        for name, shape in parameter_shapes(replace(model, n_layer=layers)).items():
            numbers[_part_of(name)] += prod(shape)
        return numbers

    one, two = count(1), count(2)
    return {part: one[part] + (model.n_layer - 1) * (two[part] - one[part]) for part in PARTS}


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters; one that is shared counts once."""
    return sum(parameters_by_part(model).values())


def non_embedding_count(model: ModelConfig) -> int:
    """N of Kaplan et al. 2020, section 2.1: without the tables of tokens and places, and without the head."""
    parts = parameters_by_part(model)
    return sum(parts[part] for part in ("attention", "cross-attention", "ffn", "norms"))


def multiplied_weights(model: ModelConfig) -> int:
    """Weights of the matrices that a token is multiplied with: all but biases, norms and looked-up tables."""
    C, F, L = model.d_model, model.ffn_width, model.n_layer
    attention = C * (C + 2 * model.kv_heads * model.head_width) + C * C
    ffn = (3 if model.activation == "swiglu" else 2) * C * F
    layers = L * (attention + ffn)
    if model.architecture == "encoder-decoder":
        layers = 2 * layers + L * 4 * C * C  # cross-attention
    return layers + model.vocab_size * C


def muons_count(model: ModelConfig) -> int:
    """How many numbers the matrices have that Muon serves: all that multiply but the output head."""
    return multiplied_weights(model) - model.vocab_size * model.d_model


def local_layers(model: ModelConfig) -> int:
    """How many layers look through the window."""
    period = model.attention_pattern.count(",") + 1
    rounds, rest = divmod(model.n_layer, period)
    local = [model.window_of(layer) > 0 for layer in range(period)]
    return rounds * sum(local) + sum(local[:rest])


class Pairs(NamedTuple):
    """Queries times keys in one sequence, over all layers."""

    seen: int  # those that the masks leave: what a kernel has to compute
    all: int  # T x T in each layer: what one computes that knows no masks


def attention_pairs(model: ModelConfig) -> Pairs:
    """How many scores a sequence of context_length tokens has."""
    T, L = model.context_length, model.n_layer
    causal = T * (T + 1) // 2
    if model.architecture == "encoder":
        return Pairs(L * T * T, L * T * T)
    if model.architecture == "encoder-decoder":
        return Pairs(L * (T * T + causal + T * T), 3 * L * T * T)  # encoder, decoder, cross-attention
    w, local = min(model.window, T), local_layers(model)
    windowed = w * (w + 1) // 2 + (T - w) * w  # the first w queries see fewer
    return Pairs(local * windowed + (L - local) * causal, L * T * T)


def forward_flops(model: ModelConfig, masked: bool = True) -> float:
    """Floating point operations of a forward pass per token; the backward pass has twice as many.

    2 W + 4 C P / T: a multiplication and an addition for each of the W weights, and for each of the C
    features of a query and key that meet, P pairs in T tokens, both in q k^T and in p v. The backward pass
    makes two products of each, for the gradients of its two factors. (Kaplan et al. 2020, table 1; PaLM,
    Chowdhery et al. 2022, appendix B.) Unless masked, P counts the pairs that masks forbid too.
    """
    pairs = attention_pairs(model)
    P = pairs.seen if masked else pairs.all
    return 2 * multiplied_weights(model) + 4 * model.d_model * P / model.context_length


def palm_flops(model: ModelConfig) -> int:
    """The usual estimate for a training step per token: 6 N + 12 L H D T (PaLM, appendix B).

    N is the number of all parameters, of which biases, norms and tables do not multiply; attention is counted
    as if every query saw every key. An encoder-decoder has 3 L attentions.
    """
    attentions = model.n_layer * (3 if model.architecture == "encoder-decoder" else 1)
    return 6 * parameter_count(model) + 12 * attentions * model.d_model * model.context_length


def kaplan_flops(model: ModelConfig) -> int:
    """6 N per token of training, N without embeddings and no attention (Kaplan et al. 2020, section 2.1)."""
    return 6 * non_embedding_count(model)
