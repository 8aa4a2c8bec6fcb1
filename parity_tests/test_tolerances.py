"""The bounds of tolerances.py against measurement: how near honest errors come, how far beyond bugs are."""

from math import sqrt

import numpy as np
from hypothesis import settings

from parity_tests.parity import Case, require_same_mathematics, require_well_rounded
from parity_tests.strategies import array, model_params
from parity_tests.test_attention import SOFT
from ref_numpy.config import ModelConfig
from ref_numpy.masks import causal_mask

CONFIG = ModelConfig(n_head=3, n_kv_head=1, d_model=12, vocab_size=17, context_length=7, positions="rope")


def _heads(random, regime):
    return {name: array(random, (2, 3, 5, 7), regime) for name in "qkv"} | {
        "mask": causal_mask(5),
        "slopes": None,
    }


def _swiglu(random, regime):
    shapes = {"gate": (11, 7), "up": (11, 7), "down": (7, 11)}
    weights = {f"{name}_weight": array(random, shape) / sqrt(shape[1]) for name, shape in shapes.items()}
    names = [f"{name}_{kind}" for name in shapes for kind in ("weight", "bias")]
    return {"x": array(random, (3, 7), regime), **{name: weights.get(name) for name in names}}


def _model(random, regime):
    params = model_params(CONFIG, int(random.integers(2**32)))
    ids = random.integers(17, size=(2, 6))
    return {"params": params, "ids": ids, "config": CONFIG, "key": None, "documents": None}


# Honest cases in the regimes of the suite's own strategies, large and deep enough for errors to add up.
HONEST = {
    "linear": lambda random, regime: {
        "x": array(random, (5, 64), regime), "weight": array(random, (11, 64)), "bias": None,
    },
    "gelu": lambda random, regime: {"x": array(random, (5, 7), regime)},
    "layernorm": lambda random, regime: {
        "x": array(random, (5, 13), regime), "weight": array(random, (13,)), "bias": None, "epsilon": 1e-5,
    },
    "attention": _heads,
    "swiglu": _swiglu,
    "cross_entropy": lambda random, regime: {
        "logits": array(random, (5, 13), regime), "targets": random.integers(13, size=5),
        "label_smoothing": 0.1, "count": None,
    },
    "transformer": _model,
}  # fmt: skip


def units_of_honest_cases(target, precision: str, rounds: int) -> list[float]:
    """The largest error of each case in units of its bound. Raises Disagreement beyond 1."""
    units: list[float] = []
    target = target._replace(record=lambda judgement: units.append(max(judgement.units.values())))
    for seed in range(rounds):
        random = np.random.default_rng(seed)
        for component, draw in HONEST.items():
            case = Case(component, draw(random, SOFT[seed % len(SOFT)]), seed)
            if precision == "float64":
                require_same_mathematics(target, case)
            else:
                require_well_rounded(target, case, precision)
    return units


def test_honest_errors_stay_within_two_decades_below_the_bound(ours):
    """In every precision asked for, and those that any CPU has: hundreds of cases, in the thorough profile
    thousands. A bound that no error comes near would excuse bugs."""
    for precision in {"float64", "float32", "bfloat16", "float16", *ours.precisions}:
        worst = max(units_of_honest_cases(ours, precision, settings().max_examples))
        assert 0.01 <= worst <= 1, f"{precision}: the worst honest error is {worst:.3g} of its bound"
