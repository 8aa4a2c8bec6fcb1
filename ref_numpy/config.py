"""The one description of a model, of its training and of how it writes, read by both sides.

All classes refuse a contradiction when they are made, so that nothing downstream has to check sizes again.
"""

from dataclasses import dataclass, fields
from math import inf
from types import GenericAlias, UnionType
from typing import Literal, get_args, get_origin


class ConfigError(ValueError):
    """A contradiction in a config. The message is one line: the value, the limit and the mend."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_types(config: object) -> None:
    """Every field holds what its annotation says; a whole number may stand for a float, which is finite."""
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            _require(value in choices, f"{field.name} is {value!r}, but must be one of {', '.join(choices)}")
        else:
            wanted = kind if get_origin(kind) else kind.__name__
            _require(_fits(value, kind), f"{field.name} is {value!r}, but must be a {wanted}")
            finite = kind is not float or abs(value) < inf
            _require(finite, f"{field.name} is {value}, but must be a finite number")


def _fits(value: object, kind: type | GenericAlias | UnionType) -> bool:
    if get_origin(kind) is tuple:
        return type(value) is tuple and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer. Raises ConfigError where its values contradict each other."""

    architecture: Literal["decoder", "encoder", "encoder-decoder"] = "decoder"
    """A decoder writes (GPT-2), an encoder fills gaps (BERT), an encoder-decoder answers (Vaswani et al.)."""
    vocab_size: int = 256
    """Number of distinct tokens, V; the last ones are the model's own, see added_tokens."""
    context_length: int = 64
    """Longest sequence that the model sees, in tokens, T."""
    n_layer: int = 2
    """Number of blocks, L."""
    n_head: int = 4
    """Number of attention heads, H; must divide d_model."""
    n_kv_head: int = 0
    """Number of key/value heads of self-attention, K, each read by H / K heads (grouped queries); 0 means
    n_head."""
    d_model: int = 96
    """Width of the residual stream, C."""
    d_ff: int = 0
    """Width of the feed-forward layer, F; 0 means 4 * d_model."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Which normalisation."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Normalise the input of a sublayer (pre, GPT-2) or the sum after it (post, Vaswani et al.)."""
    norm_epsilon: float = 1e-5
    """Added to the variance (rmsnorm: to the mean square), inside the root."""
    qk_norm: bool = False
    """Queries and keys of self-attention pass an RMSNorm over the head width, with weights of their own."""
    attention_pattern: str = "full"
    """Which layers see everything and which a window, repeated over the layers: full; local, local, full."""
    window: int = 0
    """Keys that a query sees in a local layer, its own counted."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu"] = "gelu_tanh"
    """Nonlinearity of the feed-forward layer: gelu is the exact one, gelu_tanh GPT-2's; swiglu has a gate."""
    positions: Literal["none", "learned", "sinusoidal", "rope", "alibi"] = "learned"
    """How a token knows its place. Sinusoidal also scales the embedding by sqrt(d_model), as in its paper."""
    rope_base: float = 10000.0
    """Wavelengths of rotary positions run from 2 pi to 2 pi times almost this."""
    rope_layout: Literal["half", "interleaved"] = "half"
    """Features that turn together: i and i + D/2 (Llama), or 2i and 2i + 1 (as in the paper)."""
    rope_scale: float = 1.0
    """Places are divided by it, so that a context that many times as long keeps its angles."""
    bias: bool = True
    """Biases in linear layers and layer norms; the output projection never has one."""
    tied_embeddings: bool = True
    """Use the token embedding as the output projection."""
    dropout: float = 0.0
    """Probability of dropping a unit of the embedding or of a sublayer's output while training."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}, but must be at least 1")
        _require(
            self.vocab_size > self.added_tokens,
            f"vocab_size is {self.vocab_size}, but the {self.architecture} has {self.added_tokens} of its own"
            f"; make it {self.added_tokens + 1} or more",
        )
        for name, meaning in (("d_ff", "meaning 4 * d_model"), ("n_kv_head", "meaning n_head")):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}, but must be 0 ({meaning}) or more")
        _require(
            self.d_model % self.n_head == 0,
            f"d_model {self.d_model} does not divide into n_head {self.n_head} heads; "
            f"try d_model {-(-self.d_model // self.n_head) * self.n_head}",
        )
        _require(
            self.n_head % self.kv_heads == 0,
            f"n_head {self.n_head} does not divide into n_kv_head {self.n_kv_head} groups; "
            f"try n_head {-(-self.n_head // self.kv_heads) * self.kv_heads}",
        )
        _require(0 <= self.dropout <= 0.99, f"dropout is {self.dropout}, but must lie in [0, 0.99]")
        _require(self.norm_epsilon > 0, f"norm_epsilon is {self.norm_epsilon}, but must be above 0")
        self._check_windows()
        self._check_rotation()

    def _check_windows(self) -> None:
        pattern, window = self.attention_pattern, self.window
        _require(
            set(self._pattern) <= {"full", "local"},
            f"attention_pattern is {pattern!r}, but must be a list of full and local: 'local, local, full'",
        )
        _require(window >= 0, f"window is {window}, but must not be negative")
        _require(
            window > 0 or "local" not in self._pattern,
            f"attention_pattern {pattern!r} has local layers, but window is 0; say how many keys they see",
        )
        _require(
            window == 0 or "local" in self._pattern,
            f"window is {window}, but attention_pattern {pattern!r} has no local layer; set it to local",
        )
        _require(
            window == 0 or self.architecture == "decoder",
            f"window is {window}, but {self.architecture} layers have no causal order to reach "
            f"back in; set it to 0",
        )

    def _check_rotation(self) -> None:
        for name, default in (("rope_base", 10000.0), ("rope_scale", 1.0), ("rope_layout", "half")):
            value = getattr(self, name)
            _require(
                value == default or self.positions == "rope",
                f"{name} is {value}, but positions are {self.positions}; set positions to rope",
            )
        _require(self.rope_base > 1, f"rope_base is {self.rope_base}, but must be above 1")
        _require(self.rope_scale > 0, f"rope_scale is {self.rope_scale}, but must be above 0")
        _require(
            self.positions != "rope" or self.head_width % 2 == 0,
            f"rope turns pairs of features, but a head is {self.head_width} wide (d_model {self.d_model} / "
            f"n_head {self.n_head}); make it even",
        )

    @property
    def added_tokens(self) -> int:
        """Tokens that no text holds, at the end of the vocabulary: an encoder's mask; begin, end and padding
        of an encoder-decoder."""
        return {"decoder": 0, "encoder": 1, "encoder-decoder": 3}[self.architecture]

    @property
    def text_tokens(self) -> int:
        """Tokens that a text is made of, numbered from 0: the tokenizer's."""
        return self.vocab_size - self.added_tokens

    @property
    def mask_token(self) -> int:
        """Stands in an encoder's input for a token that is to be guessed."""
        return self.text_tokens

    @property
    def begin_token(self) -> int:
        """What an encoder-decoder reads before the first token of a target."""
        return self.text_tokens

    @property
    def end_token(self) -> int:
        """What an encoder-decoder writes after the last token of a target."""
        return self.text_tokens + 1

    @property
    def padding_token(self) -> int:
        """Fills the shorter sequences of an encoder-decoder's batch; neither seen nor written."""
        return self.text_tokens + 2

    @property
    def ffn_width(self) -> int:
        """F: d_ff, or its default of four times the model width."""
        return self.d_ff or 4 * self.d_model

    @property
    def kv_heads(self) -> int:
        """K: n_kv_head, or its default of one for each head."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """D = C / H."""
        return self.d_model // self.n_head

    @property
    def _pattern(self) -> list[str]:
        return [word.strip() for word in self.attention_pattern.split(",")]

    def window_of(self, layer: int) -> int:
        """Keys that a query of this layer sees; 0 means all."""
        return self.window if self._pattern[layer % len(self._pattern)] == "local" else 0


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained: everything that decides the numbers. Raises ConfigError on a contradiction."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 12
    """Sequences per optimizer step. train_gpu.py also takes auto: those of the preset, as many at a time as
    memory has room for."""
    micro_batches: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; must divide batch_size."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 1e-4
    """Learning rate at the end of the decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0 to the peak."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after the warm-up."""
    optimizer: Literal["adamw", "adam", "muon"] = "adamw"
    """AdamW decays weights apart from the gradient; Adam does not decay them at all; Muon makes the steps of
    the matrices in blocks orthogonal, and leaves the rest to AdamW."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon's matrices, which follows the same schedule."""
    muon_momentum: float = 0.95
    """Decay of the mean of their gradients."""
    beta1: float = 0.9
    """Decay of the mean of the gradients."""
    beta2: float = 0.99
    """Decay of the mean of their squares."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay per unit of learning rate, on matrices and embeddings only."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over the whole vocabulary."""
    freeze_embeddings: bool = False
    """Leave the token embedding as it begins: all of its rows, and where it is tied the output projection."""
    seed: int = 0
    """Decides initial weights, order of the data and dropout; from 0 to 2**64 - 1."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("steps", "batch_size", "micro_batches"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}, but must be at least 1")
        _require(
            self.batch_size % self.micro_batches == 0,
            f"batch_size {self.batch_size} does not divide into {self.micro_batches} micro_batches; "
            f"try batch_size {-(-self.batch_size // self.micro_batches) * self.micro_batches}",
        )
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}, but must be above 0")
        _require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate is {self.min_learning_rate}, but must lie in [0, learning_rate "
            f"{self.learning_rate}]",
        )
        _require(
            0 <= self.warmup_steps <= self.steps,
            f"warmup_steps is {self.warmup_steps}, but must lie in [0, steps {self.steps}]",
        )
        _require(
            self.muon_learning_rate > 0,
            f"muon_learning_rate is {self.muon_learning_rate}, but must be above 0",
        )
        for name in ("beta1", "beta2", "muon_momentum", "label_smoothing"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} is {value}, but must lie in [0, 1)")
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}, but must not be negative")
        _require(self.epsilon > 0, f"epsilon is {self.epsilon}, but must be above 0")
        _require(0 <= self.seed < 2**64, f"seed is {self.seed}, but must lie in [0, 2**64)")
        _require(
            self.optimizer != "adam" or self.weight_decay == 0,
            f"optimizer adam has no weight decay, but weight_decay is {self.weight_decay}; "
            "set it to 0 or use adamw",
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, by sampling.py. Raises ConfigError on a contradiction."""

    temperature: float = 1.0
    """Divides the logits: 0 always takes the likeliest token, 1 samples as the model believes."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Makes tokens that were seen less likely; 1 does nothing."""
    forbidden: tuple[int, ...] = ()
    """Token ids that are never chosen."""

    def __post_init__(self) -> None:
        _check_types(self)
        # Where a logit of float32 could become infinite, softmax has no value.
        temperature, penalty = self.temperature, self.repetition_penalty
        _require(
            temperature == 0 or temperature >= 1e-9,
            f"temperature is {temperature}, but must be 0 (greedy) or at least 1e-9",
        )
        _require(self.top_k >= 0, f"top_k is {self.top_k}, but must be 0 (all tokens) or more")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}, but must lie in (0, 1]")
        _require(0 <= self.min_p <= 1, f"min_p is {self.min_p}, but must lie in [0, 1]")
        _require(1e-9 <= penalty <= 1e9, f"repetition_penalty is {penalty}, but must lie in [1e-9, 1e9]")


@dataclass(frozen=True)
class BeamConfig:
    """How beam.py searches for likely sequences. Raises ConfigError on a contradiction."""

    width: int = 4
    """Hypotheses that go on from step to step."""
    n_best: int = 1
    """Sequences that are returned, at most width."""
    length_penalty: float = 1.0
    """Alpha: the score is the log-probability divided by length ** alpha; 0 compares sums, 1 means."""
    early_stopping: Literal["exact", "estimate", "full"] = "exact"
    """When to stop: the n best are certain; they probably are, as longer seldom scores better; width are
    finished."""
    end_token: int | None = None
    """The token id that ends a sequence; None if none does."""
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Token ids in a row that end a sequence."""
    forbidden: tuple[int, ...] = ()
    """Token ids that are never chosen."""
    phrases: tuple[tuple[int, ...], ...] = ()
    """Token ids in a row that must appear, at most 8 such phrases; they may overlap."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.width >= 1, f"width is {self.width}, but must be at least 1")
        _require(
            1 <= self.n_best <= self.width,
            f"n_best is {self.n_best}, but must lie in [1, width {self.width}]",
        )
        _require(
            -10 <= self.length_penalty <= 10,
            f"length_penalty is {self.length_penalty}, but must lie in [-10, 10]",
        )
        _require(len(self.phrases) <= 8, f"there are {len(self.phrases)} phrases, but at most 8 are possible")
        for name in ("stop_sequences", "phrases"):
            _require(() not in getattr(self, name), f"{name} holds an empty one; take it out")
        least = min(self.ids, default=0)
        _require(least >= 0, f"a token id is {least}, but must not be negative")
        for phrase in self.phrases:
            barred = sorted(set(phrase) & set(self.forbidden))
            _require(not barred, f"phrase {phrase} needs what is forbidden: {barred}")
            for stop in self.stops:
                inside = any(phrase[i : i + len(stop)] == stop for i in range(len(phrase) - len(stop)))
                _require(not inside, f"phrase {phrase} cannot be written to its end: {stop} stops before it")

    @property
    def stops(self) -> tuple[tuple[int, ...], ...]:
        """All that ends a sequence: the stop sequences, and the end token as one of them."""
        return self.stop_sequences + (() if self.end_token is None else ((self.end_token,),))

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token id that is named here."""
        return (*self.forbidden, *(token for pattern in (*self.stops, *self.phrases) for token in pattern))
