"""A linear layer and the cross entropy of what it makes, some places at a time. The twin of
ref_numpy/linear_cross_entropy.py.

The logits of a large vocabulary never stand in memory whole, and on the CPU those of a chunk stay in the
cache. PyTorch 2.13 has such a function as well, which torch.compile does not see into.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ref_numpy.loss import IGNORE
from torch_impl.linear import linear

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}
"""By kind of device. A CPU's cache may hold 16 MiB in float32. A GPU gets half a GiB in half precision, and
as much again for the gradient: of GPT-2's vocabulary 5,312 places, whose products keep all of it at work."""
_LOGITS_ELSEWHERE = 2**27
_MULTIPLES = {"cuda": 64}
"""Of what a vocabulary is filled up to, by kind of device: tensor cores are fed by rows that are aligned. No
vocabulary of 50,257 is."""


def linear_cross_entropy(
    x: Float[Tensor, "*places C"],
    weight: Float[Tensor, "V C"],
    targets: Integer[Tensor, "*places"],
    label_smoothing: float = 0.0,
    count: Integer[Tensor, ""] | int | None = None,
    at_once: int | None = None,
) -> Float[Tensor, ""]:
    """loss = cross_entropy(x W^T, targets), for at_once places after the other; see torch_impl/loss.py.

    The products are in the precision of x, softmax and loss in at least float32. By default so many places
    come at once as make 4 million logits on the CPU, 268 on CUDA and 134 elsewhere. A target that is neither
    a token nor IGNORE raises RuntimeError on the CPU and is undefined on a GPU; at_once below 1 raises
    ValueError.
    """
    if count is None:
        count = (targets != IGNORE).sum()
    if at_once is None:
        logits = LOGITS_AT_ONCE.get(x.device.type, _LOGITS_ELSEWHERE)
        at_once = max(logits // weight.shape[0] // 64 * 64, 64)
    if at_once < 1:
        raise ValueError(f"{at_once} places at once are none; it must be at least 1")
    rows, flat = x.flatten(0, -2), targets.flatten()
    total = _LinearCrossEntropy.apply(rows, weight, flat, label_smoothing, at_once, torch.is_grad_enabled())
    return total / torch.as_tensor(count).clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over places. Its gradients are made with it, for a loss whose own gradient is 1."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        label_smoothing: float,
        at_once: int,
        with_gradient: bool,
    ) -> Tensor:
        V = weight.shape[0]
        filling = -V % _MULTIPLES.get(x.device.type, 1)
        matrix = F.pad(weight.to(x.dtype), (0, 0, 0, filling)) if filling else weight.to(x.dtype)
        wants_dx, wants_dweight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        dx = torch.empty_like(x) if wants_dx else None
        precise = torch.promote_types(weight.dtype, torch.float32)  # for long sums
        dweight = torch.zeros_like(matrix, dtype=precise) if wants_dweight else None
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for start in range(0, len(x), at_once):
            rows, t = x[start : start + at_once], targets[start : start + at_once, None]
            loss, dlogits = _of_some(
                rows, matrix, V, t, label_smoothing, total.dtype, wants_dx or wants_dweight
            )
            # Compiled by PyTorch 2.11, a result that was changed in place has no gradient.
            total = total + loss
            if wants_dx:
                dx[start : start + at_once] = linear(dlogits, matrix.t(), None)
            if wants_dweight and dweight.dtype == x.dtype:
                torch.addmm(dweight, dlogits.t(), rows, out=dweight)
            elif wants_dweight:
                dweight += dlogits.t() @ rows
            del dlogits  # else they stand beside the next ones
        ctx.save_for_backward(dx, None if dweight is None else dweight[:V])
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = (None if part is None else part * dtotal for part in ctx.saved_tensors)
        return dx, None if dweight is None else dweight.to(ctx.dtype), None, None, None, None


def _of_some(
    rows: Tensor,
    matrix: Tensor,
    V: int,
    targets: Tensor,
    label_smoothing: float,
    dtype: torch.dtype,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some places, in a dtype, and the gradient of their logits in that of the rows.

    The matrix has V tokens and what fills them up.
    """
    counted = targets != IGNORE
    targets = torch.where(counted, targets, 0)
    logits = linear(rows, matrix, None).to(dtype)
    logits[:, V:] = -torch.inf
    logits -= logits.amax(-1, keepdim=True)
    of_targets = logits.gather(1, targets)
    each = -(1 - label_smoothing) * of_targets
    if label_smoothing:
        each = each - label_smoothing * logits[:, :V].mean(-1, keepdim=True)
    p = logits.exp_()  # times their sum, so far; one array becomes the gradient
    normaliser = p.sum(-1, keepdim=True)
    loss = torch.where(counted, each + normaliser.log(), 0).sum()
    if not with_gradient:
        return loss, None
    counts = counted.to(dtype)
    dlogits = p.mul_(counts / normaliser)  # p, less the smoothed targets
    if label_smoothing:
        dlogits[:, :V] -= counts * (label_smoothing / V)
    dlogits = dlogits.to(rows.dtype)
    # Written last, the places of the targets keep torch.compile from rounding in a pass of its own. Not by
    # scatter_, which on a CPU copies all of a tensor in half precision twice.
    at_targets = of_targets.exp() / normaliser - (1 - label_smoothing) - label_smoothing / V
    places = torch.arange(len(rows), device=rows.device)
    dlogits[places, targets[:, 0]] = (at_targets * counts)[:, 0].to(rows.dtype)
    return loss, dlogits
