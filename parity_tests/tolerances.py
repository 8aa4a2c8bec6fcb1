"""How close is close enough: two questions, kept apart, each answered by a bound with a reason.

1. Is it the same mathematics? Both sides compute in float64. Honest roundings then differ by some multiple
   of 2^-53 = 1e-16; the least of the classic bugs (a table in float32, an epsilon outside its root) move a
   result by 1e-8 of its size or more, when the inputs are chosen well. Everything in between is free, and the
   line is drawn at 1e-11 of the largest element (`mathematics`).

2. Is it rounded as well as it could be? In float32, TF32, bfloat16 or float16, on any device, the oracle is
   the float64 reference on the same rounded inputs.
   * A contraction is held to the bound of its own condition (`contraction`).
   * Anything else may err twice as much (a gradient: three times) as two measures of the same case say
     (`rounding`): what a plain implementation errs in this precision on that device, which must be about
     what it errs on the CPU (`soundness`), and what one rounding of the inputs changes.

test_tolerances.py measures the first three, from both sides: honest errors come within two decades of each
bound, and the least of the classic bugs is two decades beyond that of mathematics.
"""

from typing import NamedTuple

import numpy as np


class Precision(NamedTuple):
    """Unit roundoffs, half a unit in the last place: of the values, and of the sums inside a product."""

    torch_dtype: str
    u: float
    u_sum: float


PRECISIONS = {
    "float64": Precision("float64", 2.0**-53, 2.0**-53),
    "float32": Precision("float32", 2.0**-24, 2.0**-24),
    "tf32": Precision("float32", 2.0**-11, 2.0**-24),  # 10 explicit bits going into a product
    "bfloat16": Precision("bfloat16", 2.0**-8, 2.0**-24),  # 7 explicit bits; sums are kept in float32
    "float16": Precision("float16", 2.0**-11, 2.0**-24),
}


def mathematics(want: np.ndarray, scale: float) -> float:
    """Largest error that float64 excuses: 1e-11 max|want| + 2e-14 scale.

    The first term stands in the gap. Below it: a sum of n terms, each with a rounding of 1e-16, is rarely
    further off than sqrt(n) of them, and a model of three layers, some twenty operations with n up to a
    hundred, amplifies that by the slopes of its norms and softmaxes: a few 1e-14 of a result at worst. Above
    it: the least of the classic bugs, a table of angles in float32, moves a result by 1e-8. On a logarithmic
    scale 1e-11 lies in the middle.

    The second is for what cancels. scale is the largest number anywhere in the case, inputs and results. The
    attention gradient of a query with one key is 0, computed as a difference of numbers of that scale, each
    right to 1.1e-16 of it, and the products before it to several times that: 2e-14 is two hundred roundings.

    Measured over thousands of cases, the largest honest errors are 0.08 of this bound (attention with scores
    of hundreds) and 0.02 elsewhere.
    """
    return 1e-11 * np.abs(want).max(initial=0.0) + 2e-14 * scale


def contraction(magnitude: np.ndarray, length: int, precision: Precision) -> np.ndarray:
    """Elementwise bound of a sum of `length` products: [2 u + min(n, 4 sqrt n) u_sum] (|A| |B|).

    The first term rounds both factors (TF32), each by u, or the result, by u; the second is the sum's own
    rounding, at most n roundings (Higham, Accuracy and Stability of Numerical Algorithms, 3.1) and, their
    signs being random, rarely more than 4 standard deviations of n of them. magnitude is |A| |B|.
    """
    sums = min(length, 4 * length**0.5)
    return (2 * precision.u + sums * precision.u_sum) * magnitude


def rounding(
    want: np.ndarray, uncertainty: float, scale: float, precision: Precision, is_gradient: bool
) -> float:
    """Largest error that a precision excuses: f uncertainty + 4 u max|want| + 16 * 2^-24 scale.

    uncertainty: the error of a formula-by-formula implementation in this precision, and the change of the
                 exact result when the inputs move by a rounding (parity.py measures both).
                 Attention's gradients are taken there as fused kernels take them, from y as it was stored:
                 autograd's roundings cancel where keys are alike, and no such kernel's do.
    f:           2, since who sums in another order draws another error of the same size, and the largest of
                 many elements of one draw is within twice that of another; for a gradient 3, which is made of
                 the rounded values of the forward pass besides.
    4 u:         a result that is stored is rounded, u at a time: here, in the plain implementation, and on
                 the way by whichever side stores one intermediate value more.
    16 * 2^-24:  sums are kept in float32, and may cancel to nothing: the suite's longest have 13 terms and a
                 bias, each of the size of scale and rounded once.

    Measured over the suite's cases, the largest honest errors are 0.35 of this bound in bfloat16 and 0.2 in
    float32.
    """
    factor = 3.0 if is_gradient else 2.0
    stored = 4 * precision.u * np.abs(want).max(initial=0.0)
    return factor * uncertainty + stored + 16 * 2.0**-24 * scale


def soundness(on_cpu: float, scale: float, precision: Precision) -> float:
    """Largest error of the plain implementation on another device: 32 on_cpu + 16 u scale.

    on_cpu is its error there. The bound tells a device that computes from one that does not, or not that
    function: kernels honestly differ by the order of their sums and by some units of their exponentials.
    """
    return 32 * on_cpu + 16 * precision.u * scale
