"""The command line of train_gpu.py: a preset, and flags that override it.

Nothing here needs torch, so that --help answers at once.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from ref_numpy.config import ModelConfig
from torch_impl.training.beginning import refuse_taken
from torch_impl.training.config import LEARNED, RunConfig, RunSettings, TokenizerSettings, read_config
from torch_impl.training.contradictions import refuse_contradictions
from torch_impl.training.files import InputError, find_checkpoint, whole_folder
from torch_impl.training.flags import check_text, dashed
from torch_impl.training.lock import refuse_in_use
from torch_impl.training.presets import PRESETS, split_preset
from torch_impl.training.train_flags import Flags, as_config, parse_train_flags

# What --resume may change. The rest decides which run it is. Other steps mean another schedule from there on;
# micro_batches, precision, device and compile change the rounding and nothing else. Losses of another content
# or of more or fewer eval_tokens cannot be compared, and the best of a run is one.
CHANGEABLE = {"steps", "micro_batches"} | (
    {field.name for field in fields(RunSettings)} - {"content", "eval_tokens"}
)

# What --init-from leaves open of the model. Also its context_length, as far as the positions reach.
FREE_WITH_WEIGHTS = {"dropout", "rope_scale"}


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
    preset, rest = split_preset(arguments)
    start = PRESETS[preset or "cpu"]
    flags = parse_train_flags(rest, start, preset)
    if flags.folder.resume:
        return _resume(rest, preset, Path(flags.folder.resume))
    if preset is None:
        start = PRESETS[_preset_for(flags.run.device)]
        flags = parse_train_flags(rest, start, preset)
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
        flags = parse_train_flags(rest, start, preset)
        _refuse_another_model(flags, start, init_from)
    out = Path(flags.folder.out) if flags.folder.out else None
    check_text("--out", str(out))  # the library of safetensors opens no other folder
    if out is not None:
        refuse_taken(out, Path(flags.folder.cache))
    config = _configure(flags, start)
    refuse_contradictions(config)
    return Request(config, out, None, init_from, Path(flags.folder.cache), profile=flags.folder.profile)


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
        best = f" with the weights of its best: --init-from {folder}" if (folder / "best").is_dir() else ""
        raise InputError(f"{folder} has no last/ to go on from; name another run, or begin a new one{best}")
    start = read_config(folder / "last")
    if start.quantisation is not None:
        raise InputError(f"{folder} is quantised, and only generates; resume the run that it was made from")
    flags = parse_train_flags(arguments, start, preset)
    _refuse_another_run(flags, start, folder)
    config = as_config(flags, start.preset)
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
    for part in ("model", "training", "tokenizer", "start", "run"):
        old, new = getattr(start, part), getattr(flags, part)
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
        tokenizer = replace(tokenizer, vocab_size=0)
    return as_config(replace(flags, training=training, tokenizer=tokenizer), preset.preset)


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


def _preset_for(device: str) -> str:
    """The preset that fits a device; auto means the best one here."""
    if device == "auto":
        from torch_impl.training.device import best_device  # imports torch

        device = best_device()
    return {"cuda": "gpu", "mps": "mps"}.get(device.split(":")[0], "cpu")
