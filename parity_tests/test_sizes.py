"""Sizes at which a kernel begins another vector, warp, tile or block: just beyond 16, 64, 128 and 1024.

Elsewhere sizes are small, so that cases can be many. But what a kernel does at the edge of a tile, and how it
puts together what several tiles found, shows only where there are several. One axis at a time is long here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parity_tests.components import DIFFERENTIABLE, FUNCTIONS, parameters
from parity_tests.strategies import model_params, seeded
from ref_numpy.block import within
from ref_numpy.config import ModelConfig, SamplingConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.masks import causal_mask, window_mask

LENGTHS = (17, 65, 130, 1030)
SHORT = (17, 65, 130)  # of what is made of other components, and where time grows with the square

KEY = DropoutKey(5, 6, 7)
Case = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return seeded(shape, "normal", seed)


def ids(tokens: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(tokens, size=shape)


def linear(rows: int, inputs: int, outputs: int) -> Case:
    return {
        "x": normal(rows, inputs),
        "weight": normal(outputs, inputs, seed=1) / inputs**0.5,
        "bias": normal(outputs, seed=2),
    }


def norm(rows: int, width: int) -> Case:
    return {"x": normal(rows, width), "weight": normal(width, seed=1), "epsilon": 1e-5}


def attention(queries: int, keys: int, width: int, mask: np.ndarray) -> Case:
    q, k, v = (normal(2, 2, n, width, seed=i) for i, n in enumerate((queries, keys, keys)))
    return {"q": q, "k": k, "v": v, "mask": mask}


def of_all(queries: int, keys: int, width: int) -> Case:
    return attention(queries, keys, width, np.ones((queries, keys), bool))


def feed_forward(rows: int, inner: int, gated: bool) -> Case:
    names = ("gate", "up", "down") if gated else ("up", "down")
    arguments: Case = {"x": normal(1, rows, 4)}
    for seed, name in enumerate(names, start=1):
        outputs, inputs = (4, inner) if name == "down" else (inner, 4)
        arguments[f"{name}_weight"] = normal(outputs, inputs, seed=seed) / inputs**0.5
        arguments[f"{name}_bias"] = normal(outputs, seed=seed + 5)
    return arguments if gated else arguments | {"activation": "gelu"}


def shape(**changes: Any) -> ModelConfig:
    small = {"vocab_size": 7, "context_length": 5, "n_layer": 1, "n_head": 2, "d_model": 8, "dropout": 0.2}
    return ModelConfig(**small | {"positions": "rope"} | changes)


def decoder(T: int, **changes: Any) -> Case:
    config = shape(context_length=T, **changes)
    return {
        "params": model_params(config, 1),
        "ids": ids(config.vocab_size, 2, T),
        "config": config,
        "key": KEY,
    }


def block(T: int, d_model: int = 8) -> Case:
    config = shape(d_model=d_model)
    return {
        "x": normal(2, T, d_model),
        "params": within(model_params(config, 1), "blocks.0"),
        "config": config,
        "mask": window_mask(T, max(T - 3, 1)),
        "places": np.arange(T),
        "layer": 0,
        "key": KEY,
    }


def heads(T: int, d_model: int = 8) -> Case:
    case = block(T, d_model)
    params = within(case["params"], "attention")
    return {name: case[name] for name in ("x", "config", "mask", "places")} | {"params": params}


def translator(S: int, T: int) -> Case:
    config = shape(architecture="encoder-decoder", context_length=max(S, T), positions="learned")
    present = np.ones((2, S), bool)
    present[1, S // 2 :] = False
    source, target = ids(7, 2, S), ids(7, 2, T)
    params = model_params(config, 1)
    return {
        "params": params,
        "source": source,
        "present": present,
        "target": target,
        "config": config,
        "key": KEY,
    }


def across(T: int, S: int) -> Case:
    config = shape(architecture="encoder-decoder")
    params = within(within(model_params(config, 1), "decoder.blocks.0"), "cross_attention")
    mask = np.random.default_rng(2).random((T, S)) < 0.7
    return {
        "x": normal(2, T, 8),
        "memory": normal(2, S, 8, seed=1),
        "params": params,
        "n_head": 2,
        "mask": mask,
    }


def cross_block(T: int, S: int) -> Case:
    config = shape(architecture="encoder-decoder")
    return {
        "x": normal(2, T, 8),
        "memory": normal(2, S, 8, seed=1),
        "params": within(model_params(config, 1), "decoder.blocks.0"),
        "config": config,
        "mask": causal_mask(T),
        "memory_mask": np.random.default_rng(2).random((T, S)) < 0.7,
        "places": np.arange(T),
        "site": 3,
        "key": KEY,
    }


def projected(places: int, width: int, vocabulary: int) -> Case:
    return {
        "x": normal(places, width) / width**0.5,
        "weight": normal(vocabulary, width, seed=1),
        "targets": ids(vocabulary, places),
        "label_smoothing": 0.1,
        "at_once": 64,
    }


def adam(n: int) -> Case:
    """Of a matrix: vectors do not decay."""
    moments = {"m": normal(2, n, seed=2), "v": normal(2, n, seed=3) ** 2}
    settings = {"t": 3, "learning_rate": 2.0**-10, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    return {"param": normal(2, n), "gradient": normal(2, n, seed=1), **moments, **settings}


def sampling(V: int) -> Case:
    return {"logits": normal(V), "seen": [0, V - 1], "config": SamplingConfig(0.8, 9, 0.9, 0.01, 1.3)}


LONG: dict[str, dict[str, Callable[[int], Case]]] = {
    "linear": {
        "rows": lambda n: linear(n, 3, 5),
        "inputs": lambda n: linear(3, n, 5),
        "outputs": lambda n: linear(3, 5, n),
    },
    **{
        name: {"numbers": lambda n: {"x": normal(n)}, "rows": lambda n: {"x": normal(n, 3)}}
        for name in ("relu", "gelu", "gelu_tanh", "silu")
    },
    "layernorm": {
        "rows": lambda n: norm(n, 5) | {"bias": normal(5, seed=2)},
        "width": lambda n: norm(3, n) | {"bias": normal(n, seed=2)},
    },
    "rmsnorm": {"rows": lambda n: norm(n, 5), "width": lambda n: norm(3, n)},
    "dropout": {
        "rows": lambda n: {"x": normal(n, 3), "p": 0.25, "key": KEY},
        "width": lambda n: {"x": normal(2, 3, n), "p": 0.25, "key": KEY},
    },
    "keep_mask": {"width": lambda n: {"shape": (2, n), "p": 0.25, "key": KEY}},
    "embedding": {
        "tokens": lambda n: {"ids": ids(5, 2, n), "weight": normal(5, 3)},
        "vocabulary": lambda n: {"ids": ids(n, 2, 7), "weight": normal(n, 3)},
        "width": lambda n: {"ids": ids(5, 2, 7), "weight": normal(5, n)},
    },
    "learned_positions": {
        "places": lambda n: {"places": np.arange(n)[::-1], "weight": normal(n, 3)},
        "width": lambda n: {"places": np.arange(4), "weight": normal(5, n)},
    },
    "rope": {
        "tokens": lambda n: {"x": normal(2, 2, n, 4), "places": np.arange(n), "config": shape()},
        "width": lambda n: {
            "x": normal(2, 2, 3, 2 * n),
            "places": np.arange(3),
            "config": shape(d_model=4 * n),
        },
    },
    "attention": {
        "queries": lambda n: of_all(n, 3, 4),
        "keys": lambda n: of_all(3, n, 4),
        "width": lambda n: of_all(3, 5, n),
        "both": lambda n: attention(n, n, 4, causal_mask(n)) | {"slopes": (0.5, 0.1)},
    },
    "flash_attention": {
        "queries": lambda n: of_all(n, 3, 4) | {"tile": (128, 128)},
        "keys": lambda n: of_all(3, n, 4) | {"tile": (128, 128)},
        "width": lambda n: of_all(3, 5, n) | {"tile": (128, 128)},
        "both": lambda n: attention(n, n, 4, causal_mask(n)) | {"tile": (64, 16)},
    },
    "multi_head_attention": {"tokens": heads, "width": lambda n: heads(3, 4 * n)},
    "cross_attention": {"tokens": lambda n: across(n, 3), "memory": lambda n: across(3, n)},
    "ffn": {
        "tokens": lambda n: feed_forward(n, 5, gated=False),
        "inner": lambda n: feed_forward(3, n, gated=False),
    },
    "swiglu": {
        "tokens": lambda n: feed_forward(n, 5, gated=True),
        "inner": lambda n: feed_forward(3, n, gated=True),
    },
    "block": {"tokens": block, "width": lambda n: block(3, 4 * n)},
    "cross_block": {"tokens": lambda n: cross_block(n, 3), "memory": lambda n: cross_block(3, n)},
    "transformer": {"tokens": decoder, "vocabulary": lambda n: decoder(5, vocab_size=n)},
    "seq2seq": {"source": lambda n: translator(n, 3), "target": lambda n: translator(3, n)},
    "cross_entropy": {
        "places": lambda n: {"logits": normal(n, 5), "targets": ids(5, n), "label_smoothing": 0.1},
        "vocabulary": lambda n: {"logits": normal(3, n), "targets": ids(n, 3), "label_smoothing": 0.1},
    },
    "linear_cross_entropy": {
        "places": lambda n: projected(n, 4, 5),
        "width": lambda n: projected(3, n, 5),
        "vocabulary": lambda n: projected(3, 4, n),
    },
    "causal_mask": {"length": lambda n: {"length": n, "before": 3}},
    "window_mask": {"length": lambda n: {"length": n, "window": n - 2, "before": 3}},
    "document_mask": {"length": lambda n: {"documents": np.sort(ids(4, 2, n)), "before": 0}},
    "adam": {"numbers": adam},
    "adamw": {"numbers": lambda n: adam(n) | {"weight_decay": 0.1}},
    "clip_by_global_norm": {
        "numbers": lambda n: {"gradients": {"a": normal(n), "b": normal(3)}, "limit": 1.0}
    },
    "filtered_logits": {"vocabulary": sampling},
    "sample_token": {"vocabulary": lambda n: sampling(n) | {"u": 0.7}},
    "generate": {
        "tokens": lambda n: {
            "params": model_params(config := shape(context_length=n + 3, dropout=0.0), 1),
            "prompt": ids(7, n),
            "config": config,
            "n_tokens": 3,
            "sampling": SamplingConfig(0.8),
            "seed": 1,
        }
    },
}
MODELS = {
    "multi_head_attention",
    "block",
    "cross_attention",
    "cross_block",
    "transformer",
    "seq2seq",
    "generate",
}


def test_every_component_is_here():
    assert LONG.keys() == DIFFERENTIABLE.keys() | FUNCTIONS.keys()


@pytest.mark.parametrize("component", LONG)
def test_parity(agree, component):
    for axis, case_of in LONG[component].items():
        for n in SHORT if component in MODELS or axis == "both" else LENGTHS:
            case = case_of(n)
            agree(component, **{name: case.get(name) for name in parameters(component)})
