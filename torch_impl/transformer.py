"""A transformer language model: a decoder or an encoder. The twin of ref_numpy/transformer.py.

The parameters keep the precision they were given (float32, or float64 for a comparison); the activations,
and with them all products, are in compute_dtype. It is set here and nowhere else: there is no autocast.
"""

from functools import partial
from math import sqrt

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.masks import PADDING
from ref_numpy.parameters import init_params
from torch_impl.alibi import AlibiSlopes
from torch_impl.block import Block, make_norm
from torch_impl.dropout import dropout
from torch_impl.embedding import Embedding
from torch_impl.flash_attention import AttentionPattern
from torch_impl.kv_cache import KVCache, attend_after
from torch_impl.layernorm import LayerNorm, RMSNorm
from torch_impl.linear import Linear, linear
from torch_impl.linear_cross_entropy import linear_cross_entropy
from torch_impl.masks import document_mask, places_in_documents
from torch_impl.multi_head_attention import attend_by
from torch_impl.positions import LearnedPositions, SinusoidalPositions
from torch_impl.rope import RotaryPositions, Rotation


class Embedded(nn.Module):
    """What every model begins and ends with: token vectors, positions, output projection."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.position_embedding = self.rotary = self.alibi = None
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(config.context_length, config.d_model)
        elif config.positions == "sinusoidal":
            self.position_embedding = SinusoidalPositions(config.context_length, config.d_model)
        elif config.positions == "rope":
            self.rotary = RotaryPositions(config)
        elif config.positions == "alibi":
            self.alibi = AlibiSlopes(config.n_head)
        self.head: Linear | None = None

    def add_head(self) -> None:
        """Comes last, as the parameters are numbered in the order of their use."""
        if not self.config.tied_embeddings:
            self.head = Linear(self.config.d_model, self.config.vocab_size, bias=False)

    def initialise(self, seed: int) -> None:
        """Take on the initial weights of the seed, the same as the reference's."""
        params = init_params(self.config, seed)
        self.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})

    def embed(
        self,
        ids: Integer[Tensor, "B T"],
        places: Integer[Tensor, "*#B T"],
        key: DropoutKey | None,
        before: int = 0,
    ) -> Float[Tensor, "B T C"]:
        """Token vectors and absolute positions, of tokens that follow on as many before them.

        Raises ValueError for more tokens than the context holds.
        """
        S, limit = before + ids.shape[1], self.config.context_length
        if S > limit:
            raise ValueError(f"a sequence of {S} is longer than the context length of {limit}")
        x = self.token_embedding(ids)
        if self.config.positions == "sinusoidal":  # which have size 1
            x = x * sqrt(self.config.d_model)
        if self.position_embedding is not None:
            x = x + self.position_embedding(places)
        return dropout(x.to(self.compute_dtype), self.config.dropout, key)

    def rotation(self, places: Integer[Tensor, "*B T"]) -> Rotation | None:
        """What turns queries and keys, where positions are rotary."""
        return None if self.rotary is None else self.rotary(places)

    def pattern(self, window: int = 0, documents: Integer[Tensor, "B T"] | None = None) -> AttentionPattern:
        """Who sees whom in layers with this window (0: none): all, or what came before, within a document."""
        present = None if documents is None else documents != PADDING
        causal = self.config.architecture != "encoder"
        return AttentionPattern(causal, window, self.slopes(), documents, present)

    def slopes(self) -> Float[Tensor, "H"] | None:
        """ALiBi's, where positions are distances."""
        return None if self.alibi is None else self.alibi.slopes

    def settle_precision(self) -> None:
        """Casts the weights to the compute dtype once, as every pass would; the model is trained no more.

        Its logits stay what they are. The token embedding keeps its precision; a tied head gets a copy.
        """
        if self.compute_dtype == self.token_embedding.weight.dtype:
            return
        for module in self.modules():
            if isinstance(module, (Linear, LayerNorm, RMSNorm)):
                module.to(self.compute_dtype)
        if self.config.tied_embeddings:
            self.head = Linear(self.config.d_model, self.config.vocab_size, bias=False)
            self.head.weight = nn.Parameter(self.token_embedding.weight.to(self.compute_dtype), False)

    def logits(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T V"]:
        """The output projection, shared with the token embedding or not."""
        if self.head is None:
            return linear(x, self.token_embedding.weight.to(x.dtype), None)
        return self.head(x)

    def features(self, *inputs: Tensor | None, key: DropoutKey | None = None) -> Float[Tensor, "B T C"]:
        """What the output projection reads, of what the model reads."""
        raise NotImplementedError

    def loss(
        self,
        batch: tuple[Tensor, ...],
        key: DropoutKey | None = None,
        label_smoothing: float = 0.0,
        count: Integer[Tensor, ""] | int | None = None,
    ) -> Float[Tensor, ""]:
        """Cross entropy of a batch: what the model reads, and last the targets (B, T). The logits never stand
        in memory whole. count is the number of places to average over, by default those that count.
        """
        *inputs, targets = batch
        head = self.token_embedding if self.config.tied_embeddings else self.head
        return linear_cross_entropy(
            self.features(*inputs, key=key), head.weight, targets, label_smoothing, count
        )


class Transformer(Embedded):
    """Embeddings, blocks, a last norm, and the output projection. The weights start undefined."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.add_head()

    def forward(
        self,
        ids: Integer[Tensor, "B T"],
        documents: Integer[Tensor, "B S"] | None = None,
        key: DropoutKey | None = None,
        past: KVCache | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "B P V"]:
        """Logits at every place: of the next token in a decoder, of the token there in an encoder.

        With a key, dropout acts (training); without, it does not. With documents, the number of the text that
        each token belongs to (or PADDING), texts in one sequence do not see each other. With a past (decoders
        only), the T tokens follow on those before them, S in all; it then holds theirs too. With last_only,
        those of the last place alone (P = 1, else T). Raises ValueError where a sequence is longer than the
        context length.
        """
        x = self.features(ids, documents, key, past)
        return self.logits(x[:, -1:] if last_only else x)

    def features(
        self,
        ids: Integer[Tensor, "B T"],
        documents: Integer[Tensor, "B S"] | None = None,
        key: DropoutKey | None = None,
        past: KVCache | None = None,
    ) -> Float[Tensor, "B T C"]:
        """What the output projection reads; the arguments are those of forward."""
        T, before = ids.shape[1], 0 if past is None else past.length
        if documents is None:
            places = torch.arange(T, device=ids.device) if past is None else past.places(T)
        else:
            places = places_in_documents(documents)[:, before:]
        x, rotation = self.embed(ids, places, key, before), self.rotation(places)
        windows = [self.config.window_of(layer) for layer in range(self.config.n_layer)]
        if past is None:
            attends = [attend_by(self.pattern(window, documents)) for window in windows]
        else:
            masks = {window: self.mask_after(past, window, T, documents) for window in set(windows)}
            seen = partial(attend_after, past=past, slopes=self.slopes())
            attends = [partial(seen, layer=layer, mask=masks[w]) for layer, w in enumerate(windows)]
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, attend, rotation, key)
        if past is not None:
            past.advance(T)
        return self.norm(x)

    def mask_after(
        self, past: KVCache, window: int, length: int, documents: Integer[Tensor, "B S"] | None
    ) -> Tensor | None:
        """What new tokens may look at in layers of that window, of themselves and the past."""
        mask = past.visible(length, window)
        if documents is None:
            return mask
        together = document_mask(documents, past.length)
        return together if mask is None else mask & together


def initialised(
    config: ModelConfig,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A model in float32 with the initial weights of the seed, the same as the reference's."""
    model = Transformer(config, compute_dtype)
    model.initialise(seed)
    return model.to(device)
