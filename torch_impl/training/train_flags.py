"""The flags of train_gpu.py, which are the fields of the configs, and the config that they make.

tyro makes the parser and the help out of them.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

from ref_numpy.config import ModelConfig, TrainConfig
from torch_impl.training.config import TOKENIZERS, RunConfig, RunSettings, StartSettings, TokenizerSettings
from torch_impl.training.flags import parse_flags
from torch_impl.training.presets import PRESETS


# The flags are checked together, once they are all known, and not one dataclass at a time.
@dataclass(frozen=True)
class ModelFlags(ModelConfig):
    vocab_size: tyro.conf.Suppress[int] = 256  # the tokenizer decides it

    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class RunFlags(RunSettings):
    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class TokenizerFlags(TokenizerSettings):
    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class StartFlags(StartSettings): ...  # whose docstring --help leaves out, as those of the others


@dataclass(frozen=True)
class FolderFlags:
    out: str = ""
    """Run folder, which must not exist yet; without it, runs/PRESET-DATE-TIME."""
    resume: str = ""
    """Go on with the run in this folder. Its settings hold; only steps, micro-batches and the flags under
    "run options", but for content and eval-tokens, can be changed. No PRESET beside it."""
    cache: str = "cache"
    """Folder that keeps the encoded text, and the tokenizer learned from it, for later runs; deleting it
    costs only time."""
    profile: bool = False
    """Time each operation in a few steps once the run has warmed up: print the ten dearest, and write
    trace.json.gz into the run folder, for ui.perfetto.dev."""


@dataclass(frozen=True)
class Flags:
    folder: FolderFlags
    run: RunFlags
    tokenizer: TokenizerFlags
    start: StartFlags
    training: TrainFlags
    model: ModelFlags


def parse_train_flags(arguments: list[str], start: RunConfig, preset: str | None) -> Flags:
    """The flags, with those of `start` where none are given, and with whole paths. Exits after --help."""
    default = Flags(
        FolderFlags(),
        RunFlags(**asdict(start.run)),
        TokenizerFlags(**asdict(start.tokenizer)),
        StartFlags(**asdict(start.start)),
        TrainFlags(**asdict(start.training)),
        ModelFlags(**asdict(start.model)),
    )
    description = (
        f"Train a language model on text. Presets: {', '.join(PRESETS)}. Without one: gpu with CUDA, mps on "
        f"Apple's GPUs, else cpu. The defaults below are those of {start.preset}; PRESET --help shows others."
        " To compare runs with several values of a flag: train_gpu.py sweep --help."
    )
    flags = parse_flags(default, arguments, f"train_gpu.py {preset or '[PRESET]'}", description)
    return _with_whole_paths(flags)


def _with_whole_paths(flags: Flags) -> Flags:
    """The flags with absolute paths, since a run can be resumed from another folder."""
    run, start, tokenizer = flags.run, flags.start, flags.tokenizer
    if tokenizer.tokenizer not in TOKENIZERS:
        tokenizer = replace(tokenizer, tokenizer=_whole(tokenizer.tokenizer))
    return replace(
        flags,
        run=replace(run, train_file=_whole(run.train_file), valid_file=_whole(run.valid_file)),
        tokenizer=tokenizer,
        start=replace(start, word_vectors=_whole(start.word_vectors), init_from=_whole(start.init_from)),
    )


def _whole(path: str) -> str:
    return str(Path(path).absolute()) if path else ""


def as_config(flags: Flags, preset: str) -> RunConfig:
    """The config of the flags. Raises ConfigError where they contradict each other."""
    return RunConfig(
        preset,
        ModelConfig(**asdict(flags.model)),
        TrainConfig(**asdict(flags.training)),
        RunSettings(**asdict(flags.run)),
        TokenizerSettings(**asdict(flags.tokenizer)),
        StartSettings(**asdict(flags.start)),
    )
