"""Linear layers: parity, and each element within the bound of its own contraction."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests import tolerances
from parity_tests.backend import run_reference
from parity_tests.parity import rounded
from parity_tests.strategies import array, arrays, optional_arrays, seeds, sizes
from ref_numpy.linear import linear_backward, linear_forward
from torch_impl import linear as fast

KERNELS = ["PyTorch's choice", *(["oneDNN"] if torch.backends.mkldnn.is_available() else [])]


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


@given(seed=seeds, length=st.sampled_from([1, 3, 64, 257, 1024]), signed=st.booleans())
def test_each_element_is_within_the_bound_of_its_contraction(offered, seed, length, signed):
    """Also for long sums, whose inner error the other rule would not bound. Unsigned, terms add up to where a
    sum that is kept in few digits stands still: 256 of 1024 ones in bfloat16."""
    target = offered("linear")
    random = np.random.default_rng(seed)
    drawn = {
        "x": array(random, (3, length)),
        "weight": array(random, (5, length)),
        "bias": array(random, (5,)),
    }
    if not signed:
        drawn = {name: np.abs(value) for name, value in drawn.items()}
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
            found, exact = got.named()[result], want.named()[result]
            assert found.shape == exact.shape, f"{result} of {target.backend.name}"
            units = (np.abs(found - exact) / tolerances.contraction(size, terms, precision)).max()
            assert units <= 1, f"linear of {target.backend.name}: {result} in {name}, sums of {length}"


@pytest.mark.parametrize("kernel", KERNELS)
@given(seed=seeds, has_bias=st.booleans())
@settings(max_examples=5)
def test_large_products_with_gradients_are_within_the_bound_too(kernel, seed, has_bias):
    """In float32 on some CPUs two of their three products are another library's."""
    random = np.random.default_rng(seed)
    x, weight, dy = (
        array(random, shape).astype(np.float32) for shape in ((300, 320), (431, 320), (300, 431))
    )
    bias = array(random, (431,)).astype(np.float32) if has_bias else None
    tensors = [
        None if part is None else torch.from_numpy(part).requires_grad_() for part in (x, weight, bias)
    ]
    with patch.object(fast, "product_kernel", return_value=kernel):
        y = fast.linear(*tensors)
    y.backward(torch.from_numpy(dy))
    results = [y.detach(), *(tensor.grad for tensor in tensors if tensor is not None)]

    def exact(x, weight, bias, dy):
        y, cache = linear_forward(x, weight, bias)
        return [part for part in (y, *linear_backward(dy, cache)) if part is not None]

    precise = [None if part is None else part.astype(np.float64) for part in (x, weight, bias, dy)]
    magnitudes = exact(*(None if part is None else np.abs(part) for part in precise))
    precision = tolerances.PRECISIONS["float32"]
    for got, want, size, terms in zip(
        results, exact(*precise), magnitudes, (321, 431, 300, 300)[: len(results)], strict=True
    ):
        bound = tolerances.contraction(size, terms, precision)
        assert got.shape == want.shape and (np.abs(got.numpy() - want) <= bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
@given(seed=seeds, rows=st.sampled_from([(), (1,), (1, 1), (3,), (2, 5)]), has_bias=st.booleans())
@settings(max_examples=10)
def test_a_product_without_gradient_is_within_the_bound_too(kernel, seed, rows, has_bias):
    """A large one in float32 on some CPUs is another library's."""
    random = np.random.default_rng(seed)
    x, weight = array(random, (*rows, 320)).astype(np.float32), array(random, (431, 320)).astype(np.float32)
    bias = array(random, (431,)).astype(np.float32) if has_bias else None
    tensors = [None if part is None else torch.from_numpy(part) for part in (x, weight, bias)]
    with patch.object(fast, "product_kernel", return_value=kernel):
        with torch.no_grad():
            got = fast.linear(*tensors)
        with torch.inference_mode():
            assert torch.equal(fast.linear(*tensors), got)
    want, _ = linear_forward(
        *(None if part is None else part.astype(np.float64) for part in (x, weight, bias))
    )
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(weight.T) + (0 if bias is None else np.abs(bias))
    bound = tolerances.contraction(magnitude, 321, tolerances.PRECISIONS["float32"])
    assert got.shape == want.shape and (np.abs(got.numpy() - want) <= bound).all()


@pytest.mark.parametrize(
    ("cpu_name", "instructions", "in_training", "in_writing"),
    [
        ("AMD EPYC 9R14", "AVX512", "oneDNN", "oneDNN"),
        ("AMD EPYC 7R13", "AVX2", "PyTorch's choice", "oneDNN"),
        ("Intel Xeon 2.50GHz", "AVX512", "PyTorch's choice", "PyTorch's choice"),
        ("Apple M2", "DEFAULT", "PyTorch's choice", "PyTorch's choice"),
    ],
)
def test_whose_kernel_multiplies_is_a_matter_of_the_processor(
    monkeypatch, cpu_name, instructions, in_training, in_writing
):
    """oneDNN once had those of every processor with AVX-512: on Intel's a step took up to a tenth longer."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu_name})
    found = [fast.product_kernel(torch.device("cpu"), torch.float32, training) for training in (True, False)]
    assert found == [in_training, in_writing]
    assert fast.product_kernel(torch.device("cpu"), torch.bfloat16, True) == "PyTorch's choice"
    assert fast.product_kernel(torch.device("cuda"), torch.float32, True) == "PyTorch's choice"
