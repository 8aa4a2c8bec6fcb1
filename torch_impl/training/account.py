"""What a model costs, as a table: `python -m torch_impl.training.account [PRESET] [--flags]`. See --help.

Parameters and FLOPs by costs.py, memory by footprint.py; nothing is built, and torch is not imported.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ref_numpy.config import ConfigError, ModelConfig, TrainConfig
from ref_numpy.conversation import SPECIAL_TOKENS
from torch_impl.training.config import DEFAULT_VOCAB_SIZE, WITHOUT_PRODUCTS, RunConfig, read_config
from torch_impl.training.costs import (
    attention_pairs,
    forward_flops,
    kaplan_flops,
    non_embedding_count,
    palm_flops,
    parameter_count,
    parameters_by_part,
)
from torch_impl.training.counting import counted, in_bytes, scaled
from torch_impl.training.files import InputError, find_checkpoint, refusal, replace_file
from torch_impl.training.flags import parse_flags
from torch_impl.training.footprint import (
    Kernels,
    checkpoint_bytes,
    kv_cache_bytes,
    process_bytes,
    sent_bytes,
    training_bytes,
)
from torch_impl.training.presets import PRESETS, split_preset
from torch_impl.training.terminal import lead_nowhere, show_what_can_be_shown

_LEARNED = ("characters", "words")  # tokenizers whose size nobody knows before the text
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
_MOMENTS = {
    "adam": "two moments, float32",
    "adamw": "two moments, float32",
    "muon": "one moment of the blocks' matrices, two of the rest, float32",
}


@dataclass(frozen=True)
class ShapeFlags(ModelConfig):
    def __post_init__(self) -> None: ...  # the flags are checked together, once they are all known


@dataclass(frozen=True)
class BatchFlags:
    batch_size: int = TrainConfig.batch_size
    """Sequences per optimizer step, each of context_length tokens."""
    micro_batches: int = TrainConfig.micro_batches
    """Parts that a batch is computed in, one after the other; must divide batch_size."""
    freeze_embeddings: bool = TrainConfig.freeze_embeddings
    """The token embedding is not trained, and needs no moments."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the computation; weights, gradients and moments are float32."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Whose kernels compute: a CPU's keep norms and attention in float32, whatever the precision."""
    optimizer: Literal["adamw", "adam", "muon"] = TrainConfig.optimizer
    """adamw and adam keep two moments; of the matrices of blocks muon keeps one."""
    processes: int = 1
    """Processes of torchrun that divide the batch, each with a GPU of its own."""
    shard: bool = False
    """They divide weights, gradients and moments too (FSDP2), and do not hold all of them each (DDP)."""


@dataclass(frozen=True)
class SourceFlags:
    model: str = ""
    """Run folder, checkpoint, or folder in Hugging Face's layout, whose model it is; no PRESET beside it."""
    json: str = ""
    """File to write the numbers to; FLOPs per token, and bytes."""


@dataclass(frozen=True)
class Flags:
    source: SourceFlags
    batch: BatchFlags
    shape: ShapeFlags


class Request(NamedTuple):
    name: str  # of the model
    model: ModelConfig
    training: TrainConfig
    precision: str
    device: str
    processes: int = 1
    shard: bool = False
    json: Path | None = None


def parse(arguments: list[str]) -> Request:
    """Raises InputError or ConfigError on a mistake; exits after --help."""
    preset, rest = split_preset(arguments)
    config = PRESETS[preset or "cpu"]
    flags, name = _parse_flags(rest, config), config.preset
    if folder := flags.source.model:
        if preset is not None:
            raise InputError(f"--model {folder} is a model; leave out {preset!r}")
        config, name = read_config(find_checkpoint(Path(folder))), folder
        if config.quantisation is not None:
            raise InputError(f"{folder} is quantised; name the run that it was made from")
        flags = _parse_flags(rest, config, of_preset=False)
    batch = asdict(flags.batch)
    precision, device, processes, shard = (
        batch.pop(name) for name in ("precision", "device", "processes", "shard")
    )
    training = replace(config.training, **batch)
    if processes < 1:
        raise InputError(f"--processes is {processes}, but must be at least 1")
    if training.batch_size // training.micro_batches % processes:
        rows = training.batch_size // training.micro_batches
        raise InputError(
            f"--processes {processes}: {counted(rows, 'sequence')} at a time do not divide among them; try "
            f"--batch-size {training.micro_batches * processes}"
        )
    json_file = Path(flags.source.json) if flags.source.json else None
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json {json_file} is a folder; name a file")
    model = ModelConfig(**asdict(flags.shape))
    return Request(name, model, training, precision, device, processes, shard, json_file)


def _parse_flags(arguments: list[str], config: RunConfig, of_preset: bool = True) -> Flags:
    """The flags, with those of a config where none are given."""
    precision = WITHOUT_PRODUCTS.get(config.run.precision, config.run.precision)
    precision = "float32" if precision == "auto" else precision
    training, model = config.training, config.model
    if of_preset and config.tokenizer.tokenizer == "bpe":  # else its tokenizer is not learned yet
        of_text = config.tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
        of_chat = len(SPECIAL_TOKENS) if config.run.content == "conversations" else 0
        model = replace(model, vocab_size=of_text + of_chat + model.added_tokens)
    return parse_flags(
        Flags(
            SourceFlags(),
            BatchFlags(
                training.batch_size,
                training.micro_batches,
                training.freeze_embeddings,
                precision,
                "cuda" if config.run.device.startswith("cuda") else "cpu",
                training.optimizer,
                shard=config.run.shard,
            ),
            ShapeFlags(**asdict(model)),
        ),
        arguments,
        "python -m torch_impl.training.account",
        f"Count a model's parameters, FLOPs and memory. Presets: {', '.join(PRESETS)}. The defaults below "
        f"are those of {config.preset}; PRESET --help shows others.",
    )


def account(request: Request) -> dict[str, dict[str, Any]]:
    """All the numbers, by group and name: parameters, FLOPs per token, bytes."""
    _, model, training, precision, device, processes, shard, _ = request
    size, parts = _SIZES[precision], parameters_by_part(model)
    kernels = Kernels(size, of_cpu=device == "cpu")
    forward, cache = forward_flops(model), kv_cache_bytes(model, size)
    model_file, optimizer_file = checkpoint_bytes(model, training)
    pairs = attention_pairs(model)
    return {
        "parameters": {
            **parts,
            "total": parameter_count(model),
            "non-embedding": non_embedding_count(model),
        },
        "flops_per_token": {
            "forward": forward,
            "training": 3 * forward,
            "training, unmasked attention": 3 * forward_flops(model, masked=False),
            "training, 6 N + 12 L H D T": palm_flops(model),
            "training, 6 N non-embedding": kaplan_flops(model),
            "share of scores seen": pairs.seen / pairs.all,
        },
        "training_bytes": training_bytes(model, training, kernels)._asdict(),
        "process_bytes": {
            **process_bytes(model, training, kernels, processes, shard)._asdict(),
            "sent per step": sent_bytes(model, training, size, processes, shard),
        },
        "kv_cache_bytes": cache._asdict(),
        "checkpoint_bytes": {
            "model.safetensors": model_file,
            "optimizer.safetensors": optimizer_file,
            "total": model_file + optimizer_file,
        },
    }


def table(request: Request, numbers: dict[str, dict[str, Any]]) -> str:
    """The numbers for a reader, with what they mean."""
    model, training, precision = request.model, request.training, request.precision
    parts, flops = numbers["parameters"], numbers["flops_per_token"]
    held, cache, files = (numbers[f"{what}_bytes"] for what in ("training", "kv_cache", "checkpoint"))
    rows = training.batch_size // training.micro_batches
    tokens_per_step = training.batch_size * model.context_length

    def share(part: str) -> str:
        tied = part == "head" and model.tied_embeddings
        return "is the embedding" if tied else f"{parts[part] / parts['total']:.1%}"

    lines: list[tuple[str, str, str]] = [("parameters", "", "")]
    lines += [(f"  {part}", f"{number:,}", share(part)) for part, number in parts.items()]
    lines += [
        ("FLOPs per token", "", f"at {model.context_length:,} tokens of context; matrix products only"),
        ("  forward", _si(flops["forward"]), "2 per weight multiplied, 4 C per score that a mask leaves"),
        ("  training", _si(flops["training"]), "three times the forward pass"),
        (
            "  the same, unmasked",
            _si(flops["training, unmasked attention"]),
            f"computing all scores; the masks leave {flops['share of scores seen']:.1%}",
        ),
        (
            "  6 N + 12 L H D T",
            _si(flops["training, 6 N + 12 L H D T"]),
            "the usual estimate (PaLM, appendix B), N all parameters",
        ),
        ("  6 N", _si(flops["training, 6 N non-embedding"]), "Kaplan et al. 2020, N non-embedding"),
        ("  a step", _si(flops["training"] * tokens_per_step), f"training, {tokens_per_step:,} tokens"),
        ("memory of training", "", f"{precision} on {request.device}, {counted(rows, 'sequence')} at a time"),
        ("  weights", in_bytes(held["weights"]), "float32"),
        ("  gradients", in_bytes(held["gradients"]), "float32"),
        ("  optimizer", in_bytes(held["moments"]), _MOMENTS[training.optimizer]),
        ("  activations", in_bytes(held["activations"]), "that the backward pass needs, attention fused"),
        ("  logits", in_bytes(held["logits"]), "that there are at once, and their gradients"),
        ("  peak, at least", in_bytes(held["peak"]), _peak_of(training)),
        *_process_lines(request, numbers["process_bytes"]),
        ("keys and values", "", "if generation keeps them"),
        ("  per token", in_bytes(cache["token"]), precision),
        ("  whole context", in_bytes(cache["whole"]), "per sequence, taken at once; in local layers too"),
        ("checkpoint", in_bytes(files["total"]), "without lists of names"),
        ("  model.safetensors", in_bytes(files["model.safetensors"]), "float32"),
        ("  optimizer.safetensors", in_bytes(files["optimizer.safetensors"]), "float32"),
    ]
    heading = (
        f"{request.name}: {model.architecture}, L {model.n_layer}, C {model.d_model}, H {model.n_head}, "
        f"K {model.kv_heads}, F {model.ffn_width}, V {model.vocab_size}, T {model.context_length}"
    )
    preset = PRESETS.get(request.name)
    if preset and preset.tokenizer.tokenizer in _LEARNED and model.vocab_size == preset.model.vocab_size:
        heading += " (V is assumed, as the text decides; --vocab-size sets it)"
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    body = (f"{name:{widths[0]}}  {number:>{widths[1]}}  {note}".rstrip() for name, number, note in lines)
    return "\n".join([heading, *body])


def _process_lines(request: Request, held: dict[str, int]) -> list[tuple[str, str, str]]:
    """What one of several processes holds and sends."""
    training, processes = request.training, request.processes
    if processes == 1:
        return []
    rows = training.batch_size // training.micro_batches // processes
    part = f"1/{processes} of all" if request.shard else "all, as every process"
    how = (
        "weights twice and gradients once, for each micro-batch"
        if request.shard
        else "gradients, all-reduced"
    )
    return [
        ("each of the processes", "", f"{processes}, {counted(rows, 'sequence')} at a time in each"),
        ("  weights", in_bytes(held["weights"]), part),
        ("  gradients", in_bytes(held["gradients"]), part),
        ("  optimizer", in_bytes(held["moments"]), part),
        ("  activations", in_bytes(held["activations"]), "of its own sequences"),
        ("  logits", in_bytes(held["logits"]), ""),
        ("  peak, at least", in_bytes(held["peak"]), ""),
        ("  sends in a step", in_bytes(held["sent per step"]), f"and receives as much: {how}"),
    ]


def _peak_of(training: TrainConfig) -> str:
    if training.micro_batches > 1:
        return "all of these together"
    return "all but the smaller of gradients and activations with logits"


def _si(number: int | float) -> str:
    """A number of operations, by powers of a thousand."""
    return scaled(number, 1000, ("", "k", "M", "G", "T", "P", "E"))


def main(arguments: list[str]) -> int:
    """The exit code: 0; 2 for a request that cannot be met, 1 for a failure, each with one line on stderr."""
    show_what_can_be_shown()
    try:
        request = parse(arguments)
        numbers = account(request)
        told = table(request, numbers)
        if request.json is not None:
            config = {"name": request.name, "model": asdict(request.model)}
            config |= {"precision": request.precision, "device": request.device}
            content = json.dumps({**config, **numbers}, indent=1)
            replace_file(request.json, content.encode("utf-8"))
        print(told, flush=True)
    except (InputError, ConfigError) as error:
        message, code = f"{error}; see --help", 2
    except OverflowError:
        message, code = "a size is too large to be counted with", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:  # the reader has seen enough
        lead_nowhere(sys.stdout)
        return 0
    except OSError as error:
        message, code = refusal(error, "standard output"), 1
    else:
        return 0
    print(f"account: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
