"""One transformer block, pre-norm or post-norm. The twin of ref_numpy/block.py."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from torch_impl.dropout import dropout
from torch_impl.ffn import FFN, SwiGLU
from torch_impl.layernorm import LayerNorm, RMSNorm
from torch_impl.multi_head_attention import CAUSAL, Attend, MultiHeadAttention
from torch_impl.rope import Rotation


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_epsilon)
    return LayerNorm(config.d_model, config.norm_epsilon, config.bias)


def make_ffn(config: ModelConfig) -> FFN | SwiGLU:
    """The feed-forward layer that the config names."""
    if config.activation == "swiglu":
        return SwiGLU(config.d_model, config.ffn_width, config.bias)
    return FFN(config.d_model, config.ffn_width, config.activation, config.bias)


def residual(
    x: Float[Tensor, "B T C"],
    sublayer: Callable[[Tensor], Tensor],
    norm: nn.Module,
    config: ModelConfig,
    key: DropoutKey | None,
) -> Float[Tensor, "B T C"]:
    """A sublayer with its norm, dropout and residual path."""
    if config.norm_placement == "pre":
        return x + dropout(sublayer(norm(x)), config.dropout, key)
    return norm(x + dropout(sublayer(x), config.dropout, key))


class Block(nn.Module):
    """Attention, then feed-forward, each with a residual connection and a norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.norm1 = make_norm(config)
        self.attention = MultiHeadAttention(config)
        self.norm2 = make_norm(config)
        self.ffn = make_ffn(config)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        attend: Attend = CAUSAL,
        rotation: Rotation | None = None,
        key: DropoutKey | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Without a key nothing is dropped."""
        key1 = key and key._replace(site=2 * self.layer + 1)
        key2 = key and key._replace(site=2 * self.layer + 2)
        x = residual(x, lambda x: self.attention(x, attend, rotation), self.norm1, self.config, key1)
        return residual(x, self.ffn, self.norm2, self.config, key2)
