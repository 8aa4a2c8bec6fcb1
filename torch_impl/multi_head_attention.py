"""Multi-head self-attention. The twin of ref_numpy/multi_head_attention.py."""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from ref_numpy.config import ModelConfig
from torch_impl.flash_attention import AttentionPattern, flash_attention
from torch_impl.layernorm import RMSNorm
from torch_impl.linear import Linear
from torch_impl.rope import Rotation

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (B, H, T, D), keys and values (B, K, T, D) to what the queries found (B, H, T, D)."""


def attend_by(pattern: AttentionPattern) -> Attend:
    """Attention in which a query sees what the pattern allows."""
    return partial(flash_attention, pattern=pattern)


CAUSAL = attend_by(AttentionPattern(causal=True))


def split_heads(x: Float[Tensor, "B T HD"], n_head: int) -> Float[Tensor, "B H T D"]:
    """Features h D to (h + 1) D become head h."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def join_heads(x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T HD"]:
    """The heads side by side again."""
    return x.transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """Self-attention by n_head heads; one projection makes all of q, k and v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, D = config.d_model, config.head_width
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.sections = (C, self.kv_heads * D, self.kv_heads * D)
        self.qkv = Linear(C, sum(self.sections), config.bias)
        self.q_norm = RMSNorm(D, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.proj = Linear(C, C, config.bias)

    def forward(
        self, x: Float[Tensor, "B T C"], attend: Attend = CAUSAL, rotation: Rotation | None = None
    ) -> Float[Tensor, "B T C"]:
        """attend decides who sees what; with a rotation, positions are rotary."""
        q, k, v = self.qkv(x).split(self.sections, dim=-1)
        q, k, v = split_heads(q, self.n_head), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotation.turn(q), rotation.turn(k)
        return self.proj(join_heads(attend(q, k, v)))
