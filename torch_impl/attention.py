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
    slopes: tuple[float, ...] | Float[Tensor, "H"] | None = None,
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
    y = fused_attention(q, k, v, allowed)
    return torch.where(sees_something, y, 0.0)


def fused_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    mask: Bool[Tensor, "*#mask"] | Float[Tensor, "*#mask"] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "B H T D"]:
    """scaled_dot_product_attention, with groups of heads; a mask of numbers is added to the scores.

    CUDA's kernels for float32 and for masks know no groups, and a plain one, with all scores, would step in.
    On a CPU a gradient is computed in float32: with AVX-512, PyTorch 2.13's backward kernel takes one to five
    times as long in bfloat16, and ten in float16, and the forward kernel gains nothing either.
    """
    half, groups = q.dtype in (torch.float16, torch.bfloat16), q.shape[1] // k.shape[1]
    if half and q.device.type == "cpu" and torch.is_grad_enabled():
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return fused_attention(q.float(), k.float(), v.float(), mask, is_causal).to(q.dtype)
    if groups > 1 and q.device.type != "cpu" and (mask is not None or not half):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
    )
