"""The bounds of tolerances.py against measurement: how near honest errors come, how far beyond bugs are."""

from math import sqrt
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import settings

from parity_tests import parity, tolerances
from parity_tests.backends import plain_torch
from parity_tests.disagreement import Disagreement
from parity_tests.parity import Case, require_same_mathematics, require_well_rounded
from parity_tests.strategies import REGIMES, array, model_params
from parity_tests.test_attention import SOFT
from ref_numpy.config import ModelConfig
from ref_numpy.masks import causal_mask
from torch_impl.rope import RotaryPositions

CONFIG = ModelConfig(n_head=3, n_kv_head=1, d_model=12, vocab_size=17, context_length=7, positions="rope")


def _heads(random, regime):
    """Of q alone in a regime: where two of them are large, which key wins is luck."""
    arrays = {name: array(random, (2, 3, 5, 7), regime if name == "q" else "normal") for name in "qkv"}
    return {**arrays, "mask": causal_mask(5), "slopes": None}


def _swiglu(random, regime):
    shapes = {"gate": (11, 7), "up": (11, 7), "down": (7, 11)}
    weights = {f"{name}_weight": array(random, shape) / sqrt(shape[1]) for name, shape in shapes.items()}
    names = [f"{name}_{kind}" for name in shapes for kind in ("weight", "bias")]
    return {"x": array(random, (2, 3, 7), regime), **{name: weights.get(name) for name in names}}


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
            is_soft = component in ("attention", "swiglu") and precision != "float64"
            regimes = SOFT if is_soft else REGIMES
            case = Case(component, draw(random, regimes[seed % len(regimes)]), seed)
            if precision == "float64":
                require_same_mathematics(target, case)
            else:
                require_well_rounded(target, case, precision)
    return units


def test_honest_errors_stay_within_two_decades_below_the_bound(ours):
    """In every precision asked for, and those that any CPU has: hundreds of cases, in the thorough profile
    thousands. A bound that no error comes near would excuse bugs."""
    for precision in {"float64", "float32", "bfloat16", "float16", *ours.precisions}:
        worst = max(units_of_honest_cases(ours, precision, max(settings().max_examples // 4, len(REGIMES))))
        assert 0.01 <= worst <= 1, f"{precision}: the worst honest error is {worst:.3g} of its bound"


def _rope_in_float32(x, places, config):
    """A table that was made in float32, and then cast."""
    return RotaryPositions(config)(places).turn(x)


def _softmax_in_float32(q, k, v, mask, slopes):
    scores = (q @ k.transpose(-1, -2) / sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


RIGHT = vars(plain_torch).copy()
X, ROW = array(np.random.default_rng(1), (5, 7)), array(np.random.default_rng(2), (7,))
NORM = {"x": X, "weight": ROW, "epsilon": 1e-5}
HEADS = _heads(np.random.default_rng(3), "normal")
TURNED = {"x": array(np.random.default_rng(4), (2, 3, 5, 4)), "places": np.arange(5), "config": CONFIG}
LOGITS = {"logits": X, "targets": np.array([1, 6, 0, -100, 2]), "label_smoothing": 0.1, "count": None}

# The least of the classic bugs: those that leave a model training as if nothing were wrong.
BUGS = {
    "epsilon outside the root": (
        "rmsnorm", NORM, lambda x, w, e: w * x / (x.square().mean(-1, True).sqrt() + e),
    ),
    "another library's epsilon": ("rmsnorm", NORM, lambda x, w, e: RIGHT["rmsnorm"](x, w, 1e-6)),
    "GELU by its tanh": ("gelu", {"x": X}, RIGHT["gelu_tanh"]),
    "a constant of four digits": (
        "gelu_tanh", {"x": X}, lambda x: 0.5 * x * (1 + torch.tanh(sqrt(2 / np.pi) * (x + 0.0447 * x**3))),
    ),
    "a table in float32": ("rope", TURNED, _rope_in_float32),
    "a softmax in float32": ("attention", HEADS, _softmax_in_float32),
    "smoothing over the other tokens": (
        "cross_entropy", LOGITS, lambda x, t, s, n: RIGHT["cross_entropy"](x, t, s * 7 / 6, n),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_the_least_of_classic_bugs_is_two_decades_beyond_the_bound(bug):
    component, arguments, wrong = BUGS[bug]
    units: list[float] = []
    target = parity.target(parity.PLAIN, "cpu", (), record=lambda found: units.extend(found.units.values()))
    with patch.object(plain_torch, component, wrong), pytest.raises(Disagreement):
        require_same_mathematics(target, Case(component, arguments))
    assert max(units) > 100


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_contraction_comes_within_a_decade_of_its_bound(precision):
    """Sums of 1 to 1024 products, by PyTorch: below the bound, in one element of thousands not far below."""
    p, worst = tolerances.PRECISIONS[precision], 0.0
    dtype, random = getattr(torch, p.torch_dtype), np.random.default_rng(0)
    for length in (1, 3, 64, 257, 1024):
        x, w = (torch.from_numpy(array(random, shape)).to(dtype) for shape in ((64, length), (length, 64)))
        exact, magnitude = x.double() @ w.double(), (x.double().abs() @ w.double().abs()).numpy()
        error = ((x @ w).double() - exact).abs().numpy()
        worst = max(worst, (error / tolerances.contraction(magnitude, length, p)).max())
    assert 0.1 <= worst <= 1
