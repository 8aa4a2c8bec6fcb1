"""A decoder's block with a memory. The twin of ref_numpy/cross_block.py."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from torch_impl.block import make_ffn, make_norm, residual
from torch_impl.cross_attention import CrossAttention
from torch_impl.multi_head_attention import CAUSAL, Attend, MultiHeadAttention
from torch_impl.rope import Rotation


class CrossBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with a residual connection and a norm."""

    def __init__(self, config: ModelConfig, site: int) -> None:
        super().__init__()
        self.config, self.site = config, site
        self.norm1 = make_norm(config)
        self.attention = MultiHeadAttention(config)
        self.norm2 = make_norm(config)
        self.cross_attention = CrossAttention(config.d_model, config.n_head, config.bias)
        self.norm3 = make_norm(config)
        self.ffn = make_ffn(config)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        memory: Float[Tensor, "B S C"],
        memory_mask: Bool[Tensor, "*#memory_mask"],
        attend: Attend = CAUSAL,
        rotation: Rotation | None = None,
        key: DropoutKey | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Without a key nothing is dropped."""
        key1, key2, key3 = (key and key._replace(site=self.site + n) for n in (1, 2, 3))
        x = residual(x, lambda x: self.attention(x, attend, rotation), self.norm1, self.config, key1)
        x = residual(x, lambda x: self.cross_attention(x, memory, memory_mask), self.norm2, self.config, key2)
        return residual(x, self.ffn, self.norm3, self.config, key3)
