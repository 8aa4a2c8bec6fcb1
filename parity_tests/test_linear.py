"""Linear layers: parity, and each element within the bound of its own contraction."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity_tests import tolerances
from parity_tests.backend import run_reference
from parity_tests.parity import rounded
from parity_tests.strategies import array, arrays, optional_arrays, seeds, sizes


@st.composite
def cases(draw):
    rows, inputs, outputs, more_rows = draw(sizes(4))
    leading = draw(st.sampled_from([(), (rows,), (more_rows, rows)]))
    return {
        "x": draw(arrays((*leading, inputs))),
        "weight": draw(arrays((outputs, inputs))),
        "bias": draw(optional_arrays((outputs,))),
    }


@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("linear", seed, **arguments)


@given(seed=seeds, length=st.sampled_from([1, 3, 64, 257, 1024]))
def test_each_element_is_within_the_bound_of_its_contraction(target, seed, length):
    """Also for long sums, whose inner error the other rule would not bound."""
    if not target.backend.offers("linear"):
        pytest.skip(f"linear is not offered by {target.backend.module.__name__}")
    random = np.random.default_rng(seed)
    drawn = {
        "x": array(random, (3, length)),
        "weight": array(random, (5, length)),
        "bias": array(random, (5,)),
    }
    for name in target.precisions:
        precision = tolerances.PRECISIONS[name]
        case = rounded(drawn, name)
        dy = rounded({"dy": array(random, (3, 5))}, name)["dy"]
        want = run_reference("linear", case, dy)
        got = target.backend.run("linear", case, dy, precision.torch_dtype, target.device)
        x, weight, bias = (np.abs(value) for value in case.values())
        magnitude = {
            "y": (x @ weight.T + bias, length + 1),
            "gradient of x": (np.abs(dy) @ weight, 5),
            "gradient of weight": (np.abs(dy).T @ x, 3),
            "gradient of bias": (np.abs(dy).sum(axis=0), 3),
        }
        for result, (size, terms) in magnitude.items():
            error = np.abs(got.named()[result] - want.named()[result])
            assert (error <= tolerances.contraction(size, terms, precision)).all(), (name, result)
