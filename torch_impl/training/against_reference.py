"""Which component departs from the NumPy reference, for --detect-anomaly.

Each component is given the inputs that it had in a step, and then the gradient that came back to it, and the
reference computes from them in float64. A component ends before the one that it is a part of, so the first
that departs is the smallest. Rounding is excused by what a neighbour of the numbers, computed in float32,
differs by.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray as Array
from numpy.typing import DTypeLike
from torch import Tensor, nn
from tqdm import tqdm

from ref_numpy.dropout import DropoutKey
from torch_impl.seq2seq import Seq2Seq
from torch_impl.training.ranks import whole
from torch_impl.training.references import (
    Params,
    Reference,
    array_of,
    reference_of,
    reference_of_embedding,
    reference_of_loss,
)
from torch_impl.transformer import Embedded

_DIGITS = 8
"""By how many of its last digits a neighbour's number differs: a sum is off by more than one."""


class Comparison:
    """Of a model's components with the reference's, while they compute within the block of `watching`.

    `broken` gets the first that makes numbers that are not finite out of finite ones, after which nothing is
    computed twice any more; `departures` the first that is merely off.
    """

    def __init__(self, model: Embedded) -> None:
        self.model = model
        self.broken: list[str] = []
        self.departures: list[str] = []
        self.lost_before: str | None = None  # the component, while nobody knows which one lost it
        self.gradients: dict[str, tuple[Array, Array]] = {}  # of weights: the reference's, the neighbour's
        self.in_parts = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block gradients add up in weights that had none; at its end these are compared too."""
        features: list[Tensor] = []
        last_norm = self.model.decoder.norm if isinstance(self.model, Seq2Seq) else self.model.norm
        handles = [last_norm.register_forward_hook(lambda module, inputs, y: features.append(y))]
        for name, module in self.model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(_with_own_input))
                handles.append(module.register_forward_hook(partial(self._follow_module, name)))
        embed = partial(self._follow_embedding, self.model.embed)
        loss = partial(self._follow_loss, self.model.loss, features)
        try:
            with (
                _in_place_of(self.model, "embed", embed),
                _in_place_of(self.model, "loss", loss),
                tqdm(unit=" comparisons", leave=False, disable=None) as self.progress,
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._compare_weights()

    def _follow_module(self, name: str, module: nn.Module, inputs: tuple, y: object) -> None:
        reference = reference_of(self.model.config, name, module, inputs)
        if reference is not None:
            # The gradients of a part's weights are the part's to tell.
            told = f"{name}." if next(module.children(), None) is None else None
            self._follow(_Call(name, reference, inputs[0], module.named_parameters, told), y)

    def _follow_embedding(
        self,
        compute: Callable[..., Tensor],
        ids: Tensor,
        places: Tensor,
        key: DropoutKey | None,
        before: int = 0,
    ) -> Tensor:
        """The model's own embedding: token vectors, positions, dropout."""
        x = compute(ids, places, key, before)
        tables = "token_embedding.weight", "position_embedding.weight"
        reference = reference_of_embedding(self.model.config, places, key)
        weights = partial(_of_names, self.model, tables)
        self._follow(_Call("the embedding", reference, ids, weights, ""), x)
        return x

    def _follow_loss(
        self,
        compute: Callable[..., Tensor],
        features: list[Tensor],
        batch: tuple[Tensor, ...],
        key: DropoutKey | None = None,
        label_smoothing: float = 0.0,
        count: Tensor | int | None = None,
    ) -> Tensor:
        """The model's own loss; the output projection is a part of it."""
        loss = compute(batch, key, label_smoothing, count)
        tied = self.model.config.tied_embeddings
        matrix = "token_embedding.weight" if tied else "head.weight"
        reference = reference_of_loss(batch[-1], label_smoothing, count, matrix)
        weights = partial(_of_names, self.model, (matrix,))
        self._follow(_Call("the loss", reference, features.pop(), weights, ""), loss)
        return loss

    def _follow(self, call: "_Call", y: Tensor) -> None:
        """Compare y, and once the gradient of x has come back, that."""
        params = call.whole_weights()
        if self._is_sound(call, "what comes into", call.x):
            (wanted, *_), (neighbour, *_) = _twice(call, params, call.dtype_of(y))
            self._compare(call.name, y, wanted, neighbour, call.dtype_of(y))
        if call.x.requires_grad:
            came_back: list[Tensor] = []
            y.register_hook(came_back.append)
            call.x.register_hook(lambda dx: self._look_back(call, came_back.pop(), dx))
        elif y.requires_grad:
            y.register_hook(lambda dy: self._look_back(call, dy, None))

    def _look_back(self, call: "_Call", dy: Tensor, dx: Tensor | None) -> None:
        """Compare dx, and keep what the gradients of the weights should be."""
        params, dtype = call.whole_weights(), call.dtype_of(dy)
        if not self._is_sound(call, "what brings the gradient back to", dy):
            return
        (_, wanted, gradients), (_, neighbour, shaken) = _twice(call, params, dtype, dy)
        if dx is not None:
            self._compare(f"{call.name}, in the gradient of its input", dx, wanted, neighbour, dtype)
        if call.told is None or self.in_parts:
            return
        for key, gradient in gradients.items():
            sums = self.gradients.get(call.told + key, (0.0, 0.0))
            self.gradients[call.told + key] = sums[0] + gradient, sums[1] + shaken[key]

    def _is_sound(self, call: "_Call", what: str, numbers: Tensor) -> bool:
        """Whether there is something to compare: finite numbers, before which none were lost, or only within
        this component."""
        within = self.lost_before is not None and self.lost_before.startswith(f"{call.name}.")
        if self.broken and not within:
            return False
        if not numbers.is_floating_point() or bool(numbers.isfinite().all()):
            return True
        if not self.broken:
            self.broken = [f"{what} {call.name} (it is not finite, though all that was computed before is)"]
            self.lost_before = call.name
        return False

    def _compare_weights(self) -> None:
        """The sums over all micro-batches, of this process; where a model is held in parts there are none."""
        for name, parameter in () if self.broken else self.model.named_parameters():
            if name in self.gradients and parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                wanted = self.gradients[name]
                self._compare(f"the gradient of {name}", gradient, *wanted, self.model.compute_dtype)

    def _compare(self, what: str, got: Tensor, wanted: Array, neighbour: Array, dtype: torch.dtype) -> None:
        self.progress.update()
        broken, found = _departure(got, wanted, neighbour, dtype)
        if broken and (not self.broken or self.lost_before):
            self.broken, self.lost_before = [f"{what} ({found})"], None
        elif found and not self.broken and not self.departures:
            self.departures = [f"{what} ({found})"]


class _Call(NamedTuple):
    """A component that computes, once."""

    name: str
    reference: Reference
    x: Tensor
    weights: Callable[[], Iterable[tuple[str, Tensor]]]  # anew each time: a model in parts exchanges them
    told: str | None  # what comes before the weights' names where their gradients are this one's to tell

    def dtype_of(self, y: Tensor) -> torch.dtype:
        """Which it computes in."""
        return self.x.dtype if self.x.is_floating_point() else y.dtype

    def whole_weights(self) -> dict[str, Tensor]:
        """As the component reads them. Of processes that hold a model in parts, all have to ask."""
        weights = {name: whole(weight.detach()) for name, weight in self.weights()}
        if not self.x.is_floating_point():
            return weights
        return {name: weight.to(self.x.dtype) for name, weight in weights.items()}


@contextmanager
def _in_place_of(model: Embedded, name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block, a model's method is another function."""
    own = vars(model).get(name)  # of FSDP2
    setattr(model, name, function)
    try:
        yield
    finally:
        delattr(model, name)
        if own is not None:
            setattr(model, name, own)


def _of_names(model: Embedded, names: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if name in names]


def _with_own_input(module: nn.Module, inputs: tuple) -> tuple | None:
    """A component's input for itself: its gradient is then that component's share, without other readers'."""
    x, *others = inputs
    return (x.view_as(x), *others) if x.requires_grad else None


def _twice(
    call: _Call, params: dict[str, Tensor], computed_in: torch.dtype, dy: Tensor | None = None
) -> list[tuple[Array, Array | None, Params]]:
    """y and, with dy, the gradients of x and of the weights, by the reference in float64; and so in float32
    for numbers that are off by some of their last digits."""
    results = []
    for dtype, rounding in ((np.float64, None), (np.float32, computed_in)):
        number = partial(_number, dtype=dtype, rounding=rounding, noise=np.random.default_rng(0))
        with np.errstate(all="ignore"):
            weights = {name: number(value) for name, value in params.items()}
            y, cache = call.reference.forward(number(call.x), weights)
            gradients = (None, {}) if dy is None else call.reference.backward(number(dy), cache)
        results.append((np.asarray(y), *gradients))
    return results


def _number(
    tensor: Tensor, dtype: DTypeLike, rounding: torch.dtype | None, noise: np.random.Generator
) -> Array:
    array = array_of(tensor)
    if array.dtype.kind == "f" and rounding is not None:
        array = array * (1 + _DIGITS * _digit(rounding) * noise.uniform(-1, 1, array.shape))
        array = array + _DIGITS * _least(rounding) * noise.uniform(-1, 1, array.shape)
    return np.asarray(array, dtype if array.dtype.kind == "f" else None)


def _departure(
    got: Tensor, wanted: Array, neighbour: Array, computed_in: torch.dtype
) -> tuple[bool, str | None]:
    """How far a result is from the reference's, None where it is as near as its precision allows; and whether
    it has lost its numbers."""
    largest, limit = np.abs(wanted).max(initial=0.0), torch.finfo(got.dtype).max
    moved = np.abs(neighbour - wanted).max(initial=0.0)
    name, got = str(got.dtype).removeprefix("torch."), array_of(got)
    if not np.isfinite(got).all():
        if not largest <= limit:
            return True, f"its numbers, up to {largest:.1e}, are too large for {name}"
        if not moved <= largest / 2 and largest > 0:
            return (
                True,
                f"its numbers are too large for {name} on the way, where the reference's are lost too",
            )
        end = f", and those of {name} end at {limit:,.0f}" if limit < 1e30 else ""
        return True, f"the reference's numbers are finite here{end}"
    error = np.abs(got - wanted).max(initial=0.0)
    digit = _digit(computed_in) + 4 * torch.finfo(torch.float32).eps
    allowed = 16 * (digit * largest + _least(computed_in)) + 4 * moved
    if error > allowed:
        parts = max(largest, 1e-30)
        told = f"off by {error / parts:.1e} of its largest number; rounding excuses {allowed / parts:.1e}"
        return False, told
    return False, None


def _digit(dtype: torch.dtype) -> float:
    """The last digit of a number near 1, as products compute with it."""
    in_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return max(torch.finfo(dtype).eps, 2.0**-10 if in_tf32 else 0.0)


def _least(dtype: torch.dtype) -> float:
    """The smallest number: what gradients in float16 are rounded by."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
