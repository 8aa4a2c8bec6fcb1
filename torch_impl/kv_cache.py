"""The key/value cache: keys and values of the tokens so far. The twin of ref_numpy/kv_cache.py."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ref_numpy.config import ModelConfig
from torch_impl.attention import attention
from torch_impl.flash_attention import AttentionPattern, flash_attention


class KVCache:
    """Room for context_length tokens in each of `batch` sequences, taken once."""

    def __init__(
        self, config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.n_layer, batch, config.kv_heads, config.context_length, config.head_width)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # tokens so far

    def extend(
        self, layer: int, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]
    ) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        """Writes the keys and values of T new tokens behind those before them, and returns all S of them."""
        S = self.length + k.shape[2]
        self.k[layer, :, :, self.length : S], self.v[layer, :, :, self.length : S] = k, v
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def advance(self, tokens: int) -> None:
        """To be called after a forward pass, when all layers have written their part."""
        self.length += tokens

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i], as the beams of a search do."""
        known = slice(0, self.length)
        self.k[:, :, :, known] = self.k[:, rows, :, known]
        self.v[:, :, :, known] = self.v[:, rows, :, known]


def attend_after(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K T D"],
    v: Float[Tensor, "B K T D"],
    past: KVCache,
    layer: int,
    mask: Bool[Tensor, "*#mask"] | None,
    slopes: tuple[float, ...] | None,
) -> Float[Tensor, "B H T D"]:
    """Attention of new tokens over all so far, of which they see what the mask says; without one, all."""
    k, v = past.extend(layer, k, v)
    if mask is None and slopes is None:
        return flash_attention(q, k, v, AttentionPattern())
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=q.device).expand(q.shape[2], k.shape[2])
    readers = q.shape[1] // k.shape[1]
    return attention(q, k.repeat_interleave(readers, 1), v.repeat_interleave(readers, 1), mask, slopes)
