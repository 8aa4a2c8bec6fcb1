"""Cross entropy with targets that do not count. The twin of ref_numpy/loss.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from ref_numpy.loss import IGNORE


def cross_entropy(
    logits: Float[Tensor, "*places V"],
    targets: Integer[Tensor, "*places"],
    label_smoothing: float = 0.0,
    count: Integer[Tensor, ""] | int | None = None,
) -> Float[Tensor, ""]:
    """loss = 1/count sum over counted places of -sum_v q_v log p_v, computed in at least float32.

    count is the number of places to average over, by default those whose target is not IGNORE; a tensor
    keeps it on the device. Where nothing counts the loss is 0. A target that is neither a token nor IGNORE
    raises IndexError on the CPU and is undefined on a GPU.
    """
    if count is None:
        count = (targets != IGNORE).sum()
    precise = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(
        precise.flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / torch.as_tensor(count).clamp(min=1)
