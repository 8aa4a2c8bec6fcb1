"""The reference against itself: every backward beside differences of its forward. NumPy alone, no torch.

For cotangent c and a direction d in each argument, the gradient g has to satisfy

    sum(g d) = d/dh sum(c f(x + h d)) at h = 0  =  (4 D(h) - D(2 h)) / 3 + O(h^4)

where D(h) is the central difference (Richardson). With h = 1e-4 the rounding 1e-16 / h is 1e-12 of the case's
size, and the fifth derivatives of a model may be of size 1e8 before O(h^4) shows at 1e-7. Where a deep model
of post-norms bends more than that, it bends 256 times less over a quarter of the step; a wrong gradient is
wrong at both.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.backend import run_by_hand, run_reference
from parity_tests.components import reference
from parity_tests.exchange import flat, is_floating, map_floats
from parity_tests.strategies import (
    array,
    documents,
    dropout_keys,
    masks,
    model_configs,
    model_params,
    seeds,
    sizes,
)
from ref_numpy.block import within
from ref_numpy.loss import IGNORE

STEP = 1e-4


def moved(value: Any, direction: Any, h: float) -> Any:
    """value + h direction, for an array or a dict of them."""
    if isinstance(value, dict):
        return {name: moved(array, direction[name], h) for name, array in value.items()}
    return value + h * direction


def frozen(value: np.ndarray) -> np.ndarray:
    """In float32, where writing raises."""
    value = value.astype(np.float32)
    value.flags.writeable = False
    return value


def require_manners(component: str, arguments: Mapping[str, Any], cotangent: np.ndarray) -> None:
    """float32 in, float32 out; nothing that is handed in is written to, and a cache may be used again."""
    forward, backward = reference(component)
    arguments, dy = map_floats(frozen, arguments), frozen(cotangent)
    y, cache = forward(*arguments.values())
    _, gradients = run_by_hand(lambda *_: (y, cache), backward, arguments, dy)
    once = {name: gradient.copy() for name, gradient in gradients.items()}
    _, again = run_by_hand(lambda *_: (y, cache), backward, arguments, dy)
    for name, value in {"y": y, **once}.items():
        assert value.dtype == np.float32, f"{component}: {name} is {value.dtype}"
    for name, gradient in once.items():
        np.testing.assert_array_equal(gradient, again[name])


def require_derivative(component: str, arguments: Mapping[str, Any], seed: int) -> None:
    """Compare each argument's gradient with differences along a random direction; a dict moves as one."""
    random = np.random.default_rng(seed)
    forward, _ = reference(component)
    y, _ = forward(*arguments.values())
    cotangent = np.asarray(random.standard_normal(np.shape(y)))
    gradients = run_reference(component, arguments, cotangent).gradients
    leaves = {name: value for name, value in flat(arguments).items() if is_floating(value)}
    assert set(gradients) == set(leaves)
    require_manners(component, arguments, cotangent)

    for name, value in arguments.items():
        own = [leaf for leaf in leaves if leaf.split(".")[0] == name]
        if not own:
            continue
        directions = {leaf: random.standard_normal(leaves[leaf].shape) for leaf in own}
        inner = {leaf.partition(".")[2]: direction for leaf, direction in directions.items()}
        direction = inner if isinstance(value, dict) else inner[""]

        def along(h: float, name=name, value=value, direction=direction) -> float:
            y, _ = forward(*{**arguments, name: moved(value, direction, h)}.values())
            return float((cotangent * y).sum())

        def difference(h: float, along=along) -> float:
            near, far = (along(h) - along(-h)) / (2 * h), (along(2 * h) - along(-2 * h)) / (4 * h)
            return (4 * near - far) / 3

        products = np.concatenate([(gradients[leaf] * directions[leaf]).ravel() for leaf in own])
        got, allowed = products.sum(), 1e-7 * (np.abs(products).sum() + np.abs(cotangent * y).sum())
        wanted = []
        for h in (STEP, STEP / 4):
            wanted.append(difference(h))
            if abs(got - wanted[-1]) <= allowed:
                break
        else:
            raise AssertionError(f"{component}: gradient of {name} is {got}, differences say {wanted}")


@given(shape=sizes(3), bias=st.booleans(), seed=seeds)
def test_linear(shape, bias, seed):
    random, (rows, inputs, outputs) = np.random.default_rng(seed), shape
    weight = array(random, (outputs, inputs))
    arguments = {
        "x": array(random, (rows, inputs)),
        "weight": weight,
        "bias": weight[:, 0].copy() if bias else None,
    }
    require_derivative("linear", arguments, seed)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
@given(shape=sizes(2), size=st.sampled_from([0.1, 1, 4]), seed=seeds)
def test_activations(name, shape, size, seed):
    x = size * array(np.random.default_rng(seed), tuple(shape))
    x += np.sign(x) * 0.05  # off the kink of relu, where there is no derivative
    require_derivative(name, {"x": x}, seed)


@given(shape=sizes(3, least=2), bias=st.booleans(), epsilon=st.sampled_from([1e-5, 1e-1]), seed=seeds)
def test_layernorm_and_rmsnorm(shape, bias, epsilon, seed):
    random = np.random.default_rng(seed)
    x, weight, b = array(random, tuple(shape)), array(random, shape[-1:]), array(random, shape[-1:])
    x += 3 * np.arange(shape[-1])  # rows that vary, so that a step of h is a small one
    require_derivative(
        "layernorm", {"x": x, "weight": weight, "bias": b if bias else None, "epsilon": epsilon}, seed
    )
    require_derivative("rmsnorm", {"x": x, "weight": weight, "epsilon": epsilon}, seed)


@given(shape=sizes(3), p=st.sampled_from([0.0, 0.1, 0.5]), key=st.none() | dropout_keys(), seed=seeds)
def test_dropout(shape, p, key, seed):
    require_derivative(
        "dropout", {"x": array(np.random.default_rng(seed), tuple(shape)), "p": p, "key": key}, seed
    )


@given(shape=sizes(4), seed=seeds)
def test_embedding_and_positions(shape, seed):
    random, (B, T, V, C) = np.random.default_rng(seed), shape
    require_derivative(
        "embedding", {"ids": random.integers(V, size=(B, T)), "weight": array(random, (V, C))}, seed
    )
    places = random.integers(V, size=(B, T))
    require_derivative("learned_positions", {"places": places, "weight": array(random, (V, C))}, seed)


@given(shape=sizes(5), data=st.data(), seed=seeds)
def test_attention(shape, data, seed):
    random, (B, H, T, S, D) = np.random.default_rng(seed), shape
    arguments = {
        "q": array(random, (B, H, T, D)),
        "k": array(random, (B, H, S, D)),
        "v": array(random, (B, H, S, D)),
    }
    slopes = data.draw(st.none() | st.just((0.3,) * H))
    require_derivative("attention", {**arguments, "mask": data.draw(masks(T, S)), "slopes": slopes}, seed)


@given(config=model_configs().filter(lambda config: config.positions == "rope"), seed=seeds)
def test_rope(config, seed):
    x = array(np.random.default_rng(seed), (2, config.n_head, 5, config.head_width))
    places = np.arange(10).reshape(2, 5)
    require_derivative("rope", {"x": x, "places": places, "config": config}, seed)


@given(config=model_configs(), data=st.data(), seed=seeds)
def test_multi_head_attention_and_cross_attention(config, data, seed):
    random, C = np.random.default_rng(seed), config.d_model
    x, memory = array(random, (2, 5, C)), array(random, (2, 3, C))
    params = within(model_params(config, seed), "blocks.0.attention")
    mask = data.draw(masks(5, 5))
    arguments = {"x": x, "params": params, "config": config, "mask": mask, "places": np.arange(5)}
    require_derivative("multi_head_attention", arguments, seed)
    weights = {"q.weight": (C, C), "kv.weight": (2 * C, C), "proj.weight": (C, C)}
    params = {name: array(random, shape) / C**0.5 for name, shape in weights.items()}
    mask = data.draw(masks(5, 3))
    arguments = {"x": x, "memory": memory, "params": params, "n_head": config.n_head, "mask": mask}
    require_derivative("cross_attention", arguments, seed)


@given(shape=sizes(5), data=st.data(), tile=st.tuples(*[st.sampled_from([1, 2, 3, 5, 20])] * 2), seed=seeds)
def test_flash_attention(shape, data, tile, seed):
    random, (B, H, T, S, D) = np.random.default_rng(seed), shape
    arguments = {
        "q": array(random, (B, H, T, D)),
        "k": array(random, (B, H, S, D)),
        "v": array(random, (B, H, S, D)),
        "mask": data.draw(masks(T, S)),
        "bias": None,
        "tile": tile,
    }
    require_derivative("flash_attention", arguments, seed)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@given(shape=sizes(4), bias=st.booleans(), seed=seeds)
def test_ffn(activation, shape, bias, seed):
    random, (B, T, C, F) = np.random.default_rng(seed), shape
    arguments = {
        "x": array(random, (B, T, C)),
        "up_weight": array(random, (F, C)) / C**0.5,
        "up_bias": array(random, (F,)) if bias else None,
        "down_weight": array(random, (C, F)) / F**0.5,
        "down_bias": array(random, (C,)) if bias else None,
        "activation": activation,
    }
    require_derivative("ffn", arguments, seed)


@given(shape=sizes(4), bias=st.booleans(), seed=seeds)
def test_swiglu(shape, bias, seed):
    random, (B, T, C, F) = np.random.default_rng(seed), shape
    arguments = {"x": array(random, (B, T, C))}
    for name, out, inner in (("gate", F, C), ("up", F, C), ("down", C, F)):
        arguments[f"{name}_weight"] = array(random, (out, inner)) / inner**0.5
        arguments[f"{name}_bias"] = array(random, (out,)) if bias else None
    require_derivative("swiglu", arguments, seed)


@given(config=model_configs(smooth=True), data=st.data(), key=st.none() | dropout_keys(), seed=seeds)
def test_block_and_transformer(config, data, key, seed):
    random = np.random.default_rng(seed)
    params, x = model_params(config, seed), array(random, (2, 5, config.d_model))
    arguments = {
        "x": x + 2 * np.arange(config.d_model),
        "params": within(params, "blocks.0"),
        "config": config,
        "mask": data.draw(masks(5, 5)),
        "places": np.arange(5),
        "layer": 0,
        "key": key,
    }
    require_derivative("block", arguments, seed)
    ids, numbers = random.integers(config.vocab_size, size=(2, 5)), data.draw(documents(2, 5))
    arguments = {"params": params, "ids": ids, "config": config, "key": key, "documents": numbers}
    require_derivative("transformer", arguments, seed)


@settings(max_examples=settings().max_examples // 2)
@given(
    config=model_configs(smooth=True, architectures=("encoder-decoder",)),
    key=st.none() | dropout_keys(),
    seed=seeds,
)
def test_cross_block_and_seq2seq(config, key, seed):
    random = np.random.default_rng(seed)
    params, memory = model_params(config, seed), array(random, (2, 3, config.d_model))
    arguments = {
        "x": array(random, (2, 5, config.d_model)) + 2 * np.arange(config.d_model),
        "memory": memory,
        "params": within(params, "decoder.blocks.0"),
        "config": config,
        "mask": np.tril(np.ones((5, 5), bool)),
        "memory_mask": random.random((5, 3)) < 0.7,
        "places": np.arange(5),
        "site": 4,
        "key": key,
    }
    require_derivative("cross_block", arguments, seed)
    source, target = (random.integers(config.vocab_size, size=(2, T)) for T in (4, 5))
    present = np.arange(4) < np.array([[4], [2]])
    arguments = {"params": params, "source": source, "present": present, "target": target}
    require_derivative("seq2seq", {**arguments, "config": config, "key": key}, seed)


@given(
    shape=sizes(3), smoothing=st.sampled_from([0.0, 0.1]), count=st.none() | st.integers(1, 20), seed=seeds
)
def test_cross_entropy(shape, smoothing, count, seed):
    random, (B, T, V) = np.random.default_rng(seed), shape
    targets = random.integers(V, size=(B, T))
    targets[random.random((B, T)) < 0.3] = IGNORE
    logits = 3 * array(random, (B, T, V))
    arguments = {"logits": logits, "targets": targets, "label_smoothing": smoothing, "count": count}
    require_derivative("cross_entropy", arguments, seed)
