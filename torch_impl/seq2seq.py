"""An encoder-decoder transformer. The twin of ref_numpy/seq2seq.py."""

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from torch_impl.block import Block, make_norm
from torch_impl.cross_block import CrossBlock
from torch_impl.flash_attention import AttentionPattern
from torch_impl.masks import padding_mask
from torch_impl.multi_head_attention import attend_by
from torch_impl.transformer import Embedded, Transformer


class Stack(nn.Module):
    """Blocks and, where norms come before the sublayers, a last norm."""

    def __init__(self, blocks: list[nn.Module], config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()


class Seq2Seq(Embedded):
    """A source is read whole, a target written token by token. The weights start undefined."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype)
        L = config.n_layer
        self.first_site = 2 * L + 1  # of dropout, after those of the encoder
        self.encoder = Stack([Block(config, layer) for layer in range(L)], config)
        self.decoder = Stack([CrossBlock(config, self.first_site + 3 * layer) for layer in range(L)], config)
        self.add_head()

    def encode(
        self, source: Integer[Tensor, "B S"], present: Bool[Tensor, "B S"], key: DropoutKey | None = None
    ) -> Float[Tensor, "B S C"]:
        """The memory: a vector for each token of the source, which has seen all of it but its padding."""
        places = torch.arange(source.shape[1], device=source.device)
        attend = attend_by(AttentionPattern(alibi_slopes=self.slopes(), key_mask=present))
        x, rotation = self.embed(source, places, key), self.rotation(places)
        for block in self.encoder.blocks:
            x = block(x, attend, rotation, key)
        return self.encoder.norm(x)

    def decode(
        self,
        target: Integer[Tensor, "B T"],
        memory: Float[Tensor, "B S C"],
        present: Bool[Tensor, "B S"],
        key: DropoutKey | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token of the target at every place."""
        return self.logits(self.read(target, memory, present, key))

    def read(
        self,
        target: Integer[Tensor, "B T"],
        memory: Float[Tensor, "B S C"],
        present: Bool[Tensor, "B S"],
        key: DropoutKey | None = None,
    ) -> Float[Tensor, "B T C"]:
        """The decoder, without the output projection."""
        places = torch.arange(target.shape[1], device=target.device)
        attend = attend_by(AttentionPattern(causal=True, alibi_slopes=self.slopes()))
        x = self.embed(target, places, key and key._replace(site=self.first_site))
        rotation, memory_mask = self.rotation(places), padding_mask(present)
        for block in self.decoder.blocks:
            x = block(x, memory, memory_mask, attend, rotation, key)
        return self.decoder.norm(x)

    def forward(
        self,
        source: Integer[Tensor, "B S"],
        present: Bool[Tensor, "B S"],
        target: Integer[Tensor, "B T"],
        key: DropoutKey | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Teacher forcing: logits of the next token at every place of a target that is known.

        present marks the tokens of the source. Raises ValueError where a sequence is longer than the context.
        """
        return self.logits(self.features(source, present, target, key))

    def features(
        self,
        source: Integer[Tensor, "B S"],
        present: Bool[Tensor, "B S"],
        target: Integer[Tensor, "B T"],
        key: DropoutKey | None = None,
    ) -> Float[Tensor, "B T C"]:
        """What the output projection reads; the arguments are those of forward."""
        # Not self.encode: an engine that shards the model wraps that, to let go of all parameters at its end.
        memory = type(self).encode(self, source, present, key)
        return self.read(target, memory, present, key)


def make_model(config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> Embedded:
    """A model of the config's architecture. The weights start undefined."""
    kind = Seq2Seq if config.architecture == "encoder-decoder" else Transformer
    return kind(config, compute_dtype)
