"""Muon for the matrices inside the blocks, AdamW for all else. The twin of ref_numpy/muon.py."""

from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.training.ranks import part_of, whole

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalise(
    matrices: Float[Tensor, "K M N"], products: torch.dtype = torch.float32
) -> Float[Tensor, "K M N"]:
    """U S' V^T for each matrix U S V^T, with the singular values of S' between about 0.7 and 1.2.

    Its products are in half precision where `products` is, which does as well (Jordan et al. 2024) and on a
    GPU is many times faster, and else in the format of the matrices.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    if products.itemsize == 2:
        x = _iterated(x.to(products))
    elif torch.get_float32_matmul_precision() != "highest":  # TF32, too coarse for the other
        x = _iterated(x)
    else:
        x = _iterated_on_gram(x)
    return x.mT if is_tall else x


def _iterated(x: Float[Tensor, "K M N"]) -> Float[Tensor, "K M N"]:
    """The reference's iteration, X <- a X + (b G + c G^2) X with G = X X^T."""
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        step = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, step, x, beta=_A)
    return x


def _iterated_on_gram(x: Float[Tensor, "K M N"]) -> Float[Tensor, "K M N"]:
    """The same on G alone, which X <- P X makes P G P, and in the end X times the product of all P.

    G is the smaller the flatter X is. But its eigenvalues are the squares of X's singular values, and the
    error of the small ones grows twelvefold in each iteration: in bfloat16 some would come out above 2.
    """
    gram, product = x @ x.mT, None
    for _ in range(_ITERATIONS):
        if product is not None:
            gram = step @ gram @ step
        step = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        step.diagonal(dim1=-2, dim2=-1).add_(_A)
        product = step if product is None else step @ product
    return product @ x


class Muon(torch.optim.AdamW):
    """A group whose "momentum" is not None is Muon's, the others are AdamW's. "products" is the format of
    Muon's products (see orthogonalise).

    Its state has AdamW's names: exp_avg is the momentum, step counts, and there is no exp_avg_sq. Of a matrix
    that processes hold parts of, each makes the whole orthogonal and takes its part; one after the other, for
    together they would take the room that was to be saved.
    """

    def __init__(self, groups: list[dict], **settings: object) -> None:
        super().__init__([{"momentum": None, **group} for group in groups], **settings)
        self._step_supports_amp_scaling = False  # a step with float16's overflow has to be left out whole

    @torch.no_grad()
    def step(self) -> None:
        """Muon's matrices first. AdamW passes over what has no gradient, so theirs are then taken away."""
        for group in self.param_groups:
            if group["momentum"] is not None:
                served = [param for param in group["params"] if param.grad is not None]
                self._muon(served, group)
                for param in served:
                    param.grad = None
        super().step()

    def _muon(self, params: list[Tensor], group: dict) -> None:
        rate, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        alike = defaultdict(list)  # matrices of one shape are one batch of products
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param)
            divided = hasattr(param, "full_tensor")
            alike[param.shape, id(param) if divided else 0].append(param)
        if params:
            torch._foreach_add_([self.state[param]["step"] for param in params], 1)
        for ((rows, columns), _), same in alike.items():
            averages = [self.state[param]["exp_avg"] for param in same]
            gradients = [param.grad for param in same]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            torch._foreach_lerp_(gradients, averages, momentum)  # Nesterov's, in the gradients' own room
            matrices = torch.stack([whole(matrix) for matrix in gradients])
            directions = orthogonalise(matrices, group["products"]).to(same[0].dtype)
            updates = (directions * (rate * max(1.0, rows / columns) ** 0.5)).unbind()
            torch._foreach_mul_(same, 1 - rate * decay)
            torch._foreach_sub_(same, list(map(part_of, updates, same)))
