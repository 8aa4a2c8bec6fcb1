"""Muon: momentum, made orthogonal, for the matrices inside the blocks (Jordan et al. 2024).

A step of SGD with momentum is mostly a few directions: its singular values differ by orders of magnitude.
Muon keeps the singular vectors of a step and makes all its singular values about 1, so that rare directions
count too.

Shapes: M rows, N columns of a matrix.
Not here: embeddings, the output projection, vectors (AdamW serves them, see optim.py), bfloat16 inside the
iteration, q, k and v as matrices of their own.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Of p(s) = a s + b s^3 + c s^5, chosen for the steepest rise at 0; it ends near 1, and not at it."""

_ITERATIONS = 5


def orthogonalise(matrix: Float[Array, "M N"]) -> Float[Array, "M N"]:
    """U S' V^T for the matrix U S V^T, with the singular values of S' between about 0.7 and 1.2; those of S
    below 0.0015 ||S||_F do not come that far, for nothing grows by more than 3.4445^5 = 485.

    X = matrix / (||matrix||_F + 1e-7), then five times X = a X + (b G + c G^2) X with G = X X^T: an odd
    polynomial acts on X's singular values alone (Jordan et al. 2024, "Newton-Schulz"). A tall matrix is
    turned first, so that G is small. A matrix of zeros stays one.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (np.sqrt((x * x).sum()) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return x.T if is_tall else x


def muon(
    param: Float[Array, "M N"],
    gradient: Float[Array, "M N"],
    m: Float[Array, "M N"],
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> tuple[Float[Array, "M N"], Float[Array, "M N"]]:
    """A step of Muon: the new param and m.

    m = mu m + (1 - mu) g
    u = mu m + (1 - mu) g                       Nesterov's look ahead, with the new m
    param = param - lr wd param - lr sqrt(max(1, M / N)) orthogonalise(u)

    The root makes a tall matrix move its outputs as much as a square one does.
    """
    m = momentum * m + (1 - momentum) * gradient
    update = orthogonalise(momentum * m + (1 - momentum) * gradient)
    stretch = max(1.0, param.shape[0] / param.shape[1]) ** 0.5
    return param - learning_rate * weight_decay * param - learning_rate * stretch * update, m
