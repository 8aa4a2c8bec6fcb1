"""The command line of quantisation: a trained run in, a smaller model out, and what that costs."""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from ref_numpy.config import ConfigError
from torch_impl.generate import generate
from torch_impl.quantise import quantise_model
from torch_impl.train import evaluate
from torch_impl.training.checkpoint import LoadedModel, load_model, save_model
from torch_impl.training.config import HUGGINGFACE, QuantisationSettings, read_config
from torch_impl.training.conversation_file import load_conversations
from torch_impl.training.corpus import encoded, load_corpus
from torch_impl.training.counting import counted
from torch_impl.training.device import Place, place_to_read
from torch_impl.training.files import InputError, find_checkpoint, refusal, whole_folder
from torch_impl.training.flags import check_text, parse_flags
from torch_impl.training.repeating import as_typed
from torch_impl.training.telemetry import faces_of_loss
from torch_impl.training.terminal import lasting_output, show_what_can_be_shown
from torch_impl.training.token_ids import tokens_on
from torch_impl.training.tokenizer import tokens_per_byte
from torch_impl.training.writing import chosen
from torch_impl.transformer import Transformer

_WARM_UP = 5  # tokens


@dataclass(frozen=True)
class QuantiseFlags:
    """The command line of this module."""

    run_folder: tyro.conf.Positional[str] = ""
    """Run folder (its best/ is taken, else last/), or a checkpoint in one."""
    out: str = ""
    """Folder to write the quantised model to, which must not exist yet."""
    bits: Literal[8, 4] = QuantisationSettings.bits
    """Bits per weight of the linear layers; the token embedding and the head have 8 either way."""
    group_size: int = QuantisationSettings.group_size
    """Inputs of a linear layer that share a scale; 0 means all of them, a scale per output channel."""
    valid_file: str = ""
    """Text to measure bits per byte on, or conversations where the run has them; without it, what the run
    held out."""
    tokens: int = 200
    """Tokens to write for measuring speed; 0 leaves that out."""
    device: str = "auto"
    """Where to measure: auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps."""
    cache: str = "cache"
    """Folder that keeps the encoded text for later; deleting it costs only time."""


class HeldOut(NamedTuple):
    ids: Tensor
    tokens_per_byte: float | None  # None where tokens do not hold all of the text
    most: int | None  # so many of the tokens are looked at
    told: str


class Request(NamedTuple):
    flags: QuantiseFlags
    quantisation: QuantisationSettings
    checkpoint: Path
    out: Path


def parse(arguments: list[str]) -> Request:
    """Raises InputError on a mistake; exits after --help."""
    flags = parse_flags(
        QuantiseFlags(),
        arguments,
        "python -m torch_impl.quantise",
        "Quantise the weights of a trained model, and measure what that does to it.",
    )
    try:
        settings = QuantisationSettings(flags.bits, flags.group_size)
    except ConfigError as error:
        raise InputError(str(error)) from error
    if flags.tokens < 0:
        raise InputError(f"--tokens is {flags.tokens}, but must not be negative")
    if not flags.run_folder:
        raise InputError("no run folder is named; it is what training wrote, such as one under runs/")
    if not flags.out:
        raise InputError("--out is missing; name a folder for the quantised model")
    out = Path(flags.out).absolute()
    check_text("--out", str(out))
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists, and is not overwritten; name another --out")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder; make it first, or name another --out")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out.parent} cannot be written to; name another --out")
    return Request(flags, settings, find_checkpoint(Path(flags.run_folder)), out)


def carry_out(request: Request) -> None:
    """Quantise, measure the model before and after, and save it. Prints as it goes.

    Raises InputError for a model that cannot be quantised or measured: then nothing is written.
    """
    flags, out = request.flags, request.out
    config = read_config(request.checkpoint)
    if config.quantisation is not None:
        raise InputError(f"{request.checkpoint} is quantised already; name the run that it was made from")
    if config.model.architecture != "decoder":
        raise InputError(
            f"{request.checkpoint} is an {config.model.architecture}, and only decoders are "
            "quantised; name a run of one"
        )
    place = place_to_read(config.run, flags.device)
    original = load_model(request.checkpoint, place.dtype, place.device)
    held_out = _held_out_text(original, flags, place)

    smaller = load_model(request.checkpoint, place.dtype, torch.device("cpu")).model
    try:
        quantise_model(smaller, **asdict(request.quantisation))
    except ValueError as error:
        raise InputError(f"{request.checkpoint / 'model.safetensors'}: {error}") from error

    print(f"measured on {place}, {held_out.told}:")
    for when, model in (("before", original.model), ("after", smaller.to(place.device))):
        _measure(when, model, held_out, original, flags)
    before = _bytes_of_weights(whole_folder(request.checkpoint))  # which a run may replace at any time
    save_model(out, replace(config, quantisation=request.quantisation), original.tokenizer, smaller)
    after = _bytes_of_weights(out)
    print(f"{out}: {before:,} bytes are now {after:,}, {after / before:.1%}")
    talks = config.run.content == "conversations"
    program = ["python", "-m", f"torch_impl.{'chat' if talks else 'generate'}", "--model", flags.out]
    print(f"{'talk to' if talks else 'write with'} it: {as_typed(program)}" + " --prompt TEXT" * (not talks))


def _bytes_of_weights(folder: Path) -> int:
    """Of model.safetensors, or of the shards that Hugging Face's layout has in its place."""
    single = folder / "model.safetensors"
    return sum(
        path.stat().st_size for path in ([single] if single.exists() else folder.glob("*.safetensors"))
    )


def _held_out_text(loaded: LoadedModel, flags: QuantiseFlags, place: Place) -> HeldOut:
    run, tokenizer = loaded.config.run, loaded.tokenizer
    if loaded.config.preset == HUGGINGFACE and not flags.valid_file:
        raise InputError(f"{flags.run_folder} does not tell what it was trained on; name a --valid-file")
    # A file of one's own is all that is read: the text of the training may be gone.
    files = (flags.valid_file, flags.valid_file) if flags.valid_file else (run.train_file, run.valid_file)
    # Of conversations, what is said in them, as one text.
    corpus = (load_conversations if run.content == "conversations" else load_corpus)(*files)
    special_tokens = loaded.config.tokenizer.special_tokens
    ids = encoded(corpus.valid, corpus.valid_sha256, tokenizer, special_tokens, Path(flags.cache))
    if ids.size < 2:
        raise InputError(
            f"the held-out text has {counted(ids.size, 'token')}, but needs at least 2; use a --valid-file"
        )
    most = run.eval_tokens or None
    told = f"{ids.size if most is None else min(ids.size, most):,} tokens of held-out text"
    if run.content == "conversations":
        told += ", all that is said in conversations, as plain text"
    per_byte = tokens_per_byte(tokenizer, ids, corpus.valid.size())
    return HeldOut(tokens_on(place.device, ids), per_byte, most, told)


def _measure(
    when: str, model: Transformer, held_out: HeldOut, loaded: LoadedModel, flags: QuantiseFlags
) -> None:
    """Print loss, bits per byte and speed of writing. Raises InputError where the logits are not numbers."""
    n_tokens, name = flags.tokens, f"{flags.run_folder}, {when} it is quantised"
    loss = evaluate(model, held_out.ids, max_tokens=held_out.most)
    if math.isnan(loss):
        raise InputError(f"{name}: the model's logits are not numbers, so there is nothing to measure")
    bits = faces_of_loss(loss, held_out.tokens_per_byte)["bits_per_byte"]
    shown = f"{when:>6}: {loss:.4f} nats per token" + (f", {bits:.4f} bits per byte" if bits else "")
    if n_tokens:
        prompt = torch.from_numpy(loaded.tokenizer.encode(loaded.tokenizer.opening))
        started = 0.0
        for i, _ in enumerate(chosen(generate(model, prompt, _WARM_UP + n_tokens), name)):
            if i + 1 == _WARM_UP:
                started = time.perf_counter()
        shown += f", {n_tokens / (time.perf_counter() - started):,.1f} tokens written per second"
    print(shown, flush=True)


def main(arguments: list[str]) -> int:
    """The exit code: 0; 2 for a request that cannot be met, 1 for a failure, each with one line on stderr."""
    show_what_can_be_shown()
    try:
        with lasting_output():  # who reads the model need not read what is said
            carry_out(parse(arguments))
    except InputError as error:
        message, code = f"{error}; see --help", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except OSError as error:
        message, code = refusal(error), 1
    except MemoryError:
        message, code = "out of memory", 1
    else:
        return 0
    print(f"quantise: error: {message}", file=sys.stderr)
    return code
