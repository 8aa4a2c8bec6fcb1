"""Cross-attention: queries of one sequence look at another. The twin of ref_numpy/cross_attention.py."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from torch_impl.attention import attention
from torch_impl.linear import Linear
from torch_impl.multi_head_attention import join_heads, split_heads


class CrossAttention(nn.Module):
    """Queries from x, keys and values from the memory."""

    def __init__(self, width: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.q = Linear(width, width, bias)
        self.kv = Linear(width, 2 * width, bias)
        self.proj = Linear(width, width, bias)

    def forward(
        self, x: Float[Tensor, "B T C"], memory: Float[Tensor, "B S C"], mask: Bool[Tensor, "*#mask"]
    ) -> Float[Tensor, "B T C"]:
        q, k, v = (split_heads(part, self.n_head) for part in (self.q(x), *self.kv(memory).chunk(2, dim=-1)))
        return self.proj(join_heads(attention(q, k, v, mask)))
