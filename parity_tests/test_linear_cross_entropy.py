"""A linear layer and its cross entropy, some places at a time: parity, and nothing but the two in a row."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from parity_tests.strategies import arrays, seeds, sizes
from ref_numpy.linear import linear_backward, linear_forward
from ref_numpy.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from ref_numpy.loss import IGNORE, cross_entropy_backward, cross_entropy_forward
from torch_impl.linear_cross_entropy import linear_cross_entropy


@st.composite
def cases(draw):
    B, T, C, V = draw(sizes(4))
    places = draw(st.sampled_from([(T,), (B, T)]))
    random = np.random.default_rng(draw(seeds))
    targets = random.integers(V, size=places)
    targets[random.random(places) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = IGNORE
    return {
        "x": draw(arrays((*places, C))),
        "weight": draw(arrays((V, C))),
        "targets": targets,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "count": draw(st.none() | st.integers(1, 50)),
        "at_once": draw(st.integers(1, 20)),
    }


@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("linear_cross_entropy", seed, **arguments)


@given(arguments=cases(), dloss=st.floats(-3, 3))
def test_it_is_the_two_components_in_a_row(arguments, dloss):
    x, weight, targets, smoothing, count, _ = arguments.values()
    logits, product = linear_forward(x, weight, None)
    want, softmax = cross_entropy_forward(logits, targets, smoothing, count)
    dx, dweight, _ = linear_backward(cross_entropy_backward(dloss, softmax), product)
    loss, cache = linear_cross_entropy_forward(*arguments.values())
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        (loss, *linear_cross_entropy_backward(dloss, cache)), (want, dx, dweight), strict=True
    ):
        close(got, wanted)


@given(arguments=cases())
def test_the_loss_is_the_same_where_no_gradient_is_wanted(arguments):
    """As in an evaluation: of all chunks, and not of the first alone."""
    x, weight, targets, *others = arguments.values()
    want, _ = linear_cross_entropy_forward(*arguments.values())
    with torch.no_grad():
        loss = linear_cross_entropy(*map(torch.from_numpy, (x, weight, targets)), *others)
    assert loss.item() == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_labels_are_not_smoothed_unless_that_is_asked_for():
    x, weight, targets = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1])
    loss, _ = linear_cross_entropy_forward(x, weight, targets)
    assert loss == pytest.approx(np.log1p(np.exp(-1)))
    assert linear_cross_entropy(*map(torch.from_numpy, (x, weight, targets))).item() == pytest.approx(loss)


def test_no_more_logits_are_made_than_were_asked_for(monkeypatch):
    made = []

    def recorded(x, weight, bias):
        made.append(len(x) * len(weight))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr("torch_impl.linear_cross_entropy.linear", recorded)
    x, weight = torch.randn(1000, 4, requires_grad=True), torch.randn(300, 4)
    linear_cross_entropy(x, weight, torch.arange(1000) % 300, at_once=64).backward()
    assert max(made) == 64 * 300


class Held(TorchDispatchMode):
    """The most bytes that results of operations hold at a time, in memory of their own."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.given:
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


@pytest.mark.parametrize("with_gradient", [True, False])
def test_beside_its_results_it_holds_the_logits_of_some_places_which_become_their_gradient(with_gradient):
    """Their gradient used to stand beside them, and once those of the places before as well."""
    N, C, V, at_once = 1000, 4, 512, 64
    x, weight, targets = torch.randn(N, C), torch.randn(V, C), torch.randint(V, (N,))
    for tensor in (x, weight):
        tensor.requires_grad_(with_gradient)
    with Held(x, weight, targets) as held:
        linear_cross_entropy(x, weight, targets, at_once=at_once)
    results = x.nbytes + weight.nbytes if with_gradient else 0
    logits = 4 * at_once * V
    assert logits <= held.peak - results < 1.03 * logits


@given(arguments=cases(), multiple=st.sampled_from([2, 8, 64]))
def test_a_vocabulary_that_is_filled_up_is_none_the_larger(arguments, multiple):
    """As on a GPU: the rows that are put in count for nothing."""
    x, weight, targets, *others = arguments.values()

    def found():
        leaves = [torch.from_numpy(part).requires_grad_() for part in (x, weight)]
        loss = linear_cross_entropy(*leaves, torch.from_numpy(targets), *others)
        return loss, *torch.autograd.grad(loss, leaves)

    wanted = found()
    with mock.patch.dict("torch_impl.linear_cross_entropy._MULTIPLES", cpu=multiple):
        torch.testing.assert_close(found(), wanted, rtol=1e-9, atol=1e-9)  # other products round otherwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_chunks_add_up_in_float32(dtype):
    """Each of 1,024 chunks adds a half: a sum in bfloat16, as the places are, would stay at 128."""
    x, weight = torch.ones(1024, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    linear_cross_entropy(x, weight, torch.zeros(1024, dtype=torch.long), at_once=1).backward()
    assert weight.grad.tolist() == [[-0.5], [0.5]]


def test_what_needs_no_gradient_costs_none():
    """Of frozen embeddings, or where nothing is trained: the products of the gradients are left out."""
    x, weight, targets = torch.randn(5, 4), torch.randn(3, 4), torch.tensor([0, 1, 2, 0, 1])

    def products(of_x, of_weight):
        leaves = x.clone().requires_grad_(of_x), weight.clone().requires_grad_(of_weight)
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(*leaves, targets)
        return counter.get_total_flops() / (2 * 5 * 4 * 3)

    assert products(True, True) == 3
    assert products(True, False) == products(False, True) == 2
    assert products(False, False) == 1
    with torch.no_grad():
        assert products(True, True) == 1


@pytest.mark.parametrize("target", [-1, 4])
def test_a_target_outside_the_vocabulary_is_refused(target):
    with pytest.raises(ValueError, match="a target lies outside the vocabulary of 4 and is not -100"):
        linear_cross_entropy_forward(np.ones((2, 3)), np.ones((4, 3)), np.array([0, target]))
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, target]))


@pytest.mark.parametrize("at_once", [0, -1])
def test_chunks_of_no_places_are_refused(at_once):
    """The fast side took -1, and gave a loss of 0 with whatever stood in memory for a gradient."""
    case = np.ones((2, 3)), np.ones((4, 3)), np.array([0, 1])
    with pytest.raises(ValueError, match=f"{at_once} places at once are none"):
        linear_cross_entropy_forward(*case, at_once=at_once)
    with pytest.raises(ValueError, match=f"{at_once} places at once are none"):
        linear_cross_entropy(*map(torch.from_numpy, case), at_once=at_once)


def test_targets_are_not_smoothed_unless_asked():
    x, weight, targets = np.ones((2, 3)), np.arange(12.0).reshape(4, 3), np.array([0, 3])
    plain, _ = linear_cross_entropy_forward(x, weight, targets)
    assert plain == linear_cross_entropy_forward(x, weight, targets, 0.0)[0]
    assert linear_cross_entropy(*map(torch.from_numpy, (x, weight, targets))).item() == pytest.approx(plain)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unless_told_the_mean_is_over_the_places_that_count(agree, smoothing):
    random = np.random.default_rng(0)
    case = {"x": random.standard_normal((6, 3)), "weight": random.standard_normal((5, 3))}
    targets = np.array([3, IGNORE, 0, IGNORE, IGNORE, 4])
    agree(
        "linear_cross_entropy", 0, **case, targets=targets, label_smoothing=smoothing, count=None, at_once=4
    )
