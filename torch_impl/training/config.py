"""Everything that describes a run: its model, its training, and where and how it runs; as JSON and back."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ref_numpy.config import ConfigError, ModelConfig, TrainConfig
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError, whole_folder
from torch_impl.training.hf_config import is_hf, read_hf_config

FORMAT_VERSION = 1  # of the files in a checkpoint
HUGGINGFACE = "huggingface"  # what stands for a preset where a folder is none of a run


MOST_STEPS = 10_000_000
"""Of a run: the learning rate of each stands in a table."""

WITHOUT_PRODUCTS = {"tf32": "float32", "float8": "bfloat16"}
"""Of precisions that are formats of products alone, that of all the rest."""


@dataclass(frozen=True)
class RunSettings:
    """Where a run computes and what it reports. Raises ConfigError on a value out of range."""

    train_file: str = ""
    """UTF-8 text to train on; without it, the Python language reference that ships with the interpreter. For
    an encoder-decoder, lines of source TAB target; without it, dates as people and as ISO 8601 write them."""
    valid_file: str = ""
    """The same to evaluate on; without it, the last tenth of the training text, pairs or conversations is
    held out."""
    content: Literal["text", "conversations"] = "text"
    """What the files of a decoder hold: text, or conversations as JSON lines of {"messages": [{"role",
    "content"}, ...]} or of instruction, input and output. Of these it learns what the assistant says."""
    device: str = "auto"
    """auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16", "float8"] = "auto"
    """Number format of the computation; weights are float32. auto: on CUDA bfloat16, or float16 where the GPU
    lacks it, else float32. tf32: float32 whose products round their factors to eleven bits (NVIDIA, from
    Ampere on). float16 scales the loss. float8: bfloat16, with the products of the blocks' linear layers in
    8 bits (NVIDIA, from Ada and Hopper on; a CPU can as well, slowly)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile; auto: on CUDA, where there is Triton."""
    cuda_graph: bool = False
    """Record a training step as a CUDA graph and replay it: on one GPU, where the host is what takes time.
    Not in float16."""
    deterministic: bool = False
    """On CUDA, the same bytes in each repetition, by slower kernels where the fast ones sum in any order. On
    the CPU it is always so."""
    shard: bool = False
    """Under torchrun, each process holds a part of the weights, gradients and moments (FSDP2), for a model
    that does not fit; else each holds all of them (DDP)."""
    checkpoint_activations: bool = False
    """Keep of each block only its input for the backward pass, and compute the rest again: less memory, a
    third more arithmetic, the same result."""
    eval_every: int = 100
    """Steps between two evaluations on the held-out text."""
    eval_tokens: int = 0
    """Held-out tokens that an evaluation reads; 0 means all of them."""
    patience: int = 0
    """Evaluations without a better one after which the run ends before its last step; 0 for never."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    keep_checkpoints: int = 0
    """Checkpoints that are kept as step-N/, the newest of them, that of last/ included; best/ stays beside
    them."""
    detect_anomaly: bool = False
    """Where a loss or a gradient is no finite number, compare both passes of each component with the NumPy
    reference on that batch, and name the first that departs from it."""
    log_every: int = 10
    """Steps between two readings of the loss, for the progress bar; each makes the device wait."""
    sample_tokens: int = 500
    """Length in tokens of the example that the model gives at the end; 0 for none."""
    looks: int = 5
    """Evaluations, spread evenly over the run and beside the first, at which TensorBoard gets more than
    curves: a short sample, attention maps, histograms of parameters and gradients; 0 for none at all."""

    def __post_init__(self) -> None:
        for name in ("eval_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("eval_tokens", "sample_tokens", "keep_checkpoints", "patience", "looks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must not be negative")


LEARNED = ("characters", "words", "bpe")  # tokenizers that are made of the training text
TOKENIZERS = ("bytes", *LEARNED)
DEFAULT_VOCAB_SIZE = 10_000


@dataclass(frozen=True)
class TokenizerSettings:
    """What turns text into tokens. Raises ConfigError where the parts contradict each other."""

    tokenizer: str = "bytes"
    """bytes, characters, words, bpe, or one to take: a tokenizer.json, or a folder that holds one, or GPT-2's
    vocab.json and merges.txt. bpe, words and characters are learned from the training text."""
    vocab_size: int = 0
    """Tokens in all that bpe learns, and words at most; 0 means 10000. The others have their own number."""
    special_tokens: tuple[str, ...] = ()
    """Names such as <|endoftext|> that are one token each wherever they stand in the text; for bpe, or in the
    files of the tokenizer that is taken."""

    lowercase: bool = False
    """Words in lower case, as word vectors such as glove.6B have them; for words only."""

    def __post_init__(self) -> None:
        if self.lowercase and self.tokenizer != "words":
            raise ConfigError(
                f"lowercase is for words, and the tokenizer is {self.tokenizer}; leave it out, or use "
                "--tokenizer words"
            )
        smallest = 256 + len(set(self.special_tokens)) if self.tokenizer == "bpe" else 2
        if self.vocab_size and self.tokenizer not in ("bpe", "words"):
            raise ConfigError(
                f"vocab_size is {self.vocab_size}, but only bpe and words learn so many tokens, and the "
                f"tokenizer is {self.tokenizer}; leave it out, or use --tokenizer bpe"
            )
        if self.vocab_size and self.vocab_size < smallest:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}, but must be at least {smallest}"
                + (f": 256 bytes and {counted(smallest - 256, 'special token')}" * (self.tokenizer == "bpe"))
            )
        if self.special_tokens and self.tokenizer in ("bytes", "characters", "words"):
            raise ConfigError(
                f"special_tokens are {', '.join(self.special_tokens)}, but {self.tokenizer} have none; use "
                "--tokenizer bpe"
            )


@dataclass(frozen=True)
class StartSettings:
    """What a new model begins with, beside random numbers."""

    word_vectors: str = ""
    """File of pretrained vectors in GloVe's text format, as wide as d_model; for the tokenizer words. Words
    that it lacks are counted, and begin at random."""
    init_from: str = ""
    """Begin with the weights, the model and the tokenizer in this folder: a run folder, a checkpoint in one,
    or a folder in Hugging Face's layout. The preset and the flags say how it is trained."""


@dataclass(frozen=True)
class QuantisationSettings:
    """How a model is quantised (see torch_impl.quantise). Raises ConfigError on a value out of range."""

    bits: Literal[8, 4] = 8
    """Bits per weight of the linear layers; the token embedding and the head have 8 either way."""
    group_size: int = 64
    """Inputs of a linear layer that share a scale; 0 means all of them, a scale per output channel."""

    def __post_init__(self) -> None:
        if self.group_size < 0:
            raise ConfigError(
                f"group_size is {self.group_size}, but must be 0 (one scale per output channel) or more"
            )


@dataclass(frozen=True)
class RunConfig:
    """A run, as a preset names it and as config.json keeps it."""

    preset: str
    model: ModelConfig
    training: TrainConfig
    run: RunSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    start: StartSettings = StartSettings()
    quantisation: QuantisationSettings | None = None  # a model that is not trained any more

    def __post_init__(self) -> None:
        for part in (self.model, self.training, self.run, self.tokenizer):
            for field in fields(part):
                _refuse_too_large(field.name, getattr(part, field.name))
        if self.training.steps > MOST_STEPS:
            raise ConfigError(f"steps is {self.training.steps}, but must be at most {MOST_STEPS}")

    def to_json(self) -> bytes:
        """config.json: the parts by name, under a format version."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2).encode("utf-8")

    @classmethod
    def from_json(cls, content: bytes) -> "RunConfig":
        """Raises ConfigError where a value is foreign or of the wrong kind.

        What is missing takes its default: it is younger than the file.
        """
        config = parse_json(content)
        return cls(
            preset=_text(config, "preset"),
            model=_part(config, "model", ModelConfig),
            training=_part(config, "training", TrainConfig),
            run=_part(config, "run", RunSettings),
            tokenizer=_part(config, "tokenizer", TokenizerSettings),
            start=_part(config, "start", StartSettings),
            quantisation=None
            if config.get("quantisation") is None
            else _part(config, "quantisation", QuantisationSettings),
        )


def read_config(checkpoint: Path) -> RunConfig:
    """The config of a checkpoint folder, or of one in Hugging Face's layout, whose training is unknown.

    Raises InputError where it is missing, damaged or foreign.
    """
    folder = whole_folder(checkpoint)
    path = folder / "config.json"
    if is_hf(folder):
        return RunConfig(HUGGINGFACE, read_hf_config(folder), TrainConfig(), RunSettings())
    try:
        return RunConfig.from_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{checkpoint} holds no finished checkpoint (no {path.name})") from error
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from error


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object of the format version that this program reads. Raises ConfigError for anything else."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(values, dict) or "format_version" not in values:
        raise ConfigError("no format_version: not written by this program")
    if values["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"format_version is {values['format_version']!r}, but this program reads {FORMAT_VERSION}"
        )
    return values


def _text(values: dict[str, Any], name: str) -> str:
    if not isinstance(values.get(name), str):
        raise ConfigError(f"{name} is missing or no text")
    return values[name]


def _refuse_too_large(name: str, value: Any) -> None:
    limit = 2**64 if name == "seed" else 2**63
    if type(value) is int and not -limit < value < limit:
        raise ConfigError(f"{name} is {value}, but must be below 2**{limit.bit_length() - 1}")


def _can_be_a_path(text: str) -> bool:
    """Whether this system takes it for the name of a file. Not all of these are UTF-8."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _part(config: dict[str, Any], name: str, kind: type) -> Any:
    values = config.get(name, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{name} is {values!r}, but must be an object")
    if unknown := sorted(set(values) - {field.name for field in fields(kind)}):
        raise ConfigError(f"{name}: unknown: {', '.join(unknown)}")
    for field in fields(kind):
        value, wanted = values.get(field.name, field.default), type(field.default)
        if wanted is tuple and isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = values[field.name] = tuple(value)  # JSON has lists only
        if type(value) is not wanted and (type(value), wanted) != (int, float):
            raise ConfigError(f"{field.name} is {value!r}, but must be a {wanted.__name__}")
        _refuse_too_large(field.name, value)
        if isinstance(value, str) and not _can_be_a_path(value):
            raise ConfigError(f"{field.name} is {value!r}, which is no text")
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise ConfigError(f"{field.name} is {value!r}, but must be one of {get_args(field.type)}")
    return kind(**values)
