"""A decoder-only transformer language model. The twin of ref_numpy/transformer.py.

The parameters keep the precision they were given (float32, or float64 for a comparison); the activations,
and with them all products, are in compute_dtype. It is set here and nowhere else: there is no autocast.
"""

from math import sqrt

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.transformer import init_params
from torch_impl.block import Block, make_norm
from torch_impl.dropout import dropout
from torch_impl.embedding import Embedding
from torch_impl.linear import Linear, linear
from torch_impl.positions import LearnedPositions, SinusoidalPositions


class Transformer(nn.Module):
    """Embeddings, blocks, a last norm, and the output projection. The weights start undefined."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(config.context_length, config.d_model)
            self.embedding_scale = 1.0
        else:
            self.position_embedding = SinusoidalPositions(config.context_length, config.d_model)
            self.embedding_scale = sqrt(config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.head = None if config.tied_embeddings else Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, ids: Integer[Tensor, "B T"], key: DropoutKey | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every place. With a key, dropout acts (training); without, it does not.

        Raises ValueError where a sequence is longer than the context length.
        """
        T, limit = ids.shape[1], self.config.context_length
        if T > limit:
            raise ValueError(f"a sequence of {T} is longer than the context length of {limit}")
        x = self.token_embedding(ids) * self.embedding_scale + self.position_embedding(T)
        x = dropout(x.to(self.compute_dtype), self.config.dropout, key)
        for block in self.blocks:
            x = block(x, key)
        x = self.norm(x)
        if self.head is None:
            return linear(x, self.token_embedding.weight.to(x.dtype), None)
        return self.head(x)


def initialised(
    config: ModelConfig,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A model in float32 with the initial weights of the seed, the same as the reference's."""
    model = Transformer(config, compute_dtype)
    params = init_params(config, seed)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    return model.to(device)
