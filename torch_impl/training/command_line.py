"""The command line of train_gpu.py: a preset, and flags that override it.

Nothing here needs torch, so that --help answers at once. The flags are the fields of the configs; tyro makes
the parser and the help out of them.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import tyro

from ref_numpy.config import ModelConfig, TrainConfig
from torch_impl.training.beginning import has_only_begun, is_of_a_run
from torch_impl.training.config import (
    TOKENIZERS,
    RunConfig,
    RunSettings,
    StartSettings,
    TokenizerSettings,
    read_config,
)
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError, find_checkpoint, find_tokenizer, whole_folder
from torch_impl.training.flags import check_text, dashed, parse_flags
from torch_impl.training.lock import refuse_in_use
from torch_impl.training.presets import PRESETS

# What --resume may change. The rest decides which run it is. Other steps mean another schedule from there on;
# micro_batches, precision, device and compile change the rounding and nothing else. Losses of more or fewer
# eval_tokens cannot be compared, and the best of a run is one.
CHANGEABLE = {"steps", "micro_batches", *(field.name for field in fields(RunSettings))} - {"eval_tokens"}

# What --init-from leaves open of the model. Also its context_length, as far as the positions reach.
FREE_WITH_WEIGHTS = {"dropout", "rope_scale"}
LEARNED = ("bpe", "words", "characters")


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
class StartFlags(StartSettings): ...


@dataclass(frozen=True)
class FolderFlags:
    out: str = ""
    """Run folder, which must not exist yet; without it, runs/PRESET-DATE-TIME."""
    resume: str = ""
    """Go on with the run in this folder. Its settings hold; only steps, micro-batches and the flags under
    "run options" can be changed. No PRESET beside it."""
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


class Request(NamedTuple):
    """What the user asks for."""

    config: RunConfig
    out: Path | None  # of a new run, where the user names it
    resume: Path | None  # the run to go on with
    init_from: Path | None  # where the first weights of a new run come from, if not from its seed
    cache: Path  # where encoded text is kept
    fit: bool = False  # as many sequences of a batch at a time as memory has room for
    profile: bool = False  # time the operations of a few steps


def parse(arguments: list[str]) -> Request:
    """Raises InputError or ConfigError on a mistake; exits after --help."""
    for number, argument in enumerate(arguments):
        taken = {"--batch-size=auto": 1, "--batch-size": 2}.get(argument.replace("_", "-"), 0)
        if taken and "=".join(arguments[number : number + taken]).endswith("=auto"):
            rest = arguments[:number] + arguments[number + taken :]
            return parse(rest)._replace(fit=True)
    preset = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if preset is not None and preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    rest = arguments[0 if preset is None else 1 :]
    start = PRESETS[preset or "cpu"]
    flags = _parse_flags(rest, start, preset)
    if flags.folder.resume:
        return _resume(rest, preset, Path(flags.folder.resume))
    if preset is None:
        start = PRESETS[_preset_for(flags.run.device)]
        flags = _parse_flags(rest, start, preset)
    init_from = None
    if flags.start.init_from:
        init_from = find_checkpoint(Path(flags.start.init_from)).absolute()
        start = _initial(start, init_from)
        kind, expected = start.model.architecture, PRESETS[start.preset].model.architecture
        if preset is not None and kind != expected != "decoder":  # whose presets are of machines
            raise InputError(
                f"preset {preset} is for an architecture {expected}, and the model in {init_from} is of "
                f"architecture {kind}; leave the preset out"
            )
        flags = _parse_flags(rest, start, preset)
        _refuse_another_model(flags, start, init_from)
    out = Path(flags.folder.out) if flags.folder.out else None
    check_text("--out", str(out))  # the library of safetensors opens no other folder
    if out is not None:
        _check_out(out, Path(flags.folder.cache))
    config = _configure(flags, start)
    name = config.tokenizer.tokenizer
    if name not in TOKENIZERS and not find_tokenizer(Path(name))[0].is_file():
        raise InputError(
            f"--tokenizer {flags.tokenizer.tokenizer}: no such file; use {', '.join(TOKENIZERS)}, or the "
            "path of a tokenizer.json, or of a folder with vocab.json and merges.txt"
        )
    _check_architecture(config)
    _check_word_vectors(config)
    return Request(config, out, None, init_from, Path(flags.folder.cache), profile=flags.folder.profile)


def _check_out(out: Path, cache: Path) -> None:
    """Raises InputError where a new run's folder cannot be."""
    refuse_in_use(out)
    if out.is_dir() and whole_folder(out / "last").is_dir():
        raise InputError(f"{out} exists, and a run is never overwritten; name another --out, or --resume it")
    if out.is_dir() and (out / "lock").exists() and has_only_begun(out):
        raise InputError(
            f"{out} exists, and holds no checkpoint to go on from; unless its run has just begun, delete it, "
            "or name another --out"
        )
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists, and a run is never overwritten; name another --out")
    for place in (out.absolute(), *out.absolute().parents):
        if (place / "training.json").is_file():
            raise InputError(
                f"{out} lies in a checkpoint, {place}, which its run replaces; name another --out"
            )
        if is_of_a_run(place):
            raise InputError(
                f"{place} is a name that the run in {place.parent} takes itself; name another --out"
            )
    if out.absolute() in (cache.absolute(), *cache.absolute().parents):
        raise InputError(f"--cache {cache} lies in {out}, which the run makes; name another --cache")


def _resume(arguments: list[str], preset: str | None, folder: Path) -> Request:
    if preset is not None:
        raise InputError(f"--resume goes on with the preset of {folder}; leave out {preset!r}")
    if not folder.is_dir():
        raise InputError(f"{folder} is no run folder")
    if not whole_folder(folder / "last").is_dir():
        if (folder / "training.json").is_file() and whole_folder(folder.parent / "last").is_dir():
            raise InputError(
                f"{folder} is a checkpoint, and a run goes on from its last one: --resume {folder.parent}; "
                f"to begin a new run with these weights, --init-from {folder}"
            )
        refuse_in_use(folder)
        raise InputError(f"{folder} has no last/ to go on from; name another run, or begin a new one")
    start = read_config(folder / "last")
    if start.quantisation is not None:
        raise InputError(f"{folder} is quantised, and only generates; resume the run that it was made from")
    flags = _parse_flags(arguments, start, preset)
    _refuse_another_run(flags, start, folder)
    config = RunConfig(
        start.preset,
        ModelConfig(**asdict(flags.model)),
        TrainConfig(**asdict(flags.training)),
        _settings(flags),
        _tokenizer(flags),
        _start(flags),
    )
    for name in ("train_file", "valid_file"):
        file = getattr(config.run, name)
        if file and file == getattr(start.run, name) and not Path(file).exists():
            raise InputError(
                f"cannot read {file}, which the run in {folder} has as its {name}; if it has moved, say "
                f"where by --{dashed(name)}, and its content is checked"
            )
    return Request(config, None, folder, None, Path(flags.folder.cache), profile=flags.folder.profile)


def _refuse_another_run(flags: Flags, start: RunConfig, folder: Path) -> None:
    """Raises InputError for flags that would make it another run, before any that contradict each other."""
    for name, given in (
        ("out", flags.folder.out),
        ("init-from", flags.start.init_from != start.start.init_from),
    ):
        if given:
            raise InputError(f"--resume goes on in {folder}; leave out --{name}")
    if flags.run.content != start.run.content:
        raise InputError(
            f"--content {flags.run.content}: the run in {folder} learns from {start.run.content}"
        )
    for old, new in (
        (start.model, flags.model),
        (start.training, flags.training),
        (start.tokenizer, replace(flags.tokenizer, tokenizer=_whole_name(flags.tokenizer.tokenizer))),
        (start.start, _start(flags)),
        (start.run, flags.run),
    ):
        for field in fields(old):
            before, now = getattr(old, field.name), getattr(new, field.name)
            if before != now and field.name not in CHANGEABLE:
                raise InputError(
                    f"--{dashed(field.name)} {now}: the run in {folder} has {before}; leave the flag out, "
                    "or start a new run"
                )
    steps, parts, training = flags.training.steps, flags.training.micro_batches, start.training
    if 0 < steps < training.warmup_steps:
        raise InputError(
            f"--steps {steps}: the run in {folder} warms up for {training.warmup_steps} steps; use a larger "
            "one, or leave the flag out"
        )
    if parts > 0 and training.batch_size % parts:
        raise InputError(
            f"--micro-batches {parts}: the run in {folder} has batch_size {training.batch_size}, which does "
            "not divide into so many; use another number, or leave the flag out"
        )


def _initial(preset: RunConfig, folder: Path) -> RunConfig:
    """The preset's training of the model in a folder, whose tokenizer comes with it."""
    found, path = read_config(folder), folder / "tokenizer.json"
    if found.quantisation is not None:
        raise InputError(
            f"{folder} is quantised, and only generates; begin from the run that it was made from"
        )
    model = replace(found.model, dropout=preset.model.dropout)
    if not path.is_file():
        return replace(preset, model=model)
    special_tokens = found.tokenizer.special_tokens
    return replace(preset, model=model, tokenizer=TokenizerSettings(str(path.absolute()), 0, special_tokens))


def _refuse_another_model(flags: Flags, start: RunConfig, folder: Path) -> None:
    """Raises InputError for flags that the weights in the folder do not fit."""
    for field in fields(ModelConfig):
        before, now = getattr(start.model, field.name), getattr(flags.model, field.name)
        cut = field.name == "context_length" and (now < before or start.model.positions != "learned")
        if before != now and field.name not in FREE_WITH_WEIGHTS and not cut:
            raise InputError(
                f"--{dashed(field.name)} {now}: the model in {folder} has {before}; leave the flag out, or "
                "train a new model without --init-from"
            )
    before, now = start.tokenizer.tokenizer, flags.tokenizer.tokenizer
    if (folder / "tokenizer.json").is_file() and before != now:
        raise InputError(f"--tokenizer {now}: the model in {folder} comes with its own; leave the flag out")
    if now in LEARNED:
        raise InputError(
            f"{folder} has no tokenizer.json; name the one that its model was trained with by --tokenizer"
        )


def _configure(flags: Flags, preset: RunConfig) -> RunConfig:
    """The preset with the flags laid over it.

    What the preset sets and the flags make impossible becomes a tenth of its limit: the warm-up of a run that
    is now shorter, the last learning rate of one whose peak is now lower. A size of the
    vocabulary goes where another tokenizer has its own.
    """
    training = flags.training
    if training.warmup_steps == preset.training.warmup_steps > training.steps:
        training = replace(training, warmup_steps=training.steps // 10)
    if training.min_learning_rate == preset.training.min_learning_rate > training.learning_rate:
        training = replace(training, min_learning_rate=training.learning_rate / 10)
    tokenizer = flags.tokenizer
    if tokenizer.tokenizer not in ("bpe", "words") and tokenizer.vocab_size == preset.tokenizer.vocab_size:
        flags = replace(flags, tokenizer=replace(tokenizer, vocab_size=0))
    return RunConfig(
        preset.preset,
        ModelConfig(**asdict(flags.model)),
        TrainConfig(**asdict(training)),
        _settings(flags),
        _tokenizer(flags),
        _start(flags),
    )


def _settings(flags: Flags) -> RunSettings:
    """The run settings, with whole paths: the run can be resumed from another folder."""
    run = RunSettings(**asdict(flags.run))
    files = {name: getattr(run, name) for name in ("train_file", "valid_file")}
    return replace(run, **{name: str(Path(file).absolute()) for name, file in files.items() if file})


def _tokenizer(flags: Flags) -> TokenizerSettings:
    """The tokenizer's settings, with the whole path of a file."""
    whole = _whole_name(flags.tokenizer.tokenizer)
    return TokenizerSettings(**{**asdict(flags.tokenizer), "tokenizer": whole})


def _whole_name(tokenizer: str) -> str:
    return tokenizer if tokenizer in TOKENIZERS else str(Path(tokenizer).absolute())


def _start(flags: Flags) -> StartSettings:
    """What the model begins with, with whole paths."""
    vectors, weights = flags.start.word_vectors, flags.start.init_from
    return StartSettings(
        str(Path(vectors).absolute()) if vectors else "",
        str(Path(weights).absolute()) if weights else "",
    )


def _check_architecture(config: RunConfig) -> None:
    """Raises InputError where what is learned from does not fit the model."""
    kind, expected = config.model.architecture, PRESETS[config.preset].model.architecture
    if kind != expected == "encoder-decoder":
        raise InputError(
            f"preset {config.preset} is of pairs, which a model of architecture {kind} does not read; leave "
            "--architecture out, or use another preset"
        )
    if config.run.content == "conversations":
        if kind != "decoder":
            raise InputError(
                f"--content conversations is for a decoder, and the model is an {kind}; leave --architecture "
                "out, or name another --init-from"
            )
        if config.tokenizer.tokenizer in ("characters", "words"):
            raise InputError(
                f"--tokenizer {config.tokenizer.tokenizer} cannot write every text, as conversations need; "
                "use bpe or bytes"
            )
    if kind == "encoder-decoder" and config.tokenizer.special_tokens:
        raise InputError(
            f"--special-tokens {config.tokenizer.special_tokens[0]}: pairs have none beside the "
            "encoder-decoder's own; leave them out"
        )


def _check_word_vectors(config: RunConfig) -> None:
    """Raises InputError where word vectors, tokenizer and width do not fit together."""
    file, tokenizer, width = config.start.word_vectors, config.tokenizer.tokenizer, config.model.d_model
    if not file:
        if config.training.freeze_embeddings:
            raise InputError(
                "--freeze-embeddings would freeze random numbers; give it --word-vectors, or leave it out"
            )
        return
    if tokenizer in TOKENIZERS and tokenizer != "words":
        raise InputError(
            f"--word-vectors are of words, but the tokenizer is {tokenizer}; use --tokenizer words"
        )
    from torch_impl.training.word_vectors import vector_width  # imports torch

    has = vector_width(Path(file))
    if has != width:
        raise InputError(
            f"--word-vectors {file} have {counted(has, 'number')} each, but d_model is {width}; use "
            f"--d-model {has}" + (", and an --n-head that divides it" * (has % config.model.n_head > 0))
        )


def _preset_for(device: str) -> str:
    """The preset that fits a device; auto means the best one here."""
    if device == "auto":
        from torch_impl.training.device import best_device  # imports torch

        device = best_device()
    return {"cuda": "gpu", "mps": "mps"}.get(device.split(":")[0], "cpu")


def _parse_flags(arguments: list[str], start: RunConfig, preset: str | None) -> Flags:
    """The flags, with those of `start` where none are given."""
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
    return parse_flags(default, arguments, f"train_gpu.py {preset or '[PRESET]'}", description)
