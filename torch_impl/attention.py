"""Attention: the scaled dot product. The twin of ref_numpy/attention.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from torch_impl.alibi import alibi_bias


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    mask: Bool[Tensor, "*#mask"],
    slopes: tuple[float, ...] | None = None,
) -> Float[Tensor, "B H T D"]:
    """y = softmax(q k^T / sqrt D + ALiBi) v over the keys that the mask allows; 0 for a query that sees none.

    What the fused kernels make of a row without keys differs from one to the next. Such a row is let see
    everything, which is finite, and its result is then replaced by 0, which also stops its gradient.
    """
    sees_something = mask.any(dim=-1, keepdim=True)
    allowed = mask | ~sees_something
    if slopes is not None:
        bias = alibi_bias(slopes, q.shape[-2], k.shape[-2], q.dtype, q.device)
        allowed = torch.where(allowed, bias, -torch.inf)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return torch.where(sees_something, y, 0.0)
