"""One transformer block, pre-norm or post-norm. The twin of ref_numpy/block.py."""

from jaxtyping import Float
from torch import Tensor, nn

from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from torch_impl.attention import MultiHeadAttention
from torch_impl.dropout import dropout
from torch_impl.ffn import FFN
from torch_impl.layernorm import LayerNorm, RMSNorm


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_epsilon)
    return LayerNorm(config.d_model, config.norm_epsilon, config.bias)


class Block(nn.Module):
    """Attention, then feed-forward, each with a residual connection and a norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        self.p, self.layer = config.dropout, layer
        self.norm1 = make_norm(config)
        self.attention = MultiHeadAttention(config.d_model, config.n_head, config.bias)
        self.norm2 = make_norm(config)
        self.ffn = FFN(config.d_model, config.ffn_width, config.activation, config.bias)

    def forward(self, x: Float[Tensor, "B T C"], key: DropoutKey | None = None) -> Float[Tensor, "B T C"]:
        """Without a key nothing is dropped."""
        key1 = key and key._replace(site=2 * self.layer + 1)
        key2 = key and key._replace(site=2 * self.layer + 2)
        if self.pre_norm:
            x = x + dropout(self.attention(self.norm1(x)), self.p, key1)
            return x + dropout(self.ffn(self.norm2(x)), self.p, key2)
        x = self.norm1(x + dropout(self.attention(x), self.p, key1))
        return self.norm2(x + dropout(self.ffn(x), self.p, key2))
