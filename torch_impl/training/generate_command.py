"""The command line of torch_impl.generate: texts drawn or searched for, of one prompt or of many."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm import tqdm

from ref_numpy.config import BeamConfig, ConfigError, SamplingConfig
from torch_impl.generate import answer, generate_batch
from torch_impl.training.beams import BeamFlags, beam_of, continuations
from torch_impl.training.checkpoint import LoadedModel, load_model
from torch_impl.training.config import read_config
from torch_impl.training.counting import counted
from torch_impl.training.device import place_to_read
from torch_impl.training.files import InputError, find_checkpoint, refusal
from torch_impl.training.filling import refuse_writing, show_filled
from torch_impl.training.flags import check_text, dashed, parse_flags
from torch_impl.training.memory import ran_out
from torch_impl.training.terminal import lead_nowhere
from torch_impl.training.text import Text
from torch_impl.training.tokenizer import unknown_told
from torch_impl.training.visible import visible
from torch_impl.training.writing import Printer, SamplingFlags, Writer, check_forbidden, chosen, end_tokens

_SAMPLING, _SEARCH = SamplingFlags(temperature=0.8), BeamFlags()
_MOST = 2**48  # of anything: products of more would not fit in an integer of the machine


@dataclass(frozen=True)
class GenerateFlags:
    """The command line of torch_impl.generate."""

    model: str = ""
    """Run folder (its best/ is taken, else last/), a checkpoint in one, or a folder in Hugging Face's
    layout."""
    prompt: str = ""
    """Text to go on from, - for what stands in stdin; without it, the model begins a paragraph. An
    encoder-decoder answers it instead, and an encoder fills in the tokens where it says <mask>. Of a prompt
    longer than the context a decoder reads the end; the others refuse it."""
    prompts: str = ""
    """File with a prompt on each line, instead of --prompt."""
    batch_size: int = 8
    """With --prompts or --samples: texts that are written at once."""
    max_new_tokens: int = 500
    """Length of what is written, in tokens."""
    samples: int = 1
    """Texts that are drawn for each prompt, each with random numbers of its own."""
    stop: tuple[str, ...] = ()
    """Texts that end what is written, and are not written themselves. Beams look for the tokens that encode
    them."""
    seed: int = 0
    """Decides the draws; the same seed writes the same text."""
    show_probabilities: bool = False
    """Colour each token by the probability that the model gave it, red for 0 to green for 1; with --json,
    list them."""
    json: bool = False
    """Write each text as a line of JSON: prompt, sample, text, tokens, ended_by, score of a beam; of an
    encoder prompt, text, and the likeliest tokens of each of its gaps."""
    device: str = "auto"
    """auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps."""
    sampling: SamplingFlags = _SAMPLING
    search: BeamFlags = _SEARCH


class Request(NamedTuple):
    """Flags that fit together, what they say of sampling or of a beam, and the checkpoint that they name."""

    flags: GenerateFlags
    sampling: SamplingConfig
    beam: BeamConfig | None
    checkpoint: Path
    prompts: list[str]


def parse(arguments: list[str]) -> Request:
    """Raises InputError or ConfigError on a mistake; exits after --help."""
    flags = parse_flags(
        GenerateFlags(), arguments, "python -m torch_impl.generate", "Write text with a model."
    )
    for name, least in (("max_new_tokens", 0), ("samples", 1), ("batch_size", 1)):
        if (value := getattr(flags, name)) < least:
            raise InputError(f"--{dashed(name)} is {value}, but must be at least {least}")
        if value > _MOST:
            raise InputError(f"--{dashed(name)} is {value}, but must be at most {_MOST}")
    if flags.search.beams > _MOST:
        raise InputError(f"--beams is {flags.search.beams}, but must be at most {_MOST}")
    if not 0 <= flags.seed < 2**64:
        raise InputError(f"--seed is {flags.seed}, but must lie in [0, 2**64)")
    if not flags.model:
        raise InputError("--model is missing; name a run folder, such as one under runs/")
    if "" in flags.stop:
        raise InputError("--stop '' is empty, and would end a text before it begins; leave it out")
    for stop in flags.stop:
        check_text("--stop", stop)
    sampling = SamplingConfig(**asdict(flags.sampling))
    beam = beam_of(flags.search, flags.max_new_tokens, flags.sampling.forbidden)
    if beam is not None:
        for field in fields(SamplingConfig):
            is_default = getattr(flags.sampling, field.name) == getattr(_SAMPLING, field.name)
            if field.name != "forbidden" and not is_default:
                raise InputError(
                    f"--{dashed(field.name)} is for drawing, and --beams draws nothing; leave one out"
                )
        if flags.samples > 1 or flags.show_probabilities:
            what = "--samples" if flags.samples > 1 else "--show-probabilities"
            raise InputError(f"{what} is for drawing, and --beams draws nothing; see --n-best")
    return Request(flags, sampling, beam, find_checkpoint(Path(flags.model)), _prompts(flags))


def _prompts(flags: GenerateFlags) -> list[str]:
    """The prompts as they are given; [""] where the model shall begin by itself."""
    if flags.prompts:
        if flags.prompt:
            raise InputError("--prompt and --prompts are both given; leave one out")
        try:
            text = "".join(Text(Path(flags.prompts)).parts()).removeprefix("\ufeff")  # an editor's mark
        except OSError as error:
            raise InputError(f"cannot read {flags.prompts}: {error.strerror}") from error
        if not text:
            raise InputError(f"{flags.prompts} is empty; each line is a prompt")
        lines = text.removesuffix("\n").replace("\r\n", "\n").removesuffix("\r").split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                raise InputError(f"{flags.prompts}, line {number} is empty; each line is a prompt")
        return lines
    if flags.prompt == "-":
        if sys.stdin is None:
            raise InputError("--prompt - reads stdin, and there is none")
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not UTF-8 text: byte {error.start}") from None
        prompt = text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")  # an editor's mark
        if not prompt:
            raise InputError("--prompt - reads stdin, which is empty")
        return [prompt]
    check_text("--prompt", flags.prompt)
    return [flags.prompt]


def write(request: Request) -> None:
    """Write what the request asks for to stdout."""
    flags = request.flags
    place = place_to_read(read_config(request.checkpoint).run, flags.device)
    loaded = load_model(request.checkpoint, place.dtype, place.device)
    loaded.model.settle_precision()
    if loaded.config.model.architecture == "encoder":
        refuse_writing(flags, GenerateFlags())
        show_filled(loaded, request.prompts, flags.json)
        return
    prompts = _encoded(request, loaded)
    samples, answers = max(flags.samples, flags.search.n_best), _answers(loaded)
    printer = Printer(flags.json, flags.show_probabilities, len(prompts), samples, answers)
    if request.beam is not None:
        for number, ids in enumerate(prompts):
            found = continuations(
                loaded, ids, flags.max_new_tokens, request.beam, flags.stop, flags.search.phrases
            )
            for sample, written in enumerate(found):
                printer.show(request.prompts[number], number, sample, written)
    elif len(prompts) * flags.samples == 1:
        printer.stream(request.prompts[0], _drawn(request, loaded, [(prompts[0], 0)]))
    else:
        rows = ((number, sample) for number in range(len(prompts)) for sample in range(flags.samples))
        groups = iter(lambda: [*islice(rows, flags.batch_size)], [])
        batches = -(-len(prompts) * flags.samples // flags.batch_size)
        seen = sys.stdout.isatty()  # what is written then shows how far it is
        for group in tqdm(groups, total=batches, unit="batch", disable=seen or None, leave=False):
            *_, writers = _drawn(request, loaded, [(prompts[number], sample) for number, sample in group])
            for (number, sample), writer in zip(group, writers, strict=True):
                printer.show(request.prompts[number], number, sample, writer.written)


def _answers(loaded: LoadedModel) -> bool:
    """Whether the model answers a prompt instead of going on from it."""
    return loaded.config.model.architecture == "encoder-decoder"


def _encoded(request: Request, loaded: LoadedModel) -> list[Integer[Tensor, "_"]]:
    """The prompts' tokens. Raises InputError for what the model cannot read, or is not made for."""
    flags, config, tokenizer = request.flags, loaded.config.model, loaded.tokenizer
    answers = _answers(loaded)
    if answers and request.beam is not None:
        raise InputError(
            f"{flags.model} is an encoder-decoder, and beams are for decoders; leave --beams out"
        )
    never = (config.begin_token, config.padding_token) if answers else ()
    check_forbidden(flags.sampling.forbidden, config.vocab_size, never)
    found = []
    for number, prompt in enumerate(request.prompts, 1):
        name = f"{flags.prompts}, line {number}:" if flags.prompts else "--prompt"
        if answers and not prompt:
            raise InputError(
                "--prompt is missing; an encoder-decoder answers a source, such as one it learned from"
            )
        ids = torch.from_numpy(tokenizer.encode(prompt or tokenizer.opening))
        if not ids.numel():
            raise InputError(f"{name} {prompt!r} has no word in it")
        if answers and ids.numel() > config.context_length:
            raise InputError(
                f"{name} has {counted(ids.numel(), 'token')}, but the model reads at most "
                f"{config.context_length}"
            )
        if told := unknown_told(tokenizer, ids.numpy()):
            print(f"generate: {visible(name.removesuffix(':'))}: {told}", file=sys.stderr)
        found.append(ids)
    return found


def _drawn(
    request: Request, loaded: LoadedModel, rows: list[tuple[Integer[Tensor, "_"], int]]
) -> Iterator[list[Writer]]:
    """Yields a writer for each row, a prompt and the number of a sample, after each token until all end."""
    flags, (config, tokenizer, model) = request.flags, loaded
    answers = _answers(loaded)
    ends = () if answers else end_tokens(tokenizer)
    writers = [Writer(tokenizer, [] if answers else ids.tolist(), flags.stop, ends) for ids, _ in rows]
    likelihoods: list[Float[Tensor, "B V"]] = []
    watch = (lambda logits: likelihoods.append(logits.clone())) if flags.show_probabilities else None
    count, seed = flags.max_new_tokens, flags.seed
    if answers:  # one by one: each ends where the model ends it
        for writer, (ids, sample) in zip(writers, rows, strict=True):
            likelihoods.clear()  # those of an end, which is not yielded
            tokens = answer(model, ids, count, request.sampling, seed, sample, watch)
            for token in chosen(tokens, flags.model):
                writer.feed(token, _probability(likelihoods, 0, token))
                del likelihoods[:1]
                yield writers
                if writer.written.ended_by:
                    break
            is_long = len(writer.written.tokens) == min(count, config.model.context_length)
            writer.end("length" if is_long else "end of text")
    else:
        streams = [sample for _, sample in rows]
        tokens = generate_batch(
            model, [ids for ids, _ in rows], count, request.sampling, seed, streams, watch
        )
        for step in chosen(tokens, flags.model):
            for row, (writer, token) in enumerate(zip(writers, step, strict=True)):
                if not writer.written.ended_by:
                    writer.feed(token, _probability(likelihoods, row, token))
            del likelihoods[:1]
            yield writers
            if all(writer.written.ended_by for writer in writers):
                break
        for writer in writers:
            writer.end("length")
    yield writers


def _probability(logits: list[Float[Tensor, "B V"]], row: int, token: int) -> float | None:
    """Of a token, as the model saw it, before any temperature or filter."""
    return float(logits[0][row].cpu().double().softmax(0)[token]) if logits else None


def main(arguments: list[str]) -> int:
    """The exit code: 0; 2 for a request that cannot be met, 1 for a failure, each with one line on stderr."""
    try:
        write(parse(arguments))
    except (InputError, ConfigError) as error:
        print(f"generate: error: {error}; see --help", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        lead_nowhere(sys.stdout)
    except OSError as error:
        print(f"generate: error: {refusal(error, 'standard output')}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        print("generate: error: out of memory; write fewer or shorter texts at once", file=sys.stderr)
        return 1
    return 0
