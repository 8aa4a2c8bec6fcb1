"""The key/value cache: keys and values of the tokens so far. The twin of ref_numpy/kv_cache.py."""

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ref_numpy.config import ModelConfig
from torch_impl.attention import attention, fused_attention
from torch_impl.flash_attention import AttentionPattern, flash_attention
from torch_impl.masks import causal_mask, window_mask


class KVCache:
    """Room for context_length tokens in each of `batch` sequences, taken once."""

    def __init__(
        self, config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.n_layer, batch, config.kv_heads, config.context_length, config.head_width)
        # Zeros, not whatever was there: 0 times NaN is NaN, where attention is given all of the room.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0  # tokens so far
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # the same, where shapes are held
        self.holds_shapes = False

    def clear(self) -> None:
        """Nothing is known any more."""
        self.length, self.holds_shapes = 0, False

    def hold_shapes(self) -> None:
        """From now on tokens come one at a time, and each makes the same work, which CUDA can replay.

        Its place is read from a tensor, and attention is given all of the room, with a mask."""
        self.place.fill_(self.length)
        self.holds_shapes = True

    def places(self, tokens: int) -> Integer[Tensor, "T"]:
        """Of the next tokens."""
        if self.holds_shapes:
            return self.place
        return torch.arange(self.length, self.length + tokens, device=self.k.device)

    def visible(self, tokens: int, window: int) -> Bool[Tensor, "T S"] | Float[Tensor, "T S"] | None:
        """What the next tokens may look at, of those so far and themselves; None for everything.

        Where shapes are held, as numbers to be added to the scores, which no layer has to make of it then.
        """
        if self.holds_shapes:
            s = torch.arange(self.k.shape[3], device=self.k.device)
            seen = s <= self.place
            seen = seen & (s > self.place - window) if window else seen
            return torch.zeros_like(s, dtype=self.k.dtype).masked_fill(~seen, -torch.inf)[None]
        if window:
            return window_mask(tokens, window, self.length, self.k.device)
        return causal_mask(tokens, self.length, self.k.device) if tokens > 1 else None

    def extend(
        self, layer: int, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]
    ) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        """Writes the keys and values of T new tokens behind those before them, and returns all S of them."""
        if self.holds_shapes:
            self.k[layer].index_copy_(2, self.place, k)
            self.v[layer].index_copy_(2, self.place, v)
            return self.k[layer], self.v[layer]
        S = self.length + k.shape[2]
        self.k[layer, :, :, self.length : S], self.v[layer, :, :, self.length : S] = k, v
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def advance(self, tokens: int) -> None:
        """To be called after a forward pass, when all layers have written their part."""
        self.length += tokens
        if self.holds_shapes:
            self.place += tokens

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i], as in a beam search; their number may change."""
        known = slice(0, self.length)
        k, v = (part[:, :, :, known][:, rows] for part in (self.k, self.v))
        if k.shape[1] != self.k.shape[1]:
            layers, _, *rest = self.k.shape
            self.k, self.v = (part.new_zeros(layers, k.shape[1], *rest) for part in (self.k, self.v))
        self.k[:, :, :, known], self.v[:, :, :, known] = k, v


def attend_after(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K T D"],
    v: Float[Tensor, "B K T D"],
    past: KVCache,
    layer: int,
    mask: Bool[Tensor, "*#mask"] | Float[Tensor, "*#mask"] | None,
    slopes: Float[Tensor, "H"] | None,
) -> Float[Tensor, "B H T D"]:
    """Attention of new tokens over all so far, of which they see what KVCache.visible says."""
    k, v = past.extend(layer, k, v)
    if mask is None and slopes is None:
        return flash_attention(q, k, v, AttentionPattern())
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=q.device).expand(q.shape[2], k.shape[2])
    if mask.is_floating_point():
        return fused_attention(q, k, v, mask)
    return attention(q, k, v, mask, slopes)
