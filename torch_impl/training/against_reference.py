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
from torch_impl.training.references import Params, Reference, array_of, reference_of, reference_of_loss
from torch_impl.transformer import Embedded


class Comparison:
    """Of a model's components with the reference's, while they compute within the block of `watching`.

    What departs is appended to `departures`, by name and error; after the first one nothing is computed
    twice any more.
    """

    def __init__(self, model: Embedded) -> None:
        self.model = model
        self.departures: list[str] = []
        self.gradients: dict[str, tuple[Array, Array]] = {}  # of weights: the reference's, the neighbour's

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
        loss = self.model.loss
        self.model.loss = partial(self._follow_loss, loss, features)
        try:
            with tqdm(unit=" comparisons", leave=False, disable=None) as self.progress:
                yield
        finally:
            self.model.loss = loss
            for handle in handles:
                handle.remove()
        self._compare_weights()

    def _follow_module(self, name: str, module: nn.Module, inputs: tuple, y: object) -> None:
        reference = reference_of(self.model.config, name, module, inputs)
        if reference is not None:
            # The gradients of a part's weights are the part's to tell.
            told = name if next(module.children(), None) is None else None
            self._follow(_Call(name, reference, inputs[0], module.named_parameters, told), y)

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
        reference = reference_of_loss(batch[-1], label_smoothing, count)
        told = "token_embedding" if self.model.config.tied_embeddings else "head"
        head = getattr(self.model, told)
        self._follow(_Call("the loss", reference, features.pop(), head.named_parameters, told), loss)
        return loss

    def _follow(self, call: "_Call", y: Tensor) -> None:
        """Compare y, and once the gradient of x has come back, that."""
        params = call.whole_weights()
        if not self.departures:
            (wanted, *_), (neighbour, *_) = _twice(call, params)
            self._compare(call.name, y, wanted, neighbour, call.dtype)
        if call.x.requires_grad:
            came_back: list[Tensor] = []
            y.register_hook(came_back.append)
            call.x.register_hook(lambda dx: self._look_back(call, came_back.pop(), dx))
        elif y.requires_grad:
            y.register_hook(lambda dy: self._look_back(call, dy, None))

    def _look_back(self, call: "_Call", dy: Tensor, dx: Tensor | None) -> None:
        """Compare dx, and keep what the gradients of the weights should be."""
        params = call.whole_weights()
        if self.departures:
            return
        (_, wanted, gradients), (_, neighbour, shaken) = _twice(call, params, dy)
        if dx is not None:
            self._compare(f"{call.name}, in the gradient of its input", dx, wanted, neighbour, call.dtype)
        for key, gradient in gradients.items() if call.told else ():
            sums = self.gradients.get(f"{call.told}.{key}", (0.0, 0.0))
            self.gradients[f"{call.told}.{key}"] = sums[0] + gradient, sums[1] + shaken[key]

    def _compare_weights(self) -> None:
        """The sums over all micro-batches, of this process; where a model is held in parts there are none."""
        dtype = self.model.compute_dtype
        for name, parameter in () if self.departures else self.model.named_parameters():
            gradient = parameter.grad
            if name in self.gradients and gradient is not None and not hasattr(gradient, "full_tensor"):
                self._compare(f"the gradient of {name}", gradient, *self.gradients[name], dtype)

    def _compare(self, what: str, got: Tensor, wanted: Array, neighbour: Array, dtype: torch.dtype) -> None:
        self.progress.update()
        found = _departure(array_of(got), wanted, neighbour, dtype)
        if found and not self.departures:
            self.departures.append(f"{what} ({found})")


class _Call(NamedTuple):
    """A component that computes, once."""

    name: str
    reference: Reference
    x: Tensor
    weights: Callable[[], Iterable[tuple[str, Tensor]]]  # anew each time: a model in parts exchanges them
    told: str | None  # the module under whose name the gradients of the weights are kept

    @property
    def dtype(self) -> torch.dtype:
        """Which it computes in; of a table, that of its rows."""
        return self.x.dtype if self.x.is_floating_point() else next(iter(self.weights()))[1].dtype

    def whole_weights(self) -> dict[str, Tensor]:
        """As the component reads them. Of processes that hold a model in parts, all have to ask."""
        return {name: whole(weight.detach()).to(self.dtype) for name, weight in self.weights()}


def _with_own_input(module: nn.Module, inputs: tuple) -> tuple | None:
    """A component's input for itself: its gradient is then that component's share, without other readers'."""
    x, *others = inputs
    return (x.view_as(x), *others) if x.requires_grad else None


def _twice(
    call: _Call, params: dict[str, Tensor], dy: Tensor | None = None
) -> list[tuple[Array, Array | None, Params]]:
    """y and, with dy, the gradients of x and of the weights, by the reference in float64; and so for numbers
    that are off by up to their last digit, in float32."""
    results = []
    for dtype, rounding in ((np.float64, None), (np.float32, call.dtype)):
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
        array = array * (1 + _digit(rounding) * noise.uniform(-1, 1, array.shape))
        array = array + _least(rounding) * noise.uniform(-1, 1, array.shape)
    return np.asarray(array, dtype if array.dtype.kind == "f" else None)


def _departure(got: Array, wanted: Array, neighbour: Array, dtype: torch.dtype) -> str | None:
    """How far a result is from the reference's; None where it is as near as its precision allows."""
    if not np.isfinite(wanted).all():
        return None  # the reference cannot do it either: the numbers are too large, not wrong
    largest, limit = np.abs(wanted).max(initial=0.0), torch.finfo(dtype).max
    name = str(dtype).removeprefix("torch.")
    if largest > limit:
        return f"its numbers, up to {largest:.1e}, are too large for {name}"
    if not np.isfinite(got).all():
        end = f", and those of {name} end at {limit:,.0f}" if dtype == torch.float16 else ""
        return f"the reference's numbers are finite here{end}"
    error, moved = np.abs(got - wanted).max(initial=0.0), np.abs(neighbour - wanted).max(initial=0.0)
    digit = _digit(dtype) + 4 * torch.finfo(torch.float32).eps
    allowed = 16 * (digit * largest + _least(dtype) + moved)
    if error > allowed:
        parts = max(largest, 1e-30)
        return f"off by {error / parts:.1e} of its largest number; rounding excuses {allowed / parts:.1e}"
    return None


def _digit(dtype: torch.dtype) -> float:
    """The last digit of a number near 1, as products compute with it."""
    in_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return max(torch.finfo(dtype).eps, 2.0**-10 if in_tf32 else 0.0)


def _least(dtype: torch.dtype) -> float:
    """The smallest number: what gradients in float16 are rounded by."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
