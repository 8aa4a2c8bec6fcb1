"""Attention: scaled dot product, and many heads of it side by side. The twin of ref_numpy/attention.py."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from torch_impl.linear import Linear


def causal_mask(length: int, device: torch.device | str = "cpu") -> Bool[Tensor, "T T"]:
    """mask[t, s] = (s <= t)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    mask: Bool[Tensor, "*#mask"],
) -> Float[Tensor, "B H T D"]:
    """y = softmax(q k^T / sqrt D) v over the keys that the mask allows; 0 for a query that may see none.

    What the fused kernels make of a row without keys differs from one to the next. Such a row is let see
    everything, which is finite, and its result is then replaced by 0, which also stops its gradient.
    """
    sees_something = mask.any(dim=-1, keepdim=True)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~sees_something)
    return torch.where(sees_something, y, 0.0)


def causal_attention(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]
) -> Float[Tensor, "B H T D"]:
    """attention with the causal mask, which the kernels know of themselves; every row sees itself."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class MultiHeadAttention(nn.Module):
    """Self-attention by n_head heads, causal; one projection makes all of q, k and v."""

    def __init__(self, width: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = Linear(width, 3 * width, bias)
        self.proj = Linear(width, width, bias)

    def forward(
        self, x: Float[Tensor, "B T C"], mask: Bool[Tensor, "*#mask"] | None = None
    ) -> Float[Tensor, "B T C"]:
        """Without a mask, causal."""
        B, T, C = x.shape
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in parts)  # each (B, H, T, D)
        y = causal_attention(q, k, v) if mask is None else attention(q, k, v, mask)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))
